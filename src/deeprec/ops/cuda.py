"""What the CUDA backends of all ops need of the machine: kernels, a stream, reasons why not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from deeprec import _C

__all__ = ["Runtime", "Target", "on", "why_not"]


class Target(NamedTuple):
    """Where to launch: the module of kernels, a stream's address, the device's multiprocessors."""

    kernels: ModuleType
    stream: int
    multiprocessors: int


class Runtime:
    """The GPU through torch. The tests put the emulator in its place."""

    device_type = "cuda"

    def why_not(self, device: torch.device) -> str | None:
        """None when the kernels can run on ``device``, else the reason."""
        if not hasattr(_C, "cuda"):
            return "this build has no CUDA kernels; install with nvcc on the PATH"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device (no driver, no GPU, or a torch without CUDA)"
        major, minor = torch.cuda.get_device_capability(device)
        built = [divmod(architecture, 10) for architecture in _C.cuda.ARCHITECTURES]
        if not any(major == m and minor >= n for m, n in built) and (major, minor) < max(built):
            names = ", ".join(f"{m}.{n}" for m, n in built)
            return (
                f"the device has compute capability {major}.{minor}, the kernels are compiled for "
                f"{names}; rebuild with -DCMAKE_CUDA_ARCHITECTURES={major}{minor}"
            )
        return None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[Target]:
        """The device made current, with torch's current stream on it."""
        with torch.cuda.device(device):
            properties = torch.cuda.get_device_properties(device)
            stream = torch.cuda.current_stream(device).cuda_stream
            yield Target(_C.cuda, stream, properties.multi_processor_count)


_runtime = Runtime()


def why_not(*tensors: Tensor) -> str | None:
    """Why the CUDA kernels cannot run on these tensors; None when they can."""
    for tensor in tensors:
        if tensor.device.type != _runtime.device_type:
            return f"tensors are on {tensor.device}"
    return _runtime.why_not(tensors[0].device)


@contextmanager
def on(tensor: Tensor) -> Iterator[Target]:
    """Launch on the device and current stream of ``tensor``: ``with on(x) as target: …``."""
    with _runtime.on(tensor.device) as target:
        yield target
