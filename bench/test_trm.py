"""Fused TRM retrieval: history and preference in, 20 items out, the history excluded.

The model is the paper's (H 128, inner 512, 2 layers, 2 heads, 8 experts) with P 384. "mixed"
lengths are uniform on 1 ... 20. ``ours`` first is the whole call in float32; "vectors" is its part
without the search; "later turn" has the histories' states from an earlier call. Floors count the
arithmetic that the answer needs: no padding, in the last layer one position, no key or value
projection there; the search is a scan in int8.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from harness import Table
from torch import Tensor
from torch.nn import functional as F
from trm_peers import CompiledTRM, authors_path, eager_module, recbole_ms

from deeprec.trm import PreferenceAwareTRM, TRMConfig

K, TEXT = 20, 384
BATCHES = (1, 16, 64, 256, 512)
CATALOGUES = (2414, 25_612, 1_000_000)
LENGTHS = (50, 5, 20, "mixed")  # the first has a model of its own
# Every shape takes half a minute to compile: the targets' batches at 20 items only.
COMPILED = (1, 64, 512)
# Peers that hold a [B, N] float matrix; beyond this it only takes memory and minutes.
LARGEST_SCORES = 64_000_000


@lru_cache(maxsize=1)
def model_of(items: int, max_length: int) -> PreferenceAwareTRM:
    torch.manual_seed(0)
    config = TRMConfig(n_items=items, text_dim=TEXT, max_length=max_length)
    return PreferenceAwareTRM(config, F.normalize(torch.randn(items, TEXT), dim=1)).eval()


@lru_cache(maxsize=1)
def compiled_of(items: int, max_length: int) -> CompiledTRM:
    return CompiledTRM(model_of(items, max_length), K)


def ask(items: int, batch: int, length: int | str) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(batch)
    width = 20 if length == "mixed" else int(length)
    lengths = torch.full((batch,), width)
    if length == "mixed":
        lengths = torch.randint(1, width + 1, (batch,), generator=random)
    history = torch.randint(1, items + 1, (batch, width), generator=random)
    history *= torch.arange(width) < lengths[:, None]
    return history, lengths, F.normalize(torch.randn(batch, TEXT, generator=random), dim=1)


def operations(config: TRMConfig, lengths: Tensor) -> float:
    """Of the user vectors; a multiply-add counts as two."""
    hidden, inner, tokens = config.hidden, config.inner, int(lengths.sum())
    pairs = int((lengths * lengths).sum()) * hidden
    layer = 4 * hidden * hidden + 2 * hidden * inner
    full = (config.n_layers - 1) * (tokens * layer + 2 * pairs)
    last = len(lengths) * layer + 2 * tokens * hidden * config.n_heads
    adaptor = len(lengths) * config.text_dim * config.n_experts * (hidden + 1)
    return 2.0 * (full + last + adaptor + 2 * pairs)  # the last: both convolutions


def check(
    model: PreferenceAwareTRM, asked: tuple[Tensor, Tensor, Tensor], states: Tensor, peers: Any
) -> None:
    """Against every peer, of a few users where none is measured; a later turn finds the same."""
    found = model.retrieve(*asked, K, exclude_history=True)
    for peer in peers.values():
        torch.testing.assert_close(found.values, peer().values, rtol=0, atol=1e-5)
    if not peers:
        few = eager_module(model, K)(*(part[:8] for part in asked))
        torch.testing.assert_close(found.values[:8], few.values, rtol=0, atol=1e-5)
    later = model.pack().retrieve(*asked, K, exclude_history=True, states=states)
    assert torch.equal(later.indices, found.indices)
    assert torch.equal(later.values, found.values)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("items", CATALOGUES)
def test_trm(table: Table, items: int, length: int | str, batch: int) -> None:
    if table.short and ((items, length) != (2414, "mixed") or batch > 16):
        pytest.skip("takes too long for --short")
    longest = 50 if length == 50 else 20
    model = model_of(items, longest)
    packed, half = model.pack(), model.pack(torch.bfloat16)
    asked = history, lengths, _ = ask(items, batch, length)
    states, width = packed.history_states(history, lengths), history.shape[1]
    peers: dict[str, Callable[[], Any]] = {}
    if items * batch <= LARGEST_SCORES:
        peers["authors' path"] = partial(authors_path(model, K), *asked)
        peers["eager module"] = partial(eager_module(model, K), *asked)
        if width == 20 and batch in COMPILED and not table.short:
            peers["cached, compiled"] = partial(compiled_of(items, longest), *asked)
    check(model, asked, states, peers)
    best = packed.retrieve(*asked, K).indices
    kept = half.retrieve(*asked, K).indices
    result = table.row(
        "trm",
        {"items": f"{items:,}", "length": length, "B": batch},
        ours={
            "deeprec": partial(packed.retrieve, *asked, K, exclude_history=True),
            "vectors": partial(packed.user_vectors, *asked),
            "bf16": partial(half.retrieve, *asked, K, exclude_history=True),
            "bf16 vectors": partial(half.user_vectors, *asked),
            "later turn": partial(packed.retrieve, *asked, K, exclude_history=True, states=states),
        },
        peers=peers,
    )
    ms, notes = result["median_ms"], result["notes"]
    work = operations(model.config, lengths)
    search = 2.0 * batch * items * model.config.hidden
    for name, unit in (("vectors", "fp32_fma"), ("bf16 vectors", "bf16_dot")):
        if table.peaks.get(unit):
            notes[f"{name} % peak"] = f"{100 * work / table.peaks[unit] / ms[name] * 1e3:.0f}"
    if table.peaks.get("int8_dot"):
        floor = 1e3 * (work / table.peaks["fp32_fma"] + search / table.peaks["int8_dot"])
        notes["floor ms"] = f"{floor:.3g}"
        notes["% of floor"] = f"{100 * floor / ms['deeprec']:.0f}"
    if "eager module" in ms:
        faster = min(ms["authors' path"], ms["eager module"])
        notes["eager / ours"] = f"{faster / ms['deeprec']:.1f}"
    if "cached, compiled" in ms:
        notes["compiled / ours"] = f"{ms['cached, compiled'] / ms['deeprec']:.1f}"
    shared = (best[:, :, None] == kept[:, None]).any(2).float().mean()
    notes["bf16 keeps"] = f"{shared:.3f}"


@pytest.mark.full_only
@pytest.mark.parametrize("batch", [64, 512])
def test_recbole(table: Table, batch: int) -> None:
    """RecBole's SASRec: no texts, no preference, its history not excluded; in its own process."""
    found = recbole_ms(25_612, batch, 20, table.threads)
    if not found:
        pytest.skip("RECBOLE_PYTHON names no Python that has RecBole")
    asked = ask(25_612, batch, 20)
    packed = model_of(25_612, 20).pack()
    result = table.row(
        "trm and RecBole's SASRec",
        {"items": "25,612", "length": 20, "B": batch},
        ours={"deeprec": partial(packed.retrieve, *asked, K, exclude_history=True)},
        peers={},
        notes={"RecBole SASRec ms (own process)": f"{found['p50']:.3g}"},
    )
    result["notes"]["ratio"] = f"{found['p50'] / result['median_ms']['deeprec']:.1f}"


@pytest.mark.full_only
@pytest.mark.parametrize("threads", [1, 2])
def test_latency(table: Table, threads: int) -> None:
    """One request at a time: p50 and p99 of a thousand."""
    items, length = 25_612, 20
    model = model_of(items, length)
    packed, half = model.pack(), model.pack(torch.bfloat16)
    asked = ask(items, 1, length)
    states = packed.history_states(*asked[:2])
    calls: dict[str, Callable[[], Any]] = {
        "deeprec": partial(packed.retrieve, *asked, K, exclude_history=True),
        "bf16": partial(half.retrieve, *asked, K, exclude_history=True),
        "later turn": partial(packed.retrieve, *asked, K, exclude_history=True, states=states),
        "eager module": partial(eager_module(model, K), *asked),
        "cached, compiled": partial(compiled_of(items, length), *asked),
    }
    torch.set_num_threads(threads)
    try:
        for name, call in calls.items():
            for _ in range(20):
                call()
            seconds = []
            for _ in range(200 if name == "eager module" else 1000):
                before = time.perf_counter()
                call()
                seconds.append(time.perf_counter() - before)
            seconds.sort()
            table.row(
                "trm latency",
                {"threads": threads, "what": name},
                ours={"median": call},
                peers={},
                notes={
                    "p50 ms": f"{1e3 * seconds[len(seconds) // 2]:.3f}",
                    "p99 ms": f"{1e3 * seconds[int(0.99 * len(seconds))]:.3f}",
                },
            )
    finally:
        torch.set_num_threads(table.threads)
