"""Generation with any Hugging Face causal language model, many conversations side by side."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeprec.rollout.constraints import ConstraintState
from deeprec.rollout.kv_cache import PackedBatch, SlotCache
from deeprec.rollout.sampling import draw
from deeprec.rollout.token_text import StopTable, TokenText
from deeprec.rollout.types import Request, Sample, SamplingConfig
from deeprec.rollout.weights import is_sharded, whole

__all__ = ["TransformersEngine"]

Rows = NDArray[np.int64]
# Shorter common beginnings of two prompts are cheaper to compute again than to look for and copy.
MIN_SHARED_PREFIX = 8


@dataclass
class _Turn:
    """What a conversation is answering."""

    request: Request
    begin: int  # position of the first token of the answer
    state: ConstraintState | None = None
    allowed: tuple[int, ...] = ()  # what the next token is restricted to, if state is set
    restricted: dict[int, tuple[int, ...]] = field(default_factory=dict)  # by position


class TransformersEngine:
    """Continuous batching over a Hugging Face causal language model, on its device.

    Every :meth:`step` is one forward pass over the new tokens of all running conversations:
    prompts, observations and single sampled tokens together, without padding. Keys and values stay
    until :meth:`release`, so no token is computed twice, and a new conversation copies the longest
    beginning it shares with one already here.

    Args:
        model: with full attention in all layers. Its weights are shared, unless ``dtype`` differs.
        tokenizer: the model's.
        sampling: may be replaced between steps through the attribute of the same name.
        dtype: of the weights generated with; None is the model's. Another one makes a copy.
        copy_weights: generate with a copy in any case, which :meth:`sync_weights` refreshes: needed
            where training shards the model over processes.
        max_conversations: conversations held at the same time; more wait.
        max_step_tokens: most tokens of one forward pass; longer prompts take several.

    Raises:
        ValueError: a model whose attention this engine cannot keep (sliding window, recurrent).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        copy_weights: bool = False,
        max_conversations: int = 256,
        max_step_tokens: int = 8192,
    ) -> None:
        _check_attention(model)
        if max_conversations < 1 or max_step_tokens < 1:
            raise ValueError(
                "max_conversations and max_step_tokens must be at least 1, got "
                f"{max_conversations} and {max_step_tokens}"
            )
        self.tokenizer = tokenizer
        self.sampling = sampling or SamplingConfig()
        self.forwarded_tokens = 0  # tokens that went through the model so far
        self._source = model
        self._copies = copy_weights or (dtype is not None and dtype != model.dtype)
        self.model: PreTrainedModel = model
        if self._copies:
            self.model = copy.deepcopy(model).eval()
            self.model.to(dtype=dtype or model.dtype)  # type: ignore[call-arg]
        self._config = self.model.config.get_text_config(decoder=True)
        self.text = TokenText(tokenizer, self._config.vocab_size)
        self._eos = eos_ids(model, tokenizer)
        self._max_step_tokens = max_step_tokens

        n = max_conversations
        self._cache = SlotCache()
        self._queue: dict[Hashable, Request] = {}  # in order of arrival
        self._done: list[Sample] = []
        self._slot_of: dict[Hashable, int] = {}
        self._turns: list[_Turn | None] = [None] * n
        self._taken = np.zeros(n, dtype=bool)
        self._running = np.zeros(n, dtype=bool)
        self._constrained = np.zeros(n, dtype=bool)
        self._total = np.zeros(n, dtype=np.int64)  # tokens of the conversation
        self._cached = np.zeros(n, dtype=np.int64)  # how many of them the cache holds
        self._limit = np.zeros(n, dtype=np.int64)  # tokens the current turn may bring the total to
        self._seeds = np.zeros(n, dtype=np.uint64)
        self._tokens = np.zeros((n, 256), dtype=np.int64)
        self._logprobs = np.zeros((n, 256), dtype=np.float32)
        # Strings to watch for, and per set of them which tokens may complete one.
        self._watches: list[StopTable] = []
        self._watch_of: dict[tuple[str, ...], int] = {}
        self._watch = np.zeros(n, dtype=np.int64)
        self._suspects = np.zeros((0, len(self.text.pieces)), dtype=bool)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a conversation: the sampling limit, or the positions the model knows."""
        known = getattr(self._config, "max_position_embeddings", None)
        limit = self.sampling.max_tokens
        return limit if known is None else min(limit, int(known))

    def submit(self, request: Request) -> None:
        """Queue a request. Of a conversation that is already here it starts at the next step.

        A conversation that would leave no room for an answer ends at once, with finish "length".
        """
        name = request.conversation
        slot = self._slot_of.get(name)
        if name in self._queue or (slot is not None and self._running[slot]):
            raise ValueError(f"conversation {name!r} is still writing; wait for its sample")
        if slot is not None:
            self._start(slot, request)
        elif not request.tokens:
            raise ValueError(f"conversation {name!r} opens with no tokens; give its prompt")
        elif len(request.tokens) >= self.max_tokens:
            self._done.append(Sample(name, [], [], [], "length"))
        else:
            self._queue[name] = request

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Answer all requests, in their order. Conversations stay open until released."""
        for request in requests:
            self.submit(request)
        samples: dict[Hashable, Sample] = {}
        while len(samples) < len(requests):
            samples.update({sample.conversation: sample for sample in self.step()})
        return [samples[request.conversation] for request in requests]

    def release(self, conversation: Hashable) -> None:
        """Forget a conversation, whatever it is doing. Unknown names are ignored."""
        self._queue.pop(conversation, None)
        self._done = [sample for sample in self._done if sample.conversation != conversation]
        slot = self._slot_of.pop(conversation, None)
        if slot is not None:
            self._taken[slot] = self._running[slot] = self._constrained[slot] = False
            self._turns[slot] = None
            self._total[slot] = self._cached[slot] = 0

    def restart(self) -> None:
        """Forget all conversations."""
        for name in [*self._slot_of, *self._queue]:
            self.release(name)

    def sleep(self) -> None:
        """Give the memory of keys and values back; the next conversation takes it again.

        Raises RuntimeError where a conversation is open.
        """
        self._check_idle("the engine is put to sleep")
        self._cache.clear()

    def close(self) -> None:
        """Give the memory of conversations back."""
        self.restart()
        self._cache.clear()

    def sync_weights(self) -> None:
        """Take over the model's current weights. No conversation may be open.

        Of a model sharded over processes, each of them must call this. Raises RuntimeError where
        a conversation is open: the cache would mix two models.
        """
        self._check_idle("the weights change")
        if self._copies:
            with torch.no_grad():
                own = self.model.state_dict()
                for name, value in self._source.state_dict().items():
                    own[name].copy_(whole(value))
        elif is_sharded(self.model):
            raise RuntimeError(
                "the model is sharded over processes: generate with a copy of it, "
                "TransformersEngine(..., copy_weights=True)"
            )

    def _check_idle(self, while_what: str) -> None:
        if self._slot_of or self._queue:
            raise RuntimeError(
                f"{len(self._slot_of) + len(self._queue)} conversations are open while "
                f"{while_what}; release them first"
            )

    @torch.inference_mode()
    def step(self) -> list[Sample]:
        """One forward pass and one token for every running conversation; returns the turns ended.

        Raises RuntimeError when requests wait but every slot is held by a conversation between
        two turns.
        """
        self._admit()
        rows = np.flatnonzero(self._running)
        if len(rows):
            self._advance(rows)
        elif self._queue and not self._done:
            raise RuntimeError(
                f"all {len(self._taken)} slots are held by conversations between two turns; "
                "release some, or raise max_conversations"
            )
        done, self._done = self._done, []
        return done

    def _admit(self) -> None:
        """Open queued conversations in free slots, lowest first, sharing what they begin with."""
        free = np.flatnonzero(~self._taken).tolist()
        waiting = list(islice(self._queue.values(), len(free)))
        expected = len(self._taken) - len(free) + len(waiting)
        places = iter(free)
        for request in waiting:
            source, shared, promised = self._shared_prefix(request.tokens)
            if promised >= shared + MIN_SHARED_PREFIX:
                continue  # being computed right now: copied at the next step
            del self._queue[request.conversation]
            slot = next(places)
            self._slot_of[request.conversation] = slot
            self._taken[slot] = True
            if shared >= MIN_SHARED_PREFIX:
                self._cache.reserve(expected, len(request.tokens))
                self._cache.copy_prefix(source, slot, shared)
                self._cached[slot] = shared
            self._start(slot, request)

    def _shared_prefix(self, tokens: list[int]) -> tuple[int, int, int]:
        """The conversation with the longest common beginning that is computed, and its length.

        The third number is the longest common beginning that will be once running conversations
        have caught up. The last token is never shared: its logits are needed.
        """
        slots = np.flatnonzero(self._taken)
        wanted = np.array(tokens[:-1])
        if not len(slots) or not len(wanted):
            return 0, 0, 0
        width = min(len(wanted), self._tokens.shape[1])
        differs = self._tokens[slots, :width] != wanted[:width]
        first = np.where(differs.any(axis=1), differs.argmax(axis=1), width)
        common = np.minimum(first, self._total[slots])
        ready = np.minimum(common, self._cached[slots])
        best = int(ready.argmax())
        return int(slots[best]), int(ready[best]), int((common * self._running[slots]).max())

    def _start(self, slot: int, request: Request) -> None:
        """Append a request's tokens to its conversation and let it run."""
        begin = int(self._total[slot]) + len(request.tokens)
        new = self.sampling.max_turn_tokens
        if request.max_new_tokens is not None:
            new = min(new, request.max_new_tokens)
        self._widen(begin + 1)
        self._tokens[slot, self._total[slot] : begin] = request.tokens
        self._total[slot] = begin
        self._limit[slot] = min(begin + new, self.max_tokens)
        self._seeds[slot] = np.uint64(request.seed % 2**64)
        self._running[slot] = True
        self._constrained[slot] = False
        turn = self._turns[slot] = _Turn(request, begin)
        self._watch[slot] = self._watch_index(request)
        if begin >= self._limit[slot]:
            self._finish(slot, "length")
        elif request.constraints and request.tokens:
            turn.state = request.opened(self.text.decode(request.tokens))
            self._follow(slot, turn)

    def _watch_index(self, request: Request) -> int:
        strings = request.watched
        index = self._watch_of.get(strings)
        if index is None:
            index = self._watch_of[strings] = len(self._watches)
            table = StopTable(strings, self.text)
            self._watches.append(table)
            suspects = table.suspects.copy()
            suspects[list(self._eos)] = True
            self._suspects = np.concatenate([self._suspects, suspects[None]])
        return index

    def _advance(self, rows: Rows) -> None:
        """Forward the pending tokens of ``rows`` and sample where none is left."""
        pending = self._total[rows] - self._cached[rows]
        order = np.argsort(pending, kind="stable")
        rows, pending = rows[order], pending[order]
        budget = max(self._max_step_tokens, len(rows))
        counts = np.minimum(pending, budget - (np.cumsum(pending) - pending))
        rows, pending, counts = rows[counts > 0], pending[counts > 0], counts[counts > 0]
        logits = self._forward(rows, counts)
        self._cached[rows] += counts
        whole = counts == pending
        if not whole.all():
            rows, logits = rows[whole], logits[torch.from_numpy(whole).to(logits.device)]
        if not len(rows):
            return
        tokens, logprobs = self._sample(rows, logits)
        places = self._total[rows]
        self._widen(int(places.max()) + 1)
        self._tokens[rows, places] = tokens
        self._logprobs[rows, places] = logprobs
        self._total[rows] = places + 1
        # Few rows need a closer look: those that may have stopped, and those under a constraint.
        closer = (
            self._suspects[self._watch[rows], tokens]
            | (places + 1 >= self._limit[rows])
            | self._constrained[rows]
        )
        for slot in rows[closer].tolist():
            turn = self._turns[slot]
            assert turn is not None
            if turn.state is not None:
                turn.state.advance(int(self._tokens[slot, self._total[slot] - 1]))
            if not self._check(slot, turn):
                self._follow(slot, turn)

    def _forward(self, rows: Rows, counts: Rows) -> torch.Tensor:
        """Logits [n, V] after the next ``counts`` tokens of each row."""
        model = self.model
        batch = PackedBatch(
            self._cache, rows, self._cached[rows], counts, device=model.device, dtype=model.dtype
        )
        self.forwarded_tokens += int(counts.sum())
        packed = self._tokens[np.repeat(rows, counts), batch.positions]
        training = model.training
        if training:
            model.eval()
        with batch.attending(self._config):
            logits = model(
                input_ids=torch.from_numpy(packed[None]).to(model.device),
                position_ids=batch.position_ids,
                use_cache=False,
                logits_to_keep=batch.last,
                conversations=batch,
            ).logits[0]
        if training:
            model.train()
        return logits

    def _sample(
        self, rows: Rows, logits: torch.Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The next token of each row and its log-prob."""
        tokens = np.empty(len(rows), dtype=np.int64)
        logprobs = np.empty(len(rows), dtype=np.float32)
        constrained = self._constrained[rows]
        for restrict in (False, True):
            chosen = np.flatnonzero(constrained == restrict)
            if not len(chosen):
                continue
            some = rows[chosen]
            part = logits
            if len(chosen) < len(rows):
                part = logits[torch.from_numpy(chosen).to(logits.device)]
            if restrict:
                ids, part = self._restrict(some, part)
            drawn, values = draw(part, self.sampling, self._seeds[some], self._total[some])
            if restrict:
                drawn = ids.gather(1, drawn[:, None])[:, 0]
            tokens[chosen] = drawn.cpu().numpy()
            logprobs[chosen] = values.cpu().numpy()
        return tokens, logprobs

    def _restrict(self, rows: Rows, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The ids each constrained row may take [n, most] and their logits, -inf where padded."""
        turns = [turn for slot in rows.tolist() if (turn := self._turns[slot]) is not None]
        lengths = np.array([len(turn.allowed) for turn in turns])
        valid = np.arange(lengths.max()) < lengths[:, None]
        padded = np.zeros(valid.shape, dtype=np.int64)
        padded[valid] = np.concatenate([turn.allowed for turn in turns])
        for slot, turn in zip(rows.tolist(), turns, strict=True):
            turn.restricted[int(self._total[slot])] = turn.allowed
        ids = torch.from_numpy(padded).to(logits.device)
        picked = logits.gather(1, ids).float()
        return ids, picked.masked_fill_(torch.from_numpy(~valid).to(logits.device), -torch.inf)

    def _check(self, slot: int, turn: _Turn) -> bool:
        """Whether the last token ended the turn; completing a trigger opens its constraint."""
        end = int(self._total[slot])
        token = int(self._tokens[slot, end - 1])
        if self._suspects[self._watch[slot], token]:
            if token in self._eos:
                self._finish(slot, "eos")
                return True
            watch = self._watches[self._watch[slot]]
            completed = watch.completed(self._tokens[slot, turn.begin : end].tolist())
            if completed is not None and completed[0] in turn.request.stop:
                self._finish(slot, "stop", completed[0])
                return True
            if completed is not None and turn.state is None:
                turn.state = turn.request.opened(*completed)
        if end >= self._limit[slot]:
            self._finish(slot, "length")
            return True
        return False

    def _follow(self, slot: int, turn: _Turn) -> None:
        """Append what the constraint leaves no choice about: the next pass computes it all."""
        while turn.state is not None:
            allowed = turn.state.allowed()
            if allowed is None:
                turn.state = None
                break
            if len(allowed) > 1:
                turn.allowed = allowed
                break
            place = int(self._total[slot])
            self._widen(place + 1)
            self._tokens[slot, place] = allowed[0]
            self._logprobs[slot, place] = 0.0
            self._total[slot] = place + 1
            turn.restricted[place] = allowed
            turn.state.advance(allowed[0])
            if self._check(slot, turn):
                return
        self._constrained[slot] = turn.state is not None

    def _finish(self, slot: int, finish: str, stop: str | None = None) -> None:
        """End a turn; its conversation stays until released."""
        turn = self._turns[slot]
        assert turn is not None
        span = slice(turn.begin, int(self._total[slot]))
        self._done.append(
            Sample(
                conversation=turn.request.conversation,
                ids=self._tokens[slot, span].tolist(),
                logprobs=self._logprobs[slot, span].tolist(),
                allowed=[turn.restricted.get(place) for place in range(span.start, span.stop)],
                finish=finish,
                stop=stop,
            )
        )
        self._running[slot] = self._constrained[slot] = False

    def _widen(self, width: int) -> None:
        """Make room for conversations of ``width`` tokens."""
        old = self._tokens.shape[1]
        if width > old:
            more = ((0, 0), (0, max(width, 2 * old) - old))
            self._tokens = np.pad(self._tokens, more)
            self._logprobs = np.pad(self._logprobs, more)


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a text, by the model's generation settings and the tokenizer."""
    generation = getattr(model, "generation_config", None)
    named = [tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)]
    ids: set[int] = set()
    for value in named:
        ids.update(value if isinstance(value, (list, tuple)) else [value])
    return frozenset(token for token in ids if token is not None)


def _check_attention(model: PreTrainedModel) -> None:
    """Raise ValueError for a model whose state is more than keys and values of all positions."""
    name = type(model).__name__
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    same = "full_attention" if window is None else "sliding_attention"
    kinds = set(getattr(config, "layer_types", None) or [same])
    if kinds != {"full_attention"}:
        raise ValueError(
            f"model: expected full attention in every layer, {name} has {sorted(kinds)}; such "
            "models need an engine of their own (vLLM runs them)"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(
            f"model: {name} does not take transformers' exchangeable attention functions, which "
            "the key-value cache relies on; use a model of the Llama, Qwen2, Qwen3, … families"
        )
