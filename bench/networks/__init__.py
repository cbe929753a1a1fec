"""Architectures that tests and benchmarks quantize, one family a file."""
