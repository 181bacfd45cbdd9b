"""What every other room stands on: types, batches, the cosine, checks, errors, files, float32 and preprocessing."""
