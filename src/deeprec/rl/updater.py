"""Updates of the policy from sequences with advantages."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from deeprec.rl.batching import MicroBatch, TrainSequence, collate, micro_batches
from deeprec.rl.config import RLConfig
from deeprec.rl.losses import policy_loss, token_weights
from deeprec.rl.scorer import PolicyScorer, checkpointed_layers, enable_checkpointing, uses_packing

__all__ = ["PolicyUpdater", "TrainingDiverged"]


class TrainingDiverged(FloatingPointError):
    """A reward, loss or gradient is not finite; it was not applied, checkpoints are as before."""


class PolicyUpdater:
    """Holds what turns sequences into better weights: optimizer, reference, devices.

    Args:
        policy: parameters to be trained in float32.
        config: its loss, optimizer and batching.
        accelerator: where to run, and with which other processes.
        temperature: the one sequences were sampled at.
        reference: for the KL term, see :class:`~deeprec.rl.trainer.Trainer`.
    """

    def __init__(
        self,
        policy: nn.Module,
        config: RLConfig,
        accelerator: Accelerator,
        *,
        temperature: float,
        reference: nn.Module | None = None,
    ) -> None:
        self.policy, self.config, self.accelerator = policy, config, accelerator
        self.updates = 0
        """Updates applied so far."""
        if config.gradient_checkpointing:
            enable_checkpointing(policy)
        self._bf16 = config.precision == "bf16"
        self._temperature = temperature
        self._packed = uses_packing(policy)
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        self._scorer = self._score_with(policy)
        self._reference = self._freeze(reference)
        self._wrapped, self.optimizer = accelerator.prepare(
            self._scorer, self._make_optimizer(self._parameters)
        )

    def update(self, sequences: Sequence[TrainSequence], step: int) -> dict[str, float]:
        """All updates of one step, on this process's ``sequences``; their metrics.

        Empty where some process has nothing to learn from: no policy token anywhere.

        Raises TrainingDiverged.
        """
        sequences = [sequence for sequence in sequences if len(sequence.positions)]
        plan = self._plan(sequences, step)
        if not plan:
            return {}
        self._score_beforehand(sequences, plan)
        results = [self._apply(chunk, step) for chunk in plan]
        means = np.mean([list(result.values()) for result in results], axis=0)
        return {**dict(zip(results[0], means.tolist(), strict=True)), "updates": float(len(plan))}

    def _plan(self, sequences: list[TrainSequence], step: int) -> list[list[TrainSequence]]:
        """The sequences of each update: as many updates in every process."""
        config = self.config
        counts: list[int] = gather_object([len(sequences)])
        if min(counts) == 0:
            return []
        size = config.train_batch or sum(counts)
        updates = min(math.ceil(sum(counts) / size), *counts, sum(counts))
        plan = []
        for epoch in range(config.epochs):
            rng = np.random.default_rng([config.seed, step, epoch, self.accelerator.process_index])
            order = rng.permutation(len(sequences))
            plan += [[sequences[i] for i in part] for part in np.array_split(order, updates)]
        return plan

    @torch.no_grad()
    def _score_beforehand(
        self, sequences: list[TrainSequence], plan: list[list[TrainSequence]]
    ) -> None:
        """Fill in reference log-probs, and old ones where an update comes before their use."""
        first = {id(sequence) for sequence in plan[0]} if self.config.epochs == 1 else set()
        for group in self._groups(sequences):
            with_old = [sequence for sequence in group if id(sequence) not in first]
            if self.config.loss.kl_coef:
                _store(group, "reference", self._reference_logprobs(self._batch(group)))
            if with_old:
                _store(with_old, "old", self._scorer(self._batch(with_old))[0])

    def _apply(self, sequences: list[TrainSequence], step: int) -> dict[str, float]:
        """One update."""
        settings = self.config.optimizer
        self._weigh(sequences)
        groups = self._groups(sequences)
        totals: dict[str, Tensor] = {}
        with checkpointed_layers(self.policy, self.config.gradient_checkpointing):
            for number, group in enumerate(groups, start=1):
                last = number == len(groups)
                # Gradients of several processes are averaged once, after the last backward.
                wait = nullcontext() if last else self.accelerator.no_sync(self._wrapped)
                with wait:
                    loss, sums = self._loss(self._batch(group))
                    self.accelerator.backward(loss * self.accelerator.num_processes)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value
        norm = self.accelerator.clip_grad_norm_(self._parameters, settings.grad_clip)
        sums = self.accelerator.reduce(totals, reduction="sum")
        result = {name: float(value) for name, value in sums.items()}
        result["grad_norm"] = float(norm)
        for name in ("loss", "grad_norm"):
            if not math.isfinite(result[name]):
                self.optimizer.zero_grad()
                raise TrainingDiverged(
                    f"step {step + 1}: {name} is {result[name]}, the update was not applied. Lower "
                    "the learning rate; resume goes on from the last checkpoint"
                )
        self._set_learning_rate()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates += 1
        return result

    def _loss(self, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        logprobs, entropy = self._wrapped(batch)
        loss, stats = policy_loss(
            logprobs,
            entropy,
            old=logprobs.detach() if batch.old is None else batch.old,
            engine=batch.engine,
            advantages=batch.advantages,
            weights=batch.weights,
            reference=batch.reference,
            config=self.config.loss,
        )
        sums = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
        return loss, {"loss": loss.detach(), **sums}

    def _weigh(self, sequences: list[TrainSequence]) -> None:
        """Set each sequence's share of the loss, over the sequences of all processes."""
        lengths = [len(sequence.positions) for sequence in sequences]
        every: list[list[int]] = gather_object([lengths])
        weights = token_weights(
            [length for part in every for length in part], self.config.loss.aggregate
        )
        start = sum(len(part) for part in every[: self.accelerator.process_index])
        for sequence, weight in zip(sequences, weights[start:], strict=False):
            sequence.weight = weight

    def _groups(self, sequences: Sequence[TrainSequence]) -> list[list[TrainSequence]]:
        return micro_batches(
            sequences, max_tokens=self.config.tokens_per_batch, packed=self._packed
        )

    def _batch(self, sequences: Sequence[TrainSequence]) -> MicroBatch:
        return collate(sequences, packed=self._packed).to(self.accelerator.device)

    def _score_with(self, policy: nn.Module) -> PolicyScorer:
        return PolicyScorer(policy, temperature=self._temperature, bf16=self._bf16)

    def _freeze(self, reference: nn.Module | None) -> PolicyScorer | None:
        """The scorer of the reference; None where there is no KL, or adapters are switched off."""
        if not self.config.loss.kl_coef:
            return None
        if reference is None:
            if hasattr(self.policy, "peft_config"):
                return None
            reference = copy.deepcopy(self.policy)
        frozen = reference.requires_grad_(False).to(self.accelerator.device)
        return self._score_with(frozen)

    def _reference_logprobs(self, batch: MicroBatch) -> Tensor:
        if self._reference is not None:
            logprobs: Tensor = self._reference(batch)[0]
            return logprobs
        with self.policy.disable_adapter():  # type: ignore[operator]
            return self._scorer(batch)[0]

    def _make_optimizer(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.config.optimizer
        return torch.optim.AdamW(
            parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay
        )

    def _set_learning_rate(self) -> None:
        settings = self.config.optimizer
        warm = min(1.0, (self.updates + 1) / settings.warmup) if settings.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * warm


def _store(sequences: Sequence[TrainSequence], name: str, values: Tensor) -> None:
    """Give each sequence its part of per-token ``values`` as the attribute ``name``."""
    lengths = [len(sequence.positions) for sequence in sequences]
    for sequence, part in zip(sequences, values.cpu().split(lengths), strict=True):
        setattr(sequence, name, part.numpy())
