"""Benchmarks: ratios measured in one run, with the bound beside them. Run as `python -m benchmarks.<name>`."""
