"""Training of the preference-aware TRM.

The paper leaves it open. Here: one example a position of a user's sequence, whose target is one
of the next items, learnt both without a preference and with one, made up by
:mod:`deeprec.trm.preferences` or written by a policy; cross entropy over the whole catalogue on
the scaled cosine; a moving average of the parameters, and early stopping on its validation
NDCG@10 without a preference.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel

from deeprec.data import Dataset, Requests
from deeprec.ops import ItemIndex, SeenItems, linear_logprobs
from deeprec.trm.config import TRMConfig
from deeprec.trm.examples import Batch, Examples, WrittenPreference, WrittenPreferences
from deeprec.trm.model import PreferenceAwareTRM
from deeprec.trm.phrases import Int64Array, PhraseBook, PhraseEncoder, TextEncoder
from deeprec.trm.preferences import PreferenceMix, PreferenceWriter

logger = logging.getLogger(__name__)

# Items left out at the end of every sequence: up to and including the RL or validation target.
HELD_OUT = {"rl": 3, "valid": 2}
SIMILAR_ITEMS = 10  # "like …" phrases name one of so many neighbours of the target
VALIDATION_BATCH = 1024
WARMUP_STEPS = 50
LAST_RATE = 0.1  # the learning rate falls linearly to this share
GRADIENT_CLIP = 1.0


@dataclass
class TRMTrainConfig:
    """How a TRM is built and trained; the defaults suit catalogues of a few thousand items."""

    holdout: Literal["rl", "valid"] = "valid"
    """"rl" leaves out each user's last three items, for the TRM that answers in training;
    "valid" the last two, for the TRM of the evaluation."""
    seed: int = 0
    hidden: int = 64
    inner: int = 256
    n_layers: int = 2
    n_heads: int = 2
    n_experts: int = 8
    max_length: int = 20
    """Histories are cut to their last items, so many."""
    examples_per_user: int | None = None
    """Only the last so many positions of each user are trained on; None is all of them."""
    lookahead: float = 0.4
    """Probability that an example's target is a later item, see
    :class:`~deeprec.trm.examples.Examples`."""
    dropout: float = 0.3
    adaptor_dropout: float = 0.2
    mix: PreferenceMix = field(default_factory=PreferenceMix)
    written_share: float = 0.5
    """Share of the examples with a policy-written preference that get it."""
    preference_weight: float = 0.5
    """Of the loss with a preference; every example is also learnt without one."""
    average: float = 0.99
    """Decay a step of the moving average of the parameters, which is what is evaluated and kept."""
    temperature: float = 0.07
    """Divides the cosine before the softmax."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    batch_size: int = 512
    max_epochs: int = 10
    patience: int = 2
    """Training stops after so many epochs without a better validation NDCG@10."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the matrix products; "auto" is bf16 where the device computes in it."""
    device: str | None = None
    """torch device; None is cuda when there is one, else cpu."""

    def __post_init__(self) -> None:
        if self.holdout not in HELD_OUT:
            raise ValueError(f"holdout must be one of {', '.join(HELD_OUT)}, got {self.holdout!r}")
        if self.dtype not in ("auto", "fp32", "bf16"):
            raise ValueError(f"dtype must be auto, fp32 or bf16, got {self.dtype!r}")
        for name in ("batch_size", "max_epochs", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lookahead", "preference_weight", "average"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("temperature", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


@dataclass(frozen=True)
class Epoch:
    """One line of a training log: mean loss, validation NDCG@10, seconds since the start."""

    loss: float
    ndcg: float
    seconds: float

    def __str__(self) -> str:
        return f"loss {self.loss:.3f}, NDCG@10 {self.ndcg:.4f}, {self.seconds:.0f} s"


@dataclass(frozen=True)
class TrainedTRM:
    """The TRM of the best epoch, in evaluation mode, and how it was trained."""

    model: PreferenceAwareTRM
    config: TRMTrainConfig
    epochs: tuple[Epoch, ...]


def train_trm(
    dataset: Dataset,
    encoder: TextEncoder,
    config: TRMTrainConfig,
    *,
    extra_preferences: Sequence[WrittenPreference] = (),
) -> TrainedTRM:
    """Train a TRM on a data set; no gradient comes from what is held out, as input or target.

    The best epoch is chosen on the validation targets, whatever is held out; their histories
    contain the RL targets.

    Preferences are embedded phrase by phrase (:class:`~deeprec.trm.PhraseEncoder`), and must be
    when the TRM answers. ``extra_preferences`` are ones that a policy wrote; those before
    held-out items are not used. The same seed and thread count give the same TRM.

    Raises ValueError when nothing is left to train on.
    """
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    device = torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    examples = Examples(
        dataset,
        HELD_OUT[config.holdout],
        config.max_length,
        config.examples_per_user,
        config.lookahead,
    )
    validation = dataset.requests("valid", max_history=config.max_length)
    item_texts = encoder.encode(dataset.catalog.encoder_texts())
    preferences = _Preferences(dataset, encoder, item_texts, config, extra_preferences)
    model = _new_model(dataset, item_texts, config).to(device)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
    )
    batches = math.ceil(len(examples) / config.batch_size)
    steps = config.max_epochs * batches
    schedule = LambdaLR(optimizer, lambda step: _rate(step, steps))
    averaged = AveragedModel(model, avg_fn=partial(_average, config.average))
    evaluated = cast(PreferenceAwareTRM, averaged.module)
    log: list[Epoch] = []
    best = copy.deepcopy(model.state_dict())
    began = time.perf_counter()
    for number in range(config.max_epochs):
        model.train()
        losses = []
        for batch in track(
            examples.epoch(config.batch_size, rng),
            f"Recommender ({config.holdout}), epoch {number + 1} of at most {config.max_epochs}",
            total=batches,
        ):
            with _matmul_precision(config.dtype, device):
                drawn = preferences.draw(batch, rng)
                loss = _loss(model, batch, drawn, config)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, GRADIENT_CLIP)
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            losses.append(loss.detach())
        evaluated.train()  # drops the index of the last evaluation
        ndcg = validation_ndcg(evaluated.eval(), validation)
        log.append(Epoch(float(torch.stack(losses).mean()), ndcg, time.perf_counter() - began))
        logger.info("TRM (%s) epoch %d: %s", config.holdout, len(log), log[-1])
        best_epoch = max(range(len(log)), key=lambda epoch: log[epoch].ndcg)
        if best_epoch == len(log) - 1:
            best = copy.deepcopy(evaluated.state_dict())
        elif len(log) - 1 - best_epoch >= config.patience:
            break
    model.load_state_dict(best)
    return TrainedTRM(model.eval(), config, tuple(log))


def similar_items(item_texts: Tensor, count: int = SIMILAR_ITEMS) -> Int64Array:
    """The items with the closest texts, int64 ``[n_items + 1, count]``, best first; row 0 is 0."""
    n_items = len(item_texts)
    itself = SeenItems(torch.arange(n_items + 1), torch.arange(n_items))
    index = ItemIndex(item_texts, metric="cosine")
    found = index.search(item_texts, min(count, n_items - 1), itself)
    return F.pad(found.indices + 1, (0, 0, 1, 0)).numpy()


def validation_ndcg(model: PreferenceAwareTRM, requests: Requests, k: int = 10) -> float:
    """Mean NDCG@k without a preference, history excluded."""
    device = next(model.parameters()).device
    total = 0.0
    for start in range(0, len(requests), VALIDATION_BATCH):
        part = requests[start : start + VALIDATION_BATCH]
        history = torch.from_numpy(part.history).to(device)
        lengths = torch.from_numpy(part.lengths).to(device)
        found = model.retrieve(history, lengths, None, k, exclude_history=True)
        ranks = np.nonzero(found.indices.cpu().numpy() == part.targets[:, None])[1]
        total += float((1.0 / np.log2(ranks + 2.0)).sum())
    return total / len(requests)


class _Preferences:
    """Draws the preference vectors of a batch."""

    def __init__(
        self,
        dataset: Dataset,
        encoder: TextEncoder,
        item_texts: Tensor,
        config: TRMTrainConfig,
        written: Sequence[WrittenPreference],
    ) -> None:
        book = PhraseBook(dataset.catalog)
        self._writer = PreferenceWriter(book, similar_items(item_texts), config.mix)
        vectors = encoder.encode(book.texts[1:], query=True, store=True)
        self._vectors = F.pad(vectors, (0, 0, 1, 0))
        self._written = WrittenPreferences(dataset, written, PhraseEncoder(encoder))
        self._written_share = config.written_share

    def draw(self, batch: Batch, rng: np.random.Generator) -> Tensor:
        """Float32 ``[B, P]``, zeros where an example has none; as PhraseEncoder embeds them."""
        phrases = self._writer.for_training(batch.history, batch.lengths, batch.targets, rng)
        summed = F.embedding_bag(torch.from_numpy(phrases), self._vectors, mode="sum")
        vectors = F.normalize(summed, dim=-1)
        self._written.replace(vectors, batch.rows, self._written_share, rng)
        return vectors


def _new_model(dataset: Dataset, item_texts: Tensor, config: TRMTrainConfig) -> PreferenceAwareTRM:
    shape = TRMConfig(
        n_items=dataset.catalog.n_items,
        text_dim=item_texts.shape[1],
        hidden=config.hidden,
        inner=config.inner,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_experts=config.n_experts,
        max_length=config.max_length,
        dropout=config.dropout,
        adaptor_dropout=config.adaptor_dropout,
    )
    model = PreferenceAwareTRM(shape, item_texts)
    # Items start where their texts lie, so that rare ones are not lost at random places.
    components = min(config.hidden, item_texts.shape[1])
    centred = item_texts - item_texts.mean(dim=0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    start = centred @ axes[:, -components:]
    with torch.no_grad():
        table = model.item_embedding.weight
        table[1:, :components] = start * (table[1:].std() / start.std())
    return model


def _loss(
    model: PreferenceAwareTRM,
    batch: Batch,
    preference: Tensor,
    config: TRMTrainConfig,
) -> Tensor:
    """Mean cross entropy of the targets over the catalogue, without the padding row.

    Every example is learnt without a preference as well as with one: the history is encoded once
    for both.
    """
    table = model.item_embedding.weight
    history, lengths, targets = (
        torch.from_numpy(array).to(table.device)
        for array in (batch.history, batch.lengths, batch.targets)
    )
    states = model.history_states(history, lengths)
    users = torch.cat(
        [
            model.with_preference(states, None),
            model.with_preference(states, preference.to(table.device)),
        ]
    )
    logprobs = linear_logprobs(
        F.normalize(users.float(), dim=-1),
        F.normalize(table[1:], dim=-1),
        targets.repeat(2) - 1,
        temperature=config.temperature,
    )
    assert isinstance(logprobs, Tensor)  # entropy was not asked for
    without, told = logprobs.view(2, -1).mean(dim=1)
    return -torch.lerp(without, told, config.preference_weight)


def _average(decay: float, average: Tensor, current: Tensor, steps: Tensor) -> Tensor:
    """An exponential moving average that in the first steps forgets faster than ``decay``."""
    return torch.lerp(current, average, min(decay, (1 + int(steps)) / (10 + int(steps))))


def _rate(step: int, steps: int) -> float:
    """Learning rate of a step as a share of the highest: warm-up, then linear decay."""
    progress = min(step / steps, 1.0)
    return min((step + 1) / WARMUP_STEPS, 1.0) * (1.0 - (1.0 - LAST_RATE) * progress)


@contextmanager
def _matmul_precision(dtype: str, device: torch.device) -> Iterator[None]:
    """bf16 autocast where it is wanted and computed natively."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported()
    else:
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    wanted = dtype == "bf16" or (dtype == "auto" and native)
    with torch.autocast(device.type, torch.bfloat16, enabled=wanted):
        yield
