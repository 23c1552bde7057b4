"""Settings that cannot work are refused by name."""

from collections.abc import Callable

import pytest

from deeprec.rl import LoRAConfig, LossConfig, OptimizerConfig, RLConfig, StageConfig


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: RLConfig(samples_per_prompt=1), "samples_per_prompt"),
        (lambda: RLConfig(steps=0), "steps"),
        (lambda: RLConfig(train_batch=0), "train_batch"),
        (lambda: RLConfig(name="a/b"), "name"),
        (lambda: LossConfig(clip_low=0), "clip_low"),
        (lambda: LossConfig(importance_cap=0.5), "importance_cap"),
        (lambda: OptimizerConfig(lr=0), "lr"),
        (lambda: LoRAConfig(rank=0), "rank"),
    ],
)
def test_refused(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        make()


def test_the_defaults_are_the_papers() -> None:
    config = RLConfig()
    assert config.prompts_per_step * config.samples_per_prompt == 1024
    assert (config.train_batch, config.epochs, config.optimizer.lr) == (512, 1, 1e-6)
    assert [stage.steps for stage in StageConfig.paper()] == [20, 80]


def test_a_stage_changes_only_its_own_settings() -> None:
    shared = RLConfig(seed=3, tokens_per_batch=99, loss=LossConfig(clip_high=0.3))
    stage = StageConfig("late", reward="rec", steps=5, lr=1e-4, credit="list_item")
    config = stage.apply(shared)
    assert (config.name, config.steps, config.optimizer.lr) == ("late", 5, 1e-4)
    assert (config.credit, config.seed, config.tokens_per_batch) == ("list_item", 3, 99)
    assert config.loss == shared.loss
