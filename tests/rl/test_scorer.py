"""Log-probs under a policy equal those of its own logits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from deeprec.rl import LoRAConfig, add_lora
from deeprec.rl.batching import MicroBatch, TrainSequence, collate
from deeprec.rl.scorer import PolicyScorer, checkpointed_layers, enable_checkpointing

CHOICE = (5, 6, 7)


@pytest.fixture
def batch(make_trajectory: Callable) -> MicroBatch:
    made = [
        make_trajectory(response=4, allowed=[None, CHOICE, None, CHOICE], seed=seed)
        for seed in range(3)
    ]
    zeros = np.zeros(4, dtype=np.float32)
    return collate([TrainSequence.from_trajectory(t, zeros) for t in made], packed=False)


def expected(policy: torch.nn.Module, batch: MicroBatch, temperature: float) -> torch.Tensor:
    logits = policy(input_ids=batch.input_ids).logits.flatten(0, 1)[batch.rows] / temperature
    assert batch.allowed is not None
    logits = logits.masked_fill(~batch.allowed.mask(logits.shape[1]), -torch.inf)
    return logits.log_softmax(-1).gather(-1, batch.token_ids[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_the_logits(tiny_policy: Callable, batch: MicroBatch, temperature: float) -> None:
    policy = tiny_policy()
    logprobs, _ = PolicyScorer(policy, temperature=temperature)(batch)
    torch.testing.assert_close(logprobs, expected(policy, batch, temperature))
    assert logprobs.dtype == torch.float32


def test_other_architectures(batch: MicroBatch) -> None:
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2)).eval()
    logprobs, _ = PolicyScorer(policy)(batch)
    torch.testing.assert_close(logprobs, expected(policy, batch, 1.0))


def test_bf16_is_close(tiny_policy: Callable, batch: MicroBatch) -> None:
    policy = tiny_policy()
    exact, _ = PolicyScorer(policy)(batch)
    rounded, entropy = PolicyScorer(policy, bf16=True)(batch)
    assert rounded.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, atol=0.02, rtol=0.02)
    assert not torch.allclose(rounded, exact, atol=1e-5)  # it was bf16


def test_gradient_checkpointing_changes_nothing(tiny_policy: Callable, batch: MicroBatch) -> None:
    """Not even with dropout in the configuration, which must stay off."""
    policy = tiny_policy(attention_dropout=0.5)
    scorer = PolicyScorer(policy)
    scorer(batch)[0].sum().backward()
    plain = [p.grad.clone() for p in policy.parameters()]
    policy.zero_grad()
    enable_checkpointing(policy)
    calls = []
    policy.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with checkpointed_layers(policy, True):
        scorer(batch)[0].sum().backward()
    assert len(calls) == 2  # recomputed once
    assert not any(module.training for module in policy.modules())
    for parameter, gradient in zip(policy.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_lora(tiny_policy: Callable, batch: MicroBatch) -> None:
    policy = add_lora(tiny_policy(), LoRAConfig(rank=2, alpha=4))
    names = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert names
    assert all("lora" in name for name in names)
    logprobs, _ = PolicyScorer(policy)(batch)
    torch.testing.assert_close(logprobs, expected(policy, batch, 1.0))


def test_logits_that_are_more_than_the_head_are_refused() -> None:
    config = Gemma2Config(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        final_logit_softcapping=0.001,
    )
    with pytest.raises(ValueError, match="scaling or soft-capping"):
        PolicyScorer(Gemma2ForCausalLM(config))
    with pytest.raises(ValueError, match="causal language model"):
        PolicyScorer(torch.nn.Linear(2, 2))
