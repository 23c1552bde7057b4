"""Log-probs of sampled tokens under a policy, without its logits in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from deeprec.ops import linear_logprobs
from deeprec.rl.batching import MicroBatch

__all__ = [
    "PolicyScorer",
    "backbone_and_head",
    "checkpointed_layers",
    "enable_checkpointing",
    "uses_packing",
]

HEAD_TOLERANCE = 1e-2  # in units of the logits' own spread: bf16 rounding stays far below it


def backbone_and_head(policy: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """The transformer beneath a causal language model, and its output layer.

    Looks through PEFT adapters. Raises ValueError when the model has no plain linear head.
    """
    causal: Any = policy
    if hasattr(policy, "peft_config"):
        causal = causal.get_base_model()
    head = causal.get_output_embeddings() if hasattr(causal, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear):
        raise ValueError(
            "policy: expected a Hugging Face causal language model whose output layer is a plain "
            f"Linear, got {type(causal).__name__} with {type(head).__name__}; with LoRA, leave the "
            "output layer out of target_modules"
        )
    return causal.base_model, head


def uses_packing(policy: nn.Module) -> bool:
    """Whether the policy's attention reads packed sequences without paying for their product."""
    attention = getattr(getattr(policy, "config", None), "_attn_implementation", None)
    return "flash" in (attention or "")


def enable_checkpointing(policy: nn.Module) -> None:
    """Let the policy's layers recompute activations inside :func:`checkpointed_layers`."""
    model: Any = policy
    # transformers renamed the method during version 5
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})


@contextmanager
def checkpointed_layers(policy: nn.Module, active: bool) -> Iterator[None]:
    """Recompute activations in the backward pass, in here, if ``active``.

    Only the layers' own switch is set to training mode: what is inside them stays in evaluation
    mode, since dropout would make the trainer's log-probs differ from the engine's.
    """
    layers = [m for m in policy.modules() if active and isinstance(m, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


class PolicyScorer(nn.Module):
    """``forward(batch)`` -> log-probs and entropies, float32 [N], of a batch's policy tokens.

    Taken after temperature and the constraint of each token, as the engine takes them. ``bf16``
    runs under autocast. The policy goes into evaluation mode and is held as a submodule, so that
    distributed wrappers see its parameters.
    """

    def __init__(self, policy: nn.Module, *, temperature: float = 1.0, bf16: bool = False) -> None:
        super().__init__()
        self.policy = policy
        self.temperature = temperature
        self.bf16 = bf16
        self.eval()  # dropout would make these log-probs differ from the engine's
        self.check_head()

    def forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        backbone, head = backbone_and_head(self.policy)
        device = batch.input_ids.device.type
        with torch.autocast(device, torch.bfloat16) if self.bf16 else nullcontext():
            states = backbone(
                input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
            ).last_hidden_state
            logprobs, entropy = linear_logprobs(
                states.flatten(0, 1)[batch.rows],
                head.weight,
                batch.token_ids,
                bias=head.bias,
                temperature=self.temperature,
                allowed=batch.allowed,
                entropy=True,
            )
        # Copies of a few numbers, because FSDP warns of views that might be written to.
        return logprobs.float().clone(), entropy.float().clone()

    @torch.no_grad()
    def check_head(self) -> None:
        """Compare states x head with the model's own logits, once, on two tokens.

        Some models scale or cap their logits after the head; log-probs taken from the head alone
        would then be silently wrong. Raises ValueError for those.
        """
        backbone, head = backbone_and_head(self.policy)
        ids = torch.arange(2, device=head.weight.device).unsqueeze(0)
        expected = self.policy(input_ids=ids, use_cache=False).logits.float()
        states = backbone(input_ids=ids, use_cache=False).last_hidden_state
        found = head(states).float()
        if (found - expected).abs().max() > HEAD_TOLERANCE * max(float(expected.std()), 1e-6):
            raise ValueError(
                f"policy: {type(self.policy).__name__} changes its logits after the output layer "
                "(scaling or soft-capping); only models whose logits are that layer's output can "
                "be trained"
            )
