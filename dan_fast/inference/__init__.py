"""What a trained network is used for: features of images."""

from dan_fast.inference.extractor import FeatureExtractor

__all__ = ["FeatureExtractor"]
