"""Evaluating a ranking: by sorting in NumPy, and by counting."""
