"""Small TRMs whose every parameter matters, requests to them, what the fused path must equal."""

from __future__ import annotations

import copy
from typing import Any

import torch

from deeprec.trm import PreferenceAwareTRM, TRMConfig


def make(seed: int = 0, *, padding_row: bool = False, **options: Any) -> PreferenceAwareTRM:
    """A model whose every parameter matters."""
    torch.manual_seed(seed)
    shape = {"n_items": 40, "text_dim": 12, "hidden": 24, "inner": 40, "max_length": 9}
    config = TRMConfig(**{**shape, **options})
    model = PreferenceAwareTRM(config, torch.randn(config.n_items, config.text_dim)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
        if padding_row:  # as in checkpoints whose initialisation forgot the padding row
            model.item_plm_embedding.weight[0] = torch.randn(config.text_dim)
        else:
            model.item_embedding.weight[0] = 0
    return model


def ask(
    model: PreferenceAwareTRM, rows: int, seed: int = 0, shortest: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    width = model.config.max_length
    lengths = torch.randint(min(shortest, width), width + 1, (rows,), generator=random)
    history = torch.randint(1, model.config.n_items + 1, (rows, width), generator=random)
    history *= torch.arange(width) < lengths[:, None]
    return history, lengths, torch.randn(rows, model.config.text_dim, generator=random)


@torch.no_grad()
def eager(model: PreferenceAwareTRM, history: Any, lengths: Any, preference: Any) -> torch.Tensor:
    return model.with_preference(model.history_states(history, lengths), preference)


def assert_as_exact_as_eager(
    model: PreferenceAwareTRM, users: torch.Tensor, history: Any, lengths: Any, preference: Any
) -> None:
    """Within 1e-5 of the model in float64, and of the eager module but for its own error."""
    exact = eager(copy.deepcopy(model).double(), history, lengths, preference.double())
    own_error = (eager(model, history, lengths, preference) - exact).abs().max()
    assert float((users - exact).abs().max()) <= 1e-5 + 3 * float(own_error)


def assert_same_ranking(model: PreferenceAwareTRM, users: torch.Tensor, found: Any, k: int) -> None:
    """The eager top-k, up to items whose scores differ by less than 1e-5."""
    items = torch.nn.functional.normalize(model.item_embedding.weight[1:].detach(), dim=1)
    scores = torch.nn.functional.normalize(users, dim=1) @ items.T
    best = scores.topk(k)
    torch.testing.assert_close(found.values, best.values, rtol=0, atol=1e-5)
    picked = scores.gather(1, found.indices - 1)
    torch.testing.assert_close(picked, best.values, rtol=0, atol=1e-5)
