"""Mutants: small faults put into pysmooth, to see whether the tests notice.

    python -m mutants native    # faults of the math headers, chosen by hand, all in one build
    python -m mutants python    # faults of some modules, drawn; with a number and modules: of those

Each mutant is a forked process that runs tests until one fails. `make mutants` runs the first.
"""
