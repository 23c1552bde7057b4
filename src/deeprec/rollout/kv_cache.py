"""Keys and values of many conversations, and attention over them in one packed forward pass.

All new tokens of all conversations go through the model as one sequence without padding. Only
attention needs to know whose token is whose: the function registered here with transformers
stores each token's key and value in its conversation's slot and attends to that slot alone, so a
conversation's history is never computed twice and prompts, observations and single sampled tokens
share a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PretrainedConfig

__all__ = ["ATTENTION", "PackedBatch", "SlotCache", "packed_attention"]

ATTENTION = "deeprec_slots"
# Copying a slot's keys and values together costs about three times attending over them in place, so
# attention runs over all slots unless fewer than this share of them takes part.
WHOLE_CACHE_SHARE = 0.3


class SlotCache:
    """Per layer, keys and values as [slots, heads, positions, dim], grown by doubling.

    What a head attends over lies together: torch's attention on a CPU takes a third of the time
    (bfloat16: 0.6 of it) that it needs where heads alternate (SmolLM2, one query, 700 positions).
    """

    def __init__(self) -> None:
        self.slots = 0
        self.positions = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, slots: int, positions: int) -> None:
        """Make room for ``slots`` conversations of ``positions`` tokens, keeping what is stored."""
        if slots <= self.slots and positions <= self.positions:
            return
        old_slots, old_positions = self.slots, self.positions
        self.slots = max(slots, old_slots)
        while self.positions < positions:
            self.positions = max(2 * self.positions, 128)
        for layer, pair in self._layers.items():
            grown = []
            for old in pair:
                heads, dim = old.shape[1], old.shape[3]
                new = old.new_zeros((self.slots, heads, self.positions, dim))
                new[:old_slots, :, :old_positions] = old
                grown.append(new)
            self._layers[layer] = (grown[0], grown[1])

    def write(self, layer: int, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [heads, T, dim]; ``index`` as :meth:`places` gives it."""
        if layer not in self._layers:
            # Zeros, not empty memory: a masked NaN would still poison a matrix product.
            shape = (self.slots, len(keys), self.positions)
            self._layers[layer] = (
                keys.new_zeros((*shape, keys.shape[-1])),
                values.new_zeros((*shape, values.shape[-1])),
            )
        for buffer, new in zip(self._layers[layer], (keys, values), strict=True):
            dim = new.shape[-1]
            buffer.view(-1, dim).index_copy_(0, index, new.reshape(-1, dim))

    def places(self, slots: Tensor, positions: Tensor, heads: int) -> Tensor:
        """Where tokens at ``positions`` of ``slots`` are stored, flat, head by head."""
        rows = slots * heads + torch.arange(heads, device=slots.device)[:, None]
        return (rows * self.positions + positions).flatten()

    def read(self, layer: int, slots: Tensor | int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values [n, heads, length, dim] of ``slots``, or of the first ``slots`` of them.

        An int gives views, a tensor of slots copies.
        """
        chosen = slice(slots) if isinstance(slots, int) else slots
        keys, values = self._layers[layer]
        return keys[chosen, :, :length], values[chosen, :, :length]

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot ``target`` the first ``length`` positions of slot ``source``."""
        for pair in self._layers.values():
            for buffer in pair:
                buffer[target, :, :length] = buffer[source, :, :length]

    def clear(self) -> None:
        """Give the memory back."""
        self._layers.clear()
        self.slots = self.positions = 0


@dataclass
class _Group:
    """Rows of a batch that attend together: all have ``width`` queries after padding."""

    width: int
    length: int  # keys read of every slot
    slots: Tensor | int  # the slots read; an int is a view of the first so many
    mask: Tensor  # additive [n, 1, width, length], 0 or -inf; later repeated for shared heads
    tokens: Tensor  # place of each of the group's tokens in the packed sequence
    places: Tensor  # the same token's place in the padded [n, width] queries

    @property
    def rows(self) -> int:
        return self.mask.shape[0]


@dataclass
class PackedBatch:
    """The new tokens of some conversations, one after the other without padding.

    ``slots[i]`` gets ``counts[i]`` tokens, the first at position ``starts[i]``.
    """

    cache: SlotCache
    slots: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    device: torch.device
    dtype: torch.dtype
    positions: NDArray[np.int64] = field(init=False)  # [T] each token's place in its conversation
    position_ids: Tensor = field(init=False)  # [1, T] the same for the model
    last: Tensor = field(init=False)  # [n] place of each row's last token
    groups: list[_Group] = field(init=False)

    def __post_init__(self) -> None:
        self.cache.reserve(int(self.slots.max()) + 1, int((self.starts + self.counts).max()))
        ends = np.cumsum(self.counts)
        self._offsets = ends - self.counts
        within = np.arange(ends[-1]) - np.repeat(self._offsets, self.counts)
        self.positions = np.repeat(self.starts, self.counts) + within
        self.position_ids = self._tensor(self.positions[None])
        self._places: dict[int, Tensor] = {}
        self.last = self._tensor(ends - 1)
        # Rows share a group when their query counts round up to the same power of two.
        widths = 1 << np.ceil(np.log2(self.counts)).astype(np.int64)
        self.groups = [self._group(np.flatnonzero(widths == w)) for w in np.unique(widths)]

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)

    def _group(self, rows: NDArray[np.int64]) -> _Group:
        slots, starts, counts = self.slots[rows], self.starts[rows], self.counts[rows]
        width, length = int(counts.max()), int((starts + counts).max())
        in_use = int(self.slots.max()) + 1
        in_place = len(rows) >= WHOLE_CACHE_SHARE * in_use
        row = np.arange(len(rows))
        if in_place:
            row, starts_read = slots, np.zeros(in_use, dtype=np.int64)
            starts_read[slots] = starts
        else:
            starts_read = starts
        column = np.concatenate([np.arange(c) for c in counts]) if width > 1 else 0
        query_positions = self._tensor(starts_read)[:, None] + torch.arange(
            width, device=self.device
        )
        hidden = torch.arange(length, device=self.device) > query_positions[..., None]
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
        mask.masked_fill_(hidden, -torch.inf)
        return _Group(
            width=width,
            length=length,
            slots=in_use if in_place else self._tensor(slots),
            mask=mask[:, None],
            tokens=self._tensor(np.repeat(self._offsets[rows], counts) + column),
            places=self._tensor(np.repeat(row, counts) * width + column),
        )

    def places(self, heads: int) -> Tensor:
        """Where the tokens' keys and values are stored in a layer of so many heads."""
        if heads not in self._places:
            slots = self._tensor(np.repeat(self.slots, self.counts))
            self._places[heads] = self.cache.places(slots, self.position_ids[0], heads)
        return self._places[heads]

    @contextmanager
    def attending(self, config: PretrainedConfig) -> Iterator[None]:
        """Let a model with this configuration attend through the cache for the time being."""
        usual = config._attn_implementation
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = usual


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    conversations: PackedBatch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a packed batch, with the signature transformers calls.

    query [1, heads, T, dim], key and value [1, kv_heads, T, dim]; returns [1, T, heads, dim].
    """
    if conversations is None:
        raise ValueError(f"attention {ATTENTION!r} needs the argument 'conversations'")
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} is not supported by the roll-out engine")
    cache, layer = conversations.cache, int(module.layer_idx)  # type: ignore[arg-type]
    _, heads, total, _ = query.shape
    kv_heads = key.shape[1]
    cache.write(layer, conversations.places(kv_heads), key[0], value[0])
    repeats = heads // kv_heads
    packed = query[0].transpose(0, 1)  # [T, heads, dim]
    output = value.new_empty((total, heads, value.shape[-1]))
    for group in conversations.groups:
        padded = packed.new_zeros((group.rows * group.width, heads, packed.shape[-1]))
        padded[group.places] = packed[group.tokens]
        # Query heads that share a key head become queries of that head: no key is repeated.
        queries = padded.view(group.rows, group.width, kv_heads, repeats, -1)
        queries = queries.permute(0, 2, 3, 1, 4).flatten(2, 3)
        if group.mask.shape[2] not in (1, repeats * group.width):
            group.mask = group.mask.repeat(1, 1, repeats, 1)  # once for all layers
        keys, values = cache.read(layer, group.slots, group.length)
        attended = scaled_dot_product_attention(
            queries, keys, values, attn_mask=group.mask, scale=scaling
        )
        attended = attended.unflatten(2, (repeats, group.width)).permute(0, 3, 1, 2, 4)
        output[group.tokens] = attended.reshape(-1, heads, output.shape[-1])[group.places]
    return output[None], None


AttentionInterface.register(ATTENTION, packed_attention)
