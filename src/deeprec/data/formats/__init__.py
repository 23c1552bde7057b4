"""One module a file format, each with ``detect(folder)`` and ``read(folder, columns)``."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

from deeprec.data.formats import folder
from deeprec.data.tables import DataError

__all__ = ["FORMATS", "choose"]

FORMATS: dict[str, ModuleType] = {
    "folder": folder,
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
    found = [candidate for candidate, module in FORMATS.items() if module.detect(path)]
    if len(found) != 1:
        problem = f"fits several formats ({', '.join(found)})" if found else "fits no known format"
        raise DataError(
            f"{path} {problem}; set DataConfig.format to one of {', '.join(FORMATS)}. "
            f"Files found: {', '.join(sorted(file.name for file in path.iterdir())[:20])}"
        )
    return found[0]
