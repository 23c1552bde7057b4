"""Other libraries with and without ``deeprec.patch``, on a CPU, each measured by its own code.

TRL: the log-prob step of its trainers, that is a forward (and backward) with the fused LM head, on
a model without layers so that nothing but the head takes time; prompts are ignored labels, as in
GRPO. RecBole: ``Trainer.evaluate`` on the test users of a sequential model. Memory is the growth of
the peak resident set in a process of its own, beyond inputs and returned gradients.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import recbole_peer
from harness import Table, forget_peak, peak_megabytes

import deeprec
from deeprec.integrations import patching

# "autocast" is float32 under bfloat16 autocast, what TRL's trainers do by default.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "autocast": torch.float32}
# Sequences, scored tokens of each, vocabulary, hidden size.
SHAPE, SHORT = (4, 256, 49_152, 576), (2, 24, 2000, 64)
RECBOLE = [
    ("SASRec", "movietweetings"),
    ("GRU4Rec", "movietweetings"),
    ("NARM", "movietweetings"),
    ("SASRec", "shop"),
    ("SASRec", "ml-100k"),
    ("GRU4Rec", "ml-100k"),
]


def trl_step(
    dtype: str, rows: int, length: int, prompt: int, vocabulary: int, hidden: int, backward: bool
) -> tuple[Callable[[], list[torch.Tensor]], Any]:
    """``rows`` sequences of ``prompt`` ignored tokens and ``length`` scored ones; and the model."""
    import trl.trainer.utils as trl
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8,
        num_hidden_layers=0,
        num_attention_heads=8,
        tie_word_embeddings=True,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).to(DTYPES[dtype])
    trl.add_fused_lm_head(model, temperature=0.9, outputs=("log_probs", "entropy"))
    ids = torch.randint(vocabulary, (rows, prompt + length + 1))
    labels = ids.clone()
    labels[:, : prompt + 1] = -100

    def step() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=False)
        with torch.set_grad_enabled(backward), torch.autocast("cpu", enabled=dtype == "autocast"):
            out = model(input_ids=ids, labels=labels, fused_lm_head=True)
            if backward:
                out.log_probs.sum().backward()
        return [out.log_probs.detach(), out.entropy.detach()]

    return step, model


def patched(target: str, call: Callable[[], Any]) -> tuple[Callable[[], Any], Callable[[], int]]:
    """``call`` under the patch, which is switched here so as not to time the search of modules.

    And how many calls of the library's functions became ours.
    """
    with deeprec.patch(target) as patch:
        places = [(item.owner, item.attribute, item) for item in patch._planned]
        holders = patching._holders(item.ours for item in patch._planned)
        places += [(*place, item) for item in patch._planned for place in holders[id(item.ours)]]

    def run() -> Any:
        for owner, name, item in places:
            setattr(owner, name, item.ours)
        try:
            return call()
        finally:
            for owner, name, item in places:
                setattr(owner, name, item.original)

    return run, lambda: sum(item.usage.taken for item in patch._planned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("prompt", [0, 256])
def test_trl_log_prob_step(table: Table, prompt: int, backward: bool, dtype: str) -> None:
    pytest.importorskip("trl")
    rows, length, vocabulary, hidden = SHORT if table.short else SHAPE
    step, model = trl_step(dtype, rows, length, prompt, vocabulary, hidden, backward)
    ours, taken = patched("trl", step)
    tolerance = 1e-3 if dtype == "fp32" else 0.1
    expected = step()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    assert bool(gradients) == backward and taken() == 0
    for theirs, values in zip(expected, ours(), strict=True):
        torch.testing.assert_close(values, theirs, rtol=tolerance, atol=tolerance)
    assert taken() > 0
    made = (p.grad for p in model.parameters() if p.grad is not None)
    for theirs, gradient in zip(gradients, made, strict=True):
        near = 0.1 * tolerance * float(theirs.abs().max())
        torch.testing.assert_close(gradient, theirs, rtol=0, atol=near)
    products = 4 if backward else 1  # logits, and again for the two gradients
    table.row(
        "TRL log-prob step",
        {
            "sequences": f"{rows} x ({prompt} prompt + {length})",
            "H, V": f"{hidden}, {vocabulary}",
            "dtype": dtype,
            "pass": "forward + backward" if backward else "forward",
        },
        ours={"patched": ours},
        peers={"TRL": step},
        operations=2.0 * products * rows * length * vocabulary * hidden,
        unit="fp32_fma" if dtype == "fp32" else "bf16_dot",
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_trl_memory(table: Table, dtype: str) -> None:
    pytest.importorskip("trl")
    if table.short and dtype != "fp32":
        pytest.skip("a process takes its time")
    rows, length, vocabulary, hidden = SHORT if table.short else SHAPE
    shape = (rows, length, length, vocabulary, hidden, 1)
    memory = {
        name: growth(("trl", name, dtype, *map(str, shape)), table) for name in ("TRL", "deeprec")
    }
    table.facts(
        "TRL log-prob step, memory",
        {"sequences": f"{rows} x ({length} prompt + {length})", "dtype": dtype},
        {f"{name} MB": f"{value:.0f}" for name, value in memory.items()},
    )
    if not table.short:
        assert memory["deeprec"] < memory["TRL"]


def growth(arguments: tuple[str, ...], table: Table) -> float:
    """Growth of the peak resident set over a step, MB, in a process of its own."""
    code = [sys.executable, __file__, str(table.threads), *arguments]
    done = subprocess.run(code, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def measure_growth(threads: str, _: str, who: str, dtype: str, *numbers: str) -> float:
    """What a process started by :func:`growth` prints."""
    torch.set_num_threads(int(threads))
    rows, length, prompt, vocabulary, hidden, backward = map(int, numbers)
    small, _ = trl_step(dtype, 1, 4, 0, 500, 32, bool(backward))
    step, model = trl_step(dtype, rows, length, prompt, vocabulary, hidden, bool(backward))
    if who == "deeprec":
        deeprec.patch("trl")
    small()  # loads code and thread pools
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(1)  # touched, so resident
    forget_peak()
    before = peak_megabytes()
    step()
    return peak_megabytes() - before


@pytest.fixture(scope="module")
def recbole_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recbole")
    recbole_peer.install(folder / "packages")
    recbole_peer.movietweetings(folder / "data")
    recbole_peer.shop(folder / "data")
    return folder / "data"


@pytest.mark.parametrize("model, data", RECBOLE)
def test_recbole_evaluation(
    table: Table, recbole_data: Path, monkeypatch: pytest.MonkeyPatch, model: str, data: str
) -> None:
    if table.short and data != "ml-100k":
        pytest.skip("the smallest data only")
    evaluate, what = recbole_peer.evaluation(model, data, recbole_data, monkeypatch)
    ours, taken = patched("recbole", evaluate)
    assert ours() == evaluate()
    assert taken() > 0
    table.row(
        "RecBole full-sort evaluation", what, ours={"patched": ours}, peers={"RecBole": evaluate}
    )


if __name__ == "__main__":
    print(json.dumps(measure_growth(*sys.argv[1:])))
