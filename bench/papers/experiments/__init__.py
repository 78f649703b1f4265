"""One experiment per file; see `pysmooth.bench.papers`."""
