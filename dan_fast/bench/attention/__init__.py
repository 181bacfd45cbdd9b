"""The attention head: eager, compiled, and kernels."""
