"""The packed TRM in Triton: parameters, workspaces, launches (``deeprec.kernels.trm``)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from deeprec import backends
from deeprec.ops import SeenItems, TopK, topk_triton
from deeprec.ops.gpu import float32_products, why_not_triton
from deeprec.trm import packed_gpu, packed_op
from deeprec.trm.packing import has_padding_row, row_major_tensors
from deeprec.trm.request import Request, search_items

if TYPE_CHECKING:
    from deeprec.trm.packed import PackedTRM

__all__: list[str] = []

# A row of a product and a history's scores are a tile in registers.
LIMITS = {"max_length": 128, "hidden": 512}
# Width of a product's operands in a step, by the weights' dtype. The other operand is float32: 32
# are 128 bytes, one memory transaction; half of that where both are, and are multiplied as three
# tf32 products whose operands fill registers.
WIDTH = {torch.bfloat16: 32, torch.float32: 16}
# Dimensions of a head that attention multiplies in a step, and the least a product takes.
DIMENSIONS, LEAST = 16, 16


class _Model:
    """A packed TRM's parameters on the GPU, and the kernels that take them."""

    def __init__(self, packed: PackedTRM) -> None:
        self.sizes, self.eps, self.dtype = packed.sizes, packed.eps, packed.dtype
        self.tensors = row_major_tensors(packed.module())
        # Gates and experts of the adaptor read the same preference: one product.
        self.tensors["adaptor.weight"] = torch.cat(
            [self.tensors.pop("adaptor.experts"), self.tensors.pop("adaptor.gate")]
        )
        for name, tensor in self.tensors.items():
            if name.endswith(("project.weight", "out.weight", "up.weight", "down.weight")) or (
                name == "adaptor.weight"
            ):
                self.tensors[name] = tensor.to(self.dtype)
        self.padding_row = has_padding_row(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self[f"{name}.weight"], self[f"{name}.bias"]

    @property
    def hidden(self) -> int:
        return self.sizes["hidden"]

    def product(self) -> dict[str, Any]:
        """How a product with the weights is computed, for the kernels' constants."""
        import triton.language as tl

        from deeprec.kernels import LAUNCH

        half = self.dtype == torch.bfloat16
        return {
            "DOT": tl.bfloat16 if half else tl.float32,
            "PRECISION": "ieee" if half else float32_products(),
            "BLOCK_K": WIDTH[self.dtype],
            **LAUNCH,
        }

    def dense(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        rows: int,
        total: Tensor | None = None,
        chosen: Tensor | None = None,
        gelu: bool = False,
    ) -> Tensor:
        """float32 ``[rows, out]``; with ``total`` only that many, and only they are written."""
        import triton

        from deeprec.kernels import dense as kernels

        outputs, inputs = weight.shape
        out = x.new_empty((rows, outputs))
        kernels.dense[
            lambda meta: (triton.cdiv(rows, meta["BLOCK_M"]), triton.cdiv(outputs, meta["BLOCK_N"]))
        ](x, weight, bias, chosen, total, out, rows, inputs, outputs, GELU=gelu, **self.product())
        return out

    def dense_norm(
        self,
        x: Tensor,
        map_name: str,
        norm_name: str,
        residual: Tensor,
        *,
        total: Tensor | None,
        chosen: Tensor | None = None,
    ) -> Tensor:
        """LayerNorm of a linear map and the residual, float32 ``[rows of x, out]``."""
        import triton

        from deeprec.kernels import dense as kernels

        weight, bias = self.norm(map_name)
        outputs, inputs = weight.shape
        out = x.new_empty((len(x), outputs))
        kernels.dense_norm[lambda meta: (triton.cdiv(len(x), meta["BLOCK_M"]),)](
            x,
            weight,
            bias,
            residual,
            chosen,
            *self.norm(norm_name),
            total,
            out,
            len(x),
            inputs,
            outputs,
            self.eps,
            BLOCK_N=max(LEAST, triton.next_power_of_2(outputs)),
            **self.product(),
        )
        return out


class _Encoding:
    """One batch of histories on its way through the encoder."""

    def __init__(self, model: _Model, history: Tensor, lengths: Tensor) -> None:
        self.model, self.history = model, history
        self.count, self.width = history.shape
        self.starts = packed_gpu.item_starts(lengths, self.width)
        self.total = self.starts[self.count :]
        self.last = self.starts[1:] - 1

    def run(self) -> Tensor:
        states, layers = self._embed(), self.model.sizes["n_layers"]
        for layer in range(layers - 1):
            states = self._layer(f"layer.{layer}.", states)
        return self._last_layer(f"layer.{layers - 1}.", states)

    @property
    def _head(self) -> dict[str, Any]:
        """Sizes that both kinds of attention are told."""
        head = self.model.hidden // self.model.sizes["n_heads"]
        return {"hidden": self.model.hidden, "head": head, "scale": 1 / math.sqrt(head)}

    @property
    def _tile(self) -> dict[str, Any]:
        import triton

        from deeprec.kernels import LAUNCH

        longest = max(LEAST, triton.next_power_of_2(self.width))
        return {"BLOCK_S": longest, "BLOCK_D": DIMENSIONS, **LAUNCH}

    def _embed(self) -> Tensor:
        import triton

        from deeprec.kernels import LAUNCH
        from deeprec.kernels import trm as kernels

        m, period = self.model, self.model.sizes["max_length"]
        out = m["items"].new_empty((self.count * self.width, m.hidden))
        kernels.embed[lambda meta: (self.count, triton.cdiv(self.width, meta["BLOCK_T"]))](
            m["items"],
            m["texts"],
            m["kernel"],
            m["gates.weight"],
            m["gates.bias"],
            m["positions"],
            *m.norm("input_norm"),
            self.history,
            self.starts,
            out,
            m.sizes["n_items"],
            self.width,
            period,
            m.hidden,
            1 / math.sqrt(period),
            m.eps,
            PADDING_ROW=m.padding_row,
            BLOCK_H=triton.next_power_of_2(m.hidden),
            **LAUNCH,
        )
        return out

    def _layer(self, name: str, states: Tensor) -> Tensor:
        import triton

        from deeprec.kernels import trm as kernels

        m = self.model
        projected = m.dense(states, *m.norm(name + "project"), rows=len(states), total=self.total)
        attended = torch.empty_like(states)
        kernels.attention[
            lambda meta: (
                self.count,
                m.sizes["n_heads"],
                triton.cdiv(self.width, meta["BLOCK_Q"]),
            )
        ](
            projected,
            self.starts,
            attended,
            **self._head,
            PRECISION=float32_products(),
            **self._tile,
        )
        return self._after_attention(name, attended, states, self.total, None)

    def _last_layer(self, name: str, states: Tensor) -> Tensor:
        """Keys and values of all items, but one query a user: no other position is read."""
        from deeprec.kernels import trm as kernels

        m = self.model
        weight, bias = m.norm(name + "project")
        queries = m.dense(
            states, weight[: m.hidden], bias[: m.hidden], rows=self.count, chosen=self.last
        )
        projected = m.dense(
            states, weight[m.hidden :], bias[m.hidden :], rows=len(states), total=self.total
        )
        attended = torch.empty_like(queries)
        kernels.attention_of_last[(self.count, m.sizes["n_heads"])](
            queries, projected, self.starts, attended, **self._head, **self._tile
        )
        return self._after_attention(name, attended, states, None, self.last)

    def _after_attention(
        self,
        name: str,
        attended: Tensor,
        states: Tensor,
        total: Tensor | None,
        chosen: Tensor | None,
    ) -> Tensor:
        m = self.model
        y = m.dense_norm(
            attended, name + "out", name + "attention_norm", states, total=total, chosen=chosen
        )
        inner = m.dense(y, *m.norm(name + "up"), rows=len(y), total=total, gelu=True)
        return m.dense_norm(inner, name + "down", name + "feed_norm", y, total=total)


_MODELS: WeakKeyDictionary[PackedTRM, _Model] = WeakKeyDictionary()


def _model(packed: PackedTRM) -> _Model:
    """Made at the first call; a packed TRM never changes."""
    model = _MODELS.get(packed)
    if model is None:
        model = _MODELS[packed] = _Model(packed)
    return model


def _history(packed: PackedTRM, asked: Request) -> Tensor:
    history, lengths = asked.history, asked.lengths
    assert history is not None and lengths is not None
    if not len(history):
        return history.new_empty(0, packed.sizes["hidden"], dtype=torch.float32)
    with torch.cuda.device_of(history):
        return _Encoding(_model(packed), history, lengths).run()


def _user_vectors(packed: PackedTRM, asked: Request) -> Tensor:
    import triton

    from deeprec.kernels import LAUNCH
    from deeprec.kernels import trm as kernels

    states = asked.states if asked.states is not None else _history(packed, asked)
    users = torch.empty_like(states)
    if not len(states):
        return users
    with torch.cuda.device_of(states):
        m = _model(packed)
        projected = None
        if asked.preference is not None:
            projected = m.dense(asked.preference, m["adaptor.weight"], None, rows=len(states))
        kernels.fuse[(len(states),)](
            states,
            projected,
            *m.norm("output_norm"),
            users,
            m.hidden,
            m.sizes["n_experts"],
            m.eps,
            BLOCK_E=triton.next_power_of_2(m.sizes["n_experts"]),
            BLOCK_H=triton.next_power_of_2(m.hidden),
            **LAUNCH,
        )
    return users


def _retrieve(
    packed: PackedTRM, asked: Request, k: int, exclude: SeenItems | None, exclude_history: bool
) -> TopK:
    users = _user_vectors(packed, asked)
    # Triton's top-k ends at 1,024; more is the business of whichever backend returns more.
    own = topk_triton.why_not(users, packed.index.items, k) is None
    backend = "triton" if own else None
    return search_items(packed.index, users, asked, k, exclude, exclude_history, backend)


def _why_not(*arguments: PackedTRM | Tensor) -> str | None:
    return packed_gpu.why_not(arguments, LIMITS, why_not_triton)


backends.register(packed_op.HISTORY, "triton", _history, _why_not)
backends.register(packed_op.USER_VECTORS, "triton", _user_vectors, _why_not)
backends.register(packed_op.RETRIEVE, "triton", _retrieve, _why_not)
