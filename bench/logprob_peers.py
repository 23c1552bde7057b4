"""How others compute token log-probs, each called the way its project calls it on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["HOLDS_LOGITS", "gather_peers", "linear_peers"]

Peer = Callable[..., Tensor]

# Peers of linear_logprobs that keep all logits in memory.
HOLDS_LOGITS = ("torch", "torch.compile", "cce torch_compile")


def _log_softmax(logits: Tensor, ids: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def _head(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
    return _log_softmax(hidden @ weight.T, ids)


def _installed(module: str) -> Any | None:
    try:
        return import_module(module)
    except ImportError:
        return None


def gather_peers(compiled: bool = True) -> dict[str, Peer]:
    """``(logits[T, V], ids[T]) -> log-probs[T]``, for every peer that is installed.

    ``compiled=False`` leaves out those that call a compiler first, which takes a minute.
    """
    peers: dict[str, Peer] = {"torch": _log_softmax}
    if compiled:
        peers["torch.compile"] = torch.compile(_log_softmax, dynamic=False)
    if trl := _installed("trl.trainer.utils"):
        peers["trl selective"] = lambda x, ids: trl.selective_log_softmax(x[None], ids[None])[0]
    return peers


def linear_peers(compiled: bool = True) -> dict[str, Peer]:
    """``(hidden[T, H], weight[V, H], ids[T]) -> log-probs[T]``; see :func:`gather_peers`."""
    peers: dict[str, Peer] = {"torch": _head}
    if compiled:
        peers["torch.compile"] = torch.compile(_head, dynamic=False)
    if trl := _installed("trl.trainer.utils"):
        size = trl._CHUNKED_LOGPROB_CHUNK_SIZE
        peers["trl chunked"] = lambda h, w, ids: trl._ChunkedLogProbFunction.apply(
            h, w, None, ids, 1.0, size, None, 1.0, ()
        )[0]
    if compiled and (cce := _installed("cut_cross_entropy")):
        peers["cce torch_compile"] = lambda h, w, ids: (
            -cce.linear_cross_entropy(h, w, ids, impl="torch_compile", reduction="none")
        )
    if liger := _installed("liger_kernel.chunked_loss.fused_linear_ppo"):
        chunk = liger._SELECTIVE_LOGPROB_VOCAB_CHUNK_SIZE
        peers["liger chunked"] = lambda h, w, ids: liger._ChunkedSelectiveLogProbFunction.apply(
            h, w, ids, None, 1.0, chunk
        )
    return peers
