"""Measurements behind the figures in docs/: python -m bench.NAME."""
