"""Training of the preference-aware TRM.

The paper leaves it open. Here: one example a position of a user's sequence, most of them with a
preference made up by :mod:`deeprec.trm.preferences`, cross entropy over the whole catalogue on
the scaled cosine, and early stopping on validation NDCG@10 without a preference.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from deeprec.data import Dataset, Requests
from deeprec.trm.config import TRMConfig
from deeprec.trm.examples import Examples, WrittenPreference, WrittenPreferences
from deeprec.trm.model import PreferenceAwareTRM
from deeprec.trm.phrases import Int64Array, PhraseBook, PhraseEncoder, TextEncoder
from deeprec.trm.preferences import PreferenceMix, PreferenceWriter
from deeprec.ops import ItemIndex, SeenItems, linear_logprobs

logger = logging.getLogger(__name__)

HELD_OUT = {"rl": 3, "valid": 2}
SIMILAR_ITEMS = 10
EVALUATION_BATCH = 1024
WARMUP_STEPS = 50


@dataclass
class TRMTrainConfig:
    """How a TRM is built and trained; the defaults suit catalogues of a few thousand items."""

    holdout: Literal["rl", "valid"] = "valid"
    hidden: int = 64
    inner: int = 256
    n_layers: int = 2
    n_heads: int = 2
    n_experts: int = 8
    max_length: int = 20
    dropout: float = 0.3
    adaptor_dropout: float = 0.2
    mix: PreferenceMix = field(default_factory=PreferenceMix)
    temperature: float = 0.07
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    batch_size: int = 512
    max_epochs: int = 12
    patience: int = 3
    seed: int = 0
    text_init: bool = True
    text_init_scale: float = 1.0
    ema: float = 0.0
    bf16: bool = False
    label_smoothing: float = 0.0
    mask_history: bool = False
    floor: float = 0.1
    written_share: float = 0.5
    max_seconds: float = 1e9


@dataclass
class TrainedTRM:
    model: PreferenceAwareTRM
    config: TRMTrainConfig
    history: list[dict]
    seconds: float


def similar_items(item_texts, k=SIMILAR_ITEMS):
    n = len(item_texts)
    itself = SeenItems(torch.arange(n + 1), torch.arange(n))
    found = ItemIndex(item_texts, metric="cosine").search(item_texts, min(k, n - 1), itself)
    return F.pad(found.indices + 1, (0, 0, 1, 0)).numpy()


def train_trm(
    dataset: Dataset,
    encoder: TextEncoder,
    config: TRMTrainConfig,
    *,
    start: PreferenceAwareTRM | None = None,
    extra_preferences: Sequence[WrittenPreference] = (),
    evaluate=None,
) -> TrainedTRM:
    began = time.perf_counter()
    torch.manual_seed(config.seed)
    rng = np.random.default_rng(config.seed)
    item_texts = encoder.encode(dataset.catalog.encoder_texts())
    book = PhraseBook(dataset.catalog)
    writer = PreferenceWriter(book, similar_items(item_texts), config.mix)
    phrases = F.pad(encoder.encode(list(book.texts[1:]), query=True, store=True), (0, 0, 1, 0))
    examples = Examples(dataset, HELD_OUT[config.holdout], config.max_length)
    validation = dataset.requests("valid", max_history=config.max_length)
    tc = TRMConfig(dataset.catalog.n_items, item_texts.shape[1], hidden=config.hidden, inner=config.inner,
        n_layers=config.n_layers, n_heads=config.n_heads, n_experts=config.n_experts, max_length=config.max_length,
        dropout=config.dropout, adaptor_dropout=config.adaptor_dropout)
    model = PreferenceAwareTRM(tc, item_texts)
    if start is not None:
        model.load_state_dict(start.state_dict())
    elif config.text_init:
        c = item_texts - item_texts.mean(0)
        _, vec = torch.linalg.eigh(c.T @ c)
        z = c @ vec[:, -config.hidden:]
        with torch.no_grad():
            model.item_embedding.weight[1:] = z / z.std() * 0.02 * config.text_init_scale
    logger.info("%d examples, %d phrases, prepared in %.1f s", len(examples), len(book.texts), time.perf_counter() - began)
    written = WrittenPreferences(dataset, extra_preferences, PhraseEncoder(encoder)) if extra_preferences else None
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    per_epoch = -(-len(examples) // config.batch_size)
    total = per_epoch * config.max_epochs
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / WARMUP_STEPS, 1.0) * (1 - (1 - config.floor) * s / total))
    ema = {k: v.clone() for k, v in model.state_dict().items()} if config.ema else None
    best, best_state, log = -1.0, None, []
    began_train = time.perf_counter()
    for epoch in range(config.max_epochs):
        model.train()
        losses = []
        for batch in examples.epoch(config.batch_size, rng):
            ids = writer.for_training(batch.history, batch.lengths, batch.targets, rng)
            pref = F.normalize(F.embedding_bag(torch.from_numpy(ids), phrases, mode="sum"), dim=-1)
            if written is not None:
                written.replace(pref, batch.rows, config.written_share, rng)
            h = torch.from_numpy(batch.history)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                users = model.user_vectors(h, torch.from_numpy(batch.lengths), pref)
                logits = F.normalize(users.float(), dim=-1) @ F.normalize(model.item_embedding.weight, dim=-1).T
            logits = logits.float() / config.temperature
            drop = torch.zeros_like(logits, dtype=torch.bool)
            drop[:, 0] = True
            if config.mask_history:
                drop.scatter_(1, h, True)
            logits = logits.masked_fill(drop, -1e9)
            loss = F.cross_entropy(logits, torch.from_numpy(batch.targets), label_smoothing=config.label_smoothing)
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            opt.step()
            sched.step()
            losses.append(loss.item())
            if ema is not None:
                with torch.no_grad():
                    torch._foreach_lerp_([v for v in ema.values()], [v for v in model.state_dict().values()], 1 - config.ema)
        t_epoch = time.perf_counter() - began_train
        raw = None
        if ema is not None:
            raw = {k: v.clone() for k, v in model.state_dict().items()}
            model.load_state_dict(ema)
        model.eval()
        ndcg = validation_ndcg(model, validation)
        log.append(dict(epoch=epoch, loss=float(np.mean(losses)), ndcg=ndcg, seconds=t_epoch))
        extra = evaluate(model) if evaluate else ""
        logger.info("epoch %d loss %.3f valid ndcg %.4f  %.1f s %s", epoch, np.mean(losses), ndcg, t_epoch, extra)
        if ndcg > best:
            best, best_state, best_epoch = ndcg, {k: v.clone() for k, v in model.state_dict().items()}, epoch
        if raw is not None:
            model.load_state_dict(raw)
        if epoch - best_epoch >= config.patience or time.perf_counter() - began_train > config.max_seconds:
            break
    model.load_state_dict(best_state)
    return TrainedTRM(model.eval(), config, log, time.perf_counter() - began_train)


def validation_ndcg(model, requests: Requests, preference=None, k=10):
    return metrics(model, requests, preference)[0]


def metrics(model, requests, preference=None):
    rows = []
    for s in range(0, len(requests), EVALUATION_BATCH):
        r = requests[s : s + EVALUATION_BATCH]
        found = model.retrieve(torch.from_numpy(r.history), torch.from_numpy(r.lengths),
            None if preference is None else preference[s : s + EVALUATION_BATCH], 20, exclude=SeenItems.from_padded(r.history))
        hit = found.indices.numpy() == r.targets[:, None]
        rows.append(hit)
    hit = np.concatenate(rows)
    disc = 1 / np.log2(np.arange(20) + 2)
    return float((hit[:, :10] * disc[:10]).sum(1).mean()), float(hit[:, :10].any(1).mean()), float(hit.any(1).mean())
