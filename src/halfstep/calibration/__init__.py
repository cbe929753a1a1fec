"""Ranges from data: observed, asked of every calibrator, compared, and doubted."""
