"""Readers of the known datasets, and how they are found."""
