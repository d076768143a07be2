"""What the benchmarks share: models of a given shape, the field's way to trace, counted work and peak memory."""
