"""What every other room stands on: types, the cosine, checks, errors, files, float32 and preprocessing."""
