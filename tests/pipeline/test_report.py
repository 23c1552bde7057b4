"""The report of a run folder."""

import html.parser
import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deeprec.backends import OpCount
from deeprec.eval import build_results, evaluate_ranking, write_results
from deeprec.pipeline.charts import Interval, Series, interval_chart, line_chart, nice_ticks
from deeprec.pipeline.report import system_name, write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Balanced(html.parser.HTMLParser):
    """Fails on a tag that is closed in the wrong order or never."""

    def __init__(self):
        super().__init__()
        self.open = []
        self.words = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def check(path):
    """The page's text, once it is known to be well formed and to load nothing."""
    page = path.read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=|url\(|@import|<script", page)
    parser = Balanced()
    parser.feed(page)
    assert parser.open == []
    return " ".join(" ".join(parser.words).split())


def conversation(system="policy_stage2", target="B <script>", **changes):
    rewards = {"format": 0.0, "tool_calls": 0.5, "diversity": 0.1, "listwise": 3.0}
    return {
        "system": system,
        "user": 3,
        "target": target,
        "history": ["A"],
        "turns": [{"reasoning": "Hm.", "preference": "drama", "retrieved": ["A", "B <script>"]}],
        "closing": "Ranking.",
        "ranked": ["B <script>", None],
        "finish": "done",
        "rewards": {**rewards, "pointwise": 1.0, "total": 4.6, "broken_rules": ["item_twice"]},
        "text": "",
    } | changes


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    names = ("trm", "policy_initial", "policy_stage1", "policy_stage2", "policy_stage2_single_turn")
    systems = {
        name: evaluate_ranking(rng.integers(1, 30, (80, 10)), np.ones(80, dtype=int))
        for name in names
    }
    pairs = [("policy_stage2", name) for name in names if name != "policy_stage2"]
    results = build_results(systems, pairs)
    results["all_users"] = build_results(systems, [("policy_stage2", "trm")])
    results["training_recommender"] = {"recall@20_on_rl_targets": 0.345}
    write_results(tmp_path / "metrics.json", results)
    lines = [
        {"stage": stage, "step": step, "reward/total": step / 10, "reward/listwise": listwise}
        | {"valid_rate": 1.0, "broken/list_length": 20 - step}
        for stage, listwise in (("stage1", 0.0), ("stage2", 0.4))
        for step in range(1, 21)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    talks = [conversation() for _ in range(6)] + [
        conversation("policy_initial", finish="no_list", ranked=[], rewards=None)
    ]
    (tmp_path / "trajectories.jsonl").write_text("".join(json.dumps(t) + "\n" for t in talks))
    (tmp_path / "config.yaml").write_text("data: <none>\n")
    return tmp_path


def test_a_whole_run(folder):
    ops = {
        ("topk_retrieve", "cpu"): OpCount(1200, 3.0),
        ("linear_logprobs", "cpu"): OpCount(7, 1.0),
    }
    text = check(write_report(folder, facts={"Seed": "0"}, notes=["All <b> honest."], ops=ops))
    for expected in (
        "All <b> honest.",  # escaped in the page: it is text here
        "NDCG@10: Policy after stage 2 0.",
        "Policy after stage 2, single turn",
        "All test users",
        "Recall@20 on rl targets 0.345",
        "What each stage of training contributed",
        "Does the policy use what it finds?",
        "Against other systems",
        "List-wise reward",
        "stage2",
        "hit at 1",
        "no list",
        "item twice",
        "topk_retrieve cpu 1,200 3.00 75.0%",
        "data: <none>",
    ):
        assert expected in text, expected
    assert text.count("User 3") == 5  # four of stage 2, the one of the warm start


def test_rules_broken_at_the_start_and_the_end(folder):
    assert "stage1 list length 85 10 5" in check(write_report(folder))


def test_a_stage_that_does_not_pay_a_reward_has_no_curve(folder):
    page = write_report(folder).read_text()
    panel = page.split("List-wise reward")[1].split("</svg>")[0]
    assert "c1" in panel and "c0" not in panel


def test_an_empty_folder_gives_an_empty_report(tmp_path):
    text = check(write_report(tmp_path))
    assert "Results" not in text and "Conversations" not in text


def test_a_training_killed_in_the_middle_of_a_line(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage2", "st')
    check(write_report(folder))


def test_names():
    assert system_name("trm_date") == "TRM given the request date"
    assert system_name("policy_stage2_shuffled") == "Policy after stage 2, shuffled"
    assert system_name("my_model") == "My model"


numbers = st.floats(-1e6, 1e6, allow_nan=False)


@given(numbers, numbers)
def test_ticks_cover_the_range_in_few_steps(a, b):
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 7


@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=40))
def test_charts_stay_inside_their_frame(points):
    for chart in (
        line_chart([Series("a", "c0", sorted(points))], "{:g}".format),
        interval_chart([Interval("a", min(p), min(p), max(p), "t") for p in points], str),
    ):
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', chart).groups())
        for x, y in re.findall(r'cx="(\S+)" cy="(\S+)"', chart):
            assert -0.1 <= float(x) <= width + 0.1 and -0.1 <= float(y) <= height + 0.1


def test_labels_are_escaped():
    assert "<b>" not in interval_chart([Interval("<b>", 1, 0, 2, "<b>")], str, zero=True)
