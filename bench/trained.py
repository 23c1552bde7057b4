"""Item table and user vectors of a TRM trained on the packaged data, for benchmarks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from deeprec.data import DataConfig, load_dataset
from deeprec.text import EncoderConfig, load_encoder
from deeprec.trm import TRMTrainConfig, train_trm

__all__ = ["trained_embeddings"]


def trained_embeddings(users: int, epochs: int = 3) -> tuple[Tensor, Tensor]:
    """Normalised items ``[N, 128]`` and user vectors ``[users, 128]``, as retrieval sees them.

    Trained once, then read from ``bench/results``.
    """
    kept = Path(__file__).parent / "results" / f"trained_{users}_{epochs}.pt"
    if kept.exists():
        items, vectors = torch.load(kept)
        return items, vectors
    found = _train(users, epochs)
    kept.parent.mkdir(exist_ok=True)
    torch.save(found, kept)
    return found


def _train(users: int, epochs: int) -> tuple[Tensor, Tensor]:
    dataset = load_dataset(DataConfig())
    model = train_trm(
        dataset,
        load_encoder(EncoderConfig()),
        TRMTrainConfig(hidden=128, n_heads=2, max_epochs=epochs),
    ).model.eval()
    requests = dataset.requests("valid")[:users]
    with torch.no_grad():
        vectors = model.user_vectors(
            torch.from_numpy(requests.history), torch.from_numpy(requests.lengths), None
        )
    # More users than the data set has come round again.
    vectors = vectors.repeat(-(-users // len(vectors)), 1)[:users]
    items = model.item_embedding.weight.detach()[1:]
    return F.normalize(items, dim=1).contiguous(), F.normalize(vectors, dim=1).contiguous()
