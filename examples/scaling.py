"""Memory of each GPU and traffic of each step, for any policy: what docs/SCALING.md shows.

    python examples/scaling.py --gpus 8
    python examples/scaling.py --gpus 32 --link-gb-s 50

Counts bytes from shapes; nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

FP32, BF16 = 4, 2
GB = 1e9


@dataclass(frozen=True)
class Model:
    """A causal language model by its shape; the default is Qwen2.5-7B."""

    hidden: int = 3584
    layers: int = 28
    inner: int = 18944
    heads: int = 28
    kv_heads: int = 4
    vocabulary: int = 152_064
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Queries and outputs, keys and values with biases, the gated MLP, two norms."""
        kv = self.kv_heads * self.head_dim
        attention = 2 * self.hidden**2 + 2 * self.hidden * kv + self.hidden + 2 * kv
        return attention + 3 * self.hidden * self.inner + 2 * self.hidden

    @property
    def outside_parameters(self) -> int:
        """Embeddings, output layer and the last norm: one unit of FSDP."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.outside_parameters


@dataclass(frozen=True)
class Step:
    """One step of configs/paper.yaml; ``tokens`` is a trajectory's mean length, a guess."""

    trajectories: int = 1024
    updates: int = 2
    tokens: int = 4000
    tokens_per_batch: int = 32_768


def memory(model: Model, step: Step, gpus: int) -> dict[str, float]:
    """GB on each GPU while training, and while sampling."""
    # A layer is gathered in bf16 while the one before it computes; the root unit stays gathered.
    gathered = (2 * model.layer_parameters + model.outside_parameters) * BF16
    # Its gradients come in bf16, whole, and are summed in fp32.
    reduced = max(model.layer_parameters, model.outside_parameters) * (BF16 + FP32)
    checkpoints = step.tokens_per_batch * model.hidden * model.layers * BF16
    # The layer being recomputed: about 8 hidden and 4 inner vectors a token.
    recomputed = step.tokens_per_batch * (8 * model.hidden + 4 * model.inner) * BF16
    return {
        "weights, gradients, Adam (fp32, sharded)": model.parameters * 4 * FP32 / gpus / GB,
        "gathered units (bf16)": gathered / GB,
        "gradients of one unit before they are summed": reduced / GB,
        "activations kept (one a layer)": checkpoints / GB,
        "activations of the recomputed layer": recomputed / GB,
        "logits": 0.0,  # linear_logprobs never holds them
    }


def rollout_memory(model: Model, step: Step, gpus: int) -> dict[str, float]:
    """GB on each GPU while vLLM samples; it sleeps while the policy is trained."""
    per_token = 2 * model.layers * model.kv_heads * model.head_dim * BF16
    conversations = step.trajectories / gpus
    return {
        "vLLM's weights (bf16, whole)": model.parameters * BF16 / GB,
        "keys and values of all its conversations": conversations * step.tokens * per_token / GB,
        "trainer's shard beside it (fp32)": model.parameters * 4 * FP32 / gpus / GB,
    }


def traffic(model: Model, step: Step, gpus: int) -> dict[str, float]:
    """GB that each GPU receives in one step, by the ring's (gpus - 1) / gpus of the whole."""
    share = (gpus - 1) / gpus
    total = step.trajectories * step.tokens
    batches = max(1, round(total / gpus / step.tokens_per_batch))
    whole = model.parameters * BF16 * share
    old = batches * (step.updates - 1) / step.updates  # scored before the first update
    return {
        "gathering weights, forward and backward": 2 * batches * whole / GB,
        "gathering weights to score old log-probs": old * whole / GB,
        "summing gradients (fp32)": batches * model.parameters * FP32 * share / GB,
        "weights for vLLM (fp32, once)": model.parameters * FP32 * share / GB,
        "sequences, to all processes": total * 28 * share / GB,
    }


def table(title: str, rows: dict[str, float], unit: str) -> None:
    print(f"\n{title}, {unit}")
    for name, value in rows.items():
        print(f"  {value:10.2f}  {name}")
    print(f"  {sum(rows.values()):10.2f}  together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=Step.tokens, help="mean of a trajectory")
    parser.add_argument("--link-gb-s", type=float, help="what a GPU receives a second, for seconds")
    options = parser.parse_args()
    model, step = Model(), Step(tokens=options.tokens)
    print(f"{model.parameters / 1e9:.2f} B parameters on {options.gpus} GPUs, a step of")
    print(f"{step.trajectories} trajectories x {step.tokens} tokens, {step.updates} updates")
    table("Training, each GPU", memory(model, step, options.gpus), "GB")
    table("Sampling, each GPU", rollout_memory(model, step, options.gpus), "GB")
    received = traffic(model, step, options.gpus)
    table("Received by each GPU in a step", received, "GB")
    if options.link_gb_s:
        print(f"  {sum(received.values()) / options.link_gb_s:10.1f}  seconds at that rate")
    print(
        f"\nA checkpoint: {model.parameters * 3 * FP32 / GB:.0f} GB, written by one process, which"
    )
    print("holds that much in host memory for a moment.")


if __name__ == "__main__":
    main()
