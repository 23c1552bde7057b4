"""Updates of the policy from sequences with advantages."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor, nn

from deeprec.rl.batching import MicroBatch, TrainSequence, collate, micro_batches
from deeprec.rl.config import RLConfig
from deeprec.rl.distributed import deal, shard
from deeprec.rl.losses import policy_loss, token_weights
from deeprec.rl.scorer import PolicyScorer, checkpointed_layers, enable_checkpointing, uses_packing
from deeprec.rollout.weights import whole

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
        self._scorer = self._score_with(policy)
        self._reference = self._freeze(reference)
        if config.fsdp:
            shard(self._scorer, bf16=self._bf16)
        self._parameters = [p for p in policy.parameters() if p.requires_grad]
        self._wrapped: nn.Module = self._scorer
        self.optimizer = self._make_optimizer(self._parameters)
        if not config.fsdp:
            self._wrapped, self.optimizer = accelerator.prepare(self._scorer, self.optimizer)

    def update(self, sequences: Sequence[TrainSequence], step: int) -> dict[str, float]:
        """All updates of one step, on the ``sequences`` of all processes; their metrics.

        Each process gives those it sampled. They are dealt out anew for every update, so updates
        are the same for any number of processes. Empty where there is nothing to learn from: no
        policy token anywhere.

        Raises TrainingDiverged.
        """
        every: list[TrainSequence] = gather_object(list(sequences))
        every = [sequence for sequence in every if len(sequence.positions)]
        if not every:
            return {}
        plan = self._plan(every, step)
        self._score_beforehand(every, plan)
        results = [self._apply(chunk, step) for chunk in plan]
        means = np.mean([list(result.values()) for result in results], axis=0)
        return {**dict(zip(results[0], means.tolist(), strict=True)), "updates": float(len(plan))}

    def _plan(self, sequences: list[TrainSequence], step: int) -> list[list[TrainSequence]]:
        """The sequences of each update."""
        config = self.config
        updates = math.ceil(len(sequences) / (config.train_batch or len(sequences)))
        plan = []
        for epoch in range(config.epochs):
            order = np.random.default_rng([config.seed, step, epoch]).permutation(len(sequences))
            plan += [[sequences[i] for i in part] for part in np.array_split(order, updates)]
        return plan

    @torch.no_grad()
    def _score_beforehand(
        self, sequences: list[TrainSequence], plan: list[list[TrainSequence]]
    ) -> None:
        """Fill in reference log-probs, and old ones where an update comes before their use."""
        if self.config.loss.kl_coef:
            self._score(sequences, "reference", self._reference_logprobs)
        first = {id(sequence) for sequence in plan[0]} if self.config.epochs == 1 else set()
        later = [sequence for sequence in sequences if id(sequence) not in first]
        if later:
            self._score(later, "old", lambda batch: self._scorer(batch)[0])

    def _score(
        self,
        sequences: list[TrainSequence],
        name: str,
        logprobs: Callable[[MicroBatch], Tensor],
    ) -> None:
        """Give every sequence its ``logprobs`` as the attribute ``name``, each scored once."""
        found: dict[int, NDArray[np.float32]] = {}
        number = {id(sequence): index for index, sequence in enumerate(sequences)}
        for group in self._share(sequences):
            lengths = [len(sequence.positions) for sequence in group]
            parts = logprobs(self._batch(group)).cpu().split(lengths)
            for sequence, part in zip(group, parts, strict=True):
                if id(sequence) in number:  # else it only fills up this process's rounds
                    found[number[id(sequence)]] = part.numpy()
        for part in gather_object([found]):
            for index, values in part.items():
                setattr(sequences[index], name, values)

    def _apply(self, sequences: list[TrainSequence], step: int) -> dict[str, float]:
        """One update."""
        lengths = [len(sequence.positions) for sequence in sequences]
        for sequence, weight in zip(
            sequences, token_weights(lengths, self.config.loss.aggregate), strict=True
        ):
            sequence.weight = weight
        groups = self._share(sequences)
        totals: dict[str, Tensor] = {}
        with checkpointed_layers(self.policy, self.config.gradient_checkpointing):
            for number, group in enumerate(groups, start=1):
                with self._synchronizing(last=number == len(groups)):
                    loss, sums = self._loss(self._batch(group))
                    # Processes are averaged; the weights above make a sum right.
                    self.accelerator.backward(loss * self.accelerator.num_processes)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value
        norm = nn.utils.clip_grad_norm_(self._parameters, self.config.optimizer.grad_clip)
        sums = self.accelerator.reduce(totals, reduction="sum")
        result = {name: float(value) for name, value in sums.items()}
        result["grad_norm"] = float(whole(norm))
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

    def _synchronizing(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients of several processes are averaged once, after the last backward.

        Sharded ones every time: put off, each process would hold the whole gradient.
        """
        if last or self.config.fsdp:
            return nullcontext()
        return self.accelerator.no_sync(self._wrapped)

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

    def _share(self, sequences: list[TrainSequence]) -> list[list[TrainSequence]]:
        """This process's micro-batches of ``sequences``: as many as every other has.

        A process with fewer repeats its shortest sequence without weight: a sharded policy is
        gathered by all processes at once.
        """
        hands = deal([len(sequence) for sequence in sequences], self.accelerator.num_processes)
        shares = [
            micro_batches(
                [sequences[i] for i in hand],
                max_tokens=self.config.tokens_per_batch,
                packed=self._packed,
            )
            for hand in hands
        ]
        mine = shares[self.accelerator.process_index]
        missing = max(map(len, shares)) - len(mine)
        filler = replace(min(sequences, key=len), weight=0.0) if missing else None
        return mine + [[filler] for _ in range(missing) if filler is not None]

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
