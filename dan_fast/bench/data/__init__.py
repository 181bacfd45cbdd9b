"""Feeding images: a plain DataLoader, decoding without a cache, and from the cache."""
