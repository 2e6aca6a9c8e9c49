"""Shared by all benchmarks: clocks, shapes, and results that are saved as they come."""
