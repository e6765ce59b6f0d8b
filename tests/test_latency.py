"""Decisions of one pair, written again by another: token by token, writer by writer, in the same passes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import experiments
from agents.checking.checked import CheckedPolicy
from agents.checking.entropy import CheckedEntropy
from agents.checking.speculative import Speculative
from agents.common.policy import Policy
from agents.common.rollout import TakenBack
from agents.common.saving import load_policy
from agents.heuristics import Uncertainty
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.costs import PASSES, SECONDS
from envs.decoding.observation import feature_width
from envs.models.pool import models_manifest
from envs.tasks.arithmetic import ArithmeticTask
from experiments.speed_suites.forced import ForcedModel, ForcedPolicy, Script, as_large
from experiments.speed_suites.latency import (
    ADAPTIVE,
    ENTROPY,
    LLM,
    SPECULATIVE,
    chosen_thresholds,
    compared,
    forced_pool,
    measure,
    over,
    policies_of,
)
from experiments.speed_suites.replay import Replay, check_same

TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_size": 32}
CONFIG = OmegaConf.create({"seed": 0, "slm": TINY, "llm": TINY | {"layers": 2}})
NEW, DRAFT = 40, 5
PROBLEMS = (54, 61, 300)  # of short answers, of which some is taken back
ALL = len(PROBLEMS)
SAVED = Path(experiments.__file__).parent / "results/arithmetic/policies"
CHECKED, CHECKED_ENTROPY = "checked", "checked_entropy"


@pytest.fixture(scope="module")
def large(pool):
    return forced_pool(CONFIG, pool, rows=ALL, capacity=300)


@pytest.fixture(scope="module")
def router(pool):
    network = RouterNetwork(pool.slm.width, units=[20, 10]).eval()
    return RouterPolicy(network, models_manifest(pool))


@pytest.fixture(scope="module")
def policies(pool):
    """Policies and their thresholds."""
    return {
        ENTROPY: (Uncertainty(), 0.95),
        SPECULATIVE: (Speculative(DRAFT), 0.5),
        ADAPTIVE: (Speculative(32, 0.5), 0.5),
        CHECKED_ENTROPY: (CheckedEntropy(), 0.3),
        CHECKED: (load_policy(SAVED / "checked-seed0", pool), 0.4),
        "r2r": (load_policy(SAVED / "r2r-seed0", pool), 0.5),
    }


@pytest.fixture(scope="module")
def replays(pool, large):
    """Of the same problems, one at a time and all at once."""
    task = ArithmeticTask()
    examples = [task.example("validation", number) for number in PROBLEMS]
    return {rows: Replay(pool, large, task, examples, rows, max_new_tokens=NEW) for rows in (1, ALL)}


@pytest.fixture(scope="module")
def ways(replays, policies):
    decided = {1: (ADAPTIVE, CHECKED), ALL: policies}
    return {
        rows: {LLM: replay.llm_only(), **{name: replay.routed(*policies[name]) for name in decided[rows]}}
        for rows, replay in replays.items()
    }


@pytest.fixture
def fed(monkeypatch):
    """The rows of each pass that a model of the large pair makes."""
    passes, feed = {"slm": [], "llm": []}, ForcedModel.feed

    def counted(model, cache, rows, *arguments, **settings):
        passes["slm" if model.slm else "llm"].append(len(rows))
        return feed(model, cache, rows, *arguments, **settings)

    monkeypatch.setattr(ForcedModel, "feed", counted)
    return passes


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        *((1, name) for name in (LLM, ADAPTIVE, CHECKED)),
        *((ALL, name) for name in (LLM, ENTROPY, SPECULATIVE, ADAPTIVE, CHECKED_ENTROPY, CHECKED, "r2r")),
    ],
)
def test_every_way_is_written_again_to_the_token_in_the_same_passes(ways, replays, fed, name, rows):
    way, replay = ways[rows][name], replays[rows]
    assert any(episode.taken_back for episode in way.episodes) or name in (LLM, ENTROPY, "r2r")
    again = []
    for number in range(replay.batches):
        batch = way.answer(number)
        assert len(batch) == rows
        again += batch
    for one, decided in zip(again, way.episodes, strict=True):
        check_same(name, one, decided)
        assert [(back.position, back.tokens.tolist()) for back in one.taken_back] == [
            (back.position, back.tokens.tolist()) for back in decided.taken_back
        ]
        assert one.text == decided.text
        assert one.ledger[:, SECONDS].sum() > 0
    # each pass that is counted is made, and serves no row more or less
    for model, some in enumerate(fed.values()):
        assert sum(some) == sum(episode.ledger[model, PASSES] for episode in way.episodes)
    assert max(fed["slm"] + fed["llm"]) == rows


def test_the_large_pair_itself_would_write_something_else(large, ways, monkeypatch):
    assert large.models[1].fingerprint != large.models[0].fingerprint
    monkeypatch.setattr("experiments.speed_suites.forced.CERTAIN", 0.0)
    with pytest.raises(RuntimeError, match=r"llm_only: .* has other tokens"):
        check_same(LLM, ways[1][LLM].answer(0)[0], ways[1][LLM].episodes[0])


@pytest.mark.parametrize("rows", [1, ALL])
def test_each_decision_is_computed_by_a_network_of_the_large_pair(ways, replays, large, rows):
    way, asked = ways[rows][CHECKED], []
    network = way.policy.policy.network
    assert network.width > large.slm.width
    hook = network.register_forward_hook(lambda _, inputs, output: asked.append(len(output)))
    again = [episode for number in range(replays[rows].batches) for episode in way.answer(number)]
    hook.remove()
    assert sum(asked) == sum(episode.decisions[PASSES] for episode in again)
    assert sum(asked) > sum(len(episode.tokens) - episode.ledger[1, PASSES] for episode in again)
    assert way.policy.policy._standing == {}  # what has ended is forgotten, so that the next batch begins anew


def without_drafts(of):
    return lambda *arguments: replace(of(*arguments), refused=())


def without_the_last_choice(of):
    def changed(*arguments):
        script = of(*arguments)
        return replace(script, choices=script.choices[:-1])

    return changed


def with_other_choices(of):
    """The SLM goes on where it did not, once."""

    def changed(*arguments):
        script = of(*arguments)
        first = script.choices.index(False)
        return replace(script, choices=[*script.choices[:first], True, *script.choices[first:]])

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_drafts, "checked: .* has other "),
        (without_the_last_choice, "is decided on once more"),
        (with_other_choices, "checked: .* has other "),
    ],
)
def test_a_replay_that_differs_is_refused(ways, replays, monkeypatch, change, said):
    monkeypatch.setattr(Script, "of", change(Script.of))
    with pytest.raises(RuntimeError, match=said):
        measure({CHECKED: ways[ALL][CHECKED]}, replays[ALL], repeats=1)


def test_what_differs_is_named(ways):
    one = next(episode for episode in ways[1][CHECKED].episodes if episode.taken_back)
    pass_more = one.ledger + np.eye(6)[PASSES]
    for changed, what in (
        (replace(one, tokens=np.roll(one.tokens, 1)), "tokens"),
        (replace(one, writers=1 - one.writers), "writers"),
        (replace(one, taken_back=one.taken_back[1:]), "tokens that were taken back"),
        (replace(one, ledger=pass_more), "passes"),
        (replace(one, decisions=one.decisions + np.eye(6)[PASSES]), "decisions"),
    ):
        with pytest.raises(RuntimeError, match=rf"checked: .* has other {what} when"):
            check_same(CHECKED, changed, one)
    check_same(CHECKED, replace(one, ledger=one.ledger + np.eye(6)[SECONDS]), one)


@pytest.mark.parametrize(("rows", "repeats"), [(1, 1), (ALL, 2)])
def test_measuring_counts_what_was_written_and_takes_turns(ways, replays, rows, repeats):
    measured = measure({name: ways[rows][name] for name in (LLM, CHECKED)}, replays[rows], repeats)
    for name, one in measured.items():
        assert one.seconds.shape == (ALL / rows, repeats)
        assert (one.seconds > 0).all()
        assert (one.passes.sum(1) < one.seconds.max(1)).all()
        assert ((one.passes > 0) == [name != LLM, True, name != LLM]).all()
        assert one.answers.tokens.tolist() == [len(episode.tokens) for episode in ways[rows][name].episodes]
    assert measured[LLM].answers.costs["bytes"].sum() > 0
    assert measured[CHECKED].answers.llm_tokens.sum() < measured[LLM].answers.llm_tokens.sum()


def test_a_policy_is_compared_with_the_llm_alone_and_with_each_speculative_decoding(ways, replays):
    seconds = {LLM: 4.0, SPECULATIVE: 2.0, ADAPTIVE: 1.6, CHECKED: 1.2}
    measured = measure({CHECKED: ways[ALL][CHECKED]}, replays[ALL], repeats=1)[CHECKED]
    ratios = compared({name: measured._replace(seconds=np.full((5, 3), some)) for name, some in seconds.items()})
    assert {name: ratio for name, ratio in ratios.items() if name.endswith("seconds_over_llm_only")} == pytest.approx(
        {f"{name}_seconds_over_llm_only": some / 4 for name, some in seconds.items() if name != LLM}
    )
    assert ratios["checked_seconds_over_speculative"] == pytest.approx(0.6)
    assert ratios["checked_seconds_over_speculative_adaptive"] == pytest.approx(0.75)
    assert ratios["checked_seconds_over_speculative_adaptive_high"] == pytest.approx(0.75)
    assert ratios["checked_bytes_over_llm_only"] == 1
    assert "speculative_seconds_over_speculative_adaptive" not in ratios


def test_problems_that_fill_no_batches_are_refused(replays):
    with pytest.raises(ValueError, match="3 problems are no whole number of batches of 2"):
        replace(replays[1], rows=2)


def test_a_ratio_has_an_interval_around_it():
    theirs = np.full((8, 3), 2.0)
    ours = theirs * np.linspace(0.4, 0.6, 8)[:, None] + np.array([0.0, 9.0, 0.0])  # one turn was disturbed
    found = over(ours, theirs)
    assert found[""] == pytest.approx(0.5)
    assert found["_low"] < 0.5 < found["_high"]
    assert over(theirs, theirs) == pytest.approx({"": 1.0, "_low": 1.0, "_high": 1.0})


def test_a_script_says_what_was_drafted_in_vain_until_it_is_refused():
    script = Script(10, np.array([5, 6, 7, 8]), [TakenBack(1, 0, np.array([9, 9]))])
    assert script.next_tokens(np.array([0]), slm=True).tolist() == [5]
    assert script.next_tokens(np.array([1]), slm=True).tolist() == [9]
    assert script.next_tokens(np.array([-1, 0, 1, 2]), slm=False).tolist()[1:3] == [5, 6]
    assert script.next_tokens(np.array([2]), slm=True).tolist() == [7]
    assert script.next_tokens(np.array([7]), slm=True).tolist() == [8]


def test_a_script_knows_as_many_decisions_as_were_made():
    script = Script(10, np.array([5, 6]), choices=[True, False])
    assert [script.next_choice(), script.next_choice()] == [True, False]
    with pytest.raises(RuntimeError, match="decided on 2 times is decided on once more"):
        script.next_choice()


def test_a_forced_model_wants_a_script_for_each_row(large):
    model = large.models[0]
    model.scripts = [Script(1, np.array([5, 6]))]
    cache = model.new_cache(2, 10)
    with pytest.raises(ValueError, match="writes by scripts, and has 1; row 1 was fed"):
        model.feed(cache, np.arange(2), [np.array([1]), np.array([2])])
    model.scripts = [Script(1, np.array([5, 6])), Script(2, np.array([7, 8, 9]))]
    _, logits = model.feed(cache, np.array([1, 0]), [np.array([1, 1, 1]), np.array([1])], every_position=True)
    assert logits.argmax(-1)[1:].tolist() == [7, 8, 5]


def test_a_policy_computes_as_much_as_its_network_would_for_the_large_pair(router, policies, large, pool):
    scaled = as_large(router, large)
    assert scaled.network.width == large.slm.width
    assert scaled.network.units == [round(count * large.slm.width / pool.slm.width) for count in (20, 10)]
    forced = ForcedPolicy(scaled)
    assert forced.parameters == scaled.parameters > 0
    assert as_large(Uncertainty(), large) == Uncertainty()
    checked = policies[CHECKED][0]
    scaled = as_large(checked, large)
    width = feature_width(checked.features, large.slm.width)
    assert isinstance(scaled, CheckedPolicy)
    assert scaled.network.width == width
    assert scaled.network.units == [round(count * width / checked.network.width) for count in checked.network.units]
    kept = ("judge", "span", "end_weight", "looks_ahead", "features")
    assert [getattr(scaled, name) for name in kept] == [getattr(checked, name) for name in kept]

    class Once(Policy):
        per_response = True

        def score(self, observation):
            return torch.ones(len(observation))

    with pytest.raises(ValueError, match="Once cannot be timed on another pair"):
        as_large(Once(), large)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"latency_policies": {LLM: SAVED / "checked-seed0"}}, "latency_policies.llm_only: another way to answer"),
        ({"latency_policies": {SPECULATIVE: SAVED / "checked-seed0"}}, "latency_policies.speculative: another way"),
        ({"latency_policies": {"mine": "nowhere"}}, "nowhere holds no readable policy.json"),
        ({"latency_thresholds": {"chekced": 0.5}}, "latency_thresholds.chekced: there is no such policy"),
    ],
)
def test_names_that_are_taken_or_unknown_are_refused(pool, settings, said):
    usual = {"agents": {}, "latency_policies": {}, "latency_thresholds": {}, "latency_draft_tokens": 16}
    with pytest.raises(ValueError, match=said):
        policies_of(OmegaConf.create(usual | settings), pool)


@pytest.mark.slow
def test_thresholds_are_chosen_on_validation_problems(pool, task):
    chosen = chosen_thresholds({"entropy": Uncertainty(), "checked": CheckedEntropy()}, pool, task, 40, NEW)
    assert 0.9 < chosen["entropy"] < 1
    assert 0 < chosen["checked"] < 1
