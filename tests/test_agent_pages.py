"""The pages of docs/agents are true: every agent stands on one, and settings, rows and results are as they say."""

import importlib
import re
from dataclasses import MISSING, asdict, fields, is_dataclass

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from agents.checking.checked import Checked
from agents.citer import Citer
from agents.collm import CoLlm
from agents.common.policy import policy_from
from agents.common.rollout import Scheduling
from agents.heuristics import Uncertainty
from agents.preferences.composition import CaseTwoSample
from agents.query_routing.knn import Neighbours
from agents.query_routing.mlp import QueryMlp
from agents.query_routing.optim import GradientDescent
from agents.query_routing.routellm import MatrixFactorisation, QueryClassifier, SimilarityWeighted
from agents.query_routing.router import EmbeddedQueries
from agents.query_routing.uniroute import UniRouteKMeans, UniRouteLearned
from agents.r2r import R2R
from agents.rl.algorithms import DEFAULTS
from agents.router.training import RouterTraining
from envs.tasks.arithmetic import ArithmeticTask
from experiments.common.help import CONF
from experiments.evaluation.runner import Evaluation
from experiments.evaluation.settings import EvaluationSettings
from tests.test_agents import AGENTS, agent

ROOT = CONF.parent
PAGES = {path.stem: path.read_text() for path in sorted((ROOT / "docs" / "agents").glob("*.md"))}
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
CODE = re.compile(r"`([^`]+)`")
CLASS = re.compile(r"Settings of `((?:agents|experiments)\.[\w.]+)`")
QUICK = RouterTraining(epochs=1, batch_size=64)
FEW = Scheduling(rows=16)


def tables(text, *columns):
    """Tables whose first columns have these names: (the text before, rows of cells)."""
    for found in TABLE.finditer(text):
        header, _, *rows = ([cell.strip() for cell in line[1:-1].split(" |")] for line in found[0].splitlines())
        if header[: len(columns)] == list(columns):
            yield text[: found.start()], rows


def imported(name):
    module, _, inside = name.rpartition(".")
    return getattr(importlib.import_module(module), inside)


def defaults_of(kind):
    """The defaults of a dataclass, which may be abstract, by name."""
    return {
        field.name: field.default if field.default is not MISSING else field.default_factory() for field in fields(kind)
    }


def flat(settings, prefix=""):
    """Nested settings by dotted names."""
    found = {}
    for key, value in settings.items():
        value = asdict(value) if is_dataclass(value) else value
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return found


def named(page):
    """The agents of a page's usage: (agent, its settings that differ from the defaults)."""
    for _, rows in tables(page.split("\n## Usage\n")[1].split("\n## ")[0], "agent", "what it is"):
        for name, _, changes in rows:
            pairs = (change.split("=", 1) for change in CODE.findall(changes))
            yield CODE.fullmatch(name)[1], {key: yaml.safe_load(value) for key, value in pairs}


def configured(name):
    """The class of an agent of conf/agent, and its settings that differ from the class's defaults."""
    config = OmegaConf.to_container(OmegaConf.load(CONF / "agent" / f"{name}.yaml"))
    schemas = {}
    for entry in config.pop("defaults"):
        schemas |= entry if isinstance(entry, dict) else {}
    kind = imported(schemas.pop("/schema@_here_"))
    given, defaults = {}, flat(defaults_of(kind))
    for place, schema in schemas.items():  # of what is null in the class: it is named, and what differs inside of it
        own, prefix = defaults_of(imported(schema)), f"{place.removeprefix('/schema@')}."
        inside = {key: value for key, value in own.items() if is_dataclass(value)}
        given |= flat({key: value for key, value in own.items() if key not in inside}, prefix)
        defaults |= flat(inside, prefix)
    given |= flat(config)
    # the run's own seed is no setting of the agent
    return kind, {k: v for k, v in given.items() if "${" not in str(v) and defaults.get(k) != v}


def test_every_agent_stands_on_exactly_one_page():
    assert sorted(name for page in PAGES.values() if "| agent |" in page for name, _ in named(page)) == AGENTS


@pytest.mark.parametrize("page", [name for name, text in PAGES.items() if "| agent |" in text])
def test_agents_differ_from_the_defaults_as_their_page_says(page):
    for name, changes in named(PAGES[page]):
        assert changes == configured(name)[1], name


@pytest.mark.parametrize("page", PAGES)
def test_settings_have_the_defaults_that_their_page_says(page):
    for before, rows in tables(PAGES[page], "setting", "default", "meaning"):
        name = CLASS.findall(before)[-1]
        own = defaults_of(imported(name))
        defaults, told = flat(own), {}
        for setting, default, _ in rows:
            setting, default = CODE.fullmatch(setting)[1], CODE.fullmatch(default)
            if default is None:  # it is said elsewhere: settings of its own
                assert is_dataclass(own[setting]), (name, setting)
            else:
                told[setting] = yaml.safe_load(default[1])
        assert told == {setting: defaults.get(setting, "no setting") for setting in told}, name


@pytest.mark.parametrize("page", PAGES)
def test_no_setting_is_left_out(page):
    text = PAGES[page]
    listed = {}
    for before, rows in tables(text, "setting", "default", "meaning"):
        listed[CLASS.findall(before)[-1]] = {CODE.fullmatch(row[0])[1].split(".")[0] for row in rows}
    shared = listed.get("agents.query_routing.learner.QueryLearner", set())
    for name, settings in listed.items():
        if name.startswith("agents."):
            assert {field.name for field in fields(imported(name))} <= settings | shared, name


def test_arguments_of_the_algorithms_are_those_they_are_run_with():
    told = [
        {CODE.fullmatch(key)[1]: yaml.safe_load(CODE.fullmatch(value)[1]) for key, value, _ in rows}
        for _, rows in tables(PAGES["rl"], "argument", "value at 256 rows")
    ]
    own = {
        "qrdqn": {"policy_kwargs": {"n_quantiles": 25}},
        "recurrent_ppo": {"policy_kwargs": {"lstm_hidden_size": 64}},
    }
    for algorithm, table in {"ppo": 0, "recurrent_ppo": 0, "a2c": 1, "dqn": 2, "qrdqn": 2}.items():
        assert DEFAULTS[algorithm](256) == told[table] | own.get(algorithm, {}), algorithm


def test_every_agent_of_the_benchmark_has_its_row():
    every = [row[0] for page in PAGES.values() for _, rows in tables(page, "policy (seeds)") for row in rows]
    told = {name.replace("`", "").split(" (")[0] for name in every}
    text = (ROOT / "BENCHMARK.md").read_text()
    named = {row[0].split(" (")[0] for _, rows in tables(text, "policy (seeds)") for row in rows}
    assert named <= told


# -- rows that are logged ---------------------------------------------------------------------------------------------


def keys(page, *sections):
    """The keys of a page's tables, or of some of its sections."""
    text = PAGES[page]
    parts = [re.split(rf"^#+ {section}$", text, flags=re.MULTILINE)[1].split("\n## ")[0] for section in sections]
    return {
        CODE.fullmatch(row[0])[1]
        for part in parts or [text.split("\n## What it logs\n")[1].split("\n## ")[0]]
        for _, rows in tables(part, "key", "unit", "meaning")
        for row in rows
    }


ROUTER = keys("citer", "Rows of a router")
EVALUATION = keys("heuristics", "Rows of an evaluation")


def logged(rows):
    return {key for row in rows for key in row}


def fitted(learner, pool, task):
    rows = []
    policy_from(learner, pool, task, track=rows.append)
    return logged(rows)


def test_an_evaluation_logs_the_rows_that_are_said(pool, task):
    rows = []
    settings = EvaluationSettings(
        examples=2,
        threshold_examples=2,
        llm_shares=[0.5],
        max_new_tokens=24,
        oracle_budget=2,
        draft_tokens=4,
        scheduling=FEW,
    )
    Evaluation(pool, task, settings, track=rows.append).run({"entropy": Uncertainty()})
    assert logged(rows) == EVALUATION
    assert {row["run"] for row in rows} == {"slm", "llm", "speculative", "oracle", "entropy"}


def test_citer_logs_the_rows_that_are_said(pool, task):
    sampled = CaseTwoSample(positions=4)
    assert fitted(Citer(examples=24, training=QUICK, sample=sampled, scheduling=FEW), pool, task) == keys("citer")


@pytest.mark.slow
def test_collm_logs_the_rows_that_are_said(pool, task):
    linear = RouterTraining(epochs=1, units=[])
    learner = CoLlm(examples=24, weak_epochs=1, validation_examples=2, training=linear, scheduling=FEW)
    assert fitted(learner, pool, task) == keys("collm") | ROUTER


@pytest.mark.slow
def test_r2r_logs_the_rows_that_are_said(pool, task):
    assert fitted(R2R(examples=12, training=QUICK, scheduling=FEW), pool, task) == keys("r2r") | ROUTER


def test_checked_logs_the_rows_that_are_said(pool):
    learner = Checked(examples=12, rounds=2, max_new_tokens=44, training=QUICK, scheduling=FEW)
    assert fitted(learner, pool, ArithmeticTask("easy")) == keys("checked") | ROUTER


def test_query_routers_log_the_rows_that_are_said(pool, task):
    rng, rows = np.random.default_rng(0), []
    correct = rng.random((60, 2)) < [0.4, 0.8]
    queries = EmbeddedQueries(torch.from_numpy(rng.normal(size=(60, 4))).float(), ("small", "big"), correct, np.ones(2))
    certain = EmbeddedQueries(queries.embeddings, queries.models, correct | [False, True], queries.costs)
    brief, few = GradientDescent(epochs=1), RouterTraining(epochs=1, batch_size=16)
    for learner, known in (
        (Neighbours(), queries), (UniRouteKMeans(), queries), (UniRouteLearned(training=brief), queries),
        (MatrixFactorisation(training=brief), queries), (SimilarityWeighted(), queries),
        (QueryClassifier(training=few), queries), (QueryMlp(training=few), certain),
    ):  # fmt: skip
        learner.fit_queries(known, known, track=rows.append)
    policy_from(SimilarityWeighted(examples=3, scheduling=FEW), pool, task, track=rows.append)
    told = keys("query_routing") - {"right_NAME"}
    assert logged(rows) == told | {f"right_{name}" for name in pool.names} | ROUTER
    assert {row["run"].split()[0] for row in rows} == {"knn", "uniroute", "matrix", "query", "mlp", "queries"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["expert", "tapo_scratch", "ppo", "a2c", "dqn", "qrdqn", "recurrent_ppo"])
def test_learners_that_play_log_the_rows_that_are_said(name, pool, task):
    common = next(tables(PAGES["rl"], "key", "unit", "meaning"))[1]
    stable_baselines = {CODE.fullmatch(row[0])[1] for row in common}
    for before, rows in tables(PAGES["rl"], "key", "unit", "meaning"):
        if f"`{name}`" in before.rstrip().splitlines()[-1] and "too:" in before.rstrip().splitlines()[-1]:
            stable_baselines |= {CODE.fullmatch(row[0])[1] for row in rows}
    told = {
        "expert": keys("search") | ROUTER,
        "tapo_scratch": {"run"} | {CODE.fullmatch(row[0])[1] for row in list(tables(PAGES["rl"], "key"))[-1][1]},
    }
    assert fitted(agent(name), pool, task) == told.get(name, stable_baselines)
