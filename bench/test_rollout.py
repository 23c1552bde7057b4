"""Roll-out of three turns: the engine against computing the whole context again every turn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Table
from rollout_peers import Talk, reprefilling, transformers_generate, trl_trainer, with_engine
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from deeprec.policy.load import SMOLLM2, load_policy
from deeprec.policy.tokenizer import build_title_tokenizer


def make_talk(vocabulary: int, *, prompt: int, observation: int, new: int, samples: int) -> Talk:
    rng = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return rng.integers(10, vocabulary, count).tolist()

    return Talk(ids(prompt), [[ids(observation) for _ in range(2)] for _ in range(samples)], new)


def forwarded(talk: Talk) -> int:
    """Tokens the engine computes: the prompt once for all, observations, and what was sampled.

    The last token of a sample is never forwarded; the last one of the prompt is, for each sample.
    """
    new = sum(map(len, talk.observations[0])) + talk.turns * talk.new - 1
    return len(talk.prompt) + talk.samples * new + talk.samples - 1


def without_end(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` without a token that ends a text: every turn is as long as it may be."""
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("peer", ["generate", "GRPOTrainer"])
def test_smollm2_three_turns(table: Table, peer: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if table.short:
        from deeprec.data import Catalog

        titles = tuple(f"Film {n}" for n in range(40))
        catalog = Catalog(titles=titles, categories=((),) * 40, keys=titles)
        tokenizer = build_title_tokenizer(catalog, 1_400_000_000, 1_400_000_000)
        shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
        config = Qwen2Config(vocab_size=len(tokenizer), **shape, **heads)
        model: PreTrainedModel = Qwen2ForCausalLM(config).to(dtype).eval()
        talk = make_talk(len(tokenizer), prompt=24, observation=12, new=4, samples=2)
    else:
        model, tokenizer = load_policy(SMOLLM2, dtype=dtype)
        talk = make_talk(49_000, prompt=384, observation=192, new=32, samples=8)
    without_end(model)
    ends, tokenizer.eos_token = tokenizer.eos_token, None
    ours, engine = with_engine(model, tokenizer, talk)
    tokenizer.eos_token = ends
    theirs = transformers_generate(model, talk)
    if peer == "GRPOTrainer":
        pytest.importorskip("trl")
        theirs = trl_trainer(model, tokenizer, talk, str(tmp_path))
    other = reprefilling(theirs, talk)
    if table.short:
        for run in (ours, other):
            assert [len(ids) for ids in run()] == [talk.turns * talk.new] * talk.samples
    weights = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    result = table.row(
        "roll-out",
        {
            "model": "tiny" if table.short else "SmolLM2-135M",
            "dtype": str(dtype).removeprefix("torch."),
            "prompt": len(talk.prompt),
            "observation": len(talk.observations[0][0]),
            "new a turn": talk.new,
            "samples": talk.samples,
        },
        ours={"deeprec": ours},
        peers={peer: other},
        operations=2.0 * weights * forwarded(talk),
        unit="fp32_fma" if dtype == torch.float32 else "bf16_dot",
    )
    # Every run forwarded the same: each prompt and observation once, and a row per sampled token.
    assert engine.forwarded_tokens > 0 and engine.forwarded_tokens % forwarded(talk) == 0
    for name, milliseconds in result["median_ms"].items():
        result["notes"][f"{name} tok/s"] = f"{1e3 * talk.sampled / milliseconds:.0f}"
