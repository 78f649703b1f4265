"""`python -m pysmooth.bench compare BASE`: which steps got slower since another revision.

Both revisions are built, and each runs in a process of its own; the processes take turns. Where a
machine is too noisy for times, instructions decide: those of a step, counted under valgrind, differ
by less than a hundredth from run to run.
"""
