"""The file formats that can be read, and how a folder's format is found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from deeprec.data.formats import amazon, folder, movielens, recbole
from deeprec.data.tables import DataError, RawTables

__all__ = ["FORMATS", "Format", "choose"]


@dataclass(frozen=True)
class Format:
    """How to recognise a folder of this format, and how to read it."""

    detect: Callable[[Path], bool]
    read: Callable[..., RawTables]
    """Called with the folder and, if ``named_columns``, with a mapping of column names."""
    named_columns: bool = False

    def load(self, path: Path, columns: Mapping[str, str]) -> RawTables:
        """Read ``path``; column names for a format whose columns are fixed are an error."""
        if self.named_columns:
            return self.read(path, columns)
        if columns:
            raise DataError(f"columns={dict(columns)} was given, but this format fixes its columns")
        return self.read(path)


FORMATS: dict[str, Format] = {
    "folder": Format(folder.detect, folder.read, named_columns=True),
    "movielens-100k": Format(movielens.detect_100k, movielens.read_100k),
    "movielens-1m": Format(movielens.detect_1m, movielens.read_1m),
    "movielens-latest": Format(movielens.detect_latest, movielens.read_latest),
    "amazon-2023": Format(amazon.detect, amazon.read),
    "recbole": Format(recbole.detect, recbole.read, named_columns=True),
}


def choose(path: Path, name: str | None) -> str:
    """The format called ``name``, or the one that the files of ``path`` are in.

    Raises DataError when the folder does not exist, or fits no format or several.
    """
    if name is not None and name not in FORMATS:
        raise DataError(f"format must be one of {', '.join(FORMATS)}, got {name!r}")
    if not path.is_dir():
        raise DataError(f"path must be a folder with the files of a data set, got {path}")
    if name is not None:
        return name
    found = [candidate for candidate, known in FORMATS.items() if known.detect(path)]
    if len(found) != 1:
        problem = f"fits several formats ({', '.join(found)})" if found else "fits no known format"
        files = ", ".join(sorted(file.name for file in path.iterdir())[:20]) or "none"
        raise DataError(
            f"{path} {problem}; set DataConfig.format to one of {', '.join(FORMATS)}. "
            f"Files found: {files}"
        )
    return found[0]
