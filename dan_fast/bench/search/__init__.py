"""Searching in a gallery of a million images: build time, bytes, queries a second and recall."""
