"""What the GPU backends of the packed TRM share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from deeprec.trm.packed import PackedTRM

__all__ = ["item_starts", "why_not"]


def item_starts(lengths: Tensor, width: int) -> Tensor:
    """Where each user's items begin when all lie one after the other; int64 ``[B + 1]``.

    The last entry is how many there are. Lengths are not checked, which would wait for the device.
    """
    ends = lengths.clamp(1, width).cumsum(0)
    return torch.cat([ends.new_zeros(1), ends])


def why_not(
    arguments: Sequence[PackedTRM | Tensor],
    limits: Mapping[str, int],
    on_device: Callable[..., str | None],
) -> str | None:
    """Why kernels with these limits cannot run where the TRMs and tensors are, else None.

    ``on_device`` says so of tensors.
    """
    given = [argument for argument in arguments if isinstance(argument, Tensor)]
    if reason := on_device(*given) if given else None:
        return reason
    for argument in arguments:
        if isinstance(argument, Tensor):
            continue
        for name, limit in limits.items():
            if argument.sizes[name] > limit:
                return f"{name} is {argument.sizes[name]}, more than {limit}"
        if argument.from_file:
            return "a packed TRM from a file has the layout of the CPU"
        given.append(argument.module().item_embedding.weight)
    return on_device(*given)
