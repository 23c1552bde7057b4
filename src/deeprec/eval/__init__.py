"""Evaluation: ranking metrics per user, bootstrap intervals, paired comparisons, baselines."""

from deeprec.eval.bootstrap import bootstrap_means, paired, summarise
from deeprec.eval.metrics import METRICS, UserMetrics, evaluate_ranking, evaluate_trajectories
from deeprec.eval.popularity import Popularity, RecentBlend, RecentPopularity, tune_recent
from deeprec.eval.records import conversation_record
from deeprec.eval.results import build_results, write_results
from deeprec.eval.retrieval import (
    evaluate_popularity,
    evaluate_recent_popularity,
    evaluate_trm,
    evaluate_trm_with_date,
)

__all__ = [
    "METRICS",
    "Popularity",
    "RecentBlend",
    "RecentPopularity",
    "UserMetrics",
    "bootstrap_means",
    "build_results",
    "conversation_record",
    "evaluate_popularity",
    "evaluate_ranking",
    "evaluate_recent_popularity",
    "evaluate_trajectories",
    "evaluate_trm",
    "evaluate_trm_with_date",
    "paired",
    "summarise",
    "tune_recent",
    "write_results",
]
