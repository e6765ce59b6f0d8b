"""The environment in which a call checks what was drafted; its shells are tested in test_contract.py."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv
from stable_baselines3.common.env_checker import check_env as check_sb3

import envs  # noqa: F401 (registers the ids)
from envs.costs import Dollars, MemoryTraffic
from envs.decoding.judges import FirstDisagreement, Gap
from envs.environments.checked_routing import CheckedRoutingEnv, CheckedRoutingVectorEnv
from envs.environments.rewards import OutcomeReward, ShortcutReward
from envs.environments.token_routing import RoutingEnv
from envs.prefix_tree.tree import PrefixTree
from tests.drafting import Letters, kin_of

ID = "citer/CheckedRouting-v0"
NEVER = Gap(float("inf"))


@pytest.fixture(scope="module")
def kin(pools):
    return kin_of(pools["llama"])


@pytest.fixture(scope="module")
def settings(kin):
    return {"pool": kin, "task": Letters(), "max_new_tokens": 16, "cost": MemoryTraffic()}


def play(environment, decide, seed=0):
    """One episode; what its steps gave."""
    observation, info = environment.reset(seed=seed)
    steps, over = [(observation, 0.0, False, False, info)], False
    while not over:
        steps.append(environment.step(decide(environment, len(steps) - 1)))
        over = steps[-1][2] or steps[-1][3]
    return steps


def ended(environment):
    return bool(environment.unwrapped.episodes.session.drafts(np.array([0])).ended[0])


@pytest.mark.parametrize("on_tree", [False, True])
def test_where_nothing_is_taken_back_it_is_token_routing(settings, kin, on_tree):
    """The same observations, rewards, costs and ends, but that a drafted end is accepted in a step of its own."""
    given = dict(settings)
    if on_tree:
        given = {"tree": PrefixTree(kin, given.pop("task"), given["max_new_tokens"], memory=2**24)} | given
    checked = gym.make(ID, judge=NEVER, features="hidden_logits_history", **given)
    routed = gym.make("citer/TokenRouting-v1", features="hidden_logits_history", **settings)
    accepted = 0
    for seed in range(6):
        choices = np.random.default_rng(seed).integers(0, 2, 20)

        def decide(environment, number, choices=choices):
            return 0 if environment is checked and ended(checked) else int(choices[number])

        ours, theirs = play(checked, decide, seed), play(routed, decide, seed)
        if len(ours) > len(theirs):
            accepted += 1
            assert ours[-1][4]["token"] == -1
            assert ours[-1][4]["cost_bytes"] == 0
        for mine, other in zip(ours, theirs, strict=False):
            last = other is theirs[-1]
            if not (last and other[2]):
                # a pass over several tokens sums in another order than one over each
                np.testing.assert_allclose(mine[0], other[0], atol=1e-3)
            names = {"example", "prompt_tokens", "token", "slm_token", "model"} & other[4].keys()
            assert {name: mine[4][name] for name in names} == {name: other[4][name] for name in names}
            costs = {name: cost for name, cost in other[4].items() if name.startswith("cost")}
            assert {name: mine[4][name] for name in costs} == pytest.approx(costs, abs=1e-9)
        # the reward of being right comes with the step that ends the episode
        assert sum(step[1] for step in ours) == pytest.approx(sum(step[1] for step in theirs), abs=1e-9)
        assert (ours[-1][2], ours[-1][3]) == (theirs[-1][2], theirs[-1][3])
        totals = {k: v for k, v in theirs[-1][4].items() if k.startswith("total") and "seconds" not in k}
        assert {name: ours[-1][4][name] for name in totals} == pytest.approx(totals)
        for name in ("text", "correct", "slm_tokens", "llm_tokens"):
            assert ours[-1][4][name] == theirs[-1][4][name]
        assert ours[-1][4]["tokens_taken_back"] == 0
    assert 0 < accepted < 6


@pytest.mark.parametrize("judge", [FirstDisagreement(), Gap(0.0)], ids=repr)
@pytest.mark.parametrize("features", ["drafts", "hidden"])
def test_where_the_llm_checks_all_and_takes_back_what_it_would_not_write_the_text_is_its_own(settings, features, judge):
    checked = CheckedRoutingEnv(judge=judge, features=features, **settings)
    alone = RoutingEnv(**settings)
    gone = 0
    for seed in range(5):

        def decide(environment, number):
            if environment is alone:
                return 1
            drafts = environment.episodes.session.drafts(np.array([0]))
            return int(drafts.ended[0] or drafts.counts[0] == 3)

        ours, theirs = play(checked, decide, seed), play(alone, decide, seed)
        assert ours[-1][4]["text"] == theirs[-1][4]["text"]
        assert (ours[-1][2], ours[-1][3]) == (theirs[-1][2], theirs[-1][3])
        back = [token for step in ours[1:] for token in step[4]["taken_back"]]
        assert len(back) == ours[-1][4]["tokens_taken_back"]
        kept = sum(step[4]["kept"] for step in ours[1:])
        assert kept == ours[-1][4]["slm_tokens"]
        gone += len(back)
    assert gone > 10


def test_who_is_not_observed_makes_the_slm_read_less(settings):
    """The same actions: with drafts alone the SLM reads its last token together with the LLM's."""

    def decide(environment, number):
        drafts = environment.episodes.session.drafts(np.array([0]))
        return int(drafts.ended[0] or drafts.counts[0] == 3)

    costs, texts = {}, {}
    for features in ("hidden_logits_history_drafts", "drafts"):
        environment = CheckedRoutingEnv(judge="gap", features=features, **settings)
        steps = [play(environment, decide, seed) for seed in range(3)]
        costs[features] = [one[-1][4]["total_cost_bytes"] for one in steps]
        texts[features] = [one[-1][4]["text"] for one in steps]
        assert steps[0][0][0].shape == (4 if features == "drafts" else settings["pool"].slm.width + 17,)
    assert texts["drafts"] == texts["hidden_logits_history_drafts"]
    assert steps[0][1][0][0] == pytest.approx(np.log(2))
    assert all(less <= more for less, more in zip(costs["drafts"], costs["hidden_logits_history_drafts"], strict=True))
    assert sum(costs["drafts"]) < sum(costs["hidden_logits_history_drafts"])


def test_rewards_add_up_to_the_outcome_less_the_price_of_the_whole_response(settings):
    environment = CheckedRoutingEnv(judge="first_disagreement", reward=OutcomeReward(0.5), **settings)
    rng = np.random.default_rng(0)
    for seed in range(5):
        steps = play(environment, lambda *_: int(rng.random() < 0.4), seed)
        last = steps[-1][4]
        unit = MemoryTraffic().per_llm_token(settings["pool"].profiles)
        spent = last["total_cost_bytes"] - steps[0][4]["cost_bytes"]
        assert sum(step[1] for step in steps) == pytest.approx(last["correct"] - 0.5 * spent / unit)


def test_what_is_taken_back_is_not_paid_as_written_where_that_has_a_price(settings):
    price = Dollars(read=[0.0, 0.0], written=[1.0, 1.0])
    environment = CheckedRoutingEnv(judge="first_disagreement", **{**settings, "cost": price})
    steps = play(environment, lambda e, number: int(number % 4 == 3), 0)
    last = steps[-1][4]
    written = last["slm_tokens"] + last["llm_tokens"]
    assert last["total_cost_dollars"] == pytest.approx(written / 1e6)
    assert last["tokens_taken_back"] > 0


def test_checkers_of_gymnasium_and_stable_baselines_find_nothing(settings):
    check_env(CheckedRoutingEnv(**settings), skip_render_check=True)
    check_sb3(CheckedRoutingEnv(**settings))


def test_one_tree_serves_all_judges(kin, settings):
    """What is known of one judge's walk is not decoded again for another's."""
    tree = PrefixTree(kin, Letters(), 16, memory=2**24)
    given = {"tree": tree, "max_new_tokens": 16, "cost": MemoryTraffic()}
    live = {key: value for key, value in settings.items() if key != "tree"}
    for judge in (Gap(0.3), FirstDisagreement(), NEVER):
        walked = CheckedRoutingVectorEnv(4, judge=judge, autoreset_mode="Disabled", **given)
        decoded = SyncVectorEnv(
            [lambda judge=judge: CheckedRoutingEnv(judge=judge, **live)] * 4, autoreset_mode="Disabled"
        )
        seeds = [3, 4, 5, 6]
        np.testing.assert_allclose(walked.reset(seed=seeds)[0], decoded.reset(seed=seeds)[0], atol=1e-3)
        rng = np.random.default_rng(1)
        for _ in range(7):
            actions = (rng.random(4) < 0.4).astype(int)
            ours, theirs = walked.step(actions), decoded.step(actions)
            np.testing.assert_allclose(ours[1], theirs[1], atol=1e-6)
            np.testing.assert_array_equal(ours[4]["token"], theirs[4]["token"])
            assert list(ours[4]["taken_back"]) == list(theirs[4]["taken_back"])
            if (ours[2] | ours[3]).any():
                break


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"judge": "gaps"},
            ValueError,
            "unknown judge 'gaps'; choose one of first_disagreement, gap, top_k, step_likelihood",
        ),
        (
            {"judge": 2.0},
            TypeError,
            "judge must be a Judge or one of first_disagreement, gap, top_k, step_likelihood, learned; it is 2.0",
        ),
        ({"features": "draft"}, ValueError, "unknown features 'draft'; choose one of hidden, .*, drafts"),
        ({"reward": ShortcutReward()}, ValueError, "ShortcutReward follows a reference .* use OutcomeReward"),
    ],
)
def test_wrong_arguments_are_named_when_the_environment_is_built(settings, arguments, error, message):
    with pytest.raises(error, match=message):
        CheckedRoutingEnv(**settings | arguments)
    with pytest.raises(ValueError, match="unknown features 'drafts'"):
        RoutingEnv(**settings, features="drafts")
