"""Training in several processes: sharding, dealing out work, and failing together.

Every process samples its share of a step's prompts. The sequences are then known to all of them,
so that each update is planned alike everywhere and does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

__all__ = [
    "ProcessFailedError",
    "ProcessLostError",
    "deal",
    "failing_together",
    "gather",
    "make_accelerator",
    "naming_lost_processes",
    "shard",
]

# How long a process waits for the others. Roll-outs of the same size differ by minutes; what takes
# longer has stopped, and a process that died is noticed at once.
PATIENCE = timedelta(minutes=30)


class ProcessFailedError(RuntimeError):
    """Another process of this training failed."""


class ProcessLostError(ProcessFailedError):
    """Another process of this training is gone or does not answer."""


def make_accelerator() -> Accelerator:
    """The process group as ``torchrun`` or ``accelerate launch`` describes it.

    Raises ValueError where accelerate is to wrap the policy itself, and where it was asked for
    several processes and has started one.
    """
    # Without a GPU accelerate overlooks torchrun's processes unless it is told to use the CPU.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    known = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
    if accelerator.distributed_type not in known:
        raise ValueError(
            "accelerate launch: expected plain processes (multi-GPU or multi-CPU), got "
            f"{accelerator.distributed_type.value}; set fsdp=True in RLConfig to shard the policy, "
            "and leave that option of accelerate off"
        )
    # With one GPU or none, accelerate launch --num_processes 8 starts a single process and says
    # nothing. This address is all that it tells that one of the others.
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()
    if accelerator.num_processes == 1 and launched and "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "accelerate launch: asked for several processes, it has started one; add --multi_gpu "
            "(on CPUs too, instead of --cpu) or use torchrun. If one is what you want, unset "
            "MASTER_ADDR"
        )
    return accelerator


def shard(scorer: nn.Module, *, bf16: bool) -> None:
    """Spread parameters, gradients and optimizer state over all processes (FSDP2), in place.

    A unit for every transformer layer; embeddings, norm and head belong to ``scorer`` itself,
    which is therefore what must be called. ``bf16`` sends weights in bfloat16, and sums gradients
    in float32 in any case. Parameters are moved to the GPU part by part.
    """
    mesh = dist.device_mesh.init_device_mesh(
        "cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),)
    )
    precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32
    )
    for module in scorer.modules():
        if isinstance(module, GradientCheckpointingLayer):
            fully_shard(module, mesh=mesh, mp_policy=precision)
    fully_shard(scorer, mesh=mesh, mp_policy=precision)


def deal(sizes: Sequence[int], processes: int) -> list[list[int]]:
    """Indices of ``sizes`` for each process, the largest first to whoever has least so far."""
    hands: list[list[int]] = [[] for _ in range(processes)]
    load = [0] * processes
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = load.index(min(load))
        hands[least].append(index)
        load[least] += sizes[index]
    return hands


@contextmanager
def failing_together(process: int) -> Iterator[None]:
    """A part of a step without communication: when it fails in one process, all of them stop.

    Otherwise the others would wait for the failed one. Raises ProcessFailedError in those.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    with naming_lost_processes():
        failures = gather_object([f"process {process}: {error!r}"] if error else [])
    if error is not None:
        raise error
    if failures:
        raise ProcessFailedError("; ".join(failures))


@contextmanager
def naming_lost_processes() -> Iterator[None]:
    """Turn what communication raises when a process is gone into a ProcessLostError."""
    try:
        yield
    except ProcessFailedError:
        raise
    except (RuntimeError, dist.DistError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        first = str(error).strip().split("\n")[0]
        raise ProcessLostError(
            f"another process of the training is gone; its own output says why ({first})"
        ) from error


def gather(value: Any) -> list[Any]:
    """``value`` of every process, in their order."""
    return list(gather_object([value]))
