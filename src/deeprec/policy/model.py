"""The small policy that is trained from scratch: a Qwen2 transformer over title tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

__all__ = ["TitlePolicyConfig", "build_title_policy", "dropout"]


@dataclass
class TitlePolicyConfig:
    """Size of the policy trained from scratch.

    Args:
        hidden_size: width of the transformer.
        layers: number of transformer blocks.
        heads: attention heads; must divide ``hidden_size``.
        kv_heads: heads of keys and values; fewer make roll-outs faster. Must divide ``heads``.
        max_positions: longest conversation in tokens.
    """

    hidden_size: int = 128
    layers: int = 3
    heads: int = 2
    kv_heads: int = 2
    max_positions: int = 1024


def build_title_policy(
    config: TitlePolicyConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> Qwen2ForCausalLM:
    """A randomly initialised policy for ``tokenizer``; the same seed gives the same weights."""
    if config.hidden_size % config.heads:
        raise ValueError(
            f"policy.title.heads must divide hidden_size ({config.hidden_size}), got {config.heads}"
        )
    if config.heads % config.kv_heads:
        raise ValueError(
            f"policy.title.kv_heads must divide heads ({config.heads}), got {config.kv_heads}"
        )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=3 * config.hidden_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=config.max_positions,
            tie_word_embeddings=True,
            use_sliding_window=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


@contextmanager
def dropout(model: PreTrainedModel, embedding: float, residual: float) -> Iterator[None]:
    """Train with dropout, which Qwen2 itself has on attention weights only.

    ``embedding`` acts on the input embeddings and the last hidden state, ``residual`` on what each
    attention and MLP block adds. Pre-training on 60,000 titles overfits without it.
    """

    def drop(p: float) -> Any:
        def hook(module: torch.nn.Module, _: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (F.dropout(output[0], p, module.training), *output[1:])
            return F.dropout(output, p, module.training)

        return hook

    inner = model.model
    handles = [
        inner.embed_tokens.register_forward_hook(drop(embedding)),
        inner.norm.register_forward_hook(drop(embedding)),
    ]
    for layer in inner.layers:
        handles.append(layer.self_attn.register_forward_hook(drop(residual)))
        handles.append(layer.mlp.register_forward_hook(drop(residual)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
