"""RecBole's SASRec: ms of full_sort_predict + topk. Arguments: items, batch, length, threads.

Run by bench/trm_peers.py with the Python that RECBOLE_PYTHON names: RecBole 1.2.1 needs Python
<= 3.11, setuptools < 81 and the NumPy names below. Two layers, two heads, hidden 128, inner 512 as
our model; it has no texts, adaptor or preference, so it does less.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch

for _name, _type in (("bool", bool), ("float", float), ("int", int), ("object", object)):
    if _name not in np.__dict__:
        setattr(np, _name, _type)
for _name, _new in (("bool_", np.bool_), ("float_", np.float64), ("complex_", np.complex128)):
    if _name not in np.__dict__:
        setattr(np, _name, _new)
if "unicode_" not in np.__dict__:
    np.unicode_ = np.str_

from recbole.data.interaction import Interaction  # noqa: E402
from recbole.model.sequential_recommender import SASRec  # noqa: E402

SETTINGS = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_",
    "device": "cpu",
    "n_layers": 2,
    "n_heads": 2,
    "hidden_size": 128,
    "inner_size": 512,
    "hidden_dropout_prob": 0.5,
    "attn_dropout_prob": 0.5,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "loss_type": "CE",
}


class Catalogue:
    def __init__(self, items: int) -> None:
        self.items = items

    def num(self, field: str) -> int:
        return self.items + 1


def main() -> None:
    items, batch, length, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = SASRec({**SETTINGS, "MAX_ITEM_LIST_LENGTH": max(20, length)}, Catalogue(items)).eval()
    width = max(20, length)
    history = torch.randint(1, items + 1, (batch, width))
    history *= torch.arange(width) < length
    asked = Interaction({"item_id_list": history, "item_length": torch.full((batch,), length)})
    seconds: list[float] = []
    start = time.perf_counter()
    with torch.no_grad():
        while len(seconds) < 6 or (time.perf_counter() - start < 1.0 and len(seconds) < 2000):
            before = time.perf_counter()
            model.full_sort_predict(asked)[:, 1:].topk(20)
            seconds.append(time.perf_counter() - before)
    seconds = sorted(seconds[1:])
    found = {"p50": seconds[len(seconds) // 2], "p99": seconds[int(0.99 * len(seconds))]}
    print(json.dumps({name: 1e3 * value for name, value in found.items()}))


if __name__ == "__main__":
    main()
