"""Measurements that print tables; run as modules, `python -m bench.NAME`."""
