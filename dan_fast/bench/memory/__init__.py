"""The memory step: literal, in score space, compiled, and kernels."""
