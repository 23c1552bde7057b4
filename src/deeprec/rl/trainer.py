"""The step loop of reinforcement learning."""

from __future__ import annotations

import logging
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from deeprec.rl.advantages import get_advantage
from deeprec.rl.batching import TrainSequence
from deeprec.rl.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from deeprec.rl.config import RLConfig
from deeprec.rl.credit import Credit, list_item_credit, sequence_credit
from deeprec.rl.distributed import (
    ProcessLostError,
    failing_together,
    gather,
    make_accelerator,
    naming_lost_processes,
)
from deeprec.rl.interrupt import StopRequest, TrainingInterrupted
from deeprec.rl.logging import MetricsLog
from deeprec.rl.metrics import StepClock, trajectory_means, trajectory_sums
from deeprec.rl.selection import prompt_rows
from deeprec.rl.updater import PolicyUpdater, TrainingDiverged
from deeprec.rollout import rollout

if TYPE_CHECKING:
    from deeprec.data import Requests
    from deeprec.rewards import RewardModel
    from deeprec.rollout import Engine, RetrievalEnvironment, Trajectory

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)


class Trainer:
    """Trains ``policy`` on what ``engine`` samples with it.

    Args:
        policy: a Hugging Face causal language model (or a PEFT model around one), parameters to
            be trained in float32. The engine must generate with the same module, or copy it in
            ``sync_weights``.
        engine: samples turns; its temperature is the one log-probs are taken at.
        env: answers tool calls.
        reward_model: scores trajectories; its configuration decides the stage.
        config: see :class:`~deeprec.rl.config.RLConfig`.
        reference: the policy that a KL term pulls towards; None takes the policy as it is now
            (with LoRA: without its adapters). Unused without a KL term.

    Under ``torchrun`` or ``accelerate launch`` every process samples its share of the prompts and
    holds a replica of the policy, or with ``config.fsdp`` a part of it. Then the engine must have a
    copy of its own. What is learnt does not depend on the number of processes, up to rounding.
    """

    def __init__(
        self,
        policy: nn.Module,
        engine: Engine,
        env: RetrievalEnvironment,
        reward_model: RewardModel,
        config: RLConfig,
        *,
        reference: nn.Module | None = None,
    ) -> None:
        _check(policy, engine)
        self.policy, self.engine, self.env = policy, engine, env
        self.reward_model, self.config = reward_model, config
        self.accelerator = make_accelerator()
        _check_processes(self.accelerator.num_processes, config)
        self._advantage = get_advantage(config.advantage)
        self._updater = PolicyUpdater(
            policy,
            config,
            self.accelerator,
            temperature=engine.sampling.logprob_temperature,
            reference=reference,
        )
        if config.fsdp:
            engine.sync_weights()  # says so if the engine has no copy of its own
        self._step = 0  # steps done
        self._saved = 0  # of them, in a checkpoint

    def train(self, requests: Requests, *, resume: bool = False) -> list[dict[str, float]]:
        """Run the configured steps on ``requests``; returns the metrics of each step run.

        ``resume`` goes on from the newest checkpoint under ``config.out`` exactly as if there had
        been no break, or starts afresh where there is none.

        Raises:
            TrainingInterrupted: Ctrl-C or SIGTERM; the step in progress was finished and saved.
            TrainingDiverged: a reward, a loss or a gradient is not finite.
            CheckpointError: a checkpoint cannot be written, does not fit, or is in the way of a
                new training.
            EngineError: the engine stopped answering, and did so again after being restarted.
            ProcessFailedError: another process failed; ProcessLostError: one is gone.

        After the last two, and whatever the environment or the rewards raise, the steps done so
        far are in a checkpoint; only a process lost in the middle of an update leaves just the
        last regular one.
        """
        self._open_folder(resume)
        is_main = self.accelerator.is_main_process
        folder = Path(self.config.out) if self.config.out and is_main else None
        log = MetricsLog(folder, self.config.name, first_step=self._step + 1)
        history = []
        try:
            with StopRequest() as stop, naming_lost_processes():
                while self._step < self.config.steps:
                    metrics = self._run_step(requests)
                    self._step += 1
                    history.append(metrics)
                    if is_main:
                        log.write(self._step, metrics)
                    stopping = any(gather(stop.requested))
                    finished = self._step == self.config.steps
                    if stopping or finished or self._step % self.config.checkpoint_every == 0:
                        self._save()
                    if stopping and not finished:
                        raise TrainingInterrupted(self._farewell())
        finally:
            log.close()
        return history

    def _run_step(self, requests: Requests) -> dict[str, float]:
        clock = StepClock()
        try:
            with failing_together(self.accelerator.process_index):
                with clock.part("rollout"):
                    trajectories, groups = self._sample(requests)
                with clock.part("reward"):
                    self._score(trajectories)
            kept = [row for row, t in enumerate(trajectories) if t.finish != "too_long"]
            with naming_lost_processes():
                sequences = self._sequences([trajectories[row] for row in kept], groups[kept])
        except Exception as error:
            self._save_what_was_learnt(error)  # nothing of this step was
            raise
        with clock.part("train"):
            self.engine.sleep()
            updates = self._updater.update(sequences, self._step)
            self.engine.sync_weights()

        parts = gather((trajectory_sums(trajectories), sum(map(len, sequences))))
        sums: Counter[str] = Counter()
        for part, _ in parts:
            sums.update(part)
        trained = sum(tokens for _, tokens in parts)
        return {
            **trajectory_means(sums),
            **updates,
            "tokens_per_second/rollout": sums["sampled_tokens"] / clock.seconds["rollout"],
            "tokens_per_second/train": trained / clock.seconds["train"],
            **{f"seconds/{part}": seconds for part, seconds in clock.seconds.items()},
            "seconds": sum(clock.seconds.values()),
        }

    def _score(self, trajectories: list[Trajectory]) -> None:
        """Give every trajectory its rewards."""
        rewards = self.reward_model.score(trajectories)
        for trajectory, reward in zip(trajectories, rewards, strict=True):
            if not math.isfinite(reward.total):
                raise TrainingDiverged(
                    f"step {self._step + 1}: reward_model gave user {trajectory.user} a reward "
                    f"of {reward.total}; nothing was learnt from this step"
                )
            trajectory.rewards = reward

    def _sample(self, requests: Requests) -> tuple[list[Trajectory], NDArray[np.int64]]:
        """This process's trajectories of the step, and the prompt each belongs to."""
        config, process = self.config, self.accelerator.process_index
        rows = prompt_rows(len(requests), config.prompts_per_step, self._step, config.seed)
        mine = np.array_split(rows, self.accelerator.num_processes)[process]
        trajectories = rollout(
            self.engine,
            self.env,
            requests[mine],
            samples_per_user=config.samples_per_prompt,
            # Conversations draw by user and sample: no two processes alike, however many they are.
            seed=_seed(config.seed, self._step),
        )
        return trajectories, np.arange(len(mine)).repeat(config.samples_per_prompt)

    def _sequences(
        self, trajectories: list[Trajectory], groups: NDArray[np.int64]
    ) -> list[TrainSequence]:
        """Trajectories with the advantage of each of their tokens."""
        if self.config.credit == "list_item":
            gains = [self.reward_model.list_item_rewards(t) for t in trajectories]
            credit = list_item_credit(trajectories, gains, groups, self.config.list_discount)
        else:
            credit = sequence_credit(trajectories)
        advantages = self._advantages(credit, groups)
        return [
            TrainSequence.from_trajectory(trajectory, credit.spread(advantages, row))
            for row, trajectory in enumerate(trajectories)
        ]

    def _advantages(self, credit: Credit, groups: NDArray[np.int64]) -> NDArray[np.float64]:
        """Advantages [n, S] of this process's trajectories, normalised over all processes'."""
        parts = gather((credit.returns, credit.tokens, groups))
        width = max(part[0].shape[1] for part in parts)
        returns, tokens = (
            np.concatenate([np.pad(p[i], ((0, 0), (0, width - p[i].shape[1]))) for p in parts])
            for i in (0, 1)
        )
        # Prompts are numbered within a process: tell them apart.
        prompts = np.concatenate(
            [part[2] + i * self.config.prompts_per_step for i, part in enumerate(parts)]
        )
        advantages = self._advantage(returns, prompts, tokens)
        start = sum(len(part[2]) for part in parts[: self.accelerator.process_index])
        return advantages[start : start + len(groups)]

    # Checkpoints ------------------------------------------------------------------------------

    @property
    def _checkpoints(self) -> Path | None:
        out = self.config.out
        return Path(out) / "checkpoints" / self.config.name if out else None

    def _open_folder(self, resume: bool) -> None:
        """Load the newest checkpoint, or see to it that there is none."""
        latest = latest_checkpoint(self._checkpoints) if self._checkpoints else None
        if latest is None:
            return
        if not resume:
            raise CheckpointError(
                f"{latest} is in the way of a new training: resume it, choose another out or name, "
                "or delete it"
            )
        state = load_checkpoint(latest, self.policy, self._updater.optimizer)
        if state["seed"] != self.config.seed:
            raise CheckpointError(
                f"{latest} was written with seed {state['seed']}, this training has "
                f"{self.config.seed}: give the same seed to resume"
            )
        self._step = self._saved = state["step"]
        self._updater.updates = state["updates"]
        self.engine.sync_weights()

    def _save(self) -> None:
        self._write_checkpoint()
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self) -> None:
        """Save; of a sharded policy all processes must."""
        if self._checkpoints is None:
            return
        # Prompts, samples and mini-batches follow from seed and step: no generator to keep.
        state = {"step": self._step, "updates": self._updater.updates, "seed": self.config.seed}
        save_checkpoint(
            self._checkpoints,
            self.policy,
            self._updater.optimizer,
            state,
            keep=self.config.keep_checkpoints,
            write=self.accelerator.is_main_process,
        )
        self._saved = self._step

    def _save_what_was_learnt(self, error: Exception) -> None:
        """Save the steps done, if they are not, when a step failed before its first update."""
        folder = self._checkpoints
        if folder is None or self._step == 0:
            return
        # Without the lost process, the others cannot put a sharded policy together.
        lost = self.config.fsdp and isinstance(error, ProcessLostError)
        if self._step != self._saved and not lost:
            self._write_checkpoint()
        logger.warning(
            "%s: step %d failed; resume goes on from %s",
            self.config.name,
            self._step + 1,
            latest_checkpoint(folder) or "the beginning, for lack of a checkpoint",
        )

    def _farewell(self) -> str:
        where = f"{self.config.name} stopped after step {self._step} of {self.config.steps}"
        if self._checkpoints is None:
            return f"{where}; nothing was saved, since out is not set"
        return f"{where} and saved to {self._checkpoints}; resume goes on from there"


def _seed(*keys: int) -> int:
    return int(np.random.SeedSequence(keys).generate_state(1)[0])


def _check(policy: nn.Module, engine: Engine) -> None:
    trained = [p for p in policy.parameters() if p.requires_grad]
    if not trained:
        raise ValueError("policy: no parameter requires a gradient, there is nothing to train")
    halves = {p.dtype for p in trained} & {torch.bfloat16, torch.float16}
    if halves:
        raise ValueError(
            f"policy: parameters to be trained are {halves.pop()}, where small updates are lost in "
            "rounding; load it in float32 and set precision='bf16' to compute in bfloat16"
        )
    if engine.sampling.takes_best:
        raise ValueError(
            "engine.sampling: greedy decoding gives every sample of a prompt the same reward; set "
            "a temperature above 0"
        )


def _check_processes(count: int, config: RLConfig) -> None:
    if count > config.prompts_per_step:
        raise ValueError(
            f"prompts_per_step: expected at least one a process, {count}, "
            f"got {config.prompts_per_step}"
        )
    if config.fsdp and count == 1:
        raise ValueError(
            "fsdp: there is one process, nothing to spread the policy over; start several with "
            "torchrun or accelerate launch, or leave fsdp off"
        )
