"""``deeprec bench --device cuda``: is every kernel right on this GPU, and how fast beside peers.

Correctness comes first: a kernel that disagrees with the reference is reported and not timed.
Peers that are not installed are left out, and named.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from deeprec import backends
from deeprec.ops import ItemIndex, SeenItems, gather_logprobs, linear_logprobs, topk_retrieve
from deeprec.trm import PreferenceAwareTRM, TRMConfig

__all__ = ["NoDevice", "Report", "run"]

ROUNDS, WARM_UP = 20, 3
KERNELS = ("cuda", "triton")
Call = Callable[[], object]


class NoDevice(RuntimeError):
    """The device that was asked for is not there."""


@dataclass
class Report:
    """What was found: kernels that are wrong, and a line of text for everything."""

    wrong: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


@dataclass
class Case:
    """A problem: how to check a backend on a small one, and what to time on a large one."""

    name: str
    check: Callable[[str], str | None]  # the backend's error, None if it is right
    ours: Callable[[str], Call]
    peers: Callable[[], Iterator[tuple[str, Call]]]
    op: str


def run(device: str = "cuda", *, check_only: bool = False) -> Report:
    """Check every GPU backend of every op on ``device``, then time those that are right.

    Raises NoDevice where there is no such GPU.
    """
    if torch.device(device).type != "cuda":
        raise NoDevice(
            f"device must be a GPU such as cuda or cuda:0, got {device!r}; "
            "the CPU's benchmarks are: pytest bench/ --benchmark"
        )
    if not torch.cuda.is_available():
        raise NoDevice(f"torch {torch.__version__} sees no CUDA device on this machine")
    report = Report()
    with torch.cuda.device(device), torch.device(device):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        report.say(
            f"{properties.name}, {properties.multi_processor_count} multiprocessors, "
            f"torch {torch.__version__}"
        )
        cases = (_topk(1), _topk(64), _topk(512), _gather(), _linear(False), _linear(True))
        for case in (*cases, _trm(1), _trm(512)):
            _run_case(case, report, check_only)
    return report


def _run_case(case: Case, report: Report, check_only: bool) -> None:
    report.say(f"\n{case.name}")
    right = []
    for backend in KERNELS:
        if backend not in backends.available()[case.op]:
            continue
        try:
            problem = case.check(backend)
        except RuntimeError as error:  # cannot run here, or the launch failed
            problem = str(error)
        report.say(f"  {backend:28} {'right' if problem is None else problem}")
        if problem is None:
            right.append(backend)
        elif "cannot run" not in problem:
            report.wrong.append(f"{case.name}, {backend}: {problem}")
    if check_only:
        return
    for backend in right:
        report.say(f"  {backend:28} {_milliseconds(case.ours(backend)):9.3f} ms")
    for name, call in case.peers():
        report.say(f"  {name:28} {_milliseconds(call):9.3f} ms")


def _milliseconds(call: Call) -> float:
    """Median of single calls, the queue drained in between."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _installed(*names: str) -> bool:
    try:
        for name in names:
            importlib.import_module(name)
    except ImportError:
        return False
    return True


# ---- exact top-k ----


def _topk(batch: int, items: int = 1_000_000, dim: int = 128, k: int = 20) -> Case:
    def check(backend: str) -> str | None:
        torch.manual_seed(0)
        for n, d in ((700, 11), (5000, 128)):
            table = torch.randint(-3, 4, (n, d)).float()  # ties
            queries = torch.randn(33, d)
            seen = SeenItems.from_padded(torch.randint(n, (33, 50)), pad=-1)
            for exclude in (None, seen):
                expected = topk_retrieve(queries, table, k, exclude=exclude, backend="reference")
                index = ItemIndex(table)
                for got in (
                    topk_retrieve(queries, table, k, exclude=exclude, backend=backend),
                    index.search(queries, k, exclude, backend=backend),
                ):
                    if not torch.equal(got.indices, expected.indices):
                        return f"WRONG indices at {n} x {d}"
                    if not torch.equal(got.values, expected.values):
                        return f"WRONG values at {n} x {d}"
        return None

    def problem() -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return torch.randn(batch, dim), torch.randn(items, dim)

    def ours(backend: str) -> Call:
        queries, table = problem()
        index = ItemIndex(table)
        return lambda: index.search(queries, k, backend=backend)

    def peers() -> Iterator[tuple[str, Call]]:
        queries, table = problem()
        yield "torch matmul + topk, inexact", lambda: torch.topk(queries @ table.T, k)
        if _installed("faiss", "faiss.contrib.torch_utils"):
            faiss = importlib.import_module("faiss")
            if hasattr(faiss, "StandardGpuResources"):
                flat = faiss.GpuIndexFlatIP(faiss.StandardGpuResources(), dim)
                flat.add(table)
                yield "faiss GpuIndexFlatIP", lambda: flat.search(queries, k)
        if _installed("cuvs.neighbors.brute_force"):
            brute_force = importlib.import_module("cuvs.neighbors.brute_force")
            built = brute_force.build(table, metric="inner_product")
            yield "cuVS brute_force", lambda: brute_force.search(built, queries, k)

    return Case(f"top {k} of {items:,} x {dim}, {batch} queries", check, ours, peers,
                "topk_retrieve")  # fmt: skip


# ---- log-probs ----


def _errors(got: Tensor, torchs: Tensor, exact: Tensor, factor: float) -> str | None:
    """Within ``factor`` times torch's own error in the same dtype."""
    error, allowed = ((x.double() - exact).abs().max().item() for x in (got, torchs))
    return None if error <= factor * allowed + 1e-5 else f"WRONG: error {error:.2g} > {allowed:.2g}"


def _gather(rows: int = 2048, vocabulary: int = 49_152) -> Case:
    def problem(t: int, v: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        return (3 * torch.randn(t, v)).bfloat16(), torch.randint(v, (t,))

    def torchs(logits: Tensor, ids: Tensor) -> Tensor:
        return F.log_softmax(logits.float(), -1).gather(1, ids[:, None])[:, 0]

    def check(backend: str) -> str | None:
        for t, v in ((37, 1003), (5, 49_152)):
            logits, ids = problem(t, v)
            exact = F.log_softmax(logits.double(), -1).gather(1, ids[:, None])[:, 0]
            got = gather_logprobs(logits, ids, backend=backend)
            assert isinstance(got, Tensor)  # the entropy was not asked for
            if problem_found := _errors(got, torchs(logits, ids), exact, 2):
                return problem_found
        return None

    def ours(backend: str) -> Call:
        logits, ids = problem(rows, vocabulary)
        return lambda: gather_logprobs(logits, ids, backend=backend)

    def peers() -> Iterator[tuple[str, Call]]:
        logits, ids = problem(rows, vocabulary)
        yield "torch log_softmax + gather", lambda: torchs(logits, ids)
        if _installed("flash_attn.ops.triton.cross_entropy"):
            flash = importlib.import_module("flash_attn.ops.triton.cross_entropy")
            yield "flash-attn cross entropy", lambda: flash.cross_entropy_loss(logits, ids)

    return Case(f"gather_logprobs, {rows} x {vocabulary:,} bfloat16", check, ours, peers,
                "gather_logprobs")  # fmt: skip


def _linear(backward: bool, rows: int = 2048, width: int = 576, vocabulary: int = 49_152) -> Case:
    def problem(t: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(0)
        hidden = torch.randn(t, h).bfloat16().requires_grad_(backward)
        weight = (0.05 * torch.randn(v, h)).bfloat16().requires_grad_(backward)
        return hidden, weight, torch.randint(v, (t,))

    def torchs(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return F.log_softmax((hidden @ weight.T).float(), -1).gather(1, ids[:, None])[:, 0]

    def stepped(forward: Callable[[], Tensor], *leaves: Tensor) -> Call:
        return (lambda: torch.autograd.grad(forward().sum(), leaves)) if backward else forward

    def check(backend: str) -> str | None:
        hidden, weight, ids = problem(67, 130, 1003)
        doubles = [x.detach().double().requires_grad_(backward) for x in (hidden, weight)]
        exact = torchs_exact(doubles[0], doubles[1], ids)
        values = [
            linear_logprobs(hidden, weight, ids, backend=backend),
            torchs(hidden, weight, ids),
        ]
        if wrong := _errors(values[0].detach(), values[1].detach(), exact.detach(), 2):
            return wrong
        if backward:
            wanted = torch.autograd.grad(exact.sum(), doubles)
            grads = [torch.autograd.grad(v.sum(), (hidden, weight)) for v in values]
            for got, other, truth in zip(*grads, wanted, strict=True):
                if wrong := _errors(got, other, truth, 3):
                    return f"gradient {wrong}"
        return None

    def torchs_exact(hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        return F.log_softmax(hidden @ weight.T, -1).gather(1, ids[:, None])[:, 0]

    def ours(backend: str) -> Call:
        hidden, weight, ids = problem(rows, width, vocabulary)
        return stepped(
            lambda: linear_logprobs(hidden, weight, ids, backend=backend), hidden, weight
        )

    def peers() -> Iterator[tuple[str, Call]]:
        hidden, weight, ids = problem(rows, width, vocabulary)
        yield "torch", stepped(lambda: torchs(hidden, weight, ids), hidden, weight)
        if _installed("liger_kernel.transformers"):
            liger = importlib.import_module("liger_kernel.transformers")
            loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="sum")
            yield "Liger", stepped(lambda: loss(weight, hidden, ids), hidden, weight)
        if _installed("cut_cross_entropy"):
            cce = importlib.import_module("cut_cross_entropy")
            yield (
                "cut-cross-entropy",
                stepped(
                    lambda: cce.linear_cross_entropy(hidden, weight, ids, reduction="none"),
                    hidden,
                    weight,
                ),
            )

    what = "forward + backward" if backward else "forward"
    return Case(f"linear_logprobs {what}, {rows} x {width} x {vocabulary:,} bfloat16", check, ours,
                peers, "linear_logprobs")  # fmt: skip


# ---- the TRM ----


def _trm(batch: int, items: int = 25_612, text_dim: int = 384, k: int = 20) -> Case:
    def problem(
        users: int, config: TRMConfig
    ) -> tuple[PreferenceAwareTRM, tuple[Tensor, Tensor, Tensor]]:
        torch.manual_seed(0)
        texts = torch.randn(config.n_items, config.text_dim)
        model = PreferenceAwareTRM(config, texts).eval()
        width = config.max_length
        lengths = torch.randint(1, width + 1, (users,))
        history = torch.randint(1, config.n_items + 1, (users, width))
        history *= torch.arange(width) < lengths[:, None]
        return model, (history, lengths, torch.randn(users, config.text_dim))

    @torch.no_grad()
    def eager(
        model: PreferenceAwareTRM, history: Tensor, lengths: Tensor, preference: Tensor
    ) -> Tensor:
        return model.with_preference(model.history_states(history, lengths), preference)

    def check(backend: str) -> str | None:
        for config in (
            TRMConfig(n_items=300, text_dim=40, hidden=66, inner=90, n_experts=5, max_length=13),
            TRMConfig(n_items=300, text_dim=text_dim),
        ):
            model, asked = problem(37, config)
            exact = eager(copy.deepcopy(model).double(), *asked[:2], asked[2].double())
            got = model.pack().user_vectors(*asked, backend=backend)
            if wrong := _errors(got, eager(model, *asked), exact, 3):
                return wrong
            found = model.retrieve(*asked, k, exclude_history=True, backend=backend)
            if bool((found.indices[:, :, None] == asked[0][:, None]).any()):
                return "WRONG: returned what was excluded"
        return None

    def ours(backend: str) -> Call:
        model, asked = problem(batch, TRMConfig(n_items=items, text_dim=text_dim))
        packed = model.pack()
        return lambda: packed.retrieve(*asked, k, backend=backend)

    def peers() -> Iterator[tuple[str, Call]]:
        model, asked = problem(batch, TRMConfig(n_items=items, text_dim=text_dim))
        table = F.normalize(model.item_embedding.weight.detach(), dim=1)
        yield (
            "torch eager + matmul + topk",
            lambda: torch.topk(F.normalize(eager(model, *asked), dim=1) @ table.T, k),
        )

    return Case(f"trm_retrieve {k} of {items:,}, {batch} users", check, ours, peers,
                "trm_retrieve")  # fmt: skip
