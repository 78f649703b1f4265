"""One module per family of update rules: twins of the headers in csrc/core/math, by name."""
