"""A vLLM of its own beside the trainer: its processes, its weights, and waiting for its answers."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from deeprec.rollout.engine import EngineError
from deeprec.rollout.weights import whole_parameters

__all__ = ["VLLMOptions", "VLLMProcess"]

T = TypeVar("T")
logger = logging.getLogger(__name__)

SHARED_MEMORY = Path("/dev/shm")
# Loading weights and compiling the model takes minutes for large ones.
START_SECONDS = 1800.0
STOP_SECONDS = 60.0
# What a launcher tells this process about the others would confuse vLLM's own.
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class VLLMOptions:
    """How vLLM runs.

    ``memory`` is the share of a GPU it may take for weights and keys and values; training has the
    rest, and while vLLM sleeps, all of it. ``max_conversations`` turns are computed together.
    ``timeout`` seconds without an answer mean that the engine has stopped. ``eager`` runs without
    compiling the model: a faster start, slower tokens. ``settings`` are further arguments of
    ``vllm.EngineArgs``, by name.
    """

    memory: float = 0.5
    max_conversations: int = 256
    timeout: float = 300.0
    eager: bool = False
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.memory <= 1:
            raise ValueError(f"memory: expected a share in (0, 1], got {self.memory}")
        if self.max_conversations < 1:
            raise ValueError(
                f"max_conversations: expected at least 1, got {self.max_conversations}"
            )
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected seconds > 0, got {self.timeout}")


class VLLMProcess:
    """vLLM with one policy's weights; every call ends, with an answer or an EngineError.

    After :meth:`stop` the next request starts vLLM again.

    Args:
        policy: what vLLM computes with, after :meth:`load_weights` again.
        dtype: vLLM computes in.
        options: see :class:`VLLMOptions`.
        max_tokens: of a conversation.
        logprobs_mode: vLLM's name for the log-probs it reports.

    Raises:
        ImportError: vLLM is not installed.
        EngineError: it did not start.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        dtype: torch.dtype,
        options: VLLMOptions,
        *,
        max_tokens: int,
        logprobs_mode: str,
    ) -> None:
        self.options = options
        self._policy, self._dtype = policy, dtype
        self._max_tokens, self._logprobs_mode = max_tokens, logprobs_mode
        self._asleep = False
        self._processes: set[psutil.Process] = set()
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="deeprec-vllm-", dir=place))
        self._clean_up = weakref.finalize(self, shutil.rmtree, self._folder, True)
        policy.config.save_pretrained(self._folder)
        self._write_weights()
        self._vllm: Any = None
        self._start()

    @property
    def running(self) -> bool:
        """Whether vLLM was started and not stopped since."""
        return self._vllm is not None

    def _start(self) -> None:
        """Start vLLM with the weights last written."""
        from vllm import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        on_gpu = torch.cuda.is_available()
        self._may_sleep = on_gpu
        self._asleep = False
        arguments = EngineArgs(
            **{
                "model": str(self._folder),
                "dtype": str(self._dtype).removeprefix("torch."),
                "skip_tokenizer_init": True,
                "max_model_len": self._max_tokens,
                "max_num_seqs": self.options.max_conversations,
                "enable_prefix_caching": True,
                "enforce_eager": self.options.eager,
                "gpu_memory_utilization": self.options.memory,
                "enable_sleep_mode": on_gpu,
                "logprobs_mode": self._logprobs_mode,
                "disable_log_stats": True,
                **self.options.settings,
            }
        )
        others = _processes()
        try:
            with _own_device():
                self._vllm = self._call(
                    "start", lambda: LLMEngine.from_engine_args(arguments), START_SECONDS
                )
        finally:
            self._processes = _processes() - others
            if self._vllm is None:
                self.stop()

    def stop(self) -> None:
        """End vLLM's processes, whatever they are doing."""
        vllm, self._vllm = self._vllm, None
        try:
            if vllm is not None:
                self._call("stop", vllm.engine_core.shutdown, STOP_SECONDS)
        except EngineError as error:
            logger.warning("%s; its processes are killed", error)
        # A worker that hangs outlives the process that vLLM ends.
        for process in self._processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(self._processes, timeout=STOP_SECONDS)
        self._processes = set()

    def close(self) -> None:
        """Stop, and free what is held here."""
        self.stop()
        self._clean_up()

    def add(self, name: str, tokens: list[int], settings: dict[str, Any]) -> None:
        """Ask for what follows ``tokens``; ``settings`` are those of ``vllm.SamplingParams``."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._vllm is None:
            self._start()
        kind = RequestOutputKind.DELTA
        parameters = SamplingParams(detokenize=False, output_kind=kind, **settings)
        self._vllm.add_request(name, {"prompt_token_ids": tokens}, parameters)

    def abort(self, name: str) -> None:
        """Forget a request."""
        if self._vllm is not None:
            self._vllm.abort_request([name])

    def step(self) -> list[Any]:
        """Wait for vLLM's next outputs."""
        outputs: list[Any] = self._call("step", self._vllm.step)
        return outputs

    def sleep(self) -> None:
        """Drop weights and cache on a GPU, until :meth:`load_weights`."""
        if self._may_sleep and self._vllm is not None:
            self._call("sleep", lambda: self._vllm.sleep(level=2))
            self._asleep = True

    def load_weights(self) -> None:
        """Take over the policy's current weights, in place, and forget the cache."""
        self._write_weights()
        if self._vllm is None:
            return  # reads them when it starts
        if self._asleep:
            self._call("wake up", lambda: self._vllm.wake_up(tags=["weights"]))
        self._call(
            "load weights",
            lambda: self._vllm.collective_rpc(
                "reload_weights", kwargs={"weights_path": str(self._folder)}
            ),
        )
        if self._asleep:
            self._call("wake up", lambda: self._vllm.wake_up(tags=["kv_cache"]))
            self._asleep = False
        self._call("forget the cache", self._vllm.reset_prefix_cache)

    def _write_weights(self) -> None:
        """The policy's weights as a safetensors file, the old one until the new one is whole."""
        weights = {
            name: value.to(device="cpu", dtype=self._dtype).contiguous()
            for name, value in whole_parameters(self._policy)
        }
        draft = self._folder / "model.draft"
        save_file(weights, draft, metadata={"format": "pt"})
        os.replace(draft, self._folder / "model.safetensors")

    def _call(self, doing: str, function: Callable[[], T], timeout: float | None = None) -> T:
        """``function()``, unless it fails or takes longer than the time-out: EngineError."""
        answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

        def run() -> None:
            try:
                answer.put((function(), None))
            except BaseException as error:
                answer.put((None, error))

        # vLLM waits without end for a process that hangs: only a thread can be left behind.
        threading.Thread(target=run, daemon=True, name=f"vllm {doing}").start()
        seconds = timeout or self.options.timeout
        try:
            result, error = answer.get(timeout=seconds)
        except queue.Empty:
            raise EngineError(f"vLLM has not answered for {seconds:g} s ({doing})") from None
        if isinstance(error, Exception):
            raise EngineError(f"vLLM failed ({doing}): {error!r}") from error
        if error is not None:
            raise error
        return result


def _processes() -> set[psutil.Process]:
    """The processes of vLLM, by the title it gives them, that this one has started."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("VLLM"):
                found.add(process)
    return found


@contextmanager
def _own_device() -> Iterator[None]:
    """Let the processes that vLLM starts see this process's GPU alone, and no launcher."""
    kept = {name: os.environ.pop(name) for name in LAUNCHER if name in os.environ}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.cuda.is_available():
        current = torch.cuda.current_device()
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            visible.split(",")[current] if visible else f"{current}"
        )
    try:
        yield
    finally:
        os.environ.update(kept)
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        elif torch.cuda.is_available():
            del os.environ["CUDA_VISIBLE_DEVICES"]
