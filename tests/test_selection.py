"""Learners keep the best policy of their training, measured on validation problems."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from agents.common.checkpoints import flat, nested
from agents.common.comparison import compare
from agents.common.curves import Sweep
from agents.common.selection import BestPolicy, Measured, Selection, Validation
from agents.heuristics import Always, Uncertainty
from agents.sb3 import StableBaselines
from agents.tapo import Tapo
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import FirstExamples

MAX_NEW = 44
SELECTION = Selection(evaluations=4, examples=5, llm_shares=(0.1, 0.4))
LEARNERS = {
    "ppo": StableBaselines(
        steps=512, num_envs=8, examples=12, max_new_tokens=MAX_NEW, net_arch=[8], selection=SELECTION,
        arguments={"n_steps": 8, "batch_size": 16},
    ),
    "tapo": Tapo(
        start="scratch", examples=12, iterations=4, batch=4, branches=2, rows=8, memory=2**24, max_new_tokens=MAX_NEW,
        selection=SELECTION,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def easy():
    return ArithmeticTask("easy")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr("agents.sb3.STATISTICS_STEPS", 6)


def validation(pool, task, selection=SELECTION, **given):
    return Validation(selection, selection.problems(pool, task, MAX_NEW), pool, task, MAX_NEW, **given)


# ---------------------------------------------------------------- what is measured


def test_cost_and_accuracy_are_read_off_the_hull():
    # of four problems the SLM is right on one at a cost of 1, the policy on all at 4, the LLM on all at 10
    correct = np.array([[1, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]], dtype=bool)
    found = Measured.of(Sweep(correct, np.array([[1.0] * 4, [4.0] * 4, [10.0] * 4])))
    assert found.cost == pytest.approx(0.1 + 0.3 * (0.95 - 0.25) / 0.75)
    assert found.accuracy == pytest.approx((0.3 * (0.25 + 1) / 2 + 0.6 * 1) / 0.9)


def test_who_is_cheaper_is_better_and_of_equals_who_is_more_accurate():
    first = Measured(0.2, 0.8)
    assert first.better_than(None)
    assert Measured(0.1, 0.1).better_than(first)
    assert Measured(0.2, 0.9).better_than(first)
    assert not first.better_than(first)
    assert not Measured(0.3, 0.9).better_than(first)


def test_a_model_alone_that_costs_no_more_than_the_other_is_no_error():
    found = Measured.of(Sweep(np.ones((2, 3), dtype=bool), np.ones((2, 3))))
    assert found == Measured(1.0, 1.0)


def test_a_policy_that_asks_no_one_has_the_hull_of_both_models(pool, task):
    selection = replace(SELECTION, examples=8)
    given = Validation(selection, selection.problems(pool, task, 64), pool, task, 64)
    found = given.measure(Always(slm=True))
    alone = compare(pool, task, given.problems, {}, max_new_tokens=64)
    slm, llm = (alone[name] for name in pool.names)
    assert slm.accuracy < 0.95 * llm.accuracy
    share = (0.95 * llm.accuracy - slm.accuracy) / (llm.accuracy - slm.accuracy)
    assert found.cost == pytest.approx(slm.cost + share * (1 - slm.cost))
    assert found.accuracy == pytest.approx((slm.accuracy + llm.accuracy) / 2)


def test_a_tree_measures_what_live_decoding_does(pool, easy):
    live = validation(pool, easy).measure(Uncertainty())
    few = FirstExamples(easy, 3)  # a tree of training problems judges others too
    tree = PrefixTree(pool, few, MAX_NEW, 2**24)
    walked = Validation(
        SELECTION, SELECTION.problems(pool, easy, MAX_NEW), pool, few, MAX_NEW, rows=4, tree=tree
    ).measure(Uncertainty())
    assert walked == pytest.approx(live)


def test_problems_are_others_than_those_that_thresholds_are_chosen_on(pool, easy):
    problems = Selection().problems(pool, easy, MAX_NEW)
    chosen_on = {example.id for example in easy.examples("validation", 2000)}
    assert len(problems) == 200
    assert not chosen_on & {problem.id for problem in problems}
    few = FirstExamples(easy, 30)  # a split with an end
    last = replace(SELECTION, examples=7).problems(pool, few, MAX_NEW)
    assert [problem.id for problem in last] == [few.example("validation", number).id for number in range(23, 30)]
    assert replace(SELECTION, evaluations=0).problems(pool, easy, MAX_NEW) == []


@pytest.mark.parametrize("learner", LEARNERS)
def test_too_few_problems_are_named_before_anything_runs(learner, pool, easy, monkeypatch):
    monkeypatch.setattr("envs.models.language_model.LanguageModel.feed", None)
    few = FirstExamples(easy, 12)
    agent = replace(LEARNERS[learner], selection=Selection(examples=13))
    with pytest.raises(ValueError, match=r"selection.examples is 13, .* has 12 validation .*selection.evaluations=0"):
        agent.fit(pool, few)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"evaluations": -1}, "selection.evaluations must be at least 0"),
        ({"examples": 0}, "selection.examples must be at least 1"),
        ({"start": -1}, "selection.start must be at least 0"),
        ({"llm_shares": []}, "selection.llm_shares must lie between 0 and 1"),
        ({"llm_shares": [0.5, 1.0]}, "selection.llm_shares must lie between 0 and 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Selection(**settings)


# ---------------------------------------------------------------- what is kept


class Told(Validation):
    """Says what it is told to, in turn."""

    def __init__(self, *costs):
        self.costs = list(costs)

    def measure(self, policy):
        return Measured(self.costs.pop(0), 0.5)


def test_it_is_due_evenly_its_end_included():
    best = BestPolicy(Told(), 4, 1000, made=0)
    due = []
    for made in range(0, 1001, 50):
        if best.due(made):
            due.append(made)
            best.made = made
    assert due == [250, 500, 750, 1000]
    assert BestPolicy(Told(), 4, 1000).due(0)  # where what one begins with may be the best
    assert not any(BestPolicy(Told(), 0, 1000).due(made) for made in range(1001))


def test_the_best_weights_are_kept_as_they_were_and_come_back():
    best, network = BestPolicy(Told(0.4, 0.2, 0.3, 0.2), 4, 4, made=0), nn.Linear(2, 1)
    begun = best.state()
    for made in (1, 2, 3, 4):
        with torch.no_grad():
            network.weight.fill_(made)  # in place, as an optimizer does
        best.measure(made, Always(slm=True), network)
    assert (best.weights["weight"] == 2).all()
    weights, about = best.state()
    again = BestPolicy(Told(0.25, 0.1), 4, 4, made=0)
    again.restore(nested(flat(weights)), about, network)
    assert (again.made, again.measured) == (4, Measured(0.2, 0.5))
    again.measure(5, Always(slm=True), network)
    assert (again.weights["weight"] == 2).all()
    again.measure(6, Always(slm=True), network)
    assert (again.weights["weight"] == 4).all()
    again.restore(*begun, network)
    assert again.measured is None
    with pytest.raises(RuntimeError, match="another network"):
        again.restore(weights, about, nn.Linear(3, 1))


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_learner_ends_with_the_policy_that_measured_best(learner, pool, easy, monkeypatch):
    costs, seen = iter([0.5, 0.2, 0.4, 0.3, 0.6]), []

    def measure(self, policy):
        network = policy.network
        seen.append({name: value.clone() for name, value in network.state_dict().items()})
        return Measured(next(costs), 0.5)

    monkeypatch.setattr(Validation, "measure", measure)
    rows = []
    policy = LEARNERS[learner].fit(pool, easy, seed=1, track=rows.append)
    told = [row["validation_cost"] for row in rows if "validation_cost" in row]
    assert told == [0.5, 0.2, 0.4, 0.3, 0.6][: len(told)]
    assert len(told) == (4 if learner == "ppo" else 5)  # one begins at nothing, the other at a router
    kept = policy.network.state_dict()
    assert all(torch.equal(value, seen[1][name]) for name, value in kept.items())
    assert any(not torch.equal(value, seen[-1][name]) for name, value in kept.items())


@pytest.mark.parametrize("learner", LEARNERS)
def test_measuring_changes_nothing_of_the_training(learner, pool, easy):
    """Without a choice the last policy is kept: it is that of a training in which none was measured."""
    rows = {}
    for evaluations in (4, 0):
        agent = replace(LEARNERS[learner], selection=replace(SELECTION, evaluations=evaluations))
        rows[evaluations] = []
        agent.fit(pool, easy, seed=1, track=rows[evaluations].append)
    timed = ("time/fps", "time/time_elapsed", "tree", "validation_cost", "validation_accuracy")
    plain = [[{key: value for key, value in row.items() if key not in timed} for row in some] for some in rows.values()]
    measured, others = ([row for row in some if len(row) > 2] for some in plain)
    assert len(others) > 3
    for one, other in zip(measured, others, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            # states may have been decoded in other batches, of other last bits
            assert value == other[key] or math.isclose(value, other[key], rel_tol=1e-3, abs_tol=1e-4), key
