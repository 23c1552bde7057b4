"""Packed TRMs on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_trm import ask, make

from deeprec.trm import PackedTRM


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
