"""A run in several processes: all take part in reinforcement learning, the first does the rest."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from deeprec.rl.distributed import ProcessFailedError, make_accelerator

__all__ = ["Processes"]

# The others wait while the first one trains recommenders, however long that takes; if it dies,
# the launcher ends them.
PATIENCE = timedelta(days=30)


class Processes:
    """The processes that ``torchrun`` or ``accelerate launch`` has started, or just this one.

    They share the run folder.
    """

    def __init__(self) -> None:
        accelerator = make_accelerator()
        self.count: int = accelerator.num_processes
        self.is_first: bool = accelerator.is_main_process
        self._waiting = None
        if self.count > 1:
            self._waiting = dist.new_group(backend="gloo", timeout=PATIENCE)

    def first(self, work: Callable[[], object]) -> None:
        """Let the first process do ``work`` while the others wait.

        Raises ProcessFailedError in the others where it fails.
        """
        failure: BaseException | None = None
        if self.is_first:
            try:
                work()
            except BaseException as error:
                failure = error
        if self._waiting is not None:
            news: list[Any] = [None if failure is None else repr(failure)]
            dist.broadcast_object_list(news, src=0, group=self._waiting)
            if news[0] is not None and failure is None:
                raise ProcessFailedError(f"process 0: {news[0]}")
        if failure is not None:
            raise failure
