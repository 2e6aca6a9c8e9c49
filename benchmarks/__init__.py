"""Benchmarks report ratios from one run, beside the bound. Run them with `python -m benchmarks.<name>`."""
