"""Supervised warm start: conversations written from the policy's own next-item beliefs.

After pre-training the policy knows which titles may come next, and nothing of the protocol. Here
it reads conversations that use the protocol: preferences name titles it believes in, with their
categories and years; the recommender really answers; the list ranks what was found. Where a title
is due, the target is a whole distribution restricted to the titles that may stand there
(distillation): what the policy believed before the warm start, plus what the recommender scores.
No held-out item is looked at: the targets are beliefs, not what the user did.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.progress import track
from transformers import PreTrainedModel

from deeprec.data import Catalog, Dataset, Requests
from deeprec.ops import linear_logprobs
from deeprec.policy.pretrain import next_item_logits, padded, sequence_logits
from deeprec.policy.prompts import TitlePrompt
from deeprec.policy.tokenizer import ASK, LIKE, PHRASE_SEPARATOR, RANK, number_token
from deeprec.rollout import RetrievalEnvironment, ToolCall, protocol
from deeprec.trm import PreferenceAwareTRM, WrittenPreference

__all__ = [
    "WarmStartConfig",
    "beliefs_of",
    "preference_from_titles",
    "warm_start",
    "written_preferences",
]

IGNORE = -100  # label of a token that is not learnt
COSINE_TEMPERATURE = 0.07  # at which the recommender's cosines are trained as logits


@dataclass
class WarmStartConfig:
    """Supervised warm start.

    Args:
        conversations: how many are written and read, once.
        learning_rate: peak; linear warm-up over 5% of the updates, linear decay to a tenth.
        tokens_per_batch: padded tokens of one update; the protocol is learnt by many small ones
            (100% valid after 380 updates, hardly any after 100 of four times the size).
        max_turns: conversations have as many tool calls as fill a list to this many, so that
            asking often is left to reinforcement learning.
        titles: titles a preference names.
        temperature: of the beliefs, in preferences and in the list. Preferences drawn at 1.0 are
            too vague for a recommender to rely on: trained on them it gained 0.002 NDCG@10 from
            one, and 0.022 at 0.3.
        recommender_weight: of the recommender's scaled cosine beside the policy's log-probs in
            the beliefs; together they rank better than either alone (NDCG@10 .169 against .158
            and .132).
        dropped: share of each history's items left out, so that the recommender is asked about
            histories it was not trained to complete.
        knowledge: "own" teaches the policy's own beliefs; "none" draws titles and lists at
            random, which teaches the format alone.
    """

    conversations: int = 8000
    learning_rate: float = 2e-3
    tokens_per_batch: int = 2048
    max_turns: int = 3
    titles: int = 3
    temperature: float = 0.3
    recommender_weight: float = 0.3
    dropped: float = 0.2
    knowledge: Literal["own", "none"] = "own"


@dataclass
class _Conversation:
    """Token ids with labels, and the places where a title is due."""

    ids: list[int]
    labels: list[int] = field(default_factory=list)
    retrieved: list[int] = field(default_factory=list)
    titles: list[_TitleDue] = field(default_factory=list)

    def policy(self, ids: list[int]) -> None:
        """Append what the policy is to write."""
        self.ids += ids
        self.labels += ids

    def unlearnt(self, ids: list[int]) -> None:
        """Append what the policy only reads."""
        self.ids += ids
        self.labels += [IGNORE] * len(ids)


@dataclass
class _TitleDue:
    """The title at ``position`` may be any of ``among`` (None: any) but those in ``without``."""

    position: int
    among: npt.NDArray[np.int64] | None
    without: npt.NDArray[np.int64]


def preference_from_titles(
    catalog: Catalog, items: npt.NDArray[np.int64], rng: random.Random
) -> str:
    """A preference that names ``items``, one of their categories and the first one's decade.

    For example ``Sci-Fi; 2010s; like Gravity (2013); like Elysium (2013)``.
    """
    categories = list(dict.fromkeys(c for item in items for c in catalog.categories[item - 1]))
    phrases = [rng.choice(categories)] if categories else []
    decade = catalog.decade(int(items[0]))
    if decade is not None:
        phrases.append(decade)
    phrases += [LIKE + catalog.title(int(item)) for item in items]
    return PHRASE_SEPARATOR.join(phrases)


def written_preferences(
    model: PreTrainedModel,
    prompts: TitlePrompt,
    dataset: Dataset,
    config: WarmStartConfig,
    seed: int,
) -> list[WrittenPreference]:
    """The first preference a policy would write before each item that a recommender trains on.

    A recommender trained on them learns what such preferences are worth.
    """
    draws, words = np.random.default_rng(seed), random.Random(seed)
    users = np.repeat(np.arange(dataset.n_users), np.diff(dataset.offsets))
    written = []
    for rows, logits in sequence_logits(model, prompts, dataset, held_out=2):
        scores = logits.numpy() / config.temperature + draws.gumbel(size=logits.shape)
        named = np.argpartition(-scores, config.titles, axis=1)[:, : config.titles]
        for row, items in zip(rows, named, strict=True):
            user = int(users[row])
            text = preference_from_titles(dataset.catalog, items, words)
            written.append(WrittenPreference(user, int(row - dataset.offsets[user]), text))
    return written


class _Writer:
    """Writes conversations for a chunk of requests, one turn of all at a time."""

    def __init__(
        self, prompts: TitlePrompt, env: RetrievalEnvironment, config: WarmStartConfig, seed: int
    ) -> None:
        self.env, self.config = env, config
        self.prompts = prompts
        self.titles = prompts.tokens.titles
        self.draws = np.random.default_rng(seed)
        self.words = random.Random(seed)
        self._encoded: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        ids = self._encoded.get(text)
        if ids is None:
            ids = self.prompts.tokens.tokenizer.encode(text, add_special_tokens=False)
            self._encoded[text] = ids
        return list(ids)

    def write(self, requests: Requests, beliefs: npt.NDArray[np.float32]) -> list[_Conversation]:
        """One conversation a request; ``beliefs`` [B, n_items + 1] are logits of the next title."""
        talks = []
        for row in range(len(requests)):
            talk = _Conversation([])
            talk.unlearnt(self.prompts.build(requests, row))
            talks.append(talk)
        # Enough turns to fill a list.
        fewest = min(math.ceil(protocol.LIST_LENGTH / self.env.k), self.config.max_turns)
        turns = self.draws.integers(fewest, self.config.max_turns + 1, len(requests))
        for turn in range(self.config.max_turns):
            self._turn(turn, requests, beliefs, talks, np.flatnonzero(turns > turn))
        for row, talk in enumerate(talks):
            self._finish(talk, beliefs[row])
        return talks

    def _turn(
        self,
        turn: int,
        requests: Requests,
        beliefs: npt.NDArray[np.float32],
        talks: list[_Conversation],
        rows: npt.NDArray[np.int64],
    ) -> None:
        calls = []
        for row in rows.tolist():
            talk = talks[row]
            scores = beliefs[row].copy()
            scores[talk.retrieved] = -np.inf
            named = self._draw(scores, self.config.titles)
            if not len(named):
                continue  # a small catalogue is exhausted: there is nothing left to ask for
            preference = preference_from_titles(self.env.catalog, named, self.words)
            seen = requests.history[row]
            talk.policy(self.encode(ASK) + self.encode(protocol.PREFERENCE_OPEN))
            start = len(talk.ids)
            talk.policy(self.encode(preference))
            for n, item in enumerate(named):
                position = talk.ids.index(int(self.titles[item]), start)
                without = np.concatenate([seen, talk.retrieved, named[:n]]).astype(np.int64)
                talk.titles.append(_TitleDue(position, None, without))
            talk.policy(self.encode(protocol.PREFERENCE_CLOSE))
            calls.append(ToolCall(row, turn, preference, tuple(talk.retrieved)))
        for call, answer in zip(calls, self.env.observe(requests, calls), strict=True):
            talks[call.row].unlearnt(self.encode(answer.text))
            talks[call.row].retrieved += answer.items

    def _finish(self, talk: _Conversation, beliefs: npt.NDArray[np.float32]) -> None:
        """Close the reasoning and list what was found."""
        found = np.array(talk.retrieved, dtype=np.int64)
        order = found[np.argsort(-beliefs[found], kind="stable")]
        if self.config.knowledge == "none":
            order = self.draws.permutation(found)
        talk.policy(
            self.encode(f"{RANK}\n{protocol.THINK_CLOSE}\n") + self.encode(protocol.LIST_OPEN)
        )
        for line, item in enumerate(order[: protocol.LIST_LENGTH]):
            talk.unlearnt(self.encode(number_token(line + 1)))
            talk.titles.append(_TitleDue(len(talk.ids), found, order[:line]))
            talk.unlearnt([int(self.titles[item])])
        talk.policy(self.encode("\n") + self.encode(protocol.LIST_CLOSE))

    def _draw(self, scores: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.int64]:
        """``n`` different items, drawn from the softmax of ``scores`` (Gumbel top-k).

        Fewer where fewer have finite scores.
        """
        noise = self.draws.gumbel(size=scores.shape)
        if self.config.knowledge == "none":
            scores = np.where(np.isfinite(scores), np.float32(0), scores)
        order = np.argsort(-(scores + noise), kind="stable")[:n]
        return order[np.isfinite(scores[order])]


def _batches(
    talks: list[_Conversation], tokens: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Conversations of like length together, at most ``tokens`` padded tokens a batch."""
    lengths = np.array([len(talk.ids) for talk in talks])
    order = np.argsort(lengths + 16 * rng.random(len(talks)))
    batches, start = [], 0
    for end in range(1, len(order) + 1):
        if end == len(order) or (end + 1 - start) * lengths[order[start : end + 1]].max() > tokens:
            batches.append(order[start:end])
            start = end
    rng.shuffle(batches)
    yield from batches


def _loss(
    model: PreTrainedModel,
    talks: list[_Conversation],
    beliefs: npt.NDArray[np.float32],
    titles: torch.Tensor,
    pad: int,
) -> torch.Tensor:
    """Cross entropy of the policy's tokens, plus that of titles against the beliefs."""
    ids = padded([np.array(talk.ids) for talk in talks], pad)
    labels = padded([np.array(talk.labels) for talk in talks], IGNORE)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1].float()
    weight = model.get_output_embeddings().weight
    learnt = labels[:, 1:] != IGNORE
    hard = -linear_logprobs(hidden[learnt], weight, labels[:, 1:][learnt])

    places = [(row, due) for row, talk in enumerate(talks) for due in talk.titles]
    rows = [row for row, _ in places]
    positions = [due.position - 1 for _, due in places]
    # A list is written under the constraint that decoding will have; in a preference any title
    # can be written, so that the policy has to learn which ones are no use. Sparing it the titles
    # that distinct_titles will bar costs the final lists 0.008 (seed 0, test).
    closed = np.zeros((len(places), len(titles)), dtype=bool)
    unwanted = np.zeros_like(closed)
    closed[:, 0] = True
    for place, (_, due) in enumerate(places):
        unwanted[place, due.without] = True
        if due.among is not None:
            closed[place] = True
            closed[place, due.among] = False
            closed[place, due.without] = True
    unwanted |= closed
    target = torch.from_numpy(beliefs[rows])
    target = target.masked_fill_(torch.from_numpy(unwanted), -torch.inf).softmax(-1)
    scores = hidden[rows, positions] @ weight[titles].T
    scores = scores.masked_fill(torch.from_numpy(closed), -torch.inf)
    logprobs = F.log_softmax(scores, -1).masked_fill(torch.from_numpy(closed), 0.0)
    soft = -(target * logprobs).sum(-1)
    return (hard.sum() + soft.sum()) / (len(hard) + len(soft))


def _training_requests(
    dataset: Dataset, config: WarmStartConfig, rng: np.random.Generator
) -> Requests:
    """Requests somewhere in the training part of random users, their histories thinned."""
    offsets, *_ = dataset.train()
    users = rng.integers(0, dataset.n_users, config.conversations)
    # Up to the RL target itself, which is only asked about and never looked at.
    positions = 1 + (rng.random(len(users)) * np.diff(offsets)[users]).astype(np.int64)
    requests = dataset.requests_at(dataset.offsets[users] + positions)
    kept = (rng.random(requests.history.shape) >= config.dropped) & (requests.history > 0)
    kept[np.arange(len(users)), requests.lengths - 1] = True
    order = np.argsort(~kept, axis=1, kind="stable")
    thinned = {
        name: np.take_along_axis(np.where(kept, getattr(requests, name), 0), order, axis=1)
        for name in ("history", "history_timestamps")
    }
    return replace(requests, lengths=kept.sum(axis=1), **thinned)


@torch.inference_mode()
def beliefs_of(
    model: PreTrainedModel,
    prompts: TitlePrompt,
    trm: PreferenceAwareTRM,
    requests: Requests,
    config: WarmStartConfig,
) -> npt.NDArray[np.float32]:
    """Logits of the next title, f32 [B, n_items + 1], at the configured temperature."""
    scores = next_item_logits(model, prompts, requests).log_softmax(-1)
    for start in range(0, len(requests), 512):
        rows = slice(start, start + 512)
        part = requests[rows]
        cosine = trm.scores(torch.from_numpy(part.history), torch.from_numpy(part.lengths))
        scores[rows] += config.recommender_weight / COSINE_TEMPERATURE * cosine
    return (scores / config.temperature).numpy()


def warm_start(
    model: PreTrainedModel,
    prompts: TitlePrompt,
    env: RetrievalEnvironment,
    dataset: Dataset,
    config: WarmStartConfig,
    seed: int,
) -> list[float]:
    """Train ``model`` in place on conversations written from its own beliefs; losses per update.

    ``env`` answers the preferences; its recommender must not have seen the RL targets.
    """
    rng = np.random.default_rng(seed)
    requests = _training_requests(dataset, config, rng)
    beliefs = beliefs_of(model, prompts, env.trm, requests, config)

    writer = _Writer(prompts, env, config, seed)
    talks: list[_Conversation] = []
    chunk = 512
    for start in track(range(0, len(requests), chunk), "Writing warm-start conversations"):
        part = slice(start, start + chunk)
        talks += writer.write(requests[part], beliefs[part])
    if config.knowledge == "none":
        beliefs = np.where(np.isfinite(beliefs), np.float32(0), beliefs)

    titles = torch.from_numpy(prompts.tokens.titles)
    pad = int(prompts.tokens.tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.0
    )
    batches = list(_batches(talks, config.tokens_per_batch, rng))
    losses = []
    model.train()
    for i, rows in enumerate(track(batches, "Warm start")):
        progress = i / len(batches)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(progress / 0.05 + 0.02, 1.0 - 0.9 * progress)
        loss = _loss(model, [talks[row] for row in rows], beliefs[rows], titles, pad)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return losses
