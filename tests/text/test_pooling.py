"""Pooling against hand-computed values, and how it is read from a model's files."""

import json
import logging
from pathlib import Path

import pytest
import torch

from deeprec.text.pooling import Pooling, read_pooling

STATES = torch.tensor([[[1.0, -2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 0.0], [7.0, 2.0], [6.0, 1.0]]])
RIGHT = torch.tensor([[1, 1, 0], [1, 1, 1]])
LEFT = torch.tensor([[0, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize(
    ("mode", "mask", "expected"),
    [
        ("mean", RIGHT, [[2.0, 1.0], [6.0, 1.0]]),
        ("cls", RIGHT, [[1.0, -2.0], [5.0, 0.0]]),
        ("cls", LEFT, [[3.0, 4.0], [5.0, 0.0]]),
        ("lasttoken", RIGHT, [[3.0, 4.0], [6.0, 1.0]]),
        ("lasttoken", LEFT, [[9.0, 9.0], [6.0, 1.0]]),
        ("max", RIGHT, [[3.0, 4.0], [7.0, 2.0]]),
    ],
)
def test_modes(mode: str, mask: torch.Tensor, expected: list[list[float]]) -> None:
    torch.testing.assert_close(Pooling(mode, normalize=False)(STATES, mask), torch.tensor(expected))


def test_normalised_vectors_have_length_one_in_fp32() -> None:
    vectors = Pooling("mean", normalize=True)(STATES.bfloat16(), RIGHT)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


def write(folder: Path, kinds: list[str], pooling: dict[str, object] | None) -> Pooling:
    modules = [
        {"path": f"{index}_{kind}" if index else "", "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    if pooling is not None:
        (folder / "1_Pooling").mkdir(exist_ok=True)
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return read_pooling("m", lambda name: folder / name if (folder / name).is_file() else None)


@pytest.mark.parametrize(
    "config",
    [
        {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        {"pooling_mode": "cls"},
        {"pooling_mode": ["cls"], "include_prompt": True},
    ],
)
def test_read_from_old_and_new_files(tmp_path: Path, config: dict[str, object]) -> None:
    assert write(tmp_path, ["Transformer", "Pooling"], config) == Pooling("cls", normalize=False)
    modules = ["Transformer", "Pooling", "Normalize"]
    assert write(tmp_path, modules, config) == Pooling("cls", normalize=True)


def test_mean_is_the_stated_default(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert read_pooling("m", lambda name: None) == Pooling("mean", normalize=True)
    assert "mean pooling" in caplog.text


@pytest.mark.parametrize(
    ("kinds", "config", "message"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "Dense"),
        (["Transformer"], None, "no Pooling"),
        (["Transformer", "Pooling"], None, r"no config\.json"),
        (["Transformer", "Pooling"], {"pooling_mode": ["mean", "max"]}, r"mean \+ max"),
        (["Transformer", "Pooling"], {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        (["Transformer", "Pooling"], {"pooling_mode": []}, "nothing"),
        (["Transformer", "Pooling"], {"pooling_mode": "mean", "include_prompt": False}, "prompt"),
    ],
)
def test_what_is_not_supported_is_an_error(
    tmp_path: Path, kinds: list[str], config: dict[str, object] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write(tmp_path, kinds, config)
