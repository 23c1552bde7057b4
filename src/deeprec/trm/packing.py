"""A TRM's parameters in the layouts of the fused kernels (``csrc/cpu/trm.h``, and the GPU's).

Everything that does not depend on a request is computed here: the adaptor of every item's text,
the convolution's filter in time, scaled queries, weights in panels of 32 columns. Widths are
padded with zeros to whole panels, heads each on its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeprec.trm.config import TRMConfig
from deeprec.trm.layers import EncoderLayer

if TYPE_CHECKING:
    from deeprec.trm.model import PreferenceAwareTRM

__all__ = ["check_tensors", "has_padding_row", "pack_tensors", "row_major_tensors", "sizes"]

PANEL = 32
CHANNELS = 16
# Item texts that go through the adaptor at once.
CHUNK = 4096


def padded(n: int) -> int:
    """n rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def sizes(config: TRMConfig) -> dict[str, int]:
    """What the kernel needs to know besides the tensors."""
    return {
        "n_items": config.n_items,
        "text_dim": config.text_dim,
        "hidden": config.hidden,
        "inner": config.inner,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_experts": config.n_experts,
        "max_length": config.max_length,
    }


def check_tensors(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, int], dtype: torch.dtype
) -> None:
    """Raise ValueError, naming the tensor, unless these are of :func:`pack_tensors` of such a TRM.

    Kernels read what sizes say; values are not looked at.
    """
    items, hidden, layers = sizes["n_items"], sizes["hidden"], sizes["n_layers"]
    width, inner, text = padded(hidden), padded(sizes["inner"]), padded(sizes["text_dim"])
    head = padded(hidden // sizes["n_heads"])
    heads = sizes["n_heads"] * head
    expected: dict[str, tuple[int, ...]] = {
        "items": (items + 1, hidden),
        "texts": (items + 1, hidden),
        "kernel": (width // CHANNELS, 2 * sizes["max_length"], CHANNELS),
        "gates.weight": (2, width),
        "gates.bias": (2,),
        "positions": (sizes["max_length"], width),
    }

    def norm(name: str) -> None:
        expected[f"{name}.weight"] = expected[f"{name}.bias"] = (width,)

    def linear(name: str, inputs: int, out: int, *, bias: bool = True) -> None:
        pairs = dtype == torch.bfloat16
        rows = (inputs // 2, PANEL, 2) if pairs else (inputs, PANEL)
        expected[f"{name}.weight"] = (out // PANEL, *rows)
        if bias:
            expected[f"{name}.bias"] = (out,)

    norm("input_norm")
    norm("output_norm")
    linear("adaptor.gate", text, padded(sizes["n_experts"]), bias=False)
    linear("adaptor.experts", text, sizes["n_experts"] * width, bias=False)
    for index in range(layers):
        name = f"layer.{index}."
        last = index == layers - 1
        linear(name + "project", width, heads if last else 3 * heads)
        if last:
            linear(name + "key", head, sizes["n_heads"] * width, bias=False)
            linear(name + "value", width, heads)
        linear(name + "out", heads, width)
        linear(name + "up", width, inner)
        linear(name + "down", inner, width)
        norm(name + "attention_norm")
        norm(name + "feed_norm")
    for name, shape in expected.items():
        of = dtype if name.endswith(".weight") and len(shape) > 2 else torch.float32
        tensor = tensors.get(name)
        if tensor is None:
            raise ValueError(f"{name}: expected {of} of shape {shape}, which is missing")
        if tuple(tensor.shape) != shape or tensor.dtype != of:
            raise ValueError(
                f"{name}: expected {of} of shape {shape}, got {tensor.dtype} of shape "
                f"{tuple(tensor.shape)}"
            )


@torch.no_grad()
def pack_tensors(model: PreferenceAwareTRM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The kernel's tensors by name; weights of linear maps in ``dtype``, all else in float32.

    ``items`` is the model's own table, not a copy. Raises ValueError, naming the parameter, where
    one is not finite.
    """
    for name, parameter in model.named_parameters():
        if not name.endswith("w_noise") and not bool(
            torch.isfinite(parameter.sum(dtype=torch.float64))
        ):
            if bool(torch.isfinite(parameter).all()):
                continue
            raise ValueError(
                f"{name} holds NaN or infinity: the training diverged or the checkpoint is damaged"
            )
    config, hidden = model.config, model.config.hidden
    width, head = padded(hidden), hidden // config.n_heads
    tensors = {
        "items": model.item_embedding.weight.detach().float().contiguous(),
        "texts": adapted_texts(model),
        "kernel": _by_channels(_pad(filter_in_time(model).repeat(2, 1), width)),
        "gates.weight": _pad(
            torch.cat([model.item_gating.weight, model.fusion_gating.weight]), width
        ),
        "gates.bias": torch.cat([model.item_gating.bias, model.fusion_gating.bias]).float(),
        "positions": _pad(model.position_embedding.weight, width),
        **_norm("input_norm", model.LayerNorm),
        **_norm("output_norm", model.OutLayerNorm),
    }

    def linear(name: str, weights: Sequence[Tensor], bias: Tensor | None = None) -> None:
        """Maps ``[out, in]`` one after the other, each of them padded."""
        tensors[f"{name}.weight"] = torch.cat([_panels(weight, dtype) for weight in weights])
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach().float().contiguous()

    linear("adaptor.gate", [model.moe_adaptor.w_gate.T])
    experts = [expert.get_parameter("lin.weight") for expert in model.moe_adaptor.experts]
    linear("adaptor.experts", experts)
    for index, module in enumerate(model.trm_encoder.layer):
        layer = cast(EncoderLayer, module)
        name = f"layer.{index}."
        attention, feed = layer.multi_head_attention, layer.feed_forward
        scale = 1 / math.sqrt(head)
        queries = _by_head(attention.query, config.n_heads, scale)
        keys = _by_head(attention.key, config.n_heads)
        values = _by_head(attention.value, config.n_heads)
        if index < config.n_layers - 1:
            weight, bias = (torch.cat(part) for part in zip(queries, keys, values, strict=True))
            linear(name + "project", [weight], bias)
        else:
            linear(name + "project", [queries[0]], queries[1])
            # A query's product with all keys goes through K^T; the keys' bias adds the same to
            # every score, which softmax takes off again.
            linear(name + "key", [part.T for part in keys[0].split(padded(head))])
            linear(name + "value", list(values[0].split(padded(head))), values[1])
        out = attention.out_linear.weight.unflatten(1, (config.n_heads, head))
        linear(
            name + "out",
            [_pad(out, padded(head)).flatten(1)],
            _pad(attention.out_linear.bias, width),
        )
        linear(name + "up", [feed.linear_1.weight], _pad(feed.linear_1.bias, padded(config.inner)))
        linear(name + "down", [feed.linear_2.weight], _pad(feed.linear_2.bias, width))
        tensors |= _norm(name + "attention_norm", attention.LayerNorm)
        tensors |= _norm(name + "feed_norm", feed.LayerNorm)
    return tensors


@torch.no_grad()
def row_major_tensors(model: PreferenceAwareTRM) -> dict[str, Tensor]:
    """What the GPU kernels take, by name: float32, weights ``[out, in]``, nothing padded.

    ``adaptor.gate`` is ``[experts, text_dim]``, ``adaptor.experts`` ``[experts · hidden,
    text_dim]``, ``layer.N.project`` queries, keys and values one below the other.
    """
    experts: list[Tensor] = [
        expert.get_parameter("lin.weight") for expert in model.moe_adaptor.experts
    ]
    tensors: dict[str, Tensor] = {
        "items": model.item_embedding.weight,
        "texts": adapted_texts(model),
        "kernel": filter_in_time(model),
        "gates.weight": torch.cat([model.item_gating.weight, model.fusion_gating.weight]),
        "gates.bias": torch.cat([model.item_gating.bias, model.fusion_gating.bias]),
        "positions": model.position_embedding.weight,
        "adaptor.gate": model.moe_adaptor.w_gate.T,
        "adaptor.experts": torch.cat(experts),
    }
    modules: dict[str, Any] = {"input_norm": model.LayerNorm, "output_norm": model.OutLayerNorm}
    for index, module in enumerate(model.trm_encoder.layer):
        layer, name = cast(EncoderLayer, module), f"layer.{index}."
        attention, feed = layer.multi_head_attention, layer.feed_forward
        parts = (attention.query, attention.key, attention.value)
        tensors[name + "project.weight"] = torch.cat([part.weight for part in parts])
        tensors[name + "project.bias"] = torch.cat([part.bias for part in parts])
        modules |= {
            name + "out": attention.out_linear,
            name + "up": feed.linear_1,
            name + "down": feed.linear_2,
            name + "attention_norm": attention.LayerNorm,
            name + "feed_norm": feed.LayerNorm,
        }
    for name, module in modules.items():
        tensors[name + ".weight"], tensors[name + ".bias"] = module.weight, module.bias
    return {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}


def has_padding_row(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a table's row 0 is not zero, so that padding takes part in the convolutions."""
    return any(bool(tensors[name][0].any()) for name in ("items", "texts"))


def filter_in_time(model: PreferenceAwareTRM) -> Tensor:
    """The learned filter of the contextual convolution over positions, float32 ``[L, H]``."""
    spectrum = torch.view_as_complex(model.complex_weight.double())
    return torch.fft.irfft(spectrum, n=model.config.max_length, dim=1)[0].float()


def adapted_texts(model: PreferenceAwareTRM) -> Tensor:
    """The adaptor's output for every row of the text table, float32 ``[n_items + 1, H]``."""
    adaptor, table = model.moe_adaptor, model.item_plm_embedding.weight
    was_training = adaptor.training
    adaptor.eval()  # dropout and the gate's noise are for training
    try:
        with torch.autocast(table.device.type, enabled=False):  # what it rounds would stay packed
            return torch.cat([adaptor(rows) for rows in table.split(CHUNK)]).float()
    finally:
        adaptor.train(was_training)


def _pad(x: Tensor, width: int) -> Tensor:
    """Zeros after the last dimension, up to ``width``."""
    return F.pad(x.detach().float(), (0, width - x.shape[-1])).contiguous()


def _by_channels(x: Tensor) -> Tensor:
    """``[L, H]`` → ``[H / 16, L, 16]``: what one vector of channels reads lies together."""
    return x.unflatten(1, (-1, CHANNELS)).transpose(0, 1).contiguous()


def _norm(name: str, norm: nn.LayerNorm) -> dict[str, Tensor]:
    width = padded(len(norm.weight))
    return {f"{name}.weight": _pad(norm.weight, width), f"{name}.bias": _pad(norm.bias, width)}


def _by_head(linear: nn.Linear, n_heads: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Weight ``[n_heads * padded head, in]`` and bias of a projection whose heads are padded."""
    weight = linear.weight.detach().double().unflatten(0, (n_heads, -1)) * scale
    bias = linear.bias.detach().double().unflatten(0, (n_heads, -1)) * scale
    width = padded(weight.shape[1])
    weight = F.pad(weight, (0, 0, 0, width - weight.shape[1]))
    return weight.flatten(0, 1).float(), _pad(bias, width).flatten()


def _panels(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``[out, in]`` → float32 ``[out / 32, in, 32]``, or bfloat16 ``[out / 32, in / 2, 32, 2]``."""
    out, inputs = weight.shape
    weight = F.pad(weight.detach(), (0, padded(inputs) - inputs, 0, padded(out) - out))
    panels = weight.unflatten(0, (-1, PANEL)).transpose(1, 2)
    if dtype == torch.bfloat16:
        return panels.unflatten(1, (-1, 2)).transpose(2, 3).to(dtype).contiguous()
    return panels.float().contiguous()
