"""RecBole: full-catalogue evaluation of sequential models, and their top-k.

RecBole's evaluation computes ``[B, n_items]`` scores, copies and masks them, takes the top-k, and
fills another matrix of that size to find the hits. With the patch, user vectors search an exact
:class:`deeprec.ItemIndex`, and hits are read off the ids; SASRec and GRU4Rec also encode histories
with less work (:mod:`deeprec.integrations.recbole_encoders`). Metrics come out the same: scores
differ by rounding alone.

Covered are the models whose score is the dot product of ``forward(item_seq, item_seq_len)`` with
their item embeddings, on a CPU, under ranking metrics that look at the top k. Everything else,
subclasses and metrics such as GAUC included, is passed on to RecBole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deeprec.integrations.logprob_calls import counted
from deeprec.integrations.patching import Peer, Replacement, Usage
from deeprec.integrations.recbole_encoders import gru4rec_vectors, sasrec_vectors, why_not_fast
from deeprec.ops import ItemIndex, TopK

__all__ = ["PEER"]

MODELS = "recbole.model.sequential_recommender"
# Scored by a dot product of forward(item_seq, item_seq_len) and item_embedding.
DOT_PRODUCT_MODELS = frozenset(
    f"{MODELS}.{name.lower()}.{name}"
    for name in (
        "GCSAN",
        "GRU4Rec",
        "LightSANs",
        "NARM",
        "SASRec",
        "SINE",
        "SRGNN",
        "STAMP",
    )
)
SCORE_NEEDS = ("rec.meanrank", "rec.score", "data.label")  # what only a score matrix can answer


@dataclass(frozen=True)
class _Found:
    """Item ids ``[B, k]``, best first, where RecBole would pass a score matrix."""

    items: Tensor


def _full_sort_batch_eval(original: Any, usage: Usage) -> Any:
    def _full_sort_batch_eval(self: Any, batched_data: Any) -> Any:
        interaction, history_index, positive_u, positive_i = batched_data
        reason = _why_not_search(self.model)
        if history_index is not None:
            reason = reason or "items are excluded"
        needs = [name for name in SCORE_NEEDS if self.eval_collector.register.need(name)]
        if needs:
            reason = reason or f"metrics need {', '.join(needs)}"
        if _is_modified(self):
            reason = reason or "the trainer or its collector is a modified one"
        k = max(self.eval_collector.topk)
        if k >= self.tot_item_num:
            reason = reason or "k is as large as the catalogue"
        if not counted(usage, reason):
            return original(self, batched_data)
        found = _search(self.model, interaction.to(self.device), k)
        return interaction, _Found(found.indices), positive_u, positive_i

    return _full_sort_batch_eval


def _is_modified(trainer: Any) -> bool:
    """Whether somebody else's code may see what we return in place of scores."""
    from recbole.evaluator.collector import Collector
    from recbole.trainer.trainer import Trainer

    kind = type(trainer)
    return (
        kind.evaluate is not Trainer.evaluate
        or kind._full_sort_batch_eval is not Trainer._full_sort_batch_eval
        or type(trainer.eval_collector) is not Collector
    )


def _eval_batch_collect(original: Any, usage: Usage) -> Any:
    def eval_batch_collect(
        self: Any,
        scores_tensor: Any,
        interaction: Any,
        positive_u: torch.Tensor,
        positive_i: torch.Tensor,
    ) -> None:
        if not counted(usage, None if isinstance(scores_tensor, _Found) else "a score matrix"):
            original(self, scores_tensor, interaction, positive_u, positive_i)
            return
        items = scores_tensor.items
        if self.register.need("rec.items"):
            self.data_struct.update_tensor("rec.items", items)
        if self.register.need("rec.topk"):
            # A (user, item) pair as one number.
            pairs = items + _first_key(len(items), items)
            positives = positive_i + _first_key(len(items), items)[positive_u, 0]
            hits = torch.isin(pairs, positives).long()
            counts = torch.bincount(positives.unique() // _KEYS, minlength=len(items))
            self.data_struct.update_tensor("rec.topk", torch.cat((hits, counts[:, None]), dim=1))

    return eval_batch_collect


_KEYS = 1 << 32  # more than any item id


def _first_key(n: int, like: Tensor) -> Tensor:
    return torch.arange(n, device=like.device)[:, None] * _KEYS


def _full_sort_topk(original: Any, usage: Usage) -> Any:
    def full_sort_topk(
        uid_series: Any, model: Any, test_data: Any, k: int, device: Any = None
    ) -> Any:
        dataset = test_data.dataset
        reason = _why_not_search(model)
        if not test_data.is_sequential or k >= dataset.item_num:
            reason = reason or "not a sequential data set, or k is as large as the catalogue"
        if device not in (None, torch.device("cpu"), "cpu"):
            reason = reason or f"device {device}"
        if not counted(usage, reason):
            return original(uid_series, model, test_data, k, device)
        model.eval()
        users = torch.as_tensor(uid_series)
        rows = (dataset.inter_feat[test_data.dataset.uid_field] == users[:, None]).nonzero()[:, 1]
        with torch.no_grad():
            found = _search(model, dataset[rows], k)
        return torch.return_types.topk((found.values, found.indices))

    return full_sort_topk


def _why_not_search(model: Any) -> str | None:
    name = f"{type(model).__module__}.{type(model).__qualname__}"
    if name not in DOT_PRODUCT_MODELS:
        return f"{type(model).__name__} is not one of the models covered"
    table = model.item_embedding.weight
    if table.device.type != "cpu" or table.dtype != torch.float32:
        return f"item embeddings are {table.dtype} on {table.device.type}"
    return None


def _search(model: Any, interaction: Any, k: int) -> TopK:
    """The k best items of every user; the padding item is none."""
    vectors = model.forward(interaction[model.ITEM_SEQ], interaction[model.ITEM_SEQ_LEN])
    found = _index(model).search(vectors.contiguous(), k)
    return TopK(found.values, found.indices + 1)


def _index(model: Any) -> ItemIndex:
    """An index of the model's items, built anew whenever the embeddings have changed."""
    items = model.item_embedding.weight.detach()[1:]
    index: ItemIndex | None = getattr(model, "_deeprec_items", None)
    # Compared by value: optimisers change weights without telling. It takes one pass over memory.
    if index is None or not torch.equal(index.items, items):
        index = ItemIndex(items)
        object.__setattr__(model, "_deeprec_items", index)
    return index


def _forward(vectors: Any) -> Any:
    def make(original: Any, usage: Usage) -> Any:
        def forward(self: Any, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
            reason = why_not_fast(self, item_seq, item_seq_len)
            if f"{type(self).__module__}.{type(self).__qualname__}" not in DOT_PRODUCT_MODELS:
                reason = reason or f"{type(self).__name__} is a subclass"
            if not counted(usage, reason):
                return original(self, item_seq, item_seq_len)
            return vectors(self, item_seq, item_seq_len)

        return forward

    return make


PEER = Peer(
    distribution="recbole",
    supported="==1.2.1",
    replacements=(
        Replacement(
            "recbole.trainer.trainer",
            "Trainer._full_sort_batch_eval",
            _full_sort_batch_eval,
            "deeprec.ItemIndex",
            everywhere=False,
        ),
        Replacement(
            "recbole.evaluator.collector",
            "Collector.eval_batch_collect",
            _eval_batch_collect,
            "hits read off the ids",
            everywhere=False,
        ),
        Replacement(
            "recbole.utils.case_study", "full_sort_topk", _full_sort_topk, "deeprec.ItemIndex"
        ),
        Replacement(
            f"{MODELS}.sasrec",
            "SASRec.forward",
            _forward(sasrec_vectors),
            "deeprec's encoder of histories",
            everywhere=False,
        ),
        Replacement(
            f"{MODELS}.gru4rec",
            "GRU4Rec.forward",
            _forward(gru4rec_vectors),
            "deeprec's encoder of histories",
            everywhere=False,
        ),
    ),
)
