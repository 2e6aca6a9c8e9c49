"""What all benchmarks share: clocks, shapes, results that are kept as they come."""
