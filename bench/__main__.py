"""`python -m pysmooth.bench`."""

from .cli import main

main()
