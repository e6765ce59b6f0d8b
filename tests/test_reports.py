"""What an evaluation leaves for people: a table that fits, an oracle that is a limit or is none, transcripts."""

import json
import logging

import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from agents.common.rollout import Scheduling
from agents.heuristics import Random, Uncertainty
from envs.costs import ALL_COSTS
from envs.models.loading import embedded_pool
from envs.tasks.arithmetic import ArithmeticTask
from experiments.common.config import CONF, build_settings, register_schemas
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.runner import Evaluation, evaluate
from experiments.evaluation.settings import EvaluationSettings
from experiments.evaluation.summary import Results, summarize
from experiments.report import UNITS
from experiments.reporting.tables import (
    WIDTH,
    markdown,
    measured_width,
    most_wanted,
    narrowed,
    query_table,
    table,
    write_table,
)

LONG = "routellm_classifier learning_rate=0.0003"
EXAMPLES = 20


def config_of(script, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(script, overrides=list(overrides))


def interval(value):
    return {"value": value, "interval": [value - 0.01, value + 0.01]}


def summary_of(*names):
    """The summary of an evaluation, as far as tables show it."""
    measures = {"over_speculative_at_0.99": 0.9, "area_above_line": 0.1, "oracle_share": 0.8}
    policy = {
        "seeds": 3,
        "cost_at": {"0.90": 0.18, "0.95": 0.2, "0.99": None},
        "cost_at_interval": {level: [0.1, None] for level in ("0.90", "0.95", "0.99")},
        "cost_at_by_unit": {"llm_tokens": {"0.95": 0.14}},
        "measures": {name: interval(value) for name, value in measures.items()},
        "operating_points": {
            level: {"accuracy": interval(0.93), "cost_bytes": interval(0.21)} for level in ("0.90", "0.95", "0.99")
        },
        f"against_{names[0]}": {"ratio_at_0.95": interval(1.1), "gain_at_0.25": interval(0.05)},
    }
    curve = {
        "curve": [],
        "cost_at_by_unit": {"bytes": policy["cost_at"], "llm_tokens": policy["cost_at"]},
    }
    return {
        "task": "arithmetic",
        "examples": 300,
        "split": "test",
        "cost": "bytes",
        "first": names[0],
        "models": {"slm": {"accuracy": 0.38, "cost": 0.06}, "llm": {"accuracy": 0.97, "cost": 1.0}},
        "limits": {"line": curve, "query_oracle": curve, "speculative": {"accuracy": 0.97, "cost_bytes": 0.18}},
        "policies": dict.fromkeys(names, policy),
    }


def test_the_printed_table_fits_and_names_are_whole(capsys, tmp_path):
    full = table(summary_of("citer", LONG))
    assert measured_width(full) > 150
    write_table(full, tmp_path / "table.md", most_wanted(full), notes=["So it is."])
    *lines, note, more = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    for name in (f"{LONG} (3)", "speculative decoding", "oracle, per query", "a coin per query", "slm only"):
        assert any(line.startswith(name + " ") for line in lines)
    assert any("0.930 [0.920, 0.940]  0.210 [0.200, 0.220]" in line for line in lines)
    assert note == "So it is."
    left_out = len(full.columns) - len(narrowed(full, most_wanted(full)).columns)
    assert more == f"{tmp_path / 'table.md'} holds {left_out} more columns"
    written = (tmp_path / "table.md").read_text()
    assert written == markdown(full) + "\nSo it is.\n"
    assert "share of the oracle's" in written


def test_all_columns_are_printed_where_they_are_asked_for(capsys, tmp_path):
    full = table(summary_of("citer", LONG))
    write_table(full, tmp_path / "table.md", most_wanted(full), "all")
    printed = capsys.readouterr().out
    for header in ("accuracy", "above citer", "share of the", "LLM tokens"):
        assert header in printed
    assert "more columns" not in printed


def test_columns_are_left_out_by_what_they_are_worth_and_stay_in_order():
    full = table(summary_of("citer"))
    order = most_wanted(full)
    assert sorted(order) == list(range(len(full.columns)))
    headers = [[str(column.header) for column in narrowed(full, order, width).columns] for width in (1, 45, 10_000)]
    assert headers[0] == ["policy (seeds)"]
    assert headers[1] == ["policy (seeds)", "chosen for 95%:\naccuracy"]
    assert headers[2] == [str(column.header) for column in full.columns]


def test_the_table_of_queries_fits_too():
    agents = {
        name: {
            "measures": {
                key: interval(0.5) for key in ("area_above_line", "aiq", "qnc", "apgr", "cpt_0.50", "cpt_0.80")
            },
            "less_knn": {key: interval(0.1) for key in ("qnc", "aiq")},
        }
        for name in ("knn", "uniroute_learned")
    }
    summary = {"task": "pool", "splits": 5, "examples": 96, "first": "knn", "policies": agents}
    full = query_table(summary)
    printed = narrowed(full, range(len(full.columns)))
    assert measured_width(printed) <= WIDTH < measured_width(full)
    assert [str(column.header) for column in printed.columns][:2] == ["agent", "area above\nthe line"]


def answers(correct, cost):
    shape = (EXAMPLES,)
    return Answers(
        correct=np.arange(EXAMPLES) < correct,
        terminated=np.ones(shape, dtype=bool),
        llm_tokens=np.full(shape, 10 * cost),
        tokens=np.full(shape, 10.0),
        costs={unit: np.full(shape, cost) for unit in ("bytes", "llm_tokens")},
    )


def results(exhausted, oracle_solves):
    """A policy that is right on 18 of 20 at 0.15, beside an oracle that solves some."""
    slm, llm = answers(6, 0.1), answers(19, 1.0)
    baselines = Baselines(slm, llm, None, answers(oracle_solves, 0.14), exhausted)
    about = {"task": "arithmetic", "pool": ["slm", "llm"], "split": "test"}
    policies = {"mine": [[answers(18, 0.15)]]}
    return Results(about, baselines, policies, frozenset(), {"mine": [[0.5]]})


@pytest.mark.parametrize(("exhausted", "why"), [(4, "ran out of budget"), (0, "fewest LLM tokens")])
def test_more_than_the_oracles_area_is_not_given_and_explained(exhausted, why):
    summary = summarize(results(exhausted, 12), samples=5)
    share = summary["policies"]["mine"]["measures"]["oracle_share"]
    assert share["value"] is None
    assert why in share["why"]
    assert why in summary["notes"][-1]
    assert "mine" in summary["notes"][-1]
    assert any("on 4 of 20 problems" in note for note in summary["notes"]) is bool(exhausted)
    assert " n/a |" in markdown(table(summary))
    limited = summarize(results(0, 20), samples=5)
    assert 0 < limited["policies"]["mine"]["measures"]["oracle_share"]["value"] <= 1
    assert limited["notes"] == []
    assert "n/a" not in markdown(table(limited))


def test_the_oracles_budget_goes_by_its_old_name_too_and_says_so(caplog):
    assert EvaluationSettings(oracle=20) == EvaluationSettings(oracle_budget=20)
    assert "oracle is called oracle_budget now" in caplog.text
    caplog.clear()
    old = build_settings(config_of("train", "evaluation.oracle=20").evaluation, EvaluationSettings)
    assert "oracle_budget" in caplog.text
    caplog.clear()
    new = build_settings(config_of("train", "evaluation.oracle_budget=20").evaluation, EvaluationSettings)
    assert old == new == EvaluationSettings(oracle_budget=20)
    assert not caplog.text
    with pytest.raises(ValueError, match="oracle_budget is how many answers are tried"):
        EvaluationSettings(oracle_budget=-1)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of two policies, with an oracle that may try one answer."""
    pool, task, folder = embedded_pool(), ArithmeticTask(), tmp_path_factory.mktemp("evaluated")
    settings = {"examples": 6, "threshold_examples": 4, "llm_shares": [0.1, 0.5], "bootstrap": 5}
    settings |= {
        "oracle_budget": 1,
        "draft_tokens": 0,
        "transcripts": 2,
        "max_new_tokens": 32,
        "scheduling": Scheduling(rows=8),
    }
    policies = {"entropy": Uncertainty(), "random": Random()}

    def again(**changed):
        return evaluate(pool, task, policies, EvaluationSettings(**{**settings, **changed}), folder)

    def baselines(**changed):
        return Evaluation(pool, task, EvaluationSettings(**{**settings, **changed}), folder).baselines()

    return again, baselines, folder


def test_folders_of_before_are_known_and_searches_that_ran_out_are_warned_of(evaluated, caplog):
    again, baselines, folder = evaluated
    with caplog.at_level(logging.WARNING):
        summary = again()
    exhausted = summary["limits"]["oracle"]["ran_out_of_budget"]
    assert exhausted > 0
    sentence = f"The oracle's search ran out of its budget on {exhausted} of 6 problems"
    assert sentence in caplog.text
    assert sentence in (folder / "table.md").read_text()
    assert json.loads((folder / "runs" / "manifest.json").read_text())["oracle"] == 1
    assert json.loads((folder / "runs" / "limits.json").read_text())["oracle"] == 1
    with pytest.raises(ValueError, match="made with oracle 1, this run has 2"):
        baselines(oracle_budget=2)


def test_transcripts_are_of_any_policy(evaluated):
    again, _, folder = evaluated
    page = folder / "index.html"
    for of, title in ((None, "routed by entropy"), ("random", "routed by random")):
        again(transcripts_of=of)
        assert title in page.read_text()
        assert page.read_text().count("<article") == 2
        assert '<details class="problem"' not in page.read_text()
    again(transcripts_of="all")
    assert page.read_text().count('<details class="problem"') == 2
    assert page.read_text().count('<details class="problem" open>') == 1  # the first one
    assert page.read_text().count("<article") == 4
    page.unlink()
    with pytest.raises(ValueError, match="transcripts_of is 'citer'; choose one of entropy, random, or all"):
        again(transcripts_of="citer")
    assert not page.exists()


def test_the_reports_units_are_those_of_costs():
    assert set(UNITS) == {cost.name for cost in ALL_COSTS}
