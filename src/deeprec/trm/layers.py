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


class MultiHeadAttention(nn.Module):
    """Attention, residual and LayerNorm (post-LN)."""

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

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (
            linear(states).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for linear, states in (
                (self.query, queries),
                (self.key, context),
                (self.value, context),
            )
        )
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + mask
        heads = self.dropout(scores.softmax(dim=-1)) @ v
        attended = self.out_linear(heads.transpose(1, 2).flatten(2))
        return self.LayerNorm(queries + self.dropout(attended))


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
    """A post-LN transformer layer whose queries may be fewer than its context."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.multi_head_attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor) -> Tensor:
        return self.feed_forward(self.multi_head_attention(queries, context, mask))


class Encoder(nn.Module):
    """A bidirectional transformer that is read at one position a row."""

    def __init__(self, config: TRMConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config) for _ in range(config.n_layers))

    def forward(self, states: Tensor, lengths: Tensor) -> Tensor:
        """States [B, T, H] → the last real position [B, H].

        Only that position is used, so the last layer computes no other.
        """
        positions = torch.arange(states.shape[1], device=states.device)
        padding = (positions >= lengths[:, None])[:, None, None]
        mask = states.new_zeros(padding.shape).masked_fill_(padding, torch.finfo(states.dtype).min)
        for layer in self.layer[:-1]:
            states = layer(states, states, mask)
        last = states.take_along_dim((lengths - 1)[:, None, None], dim=1)
        return self.layer[-1](last, states, mask).squeeze(1)
