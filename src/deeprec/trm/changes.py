"""Notices that a module's parameters have changed, so that nothing derived from them goes stale."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

__all__ = ["ParameterWatch"]


class ParameterWatch:
    """Tells whether the parameters of a module are still what they were.

    In-place changes show in a tensor's version and replaced tensors in its address. Fused
    optimizers show in neither, so every step of a torch optimizer over a watched parameter counts.
    Modules put in the place of others are looked for once any module anywhere was given one. Only
    writes through ``parameter.data`` go unnoticed.
    """

    registrations: ClassVar[int] = 0
    """Modules given to other modules, in this process."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._places: list[tuple[dict[str, Any], str]] = []
        self._registrations = -1
        self._steps = 0
        _WATCHES.add(self)

    def state(self) -> tuple[int, ...]:
        """Another value after every change."""
        if self._registrations != self.registrations:
            self._find_places()
        state = [self._steps]
        for parameters, name in self._places:
            parameter = parameters.get(name)
            if parameter is not None:
                state += (parameter.data_ptr(), parameter._version)
        return tuple(state)

    def _find_places(self) -> None:
        # Tensors are looked up anew each time: load_state_dict(assign=True) replaces parameters.
        self._registrations = self.registrations
        modules = () if (module := self._module()) is None else module.modules()
        self._places = [
            (owner._parameters, name) for owner in modules for name in owner._parameters
        ]

    def stepped(self, changed: set[int]) -> None:
        """An optimizer has stepped over the tensors of these ids."""
        if any(id(parameters.get(name)) in changed for parameters, name in self._places):
            self._steps += 1


_WATCHES: weakref.WeakSet[ParameterWatch] = weakref.WeakSet()


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    watches = list(_WATCHES)
    if watches:
        changed = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for watch in watches:
            watch.stepped(changed)


def _on_registration(*_: Any) -> None:
    ParameterWatch.registrations += 1


register_optimizer_step_post_hook(_after_step)
register_module_module_registration_hook(_on_registration)
