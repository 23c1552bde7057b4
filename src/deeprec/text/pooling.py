"""From token states to one vector a text, the way the model's own files ask for."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["POOLINGS", "Pooling", "read_pooling"]

logger = logging.getLogger(__name__)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(-1).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _cls(states: Tensor, mask: Tensor) -> Tensor:
    first = mask.int().argmax(1)  # not column 0 when the tokenizer pads on the left
    return states[torch.arange(len(states), device=states.device), first]


def _last_token(states: Tensor, mask: Tensor) -> Tensor:
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(1)
    return states[torch.arange(len(states), device=states.device), last]


def _max(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(~mask.bool().unsqueeze(-1), float("-inf")).amax(1)


# (states f32 [B, T, P], mask [B, T], 1 = token) -> f32 [B, P], by the names of the flags
# "pooling_mode_..." in a sentence-transformers 1_Pooling/config.json.
POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": _mean,
    "cls": _cls,
    "lasttoken": _last_token,
    "max": _max,
}

_FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_max_tokens": "max",
}


@dataclass(frozen=True)
class Pooling:
    """How token states become a vector."""

    mode: str
    """One of POOLINGS."""
    normalize: bool
    """Whether vectors are scaled to length 1."""

    def __call__(self, states: Tensor, mask: Tensor) -> Tensor:
        """Pool states [B, T, P] under mask [B, T] to f32 [B, P]."""
        vectors = POOLINGS[self.mode](states.float(), mask)
        return torch.nn.functional.normalize(vectors, dim=-1) if self.normalize else vectors


def read_pooling(name: str, fetch: Callable[[str], Path | None]) -> Pooling:
    """The pooling of a model with sentence-transformers files, else mean pooling, normalised.

    ``fetch`` maps a file name inside the model to a local path, None when there is no such file.
    Raises ValueError for modules or pooling modes that are not supported.
    """
    modules_file = fetch("modules.json")
    if modules_file is None:
        logger.info("%s has no modules.json: mean pooling, vectors scaled to length 1", name)
        return Pooling("mean", normalize=True)
    mode, normalize = None, False
    for module in json.loads(modules_file.read_text(encoding="utf-8")):
        kind = module["type"].rsplit(".", 1)[-1]
        if kind == "Pooling":
            mode = _read_mode(name, fetch(f"{module['path']}/config.json"))
        elif kind == "Normalize":
            normalize = True
        elif kind != "Transformer":
            raise ValueError(
                f"model {name!r} has a module {module['type']!r}; supported are Transformer, "
                "Pooling and Normalize"
            )
    if mode is None:
        raise ValueError(f"model {name!r}: modules.json names no Pooling module")
    return Pooling(mode, normalize)


def _read_mode(name: str, file: Path | None) -> str:
    if file is None:
        raise ValueError(f"model {name!r}: the Pooling module has no config.json")
    config = json.loads(file.read_text(encoding="utf-8"))
    if not config.get("include_prompt", True):
        raise ValueError(f"model {name!r} leaves its prompt out of pooling; that is not supported")
    if "pooling_mode" in config:  # one name, or a list; older files have a flag a mode
        chosen = config["pooling_mode"]
        modes = [chosen] if isinstance(chosen, str) else list(chosen)
    else:
        flags = [key for key, on in config.items() if key.startswith("pooling_mode_") and on]
        modes = [_FLAGS.get(flag, flag) for flag in flags]
    if len(modes) != 1 or modes[0] not in POOLINGS:
        raise ValueError(
            f"model {name!r} pools with {' + '.join(modes) or 'nothing'}; supported is exactly "
            f"one of {', '.join(POOLINGS)}"
        )
    return modes[0]
