"""Load a data set from files, or the one that comes with the package."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path

from deeprec.data import formats
from deeprec.data.dataset import Dataset
from deeprec.data.prepare import prepare
from deeprec.data.report import LoadReport
from deeprec.data.tables import COLUMNS

__all__ = ["DataConfig", "load_dataset"]

_EMBEDDED = "movietweetings_100k"

logger = logging.getLogger(__name__)


@dataclass
class DataConfig:
    """Which data set to load, and how to filter it."""

    path: str | None = None
    """Folder of the data set; None is the embedded MovieTweetings 100K."""
    format: str | None = None
    """folder, movielens-100k, movielens-1m, movielens-latest, amazon-2023 or recbole; None finds it
    from the file names."""
    min_interactions: int = 5
    """Users and items with fewer are dropped, repeatedly (k-core). Users need 4 in any case."""
    min_rating: float | None = None
    """Interactions rated lower are dropped; None keeps all."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names of your files where they differ from user_id, item_id, rating, timestamp, title
    and categories, e.g. {"user_id": "customer"}; for the formats folder and recbole."""

    def __post_init__(self) -> None:
        if self.min_interactions < 1:
            raise ValueError(f"min_interactions must be at least 1, got {self.min_interactions}")
        unknown = set(self.columns) - set(COLUMNS)
        if unknown:
            raise ValueError(
                f"columns must map {', '.join(COLUMNS)} to names in the files, got the keys "
                f"{', '.join(sorted(unknown))}"
            )


def load_dataset(config: DataConfig | None = None) -> Dataset:
    """Read, clean, filter and split a data set.

    ``dataset.report`` says what was dropped and why. Raises DataError (a ValueError) for a missing
    file or column, a format that is unknown or does not fit, and when nothing is left.
    """
    config = config or DataConfig()
    if config.path is None:
        with as_file(files("deeprec.data") / _EMBEDDED) as folder:
            return _load(folder, "MovieTweetings 100K (embedded)", config)
    return _load(Path(config.path).expanduser(), config.path, config)


def _load(folder: Path, source: str, config: DataConfig) -> Dataset:
    name = formats.choose(folder, config.format)
    tables = formats.FORMATS[name].load(folder, config.columns)
    report = LoadReport(source=source, format=name)
    dataset = prepare(tables, report, config.min_interactions, config.min_rating)
    logger.info("%s", report)
    return dataset
