"""The memory step and its parts: checks, custom operators, autograd and the choice of path."""
