"""A step of TRM training, forward and backward: no padding, catalogue softmax by linear_logprobs.

512 histories of 1 to 20 items, each learnt without and with a preference, as ``train_trm`` does,
with dropout, under bf16 autocast where the machine multiplies bf16. Peers: the same modules over
padded batches, and with torch's cross entropy over the catalogue's logits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from harness import Table
from torch import Tensor
from torch.nn import functional as F
from trm_peers import adapted, padded_states

from deeprec.ops import linear_logprobs
from deeprec.trm import PreferenceAwareTRM, TRMConfig

TEMPERATURE = 0.07
# MovieTweetings with the width of ``deeprec run``, Amazon Video Games with the paper's.
SHAPES = ((2414, 64), (25_612, 128))


def by_ours(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    logprobs = linear_logprobs(users, items, targets, temperature=TEMPERATURE)
    assert isinstance(logprobs, Tensor)
    return -logprobs.mean()


def by_torch(users: Tensor, items: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(users @ items.T / TEMPERATURE, targets)


def padded(model: PreferenceAwareTRM, history: Tensor, lengths: Tensor) -> Tensor:
    table = model.item_embedding.weight
    return padded_states(model, history, lengths, adapted(model, history), table)


@pytest.mark.parametrize(("items", "hidden"), SHAPES)
def test_training_step(table: Table, items: int, hidden: int) -> None:
    if table.short and items > 5000:
        pytest.skip("takes too long for --short")
    torch.manual_seed(0)
    batch, text = (8, 32) if table.short else (512, 384)
    config = TRMConfig(n_items=items, text_dim=text, hidden=hidden, inner=4 * hidden, dropout=0.3)
    model = PreferenceAwareTRM(config, F.normalize(torch.randn(items, text), dim=1))
    lengths = torch.randint(1, 21, (batch,))
    history = torch.randint(1, items + 1, (batch, 20)) * (torch.arange(20) < lengths[:, None])
    preference = F.normalize(torch.randn(batch, text), dim=1)
    targets = torch.randint(0, items, (batch,)).repeat(2)
    native = torch.cpu._is_avx512_bf16_supported()

    def loss(encode: Callable[..., Tensor], criterion: Callable[..., Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=native and model.training):
            states = encode(history, lengths)
            users = [model.with_preference(states, asked) for asked in (None, preference)]
            rows = F.normalize(model.item_embedding.weight[1:], dim=1)
            return criterion(F.normalize(torch.cat(users).float(), dim=1), rows, targets)

    def step(encode: Callable[..., Tensor], criterion: Callable[..., Tensor]) -> None:
        model.zero_grad()
        loss(encode, criterion).backward()

    model.eval()  # without dropout, all are the same function
    calls = {
        "deeprec": (model.history_states, by_ours),
        "padded": (partial(padded, model), by_ours),
        "torch cross entropy": (model.history_states, by_torch),
        "padded, torch cross entropy": (partial(padded, model), by_torch),
    }
    with torch.no_grad():
        for call in calls.values():
            torch.testing.assert_close(loss(*call), loss(*calls["deeprec"]), rtol=1e-5, atol=1e-5)
    model.train()
    steps = {name: partial(step, *call) for name, call in calls.items()}
    result = table.row(
        "trm training step",
        {"items": f"{items:,}", "H": hidden, "B": batch},
        ours={"deeprec": steps.pop("deeprec")},
        peers=steps,
        notes={"dtype": "bf16 autocast" if native else "fp32"},
    )
    ms = result["median_ms"]
    plain = ms["padded, torch cross entropy"]
    result["notes"]["both / ours"] = f"{plain / ms['deeprec']:.2f}"
