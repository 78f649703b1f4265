"""The benchmark suite: every rival present, the roofline, numerics, real training."""
