"""User vectors of RecBole's sequential models in evaluation: the same numbers, less work.

RecBole encodes every history at the full padded length, one batch of thousands of users at a time,
and computes the last layer at every position although only the last one is used. Here users are
sorted by length and encoded a few at a time, so that padding is never computed and intermediate
results stay in the cache; a transformer's last layer runs at the last position alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["gru4rec_vectors", "sasrec_vectors", "why_not_fast"]

# Positions encoded at once. The widest intermediate result (256 floats a position by default) then
# takes 1 MB, a core's second-level cache.
POSITIONS = 1024
# Of a GRU: state and gates, 2 KB a row by default, again the second-level cache.
GRU_ROWS = 512


def why_not_fast(model: nn.Module, item_seq: Tensor, item_seq_len: Tensor) -> str | None:
    """None where the encoders below compute what the model's own forward does, else the reason."""
    if model.training or torch.is_grad_enabled():
        return "training, or gradients are wanted"
    if item_seq.device.type != "cpu":
        return f"histories on {item_seq.device.type}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in model.modules()):
        return "the model has forward hooks"
    positions = torch.arange(item_seq.shape[1])
    if bool((item_seq_len < 1).any()) or not torch.equal(
        item_seq != 0, positions < item_seq_len[:, None]
    ):
        return "histories that are empty or not padded on the right"
    return None


def sasrec_vectors(model: Any, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
    """f32 ``[B, H]``: SASRec's output at each history's last position."""
    layers = [_Layer(layer) for layer in model.trm_encoder.layer]
    positions = model.position_embedding.weight

    def encode(history: Tensor, last: Tensor) -> Tensor:
        x = model.item_embedding(history) + positions[: history.shape[1]]
        x = model.LayerNorm(x)
        for layer in layers[:-1]:
            x = layer(x)
        return layers[-1].last(x, last)

    return _encoded(encode, item_seq, item_seq_len, positions.shape[1])


def gru4rec_vectors(model: Any, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
    """f32 ``[B, H]``: GRU4Rec's output at each history's last position."""
    order = item_seq_len.argsort(descending=True)
    states = torch.empty(len(item_seq), model.gru_layers.hidden_size)
    for rows in order.split(GRU_ROWS):
        lengths = item_seq_len[rows]
        history = item_seq[rows, : int(lengths[0])]
        states[rows] = _gru(model.gru_layers, model.item_embedding(history), lengths)
    vectors: Tensor = model.dense(states)
    return vectors


def _gru(gru: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """The last state ``[n, H]`` of inputs ``[n, L, D]``, by descending length; without biases.

    A row stops at its end, and gates are computed in place: torch's GRU takes 1.3 to 1.5 times as
    long (64 inputs, 128 states).
    """
    active = (lengths[:, None] > torch.arange(x.shape[1])).sum(0).tolist()
    inputs = list(x.unbind(1))
    for layer in range(gru.num_layers):
        from_input = getattr(gru, f"weight_ih_l{layer}").t()
        from_state = getattr(gru, f"weight_hh_l{layer}").t()
        size = gru.hidden_size
        state = x.new_zeros(len(x), size)
        for step, n in enumerate(active):
            gates = inputs[step][:n] @ from_input  # reset, update, candidate
            recurrent = state[:n] @ from_state
            reset_update = gates[:, : 2 * size].add_(recurrent[:, : 2 * size]).sigmoid_()
            reset, update = reset_update.chunk(2, -1)
            candidate = torch.addcmul(gates[:, 2 * size :], reset, recurrent[:, 2 * size :]).tanh_()
            torch.lerp(candidate, state[:n], update, out=state[:n])
            if layer + 1 < gru.num_layers:
                inputs[step] = state[:n].clone()
    return state


def _encoded(
    encode: Callable[[Tensor, Tensor], Tensor],
    item_seq: Tensor,
    lengths: Tensor,
    size: int,
) -> Tensor:
    """``encode(histories, last positions)`` of users with similar lengths at a time."""
    vectors = torch.empty(len(item_seq), size)
    for rows, longest in _groups(lengths):
        vectors[rows] = encode(item_seq[rows, :longest], lengths[rows] - 1)
    return vectors


def _groups(lengths: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Rows by descending length, so many at a time that they fill :data:`POSITIONS`."""
    order = lengths.argsort(descending=True)
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, POSITIONS // longest)]
        yield rows, longest
        start += len(rows)


class _Layer:
    """One of RecBole's transformer layers, without dropout, causal."""

    def __init__(self, layer: Any) -> None:
        attention, self.forward = layer.multi_head_attention, layer.feed_forward
        self.attention = attention
        self.heads = attention.num_attention_heads
        projections = (attention.query, attention.key, attention.value)
        self.weight = torch.cat([projection.weight for projection in projections])
        self.bias = torch.cat([projection.bias for projection in projections])
        self.act = self.forward.intermediate_act_fn
        if self.act == self.forward.gelu:
            self.act = functional.gelu  # the same function of erf, in one pass

    def __call__(self, x: Tensor) -> Tensor:
        """``[B, L, H]`` at every position."""
        q, k, v = (
            self._split(part) for part in functional.linear(x, self.weight, self.bias).chunk(3, -1)
        )
        return self._finish(functional.scaled_dot_product_attention(q, k, v, is_causal=True), x)

    def last(self, x: Tensor, last: Tensor) -> Tensor:
        """``[B, H]`` at each row's last position."""
        size = x.shape[-1]
        k, v = (
            self._split(part)
            for part in functional.linear(x, self.weight[size:], self.bias[size:]).chunk(2, -1)
        )
        own = _at(x, last)[:, None]
        q = self._split(functional.linear(own, self.weight[:size], self.bias[:size]))
        seen = torch.arange(x.shape[1]) <= last[:, None]
        context = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])
        return self._finish(context, own)[:, 0]

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _finish(self, context: Tensor, x: Tensor) -> Tensor:
        attention, forward = self.attention, self.forward
        context = context.transpose(1, 2).flatten(-2)
        x = attention.LayerNorm(attention.dense(context) + x)
        return forward.LayerNorm(forward.dense_2(self.act(forward.dense_1(x))) + x)


def _at(x: Tensor, positions: Tensor) -> Tensor:
    return x[torch.arange(len(x)), positions]
