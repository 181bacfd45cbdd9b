"""Datasets, training sets, batch plans, transforms and loaders."""

from dan_fast.core.batches import MiniBatch, Split
from dan_fast.data.datasets.load import all_images, load_dataset
from dan_fast.data.images.cache import ImageCache
from dan_fast.data.images.loader import ImageSamples, image_loader, training_loader
from dan_fast.data.images.reading import read_image
from dan_fast.data.images.transforms import test_transform, train_transform
from dan_fast.data.sampler import BatchPlan, BatchPlanner, PlannedItem
from dan_fast.data.samples import ReIDDataset, Sample
from dan_fast.data.training_set import TrainingSet

__all__ = [
    "BatchPlan",
    "BatchPlanner",
    "ImageCache",
    "ImageSamples",
    "MiniBatch",
    "PlannedItem",
    "ReIDDataset",
    "Sample",
    "Split",
    "TrainingSet",
    "all_images",
    "image_loader",
    "load_dataset",
    "read_image",
    "test_transform",
    "train_transform",
    "training_loader",
]
