"""Imported before RecBole 1.2.1, which was written for NumPy 1 and for torch before 2.6."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

for _name, _kind in (("float_", float), ("bool8", bool), ("complex_", complex), ("unicode_", str)):
    setattr(np, _name, _kind)

_load = torch.load


def _load_whole(*args: Any, **options: Any) -> Any:
    return _load(*args, **{"weights_only": False, **options})


torch.load = _load_whole
