"""Generation with vLLM: paged attention, prefix caching, many turns in flight."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deeprec.rollout.constraints import ConstraintState
from deeprec.rollout.sampling import draw, mix
from deeprec.rollout.token_text import StopTable, TokenText
from deeprec.rollout.transformers_engine import eos_ids
from deeprec.rollout.types import Allowed, Request, Sample, SamplingConfig
from deeprec.rollout.vllm_process import VLLMOptions, VLLMProcess

__all__ = ["VLLMEngine", "VLLMOptions"]


@dataclass
class _Turn:
    """What a conversation is answering."""

    request: Request
    begin: int  # position of the first token of the answer
    limit: int  # tokens the turn may bring the conversation to
    watch: StopTable
    logprobs: list[float] = field(default_factory=list)
    allowed: list[Allowed] = field(default_factory=list)
    state: ConstraintState | None = None
    choices: tuple[int, ...] = ()  # what the next token is restricted to, if state is set


@dataclass
class _Conversation:
    ids: list[int] = field(default_factory=list)
    turn: _Turn | None = None
    running: str | None = None  # vLLM's name for the request being computed
    answered: bool = False  # whether a token of it has arrived


class VLLMEngine:
    """The engine of :mod:`deeprec.rollout.engine` on a vLLM of its own beside the trainer.

    vLLM computes in processes of its own, so turns go on while the tool answers others. A turn's
    prompt is the whole conversation as token ids; what was computed in earlier turns comes out of
    vLLM's prefix cache. Stop strings are looked for here, token by token, and kept.

    Under a constraint, every token that has a choice is a request of its own for the log-probs of
    the permitted ids, out of which the token is drawn here, exactly as
    :class:`~deeprec.rollout.TransformersEngine` does; tokens without a choice cost nothing.

    Weights travel through a file in shared memory, and are loaded in place.

    Args:
        policy: a Hugging Face causal language model that vLLM knows; adapters must be merged.
        tokenizer: the policy's.
        sampling: may be replaced between steps, within what ``log-probs`` below allows.
        dtype: vLLM computes in; None is the policy's.
        options: see :class:`VLLMOptions`.

    Log-probs are asked for after temperature and before top-p. vLLM gives either those before
    temperature, which are the same at temperature 1 and for greedy decoding, or those after
    top-p, which are the same without top-p. Other combinations are refused.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: sampling asks for a temperature and top-p at once, or the policy has adapters.
        EngineError: vLLM did not start.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        options: VLLMOptions | None = None,
    ) -> None:
        if hasattr(policy, "peft_config"):
            raise ValueError(
                "policy: has adapters, which vLLM would have to be told about; merge them, or use "
                "TransformersEngine"
            )
        self.tokenizer = tokenizer
        self._after_temperature = False
        self._sampling = self._checked(sampling or SamplingConfig())
        self._after_temperature = self._sampling.logprob_temperature != 1.0
        config = policy.config.get_text_config(decoder=True)
        known = getattr(config, "max_position_embeddings", None)
        self._longest = min(self._sampling.max_tokens, known or self._sampling.max_tokens)
        self.text = TokenText(tokenizer, config.vocab_size)
        self._eos = eos_ids(policy, tokenizer)
        self._watches: dict[tuple[str, ...], StopTable] = {}
        self._conversations: dict[Hashable, _Conversation] = {}
        self._asked: dict[str, Hashable] = {}
        self._done: list[Sample] = []
        self._count = 0
        self.cached_tokens = 0  # tokens of requests that vLLM's prefix cache held
        self._vllm = VLLMProcess(
            policy,
            dtype or policy.dtype,
            options or VLLMOptions(),
            max_tokens=self._longest,
            logprobs_mode="processed_logprobs" if self._after_temperature else "raw_logprobs",
        )

    # ---- the engine's interface ----

    @property
    def sampling(self) -> SamplingConfig:
        """How tokens are drawn."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingConfig) -> None:
        self._sampling = self._checked(sampling)

    @property
    def max_tokens(self) -> int:
        """Most tokens of a conversation."""
        return min(self._sampling.max_tokens, self._longest)

    def submit(self, request: Request) -> None:
        """Send a request; it is computed as soon as there is room.

        A conversation that would leave no room for an answer ends at once, with finish "length".
        """
        name = request.conversation
        conversation = self._conversations.get(name)
        if conversation is None and not request.tokens:
            raise ValueError(f"conversation {name!r} opens with no tokens; give its prompt")
        if conversation is not None and conversation.turn is not None:
            raise ValueError(f"conversation {name!r} is still writing; wait for its sample")
        if conversation is None:
            conversation = self._conversations[name] = _Conversation()
        conversation.ids += request.tokens
        begin = len(conversation.ids)
        new = self._sampling.max_turn_tokens
        if request.max_new_tokens is not None:
            new = min(new, request.max_new_tokens)
        limit = min(begin + new, self.max_tokens)
        turn = conversation.turn = _Turn(request, begin, limit, self._watch(request))
        if begin >= limit:
            self._finish(conversation, "length")
            return
        if request.constraints and request.tokens:
            turn.state = request.opened(self.text.decode(request.tokens))
        self._go_on(conversation)

    def step(self) -> list[Sample]:
        """Wait for the next tokens; returns the turns that ended with them.

        Raises EngineError where vLLM failed, or gave no answer for ``options.timeout`` seconds.
        """
        if self._asked and not self._done:
            for output in self._vllm.step():
                self._hear(output)
        done, self._done = self._done, []
        return done

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
        self._done = [sample for sample in self._done if sample.conversation != conversation]
        known = self._conversations.pop(conversation, None)
        if known is not None:
            self._cancel(known)

    def restart(self) -> None:
        """Forget all conversations and stop vLLM.

        The next request starts a new one, with the weights last taken over.
        """
        self._conversations.clear()
        self._asked.clear()
        self._done.clear()
        self._vllm.stop()

    def sleep(self) -> None:
        """Free the GPU: weights and cache are dropped until :meth:`sync_weights`.

        On a CPU only the cache's content is. Raises RuntimeError where a conversation is open.
        """
        self._check_idle("the engine is put to sleep")
        self._vllm.sleep()

    def sync_weights(self) -> None:
        """Take over the policy's current weights, in place. No conversation may be open.

        Of a policy sharded over processes, each of them must call this.
        """
        self._check_idle("the weights change")
        self._vllm.load_weights()

    def close(self) -> None:
        """Stop vLLM and free what it holds."""
        self._vllm.close()

    # ---- turns ----

    def _ask(self, conversation: _Conversation) -> None:
        """Have the next tokens computed: one under a constraint, else all up to the limit."""
        turn, sampling = conversation.turn, self._sampling
        assert turn is not None
        if turn.state is not None:
            # The token vLLM draws is not used.
            settings: dict[str, Any] = {
                "max_tokens": 1,
                "temperature": sampling.temperature if self._after_temperature else 0.0,
                "logprob_token_ids": list(turn.choices),
            }
        else:
            settings = {
                "max_tokens": turn.limit - len(conversation.ids),
                "temperature": 0.0 if sampling.takes_best else sampling.temperature,
                "top_p": 1.0 if sampling.takes_best else sampling.top_p,
                # Another seed each turn, or turns would begin with the same random numbers.
                "seed": int(mix(turn.request.seed, len(conversation.ids)) >> np.uint64(1)),
                "logprobs": 0,
                "stop_token_ids": sorted(self._eos),
            }
        self._count += 1
        conversation.running, conversation.answered = str(self._count), False
        self._asked[conversation.running] = turn.request.conversation
        self._vllm.add(conversation.running, list(conversation.ids), settings)

    def _cancel(self, conversation: _Conversation) -> None:
        """Have vLLM forget what it is computing for a conversation."""
        running, conversation.running = conversation.running, None
        if running is not None and self._asked.pop(running, None) is not None:
            self._vllm.abort(running)

    def _hear(self, output: Any) -> None:
        """Take note of new tokens of one request."""
        name = self._asked.get(output.request_id)
        conversation = None if name is None else self._conversations.get(name)
        if conversation is None or conversation.turn is None:
            return  # computed before the news of its end arrived
        turn, (answer,) = conversation.turn, output.outputs
        if not conversation.answered:
            self.cached_tokens += output.num_cached_tokens or 0
            conversation.answered = True
        if output.finished:
            self._asked.pop(output.request_id)
            conversation.running = None
        if turn.state is not None:
            self._choose(conversation, answer.logprobs[0])
            return
        for token, found in zip(answer.token_ids, answer.logprobs, strict=True):
            self._append(conversation, int(token), found[token].logprob, None)
            if self._check(conversation):
                return
            if turn.state is not None:
                break
        if turn.state is not None or output.finished:
            self._cancel(conversation)
            self._go_on(conversation)

    def _choose(self, conversation: _Conversation, found: Any) -> None:
        """Draw the next token out of the permitted ones, given their log-probs."""
        turn = conversation.turn
        assert turn is not None and turn.state is not None
        sampling = self._sampling
        if self._after_temperature:
            sampling = replace(sampling, temperature=1.0)
        drawn, logprobs = draw(
            torch.tensor([[found[token].logprob for token in turn.choices]]),
            sampling,
            np.array([turn.request.seed % 2**64], dtype=np.uint64),
            np.array([len(conversation.ids)]),
        )
        token = turn.choices[int(drawn[0])]
        self._append(conversation, token, float(logprobs[0]), turn.choices)
        turn.state.advance(token)
        if not self._check(conversation):
            self._go_on(conversation)

    def _go_on(self, conversation: _Conversation) -> None:
        """Append what the constraint leaves no choice about, then ask for more."""
        turn = conversation.turn
        assert turn is not None
        while turn.state is not None:
            choices = turn.state.allowed()
            if choices is None:
                turn.state = None
                break
            if len(choices) > 1:
                turn.choices = choices
                break
            self._append(conversation, choices[0], 0.0, choices)
            turn.state.advance(choices[0])
            if self._check(conversation):
                return
        self._ask(conversation)

    @staticmethod
    def _append(conversation: _Conversation, token: int, logprob: float, allowed: Allowed) -> None:
        assert conversation.turn is not None
        conversation.ids.append(token)
        conversation.turn.logprobs.append(logprob)
        conversation.turn.allowed.append(allowed)

    def _check(self, conversation: _Conversation) -> bool:
        """Whether the last token ended the turn; completing a trigger opens its constraint."""
        turn, token = conversation.turn, conversation.ids[-1]
        assert turn is not None
        if token in self._eos:
            self._finish(conversation, "eos")
            return True
        if turn.watch.suspects[token]:
            completed = turn.watch.completed(conversation.ids[turn.begin :])
            if completed is not None and completed[0] in turn.request.stop:
                self._finish(conversation, "stop", completed[0])
                return True
            if completed is not None and turn.state is None:
                turn.state = turn.request.opened(*completed)
        if len(conversation.ids) >= turn.limit:
            self._finish(conversation, "length")
            return True
        return False

    def _finish(self, conversation: _Conversation, finish: str, stop: str | None = None) -> None:
        """End a turn; its conversation stays until released."""
        self._cancel(conversation)
        turn, conversation.turn = conversation.turn, None
        assert turn is not None
        ids = conversation.ids[turn.begin :]
        name = turn.request.conversation
        self._done.append(Sample(name, ids, turn.logprobs, turn.allowed, finish, stop))

    def _watch(self, request: Request) -> StopTable:
        strings = request.watched
        if strings not in self._watches:
            self._watches[strings] = StopTable(strings, self.text)
        return self._watches[strings]

    def _check_idle(self, while_what: str) -> None:
        if self._conversations:
            raise RuntimeError(
                f"{len(self._conversations)} conversations are open while {while_what}; "
                "release them first"
            )

    def _checked(self, sampling: SamplingConfig) -> SamplingConfig:
        scaled = sampling.logprob_temperature != 1.0
        if scaled and sampling.top_p < 1:
            raise ValueError(
                f"sampling: vLLM reports log-probs before temperature or after top-p; with "
                f"temperature {sampling.temperature} set top_p=1, or with top_p {sampling.top_p} "
                "temperature 1, or use TransformersEngine"
            )
        if hasattr(self, "_vllm") and not sampling.takes_best and scaled != self._after_temperature:
            raise ValueError(
                f"sampling: this engine was started for temperature "
                f"{'other than 1' if self._after_temperature else '1'}, got "
                f"{sampling.temperature}; make a new one"
            )
        return sampling
