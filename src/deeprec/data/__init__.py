"""Data sets: loading, filtering, leave-one-out splits."""

from deeprec.data.catalog import Catalog
from deeprec.data.dataset import Dataset, Sequences
from deeprec.data.load import DataConfig, load_dataset
from deeprec.data.report import LoadReport
from deeprec.data.requests import Requests
from deeprec.data.tables import DataError

__all__ = [
    "Catalog",
    "DataConfig",
    "DataError",
    "Dataset",
    "LoadReport",
    "Requests",
    "Sequences",
    "load_dataset",
]
