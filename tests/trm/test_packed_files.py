"""Packed TRMs on disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_trm import ask, make

from deeprec.trm import PackedTRM
from deeprec.trm.packing import check_tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(tmp_path: Path, dtype: torch.dtype) -> None:
    model = make(n_items=700)
    asked = ask(model, 9)
    packed = model.pack(dtype)
    packed.save(tmp_path / "served")
    assert len(list((tmp_path / "served").iterdir())) == 2
    loaded = PackedTRM.load(tmp_path / "served")
    one = packed.retrieve(*asked, 6, exclude_history=True)
    two = loaded.retrieve(*asked, 6, exclude_history=True)
    assert torch.equal(one.indices, two.indices)
    assert torch.equal(one.values, two.values)
    assert loaded.dtype == dtype
    assert loaded.nbytes == packed.nbytes
    with pytest.raises(RuntimeError, match="no module behind it"):
        loaded.retrieve(*asked, 6, backend="reference")
    # It needs no module.
    del model, packed
    assert torch.equal(loaded.retrieve(*asked, 6, exclude_history=True).indices, two.indices)


def test_load_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="trm_packed"):
        PackedTRM.load(tmp_path)
    model = make()
    model.save(tmp_path)
    (tmp_path / "trm.safetensors").rename(tmp_path / "trm_packed.safetensors")
    with pytest.raises(ValueError, match="no packed TRM"):
        PackedTRM.load(tmp_path)
    model.pack().save(tmp_path)
    make(seed=1).pack().save(tmp_path / "other")
    (tmp_path / "other" / "trm_items.safetensors").rename(tmp_path / "trm_items.safetensors")
    with pytest.raises(ValueError, match="different models"):
        PackedTRM.load(tmp_path)


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_every_tensor_has_its_shape(data: st.DataObject) -> None:
    heads = data.draw(st.integers(1, 4))
    model = make(
        n_items=data.draw(st.integers(1, 50)),
        text_dim=data.draw(st.integers(1, 40)),
        hidden=heads * data.draw(st.integers(1, 20)),
        inner=data.draw(st.integers(1, 70)),
        n_layers=data.draw(st.integers(1, 3)),
        n_heads=heads,
        n_experts=data.draw(st.integers(1, 9)),
        max_length=data.draw(st.integers(1, 20)),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    packed = model.pack(dtype)
    check_tensors(packed.tensors, packed.sizes, dtype)
    # Nothing else is there, and nothing may be missing, shorter or of another dtype.
    name = data.draw(st.sampled_from(sorted(packed.tensors)))
    tensor = packed.tensors[name]
    for wrong in (None, tensor[:-1], tensor.double()):
        tensors = dict(packed.tensors)
        if wrong is None:
            del tensors[name]
        else:
            tensors[name] = wrong
        with pytest.raises(ValueError, match=re.escape(f"{name}: expected torch.")):
            check_tensors(tensors, packed.sizes, dtype)


def test_load_finds_changed_bytes(tmp_path: Path) -> None:
    model = make()
    model.pack().save(tmp_path)
    path = tmp_path / "trm_packed.safetensors"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"trm_packed.* its checksum differs"):
        PackedTRM.load(tmp_path)
    PackedTRM.load(tmp_path, verify=False).retrieve(*ask(model, 3), 3)
    for damaged in (b"", content[:200], b"\0" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"trm_packed\.safetensors is damaged"):
            PackedTRM.load(tmp_path)


def test_load_names_a_tensor_of_another_shape(tmp_path: Path) -> None:
    packed = make().pack()
    packed.tensors["layer.0.up.bias"] = torch.zeros(3)
    packed.save(tmp_path)
    with pytest.raises(ValueError, match=r"damaged.*layer.0.up.bias: expected .* \(64,\), got"):
        PackedTRM.load(tmp_path)
