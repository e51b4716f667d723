"""Datasets, splits and the feed."""

from polypseg.data.catalog import DATASETS, DatasetSpec
from polypseg.data.polyps import PolypDataset, SyntheticOptions, load_polyps, open_dataset

__all__ = ["DATASETS", "DatasetSpec", "PolypDataset", "SyntheticOptions", "load_polyps", "open_dataset"]
