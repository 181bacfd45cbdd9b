"""What every other room stands on.

Types, batches, the cosine, checks, devices, errors, files, signals, the terminal, float32 and preprocessing.
"""
