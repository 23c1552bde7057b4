"""``report.html``: a run folder as one self-contained page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from deeprec.backends import OpCount
from deeprec.eval.results import replace_text
from deeprec.pipeline.charts import Interval, Series, interval_chart, line_chart
from deeprec.rl.logging import read_metrics

__all__ = ["write_report"]

HEADLINE_METRIC = "ndcg@10"
CONVERSATIONS = 4  # shown a system
BROKEN_STEPS = 5  # at either end of a stage, compared with each other
EMPTY: dict[str, Any] = {"systems": {}, "paired": {}}
QUESTIONS = (
    "What each stage of training contributed",
    "Does the policy use what it finds?",
    "Against other systems",
)
SYSTEM_NAMES = {
    "popularity": "Popularity",
    "popularity_recent": "Popularity, last days",
    "trm": "TRM alone",
    "trm_date": "TRM given the request date",
    "lm": "Pre-trained LM alone",
    "lm_rerank": "LM re-ranking the TRM's list",
    "policy_initial": "Policy, warm start",
    "policy_stage1": "Policy after stage 1",
    "policy_stage2": "Policy after stage 2",
}
METRIC_NAMES = {
    "recall@1": "Recall@1",
    "recall@5": "Recall@5",
    "recall@10": "Recall@10",
    "ndcg@5": "NDCG@5",
    "ndcg@10": "NDCG@10",
    "valid_rate": "Valid lists",
    "mean_turns": "Turns",
}
RANKING_METRICS = tuple(name for name in METRIC_NAMES if "@" in name)
CURVES = {
    "reward/total": "Reward",
    "valid_rate": "Valid format",
    "tool_calls": "Tool calls",
    "reward/diversity": "Diversity reward",
    "reward/listwise": "List-wise reward",
    "reward/pointwise": "Point-wise reward",
    "response_tokens": "Response tokens",
    "entropy": "Entropy (nats a token)",
    "kl": "KL to the reference",
    "clip_fraction": "Clipped tokens",
    "grad_norm": "Gradient norm",
    "tokens_per_second/rollout": "Roll-out tokens/s",
    "tokens_per_second/train": "Training tokens/s",
}
STAGE_CLASSES = ("c0", "c1", "c2", "c3")


def write_report(
    folder: Path,
    *,
    facts: Mapping[str, str] | None = None,
    notes: Sequence[str] = (),
    ops: Mapping[tuple[str, str], OpCount] | None = None,
    seconds: float | None = None,
) -> Path:
    """Write ``folder/report.html`` from what the run folder holds, and return its path.

    Read, where they exist: ``metrics.json``, ``metrics.jsonl``, ``trajectories.jsonl`` (lines of
    :func:`deeprec.eval.conversation_record`) and ``config.yaml``. ``facts`` are names and values
    for the head of the page, ``notes`` paragraphs beneath it; ``ops`` is
    :func:`deeprec.backends.op_table` and ``seconds`` the wall time its shares refer to (None: the
    time of all ops together).
    """
    results = _read_json(folder / "metrics.json")
    config = folder / "config.yaml"
    environment = Environment(
        loader=PackageLoader("deeprec.pipeline"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        name=folder.resolve().name,
        facts=dict(facts or {}),
        notes=list(notes),
        cards=_cards(results),
        metric_names=METRIC_NAMES,
        systems=_system_rows(results),
        overview=_overview(results),
        comparisons=_comparisons(results),
        all_users=_system_rows(results.get("all_users", EMPTY)),
        all_users_comparisons=_comparisons(results.get("all_users", EMPTY)),
        training_recommender={
            name.replace("_", " ").capitalize(): f"{value:.3f}"
            for name, value in results.get("training_recommender", {}).items()
        },
        curves=_curves(read_metrics(folder / "metrics.jsonl")),
        broken=_broken_rules(read_metrics(folder / "metrics.jsonl")),
        ops=_op_rows(ops or {}, seconds),
        conversations=_conversations(folder / "trajectories.jsonl"),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )
    path = folder / "report.html"
    replace_text(path, page)
    return path


def system_name(name: str) -> str:
    """How a system is called on the page: its known name, or its key in words."""
    for known in sorted(SYSTEM_NAMES, key=len, reverse=True):
        if name == known:
            return SYSTEM_NAMES[known]
        if name.startswith(known + "_"):
            return f"{SYSTEM_NAMES[known]}, {name[len(known) + 1 :].replace('_', ' ')}"
    return name.replace("_", " ").capitalize()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return EMPTY
    contents: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return contents


def _css(system: str) -> str:
    return "policy" if system.startswith("policy") else "baseline"


# The table of results ---------------------------------------------------------------------------


def _cards(results: dict[str, Any]) -> list[dict[str, str]]:
    """The run in a few numbers."""
    policies = [name for name in results["systems"] if _css(name) == "policy"]
    trained = [p for p in policies if not any(p.startswith(other + "_") for other in policies)]
    if not trained:
        return []
    final = trained[-1]  # what comes after it are this policy with something taken away
    system = results["systems"][final]
    metric = system[HEADLINE_METRIC]
    cards = [
        {
            "title": f"{METRIC_NAMES[HEADLINE_METRIC]}: {system_name(final)}",
            "value": f"{metric['mean']:.4f}",
            "detail": f"95% interval {metric['low']:.4f} to {metric['high']:.4f}",
            "css": "",
        }
    ]
    for other, title in (("trm", "against the TRM alone"), ("policy_initial", "from RL")):
        found = results["paired"].get(f"{final}_vs_{other}")
        if found is not None:
            metric = found[HEADLINE_METRIC]
            cards.append(
                {
                    "title": f"{METRIC_NAMES[HEADLINE_METRIC]} {title}",
                    "value": f"{metric['difference']:+.4f}",
                    "detail": f"{metric['low']:+.4f} to {metric['high']:+.4f}, {_p(metric)}",
                    "css": _sign(metric),
                }
            )
    cards.append(
        {
            "title": "Valid lists",
            "value": f"{system['valid_rate']['mean']:.1%}",
            "detail": f"{system['mean_turns']['mean']:.2f} turns a conversation",
            "css": "",
        }
    )
    return cards


def _system_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    systems = results["systems"]
    best = {
        metric: max(
            (values[metric]["mean"] for values in systems.values() if metric in values), default=0.0
        )
        for metric in RANKING_METRICS
    }
    rows = []
    for name, values in systems.items():
        cells = []
        for metric in METRIC_NAMES:
            found = values.get(metric)
            if found is None or (metric == "mean_turns" and found["mean"] == 0):
                cells.append({"mean": "–", "range": "", "best": False})
                continue
            show = _shower(metric)
            cells.append(
                {
                    "mean": show(found["mean"]),
                    "range": _range(show, found) if found["low"] < found["high"] else "",
                    "best": best.get(metric) == found["mean"],
                }
            )
        users = results.get("users", {}).get(name, "")
        rows.append({"name": system_name(name), "css": _css(name), "cells": cells, "users": users})
    return rows


def _range(show: Callable[[float], str], metric: Mapping[str, float]) -> str:
    return f"{show(metric['low'])} – {show(metric['high'])}"


def _shower(metric: str) -> Callable[[float], str]:
    if metric == "valid_rate":
        return "{:.1%}".format
    return "{:.2f}".format if metric == "mean_turns" else "{:.4f}".format


def _overview(results: dict[str, Any]) -> Markup | None:
    """Every system's headline metric with its interval."""
    rows = []
    for name, values in results["systems"].items():
        metric = values[HEADLINE_METRIC]
        mean = metric["mean"]
        text = f"{mean:.4f}"
        rows.append(
            Interval(system_name(name), mean, metric["low"], metric["high"], text, _css(name))
        )
    return interval_chart(rows, "{:g}".format) if rows else None


def _comparisons(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Paired differences of the headline metric, a chart for each question they answer."""
    groups: dict[str, list[Interval]] = {question: [] for question in QUESTIONS}
    for name, metrics in results["paired"].items():
        first, second = name.split("_vs_")
        metric = metrics[HEADLINE_METRIC]
        row = Interval(
            f"{system_name(first)} − {system_name(second)}",
            metric["difference"],
            metric["low"],
            metric["high"],
            f"{metric['difference']:+.4f}, {_p(metric)}",
            _sign(metric),
        )
        groups[_question(first, second)].append(row)
    return [
        {"title": question, "chart": interval_chart(rows, _signed, zero=True)}
        for question, rows in groups.items()
        if rows
    ]


def _question(first: str, second: str) -> str:
    stages, interaction, others = QUESTIONS
    if first.startswith(second + "_") or second.startswith(first + "_"):
        return interaction  # one is the other with something taken away
    if _css(first) == _css(second) == "policy":
        return stages
    return others


def _sign(metric: Mapping[str, float]) -> str:
    """Class of a difference: its interval lies above 0, below 0, or holds it."""
    if metric["low"] > 0:
        return "better"
    return "worse" if metric["high"] < 0 else "undecided"


def _signed(value: float) -> str:
    return f"{value:+g}" if value else "0"


def _p(metric: Mapping[str, float]) -> str:
    return f"p = {metric['p']:.3f}" if metric["p"] >= 0.001 else "p < 0.001"


# Training ---------------------------------------------------------------------------------------


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A chart a metric over the steps of all stages, one after the other."""
    stages = list(dict.fromkeys(line["stage"] for line in lines))
    offsets, offset = {}, 0
    for stage in stages:
        offsets[stage] = offset
        offset += max(int(line["step"]) for line in lines if line["stage"] == stage)
    classes = {stage: STAGE_CLASSES[i % len(STAGE_CLASSES)] for i, stage in enumerate(stages)}
    charts = []
    for key, title in CURVES.items():
        series = []
        for stage in stages:
            points = [
                (offsets[stage] + float(line["step"]), float(line[key]))
                for line in lines
                if line["stage"] == stage and line.get(key) is not None
            ]
            # A reward that a stage does not pay is logged as 0 throughout: not worth a curve.
            if any(y != 0 for _, y in points):
                series.append(Series(stage, classes[stage], points))
        if series:
            charts.append({"title": title, "chart": line_chart(series, _compact)})
    return {"stages": list(classes.items()), "charts": charts}


def _compact(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"


def _broken_rules(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """How often each format rule was broken in the first and the last steps of each stage."""
    rows = []
    for stage in dict.fromkeys(line["stage"] for line in lines):
        own = [line for line in lines if line["stage"] == stage]
        span = min(BROKEN_STEPS, (len(own) + 1) // 2)
        rules = sorted({key for line in own for key in line if key.startswith("broken/")})
        for rule in rules:
            first = sum(int(line.get(rule, 0)) for line in own[:span])
            last = sum(int(line.get(rule, 0)) for line in own[-span:])
            name = rule.removeprefix("broken/").replace("_", " ")
            rows.append({"stage": stage, "rule": name, "first": first, "last": last, "span": span})
    return rows


def _op_rows(ops: Mapping[tuple[str, str], OpCount], seconds: float | None) -> list[dict[str, Any]]:
    total = seconds or sum(count.seconds for count in ops.values()) or 1.0
    ordered = sorted(ops.items(), key=lambda item: -item[1].seconds)
    return [
        {
            "op": op,
            "backend": backend,
            "calls": f"{count.calls:,}",
            "seconds": f"{count.seconds:.2f}",
            "share": count.seconds / total,
        }
        for (op, backend), count in ordered
    ]


# Conversations ----------------------------------------------------------------------------------


def _conversations(path: Path) -> list[dict[str, Any]]:
    """The first conversations of each system, in the order of the file: nobody chose them."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for record in _records(path):
        own = shown.setdefault(record["system"], [])
        if len(own) < CONVERSATIONS:
            own.append(record)
    return [
        {"name": system_name(system), "conversations": records} for system, records in shown.items()
    ]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)
