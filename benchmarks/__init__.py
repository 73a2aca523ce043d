"""Measured comparisons: ``python -m benchmarks.NAME [--quick]``. See ``benchmarks/README.md``."""
