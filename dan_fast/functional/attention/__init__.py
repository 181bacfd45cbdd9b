"""The attention head, its parts and its variants: checks, custom operators, autograd and the choice of path."""
