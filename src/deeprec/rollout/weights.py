"""Weights of a policy that may be sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["assign", "is_sharded", "whole", "whole_parameters"]


def is_sharded(module: nn.Module) -> bool:
    """Whether some parameter lies in parts on several processes (FSDP2)."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` without gradient, put together from all processes where it is sharded.

    Of a sharded tensor every process must ask at the same time.
    """
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and whole parameters, shared ones once, one at a time: never all in memory."""
    for name, parameter in module.named_parameters():
        yield name, whole(parameter)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole ``value`` that every process holds into ``target``, sharded or not."""
    if isinstance(target, DTensor):
        value = distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    target.copy_(value)
