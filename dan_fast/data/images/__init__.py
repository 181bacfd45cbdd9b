"""Images on their way to a network: decoding, cache, augmentation, loaders."""
