"""ItemIndex: cosine, updates, files, copies."""

from __future__ import annotations

import json
import multiprocessing
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deeprec import ItemIndex, topk_retrieve
from deeprec.ops.reference.topk import normalize_rows

torch.manual_seed(0)
ITEMS, QUERIES = torch.randn(1000, 20), torch.randn(6, 20)


def same(a, b) -> bool:
    return torch.equal(a.indices, b.indices) and torch.equal(a.values, b.values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosine_is_the_inner_product_of_normalised_rows(dtype: torch.dtype) -> None:
    index = ItemIndex(ITEMS.to(dtype), metric="cosine")
    rows, queries = normalize_rows(ITEMS.to(dtype)), normalize_rows(QUERIES)
    assert torch.equal(index.items, rows)
    assert same(index.search(QUERIES, 9), topk_retrieve(queries, rows, 9, backend="reference"))


def test_normalising_survives_extreme_rows() -> None:
    items = torch.cat([ITEMS[:3] * 1e-44, ITEMS[3:6] * 1e37])
    index = ItemIndex(items, metric="cosine")
    assert torch.allclose(index.items.norm(dim=1), torch.ones(6))
    assert torch.equal(index.items, normalize_rows(items))


@pytest.mark.parametrize("metric", ["ip", "cosine"])
@pytest.mark.parametrize("scaled", [1.0, 50.0])
def test_update_equals_a_new_index(metric, scaled: float) -> None:
    # Norms far apart, so that rows are stored in another order than given.
    items = ITEMS * torch.linspace(0.1, 30, len(ITEMS))[:, None]
    index = ItemIndex(items, metric=metric)
    rows = torch.tensor([999, 0, 17, 500])
    vectors = torch.randn(4, 20) * scaled
    index.update(rows, vectors)
    changed = items.clone()
    changed[rows] = vectors
    assert same(index.search(QUERIES, 30), ItemIndex(changed, metric=metric).search(QUERIES, 30))
    assert torch.equal(items, ITEMS * torch.linspace(0.1, 30, len(ITEMS))[:, None])


def test_the_index_owns_its_rows() -> None:
    items = ITEMS.clone()
    index = ItemIndex(items)
    before = index.search(QUERIES, 5)
    items.zero_()
    assert same(index.search(QUERIES, 5), before)


@pytest.mark.parametrize("prefilter", ["auto", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_and_loaded(tmp_path: Path, dtype: torch.dtype, prefilter) -> None:
    items = (ITEMS * torch.rand(1000, 1) + 3).to(dtype)
    index = ItemIndex(items, prefilter=prefilter)
    path = tmp_path / "items.safetensors"
    index.save(path)
    loaded = ItemIndex.load(path)
    assert same(loaded.search(QUERIES, 9), index.search(QUERIES, 9))
    assert (len(loaded), loaded.dim, loaded.metric) == (1000, 20, "ip")
    assert loaded.nbytes == index.nbytes
    # Any reader of the format can read it; an update stays in memory.
    assert torch.equal(safetensors.torch.load_file(path)["items"], items)
    content = path.read_bytes()
    loaded.update(torch.tensor([3]), torch.ones(1, 20, dtype=dtype))
    assert path.read_bytes() == content
    index.save(path)  # over a file that is mapped
    assert [file.name for file in tmp_path.iterdir()] == ["items.safetensors"]


def header_of(content: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(header: dict, data: bytes) -> bytes:
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + data


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "items.safetensors"
    ItemIndex(ITEMS).save(path)
    content = path.read_bytes()
    header, data = header_of(content)

    def changed(**entries) -> bytes:
        return with_header({**header, **entries}, data)

    metadata = header["__metadata__"]
    flipped = bytearray(content)
    flipped[-7] ^= 1
    damaged = {
        "too few for a header": b"",
        "cut off": content[:100],
        "does not describe": content[:-1],
        "checksum": bytes(flipped),
        "cannot be read": b"\x08" + b"\0" * 7 + b"nonsense",
        "version 4": changed(__metadata__={**metadata, "version": "4"}),
        "metric is 'l2'": changed(__metadata__={**metadata, "metric": "l2"}),
        "wrong size": changed(items={**header["items"], "shape": [1 << 40, 20]}),
        "has shape": changed(items={**header["items"], "shape": [-1000, -20]}),
        "incomplete prefilter": with_header(
            {"extra" if name == "codes" else name: entry for name, entry in header.items()}, data
        ),
    }
    for message, bad in damaged.items():
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="not a usable item index") as caught:
            ItemIndex.load(path)
        assert message in str(caught.value), message
    path.write_bytes(content)
    assert len(ItemIndex.load(path)) == 1000


def test_pickled_and_forked() -> None:
    index = ItemIndex(ITEMS)
    expected = index.search(QUERIES, 5)
    assert same(pickle.loads(pickle.dumps(index)).search(QUERIES, 5), expected)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child() -> None:
        torch.set_num_threads(2)
        found = index.search(QUERIES.repeat(40, 1), 5)
        queue.put(found.indices[:6].tolist())

    process = context.Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 0
    assert queue.get() == expected.indices.tolist()


def test_description() -> None:
    index = ItemIndex(ITEMS)
    assert "1000 x 20" in repr(index)
    assert "8-bit codes" in repr(index)
    assert index.nbytes > ITEMS.nbytes
    assert index.to("cpu") is index


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ItemIndex(ITEMS, metric="l2"), ValueError, "metric must be one of ip, cosine"),
        (lambda: ItemIndex(ITEMS, prefilter="maybe"), ValueError, "prefilter must be one of"),
        (lambda: ItemIndex(ITEMS.long()), TypeError, "items must be float32"),
        (lambda: ItemIndex(torch.empty(3, 0)), ValueError, "D > 0"),
        (lambda: ItemIndex(torch.tensor([[1.0], [torch.inf]])), ValueError, "row 1 holds NaN"),
        (lambda: ItemIndex(torch.tensor([[1.0], [0.0]]), metric="cosine"), ValueError, "row 1 is"),
        (
            lambda: ItemIndex(ITEMS, metric="cosine").search(torch.zeros(1, 20), 1),
            ValueError,
            "queries: row 0 is zero",
        ),
        (lambda: ItemIndex(ITEMS).search(QUERIES[:, :3], 1), ValueError, "D = 20"),
        (lambda: ItemIndex(ITEMS).update([0.5], ITEMS[:1]), ValueError, "rows must be integers"),
        (lambda: ItemIndex(ITEMS).update([1000], ITEMS[:1]), IndexError, "items are 0 … 999"),
        (lambda: ItemIndex(ITEMS).update([1, 1], ITEMS[:2]), ValueError, "distinct"),
        (lambda: ItemIndex(ITEMS).update([1], ITEMS[:2]), ValueError, r"shape \[1, 20\]"),
        (lambda: ItemIndex(ITEMS).update([1], ITEMS[:1].half()), TypeError, "like the items"),
        (lambda: ItemIndex(ITEMS).update([1], ITEMS[:1] / 0), ValueError, "vectors: row 0"),
    ],
)
def test_bad_input_is_explained(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
