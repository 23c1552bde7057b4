"""Next-item pre-training of the title-token policy.

What a language model brings to the conversation is knowledge that the recommender lacks; here it
is the date of a request. The policy is pre-trained as a causal language model over dated
histories (week, title, week, title, …): each title is predicted from everything before it and the
week it was taken in.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import track
from transformers import PreTrainedModel

from deeprec.data import Dataset, Requests
from deeprec.eval import evaluate_ranking
from deeprec.ops import linear_logprobs
from deeprec.policy.model import dropout
from deeprec.policy.prompts import TitlePrompt, TitleTokens

__all__ = ["PretrainConfig", "next_item_logits", "pretrain", "sequence_logits"]

WINDOW = 21  # items read at once: a history of 20 and the item after it


@dataclass
class PretrainConfig:
    """Next-item pre-training.

    Args:
        epochs: passes over the training sequences; the best on validation is kept.
        learning_rate: peak of a cosine schedule with 50 steps of warm-up.
        batch_size: windows a step.
        window: most items a training window holds (history of 20 and the target).
        embedding_dropout: on input embeddings and the last hidden state.
        residual_dropout: on what each block adds.
        weight_decay: of matrices; vectors are not decayed.
        validation_users: users whose next item measures each epoch.
    """

    epochs: int = 4
    learning_rate: float = 2e-3
    batch_size: int = 64
    window: int = 21
    embedding_dropout: float = 0.3
    residual_dropout: float = 0.1
    weight_decay: float = 0.1
    validation_users: int = 1500


def _windows(
    dataset: Dataset, tokens: TitleTokens, config: PretrainConfig, rng: np.random.Generator
) -> list[list[npt.NDArray[np.int64]]]:
    """Batches of token windows in random order, windows of like length together."""
    offsets, items, timestamps = dataset.train()
    dated = tokens.dated(items, timestamps)
    windows = []
    for first, last in itertools.pairwise(offsets):
        # A random phase, so that long histories are not always cut at the same items.
        phase = int(rng.integers(config.window)) if last - first > config.window else 0
        for start in range(int(first) - phase, int(last), config.window):
            window = dated[2 * max(start, int(first)) : 2 * min(start + config.window, int(last))]
            if len(window) >= 4:
                windows.append(window)
    rng.shuffle(windows)
    windows.sort(key=lambda window: len(window) + 8 * rng.random())
    size = config.batch_size
    batches = [windows[i : i + size] for i in range(0, len(windows), size)]
    rng.shuffle(batches)
    return batches


def padded(rows: list[npt.NDArray[np.int64]], pad: int) -> torch.Tensor:
    """``rows`` as one int64 batch, filled up with ``pad`` on the right."""
    width = max(len(row) for row in rows)
    batch = np.full((len(rows), width), pad, dtype=np.int64)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return torch.from_numpy(batch)


@torch.inference_mode()
def next_item_logits(
    model: PreTrainedModel,
    prompts: TitlePrompt,
    requests: Requests,
    batch_size: int = 256,
    exclude_history: bool = True,
) -> torch.Tensor:
    """Logits of the next title, f32 [B, n_items + 1]; column 0 and the history are −inf.

    The prompt is cut before ``?``, so the policy continues a dated history as in pre-training.
    """
    was_training = model.training
    model.eval()
    titles = torch.from_numpy(prompts.tokens.titles)
    head = model.get_output_embeddings().weight[titles].float()
    out = []
    for start in range(0, len(requests), batch_size):
        chunk = requests[start : start + batch_size]
        rows = [np.array(prompts.build(chunk, i)[:-1]) for i in range(len(chunk))]
        ids = padded(rows, prompts.tokens.tokenizer.pad_token_id)
        last = torch.tensor([len(row) - 1 for row in rows])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(ids).last_hidden_state[torch.arange(len(rows)), last]
        logits = hidden.float() @ head.T
        logits[:, 0] = -torch.inf
        if exclude_history:
            logits.scatter_(1, torch.from_numpy(chunk.history), -torch.inf)
        out.append(logits)
    model.train(was_training)
    return torch.cat(out)


@torch.inference_mode()
def sequence_logits(
    model: PreTrainedModel,
    prompts: TitlePrompt,
    dataset: Dataset,
    held_out: int,
    batch_size: int = 128,
) -> Iterator[tuple[npt.NDArray[np.int64], torch.Tensor]]:
    """Logits of every title of every user but the first and the last ``held_out``, in batches.

    Yields rows [B] of ``dataset.items`` and f32 [B, n_items + 1] logits of the title that stands
    there, column 0 −inf. One causal pass serves a window of positions, each seeing at least half
    a window of history where there is that much.
    """
    was_training = model.training
    model.eval()
    header = np.array(prompts.start)
    titles = torch.from_numpy(prompts.tokens.titles)
    head = model.get_output_embeddings().weight[titles].float()
    spans = []  # first item read, first item predicted, end
    for first, end in zip(dataset.offsets[:-1], dataset.offsets[1:] - held_out, strict=True):
        reached = first + 1
        while reached < end:
            read = max(first, reached - WINDOW // 2)
            spans.append((read, reached, min(read + WINDOW, end)))
            reached = spans[-1][2]
    spans.sort(key=lambda span: int(span[2] - span[0]))
    for i in range(0, len(spans), batch_size):
        part = spans[i : i + batch_size]
        ids = [
            np.concatenate([header, prompts.tokens.dated(*_rows(dataset, read, end))])
            for read, _, end in part
        ]
        batch = padded(ids, int(prompts.tokens.tokenizer.pad_token_id))
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(batch, use_cache=False).last_hidden_state
        rows = [np.arange(reached, end) for _, reached, end in part]
        which = torch.from_numpy(np.repeat(np.arange(len(part)), [len(r) for r in rows]))
        # After the header come a week and a title an item; a title is predicted at its week.
        places = [len(header) + 2 * (r - read) for r, (read, _, _) in zip(rows, part, strict=True)]
        logits = hidden[which, torch.from_numpy(np.concatenate(places))].float() @ head.T
        logits[:, 0] = -torch.inf
        yield np.concatenate(rows), logits
    model.train(was_training)


def _rows(
    dataset: Dataset, start: int, end: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    return dataset.items[start:end], dataset.timestamps[start:end]


def _validation_ndcg(model: PreTrainedModel, prompts: TitlePrompt, requests: Requests) -> float:
    top = next_item_logits(model, prompts, requests).topk(10).indices.numpy()
    return float(evaluate_ranking(top, requests.targets).values["ndcg@10"].mean())


def _loss(model: PreTrainedModel, batch: torch.Tensor, pad: int) -> torch.Tensor:
    """Mean cross entropy of the titles in ``batch`` [B, 2n] given everything before each."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch, use_cache=False).last_hidden_state
    titles = batch[:, 1::2]
    real = titles != pad
    weight = model.get_output_embeddings().weight
    return -linear_logprobs(hidden[:, 0::2][real].float(), weight, titles[real]).mean()


def pretrain(
    model: PreTrainedModel,
    prompts: TitlePrompt,
    dataset: Dataset,
    config: PretrainConfig,
    seed: int,
) -> list[dict[str, float]]:
    """Train ``model`` in place on everything before the RL target; keep the best epoch.

    Returns one record an epoch: loss (nats a title) and NDCG@10 of validation targets.
    """
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    pad = int(prompts.tokens.tokenizer.pad_token_id)
    users = rng.permutation(dataset.n_users)[: config.validation_users]
    validation = dataset.requests("valid", users)
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.ndim > 1]},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(0.9, 0.98),
        weight_decay=config.weight_decay,
    )
    records: list[dict[str, float]] = []
    best = copy.deepcopy(model.state_dict())
    model.train()
    with dropout(model, config.embedding_dropout, config.residual_dropout):
        for epoch in range(config.epochs):
            batches = _windows(dataset, prompts.tokens, config, rng)
            losses = []
            for i, rows in enumerate(
                track(batches, f"Pre-training, epoch {epoch + 1} of {config.epochs}")
            ):
                progress = (epoch + i / len(batches)) / config.epochs
                warm_up = min(1.0, (epoch * len(batches) + i + 1) / 50)
                rate = (
                    config.learning_rate * warm_up * (0.525 + 0.475 * math.cos(math.pi * progress))
                )
                for group in optimizer.param_groups:
                    group["lr"] = rate
                loss = _loss(model, padded(rows, pad), pad)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                losses.append(loss.item())
            ndcg = _validation_ndcg(model, prompts, validation)
            if ndcg > max((r["valid_ndcg@10"] for r in records), default=-1.0):
                best = copy.deepcopy(model.state_dict())
            records.append({"loss": float(np.mean(losses)), "valid_ndcg@10": ndcg})
    model.load_state_dict(best)
    return records
