"""A step of training is the same whether the kernels or plain torch compute its log-probs."""

from collections.abc import Callable, Sequence

import pytest
import torch

from deeprec import backends
from deeprec.policy.model import TitlePolicyConfig
from deeprec.rewards import Rewards
from deeprec.rl import OptimizerConfig, RLConfig, Trainer
from deeprec.rollout import Trajectory

# Several updates, so that the later ones have ratios other than 1.
CONFIG = RLConfig(
    steps=1,
    prompts_per_step=8,
    samples_per_prompt=4,
    train_batch=8,
    epochs=2,
    optimizer=OptimizerConfig(lr=1e-4),
)


class Varied:
    """Rewards that differ within a group, whatever an untrained policy writes."""

    def score(self, trajectories: Sequence[Trajectory]) -> list[Rewards]:
        gains = [float(sum(made.response_ids) % 7) for made in trajectories]
        return [Rewards(0.0, 0.0, 0.0, gain, 0.0, gain, ()) for gain in gains]


def default_shape(make_world: Callable, warm_world: Callable) -> object:
    """The policy that `deeprec run` trains; untrained, so its answers are noise."""
    shape = TitlePolicyConfig()
    return make_world(items=500, hidden=shape.hidden_size, layers=shape.layers)


def conversations(make_world: Callable, warm_world: Callable) -> object:
    """A small policy that calls the recommender and lists titles under their constraint."""
    return warm_world()


@pytest.mark.parametrize("build", [default_shape, conversations])
def test_kernels_change_no_loss(
    make_world: Callable, warm_world: Callable, monkeypatch: pytest.MonkeyPatch, build: Callable
) -> None:
    def step(backend: str) -> tuple[dict, list[torch.Tensor]]:
        monkeypatch.setenv("DEEPREC_BACKEND", backend)
        world = build(make_world, warm_world)
        before = [p.detach().clone() for p in world.policy.parameters()]
        trainer = Trainer(world.policy, world.engine, world.env, Varied(), CONFIG)
        backends.reset_op_table()
        (metrics,) = trainer.train(world.requests)
        assert backends.op_table()["linear_logprobs", backend].calls > 0
        after = world.policy.parameters()
        return metrics, [b.detach() - a for a, b in zip(before, after, strict=True)]

    ours, our_moves = step("cpu")
    plain, plain_moves = step("reference")
    assert ours["updates"] == plain["updates"] >= 4
    assert ours["loss"] != 0
    assert ours["kl"] > 0
    for name in ("loss", "kl", "entropy", "clip_fraction", "logprob_difference"):
        assert ours[name] == pytest.approx(plain[name], abs=1e-5, rel=1e-5), name
    assert ours["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    # Adam's first steps have one size whatever the gradient's: noise in tiny ones shows here.
    for moves, others in zip(our_moves, plain_moves, strict=True):
        assert (moves - others).norm() <= 0.1 * others.norm()
