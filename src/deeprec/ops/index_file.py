"""Tensors in a safetensors file that can be mapped into memory, with a version and a checksum.

Written by hand because mapping wants the data to start on a cache line, which the format allows
(spaces after the header) and the library does not offer. Any safetensors reader can read it.
"""

from __future__ import annotations

import json
import os
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["read", "write"]

FORMAT = "deeprec.ItemIndex"
VERSION = "3"
LINE = 64
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
}
# Codes come first, on a cache line, then wider elements before narrower ones: all are aligned.
ORDER = ("codes", "center", "bounds", "order", "cluster", "fine_bounds", "items", "fine")
REQUIRED = {"items": ("F32", "BF16", "F16")}
# The prefilter as the kernels want it (csrc/cpu/topk.h, Prefilter).
TABLE = {
    "codes": "U8",
    "bounds": "F32",
    "order": "I32",
    "center": "F64",
    "cluster": "I32",
    "fine": "I16",
    "fine_bounds": "F32",
}
SETTINGS = {"metric": ("ip", "cosine"), "prefilter": ("auto", "none")}
CHUNK = 1 << 24


def write(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], settings: dict[str, str]
) -> None:
    """Write atomically: a file of this name is either the old one or the whole new one."""
    names = sorted(tensors, key=ORDER.index)
    arrays = {name: _bytes(tensors[name]) for name in names}
    entries: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + arrays[name].nbytes
        entries[name] = {
            "dtype": DTYPES[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    metadata = {"format": FORMAT, "version": VERSION, **settings}
    metadata["checksum"] = _checksum(entries, metadata, arrays.values())
    header = json.dumps({"__metadata__": metadata, **entries}).encode()
    header += b" " * (-(8 + len(header)) % LINE)
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for array in arrays.values():
                file.write(array.data)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path: str | os.PathLike[str], *, verify: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors mapped copy-on-write, and the settings; ValueError if anything is amiss."""

    def damaged(what: str) -> ValueError:
        return ValueError(f"{path} is not a usable item index: {what}; save the index again")

    size = os.path.getsize(path)
    if size < 8:
        raise damaged(f"{size} bytes are too few for a header")
    content = np.memmap(path, dtype=np.uint8, mode="c")
    length = int.from_bytes(content[:8].tobytes(), "little")
    if length > size - 8:
        raise damaged("the header is cut off")
    try:
        entries = json.loads(content[8 : 8 + length].tobytes())
        metadata = entries.pop("__metadata__")
        checksum = metadata.pop("checksum")
        kind = (metadata["format"], metadata["version"])
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise damaged("the header cannot be read") from error
    if kind != (FORMAT, VERSION):
        raise damaged(
            f"expected {FORMAT} version {VERSION}, got {' version '.join(map(str, kind))}"
        )
    data = content[8 + length :]
    try:
        _check_entries(entries, metadata, len(data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise damaged(f"the header does not describe its data ({error})") from error
    if verify:
        parts = [data[slice(*entry["data_offsets"])] for entry in entries.values()]
        if _checksum(entries, metadata, parts) != checksum:
            raise damaged("the checksum differs")
    dtypes = {code: dtype for dtype, code in DTYPES.items()}
    tensors = {
        name: torch.from_numpy(data[slice(*entry["data_offsets"])])
        .view(dtypes[entry["dtype"]])
        .view(entry["shape"])
        for name, entry in entries.items()
    }
    return tensors, metadata


def _bytes(tensor: Tensor) -> np.ndarray:
    if tensor.numel() == 0:
        return np.empty(0, np.uint8)
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()


def _checksum(entries: dict[str, Any], metadata: dict[str, Any], parts: Any) -> str:
    crc = zlib.crc32(json.dumps([entries, metadata], sort_keys=True).encode())
    for part in parts:
        for start in range(0, len(part), CHUNK):
            crc = zlib.crc32(part[start : start + CHUNK], crc)
    return f"{crc:08x}"


def _check_entries(entries: dict[str, Any], metadata: dict[str, Any], size: int) -> None:
    """Raise unless the entries tile the data and their shapes fit each other."""
    from deeprec import _C

    for name, choices in SETTINGS.items():
        if metadata[name] not in choices:
            raise ValueError(f"{name} is {metadata[name]!r}")
    width = {code: dtype.itemsize for dtype, code in DTYPES.items()}
    end = 0
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        count = 1
        for extent in entry["shape"]:
            if not isinstance(extent, int) or extent < 0:
                raise ValueError(f"{name} has shape {entry['shape']}")
            count *= extent
        if start != end or stop - start != count * width[entry["dtype"]]:
            raise ValueError(f"{name} has the wrong size")
        end = stop
    if end != size:
        raise ValueError(f"{end} bytes of data expected, {size} found")
    if entries["items"]["dtype"] not in REQUIRED["items"]:
        raise ValueError("items have the wrong type")
    rows, dim = entries["items"]["shape"]
    if dim < 1:
        raise ValueError("items have no dimensions")
    if "codes" not in entries:
        if set(entries) != {"items"}:
            raise ValueError("an incomplete prefilter")
        return
    if set(entries) != {"items", *TABLE}:
        raise ValueError("an incomplete prefilter")
    blocks, quads, block_rows = _C.topk_code_shape(rows, dim)
    centers, fine = entries["center"]["shape"][0], entries["fine"]["shape"][0]
    if fine not in (0, rows):
        raise ValueError("fine does not fit the items")
    shapes = {
        "codes": ([blocks, quads, block_rows, 4],),
        "bounds": ([blocks, 3],),
        "order": ([0], [rows]),
        "center": ([centers, dim],),
        "cluster": ([blocks] if centers > 1 else [0],),
        "fine": ([fine, dim],),
        "fine_bounds": ([blocks, 2] if fine else [0, 2],),
    }
    for name, dtype in TABLE.items():
        if entries[name]["dtype"] != dtype or entries[name]["shape"] not in shapes[name]:
            raise ValueError(f"{name} does not fit the items")
