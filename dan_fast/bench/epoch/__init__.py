"""An epoch from JPEG files: a plain PyTorch loop, the same from the cache, and DAN as the trainer runs it."""
