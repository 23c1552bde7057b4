"""What ideal conversations find: is the recommender of a run worth asking several times?

    deeprec trm --out runs/default
    python examples/ideal_conversations.py --run runs/default --k 5 --calls 3

Every call names the titles that the language model and the recommender together believe in most and
that were not found yet; the list is what was found, in the order of the same belief. Beside it: the
same calls without preferences, with those of another user, and one call for as many items. On
validation targets of the embedded data, NDCG@10. What it leaves out: a policy, which asks and ranks
less well.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deeprec.data import Requests
from deeprec.eval import evaluate_ranking, evaluate_trm
from deeprec.pipeline.config import RunConfig
from deeprec.pipeline.folder import RunFolder
from deeprec.pipeline.parts import Parts
from deeprec.pipeline.stages import PRETRAINED
from deeprec.policy.warmstart import beliefs_of, preference_from_titles
from deeprec.rollout import ToolCall

Beliefs = NDArray[np.float32]


class Conversations:
    """Ideal conversations about ``requests``, whose next titles have the logits ``beliefs``."""

    def __init__(self, parts: Parts, requests: Requests, beliefs: Beliefs) -> None:
        self.parts, self.requests, self.beliefs = parts, requests, beliefs

    def preferences(self, found: list[list[int]], words: random.Random) -> list[str]:
        """What each user asks for next."""
        texts = []
        for belief, items in zip(self.beliefs, found, strict=True):
            left = belief.copy()
            left[items] = -np.inf
            named = np.argsort(-left)[: self.parts.config.policy.warm_start.titles]
            texts.append(preference_from_titles(self.parts.dataset.catalog, named, words))
        return texts

    def ndcg(self, asks: str, *, single_turn: bool = False) -> float:
        """NDCG@10 with one's ``own`` preferences, those of an ``other`` user, or ``none``."""
        env = self.parts.environment("valid", single_turn=single_turn)
        words = random.Random(self.parts.config.seed)
        found: list[list[int]] = [[] for _ in range(len(self.requests))]
        for turn in range(env.max_calls):
            texts = self.preferences(found, words) if asks != "none" else [""] * len(found)
            if asks == "other":
                texts = texts[1:] + texts[:1]
            calls = [ToolCall(row, turn, text, found[row]) for row, text in enumerate(texts)]
            for call, answer in zip(calls, env.observe(self.requests, calls), strict=True):
                found[call.row] = found[call.row] + answer.items
        lists = [
            sorted(items, key=lambda item, row=row: -self.beliefs[row, item])
            for row, items in enumerate(found)
        ]
        return float(evaluate_ranking(lists, self.requests.targets).values["ndcg@10"].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/default"))
    parser.add_argument("--k", type=int, default=5, help="items a call returns")
    parser.add_argument("--calls", type=int, default=3, help="calls a conversation makes")
    parser.add_argument("--users", type=int, default=5000, help="at most")
    arguments = parser.parse_args()

    config = RunConfig(out=str(arguments.run))
    config.environment.k, config.environment.max_calls = arguments.k, arguments.calls
    parts = Parts(config, RunFolder.of(config))
    everyone = parts.dataset.requests("valid")
    requests = everyone[np.random.default_rng(0).permutation(len(everyone))[: arguments.users]]
    trm = parts.trm("valid")
    with torch.inference_mode():
        beliefs = beliefs_of(
            parts.load_stage(PRETRAINED),
            parts.title_prompts,
            trm,
            requests,
            config.policy.warm_start,
        )
    conversations = Conversations(parts, requests, beliefs)
    alone = evaluate_trm(trm, requests, exclude_history=True).values["ndcg@10"].mean()
    top = np.argsort(-beliefs, axis=1)[:, :10]
    rows = {
        "the recommender alone": alone,
        "belief, whole catalogue": evaluate_ranking(top, requests.targets).values["ndcg@10"].mean(),
        "own preferences": conversations.ndcg("own"),
        "no preferences": conversations.ndcg("none"),
        "another user's": conversations.ndcg("other"),
        "one call, as many items": conversations.ndcg("own", single_turn=True),
    }
    print(f"{len(requests):,} users, {arguments.calls} calls of {arguments.k} items, NDCG@10")
    for name, value in rows.items():
        print(f"{name:24} {value:.4f}")


if __name__ == "__main__":
    main()
