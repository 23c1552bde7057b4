"""The building blocks of the preference-aware TRM: adaptor, convolution, transformer layer.

Attribute names are those of the published checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deeprec.trm.config import TRMConfig

# Initial scale of weights and embeddings, and the floor of the gate's noise: the paper's code.
INIT_STD = 0.02
GATE_NOISE_FLOOR = 1e-2


class Dropout(nn.Module):
    """Dropout whose mask takes a byte of randomness an element: p is rounded to 1/256.

    On the CPU ``torch.nn.Dropout`` runs its generator once an element and is a quarter of the
    training time of a small model; a byte an element costs a third. Seeded by
    ``torch.manual_seed`` alike.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        threshold = round(self.p * 256)
        if not self.training or threshold == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
        random_bytes = words.view(torch.uint8)[: x.numel()].view(x.shape)
        keep = (random_bytes >= threshold).to(x.dtype)
        return x * keep.mul_(256 / (256 - threshold))


class Expert(nn.Module):
    """One bias-free projection of the adaptor."""

    def __init__(self, text_dim: int, hidden: int) -> None:
        super().__init__()
        self.lin = nn.Linear(text_dim, hidden, bias=False)


class MoEAdaptor(nn.Module):
    """Text vectors [n, P] → item space [n, H] through softmax-gated linear experts.

    In training the gate is noisy. The input's dropout mask is drawn once for all experts, which
    turns them into one matrix product; experts stay apart through gate and initialisation.
    """

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        shape = (config.text_dim, config.n_experts)
        self.w_gate = nn.Parameter(torch.empty(shape).normal_(std=INIT_STD))
        self.w_noise = nn.Parameter(torch.empty(shape).normal_(std=INIT_STD))
        self.experts = nn.ModuleList(
            Expert(config.text_dim, config.hidden) for _ in range(config.n_experts)
        )
        self.dropout = Dropout(config.adaptor_dropout)

    def forward(self, texts: Tensor) -> Tensor:
        logits = texts @ self.w_gate
        if self.training:
            scale = F.softplus(texts @ self.w_noise) + GATE_NOISE_FLOOR
            logits = logits + torch.randn_like(logits) * scale
        gate = logits.softmax(dim=-1)
        weight = torch.cat([expert.get_parameter("lin.weight") for expert in self.experts])
        projected = F.linear(self.dropout(texts), weight).unflatten(-1, (len(self.experts), -1))
        return torch.einsum("ne,neh->nh", gate, projected)


class Rows:
    """Which positions of ``[B, T]`` are real, for layers that take those alone: ``[N, ...]``.

    The items of a history lie one after the other, histories in order. Padding is half of what a
    batch of mixed lengths holds, and all but the products of attention is done a row at a time.
    """

    def __init__(self, lengths: Tensor, width: int) -> None:
        """``lengths`` int64 ``[B]``, from 1 to ``width``."""
        real = torch.arange(width, device=lengths.device) < lengths[:, None]
        self.real = real
        self.where = real.flatten().nonzero()[:, 0]
        self.position = self.where % width
        """Of every row in its history."""
        self.last = lengths.cumsum(0) - 1
        """Row of every history's last item."""

    def take(self, grid: Tensor) -> Tensor:
        """``[B, T, ...]`` → ``[N, ...]``."""
        return grid.flatten(0, 1).index_select(0, self.where)

    def spread(self, rows: Tensor) -> Tensor:
        """``[N, ...]`` → ``[B, T, ...]``, zero where nothing is real."""
        grid = rows.new_zeros(self.real.numel(), *rows.shape[1:])
        return grid.index_copy(0, self.where, rows).unflatten(0, self.real.shape)


class MultiHeadAttention(nn.Module):
    """Attention within every history, residual and LayerNorm (post-LN)."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        hidden = config.hidden
        self.n_heads = config.n_heads
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.out_linear = nn.Linear(hidden, hidden)
        self.LayerNorm = nn.LayerNorm(hidden, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, states: Tensor, rows: Rows, *, last_only: bool = False) -> Tensor:
        """``[N, H]`` → ``[N, H]``; of the last item of every history alone: → ``[B, H]``."""
        queries = states[rows.last] if last_only else states
        q = self._project([self.query], queries)
        k, v = self._project([self.key, self.value], states).chunk(2, dim=1)
        q = q[:, None] if last_only else rows.spread(q)
        q, k, v = (x.transpose(1, 2) for x in (q, rows.spread(k), rows.spread(v)))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~rows.real[:, None, None], -math.inf)
        heads = (self.dropout(scores.softmax(dim=-1)) @ v).transpose(1, 2)
        heads = heads[:, 0] if last_only else rows.take(heads)
        return self.LayerNorm(queries + self.dropout(self.out_linear(heads.flatten(1))))

    def _project(self, maps: list[nn.Linear], states: Tensor) -> Tensor:
        """``[N, H]`` → ``[N, heads of every map, H / heads]``."""
        weight = torch.cat([linear.weight for linear in maps])
        bias = torch.cat([linear.bias for linear in maps])
        return F.linear(states, weight, bias).unflatten(-1, (len(maps) * self.n_heads, -1))


class FeedForward(nn.Module):
    """Two linear maps around a gelu, residual and LayerNorm (post-LN)."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(config.hidden, config.inner)
        self.linear_2 = nn.Linear(config.inner, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, eps=config.layer_norm_eps)
        self.dropout = Dropout(config.dropout)

    def forward(self, states: Tensor) -> Tensor:
        return self.LayerNorm(states + self.dropout(self.linear_2(F.gelu(self.linear_1(states)))))


class EncoderLayer(nn.Module):
    """A post-LN transformer layer."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.multi_head_attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, states: Tensor, rows: Rows, *, last_only: bool = False) -> Tensor:
        return self.feed_forward(self.multi_head_attention(states, rows, last_only=last_only))


class Encoder(nn.Module):
    """A bidirectional transformer that is read at one position a history."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))

    def forward(self, states: Tensor, rows: Rows) -> Tensor:
        """States of the real positions ``[N, H]`` → the last one's of every history ``[B, H]``.

        Only that position is used, so the last layer computes no other.
        """
        for layer in self.layer[:-1]:
            states = layer(states, rows)
        return self.layer[-1](states, rows, last_only=True)
