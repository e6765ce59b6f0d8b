"""Actors that begin with the decisions of another policy."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from stable_baselines3 import PPO

from agents.checking.checked import Checked
from agents.common.rollout import decode
from agents.common.selection import Selection
from agents.heuristics import Uncertainty
from agents.rl.imitation import Decisions, clone, decisions_of
from agents.router.training import RouterTraining
from agents.sb3 import Imitation, StableBaselines
from envs.decoding.judges import Gap
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask

FEATURES = "hidden_logits_history_drafts"


class Judged(Uncertainty):
    """Calls by the entropy of a state that the SLM has read."""

    judge = Gap()


@pytest.fixture(scope="module")
def task():
    return ArithmeticTask("easy")


@pytest.fixture
def learner():
    """PPO of two numbers and two actions."""

    class Numbers(gym.Env):
        observation_space, action_space = gym.spaces.Box(-9, 9, (2,)), gym.spaces.Discrete(2)

    return PPO("MlpPolicy", Numbers(), seed=0, policy_kwargs={"net_arch": [32]}, device="cpu")


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_an_actor_comes_to_decide_likewise_and_explores_as_far_as_it_is_told(learner, smoothing):
    seen = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    calls = seen.sum(1) > 1
    critic = [weight.clone() for weight in learner.policy.value_net.parameters()]
    row = clone(learner.policy, Decisions(seen, calls), 30, smoothing, 1e-2, 256, 0)
    with torch.no_grad():
        called = learner.policy.get_distribution(seen).distribution.probs[:, 1]
    assert ((called > 0.5) == calls).float().mean() > 0.98
    sure = called[seen.sum(1) > 2].mean().item()
    assert sure == pytest.approx(1 - smoothing / 2, abs=0.03)
    assert row["calls"] == pytest.approx(calls.float().mean().item())
    assert all(torch.equal(*pair) for pair in zip(critic, learner.policy.value_net.parameters(), strict=True))


def test_decisions_are_those_of_the_answers(pool, task):
    examples, tree = task.examples("train", 4), PrefixTree(pool, task, 44, 2**26)
    found = decisions_of(Judged(), 0.99, FEATURES, examples, tree)
    episodes = decode(pool, task, examples, Judged(), 0.99, 44, tree=tree)
    scores = np.concatenate([one.scores for one in episodes])
    assert len(found.seen) == len(found.calls) == len(scores)
    assert found.calls.sum() == (scores < 0.99).sum() > 0
    assert found.seen.shape[1] == pool.slm.width + 17  # of logits, history, and what was drafted


def test_a_teacher_that_does_not_look_is_refused(pool, task):
    class Blind(Judged):
        observes = False

    tree = PrefixTree(pool, task, 44, 2**26)
    with pytest.raises(ValueError, match="Blind decides before the SLM has read a state"):
        decisions_of(Blind(), 0.5, FEATURES, task.examples("train", 2), tree)


def test_a_start_is_measured_repeats_and_is_gone_on_from(pool, task, tmp_path):
    teacher = Checked(examples=12, rounds=1, max_new_tokens=44, training=RouterTraining(epochs=1, units=[8]))
    learner = StableBaselines(
        environment="checked_tree", features=FEATURES, cost="bytes", steps=64, num_envs=4, examples=8, net_arch=[8],
        max_new_tokens=44, selection=Selection(evaluations=1, examples=4, start=0, llm_shares=[0.1]),
        arguments={"n_steps": 8, "batch_size": 16}, start=Imitation(teacher, epochs=2),
    )  # fmt: skip
    rows = []
    first = learner.fit(pool, task, track=rows.append, folder=tmp_path / "first")
    assert [row["time/total_timesteps"] for row in rows if "validation_cost" in row] == [0, 64]
    assert [row["decisions"] > 0 for row in rows if row["run"] == "imitated"] == [True]
    # what was imitated lies there, so that a second run does not train the teacher again
    assert (tmp_path / "first" / "start" / "states-1.safetensors").is_file()
    again = learner.fit(pool, task, folder=tmp_path / "first")
    other = learner.fit(pool, task)
    assert first.fingerprint == again.fingerprint == other.fingerprint


@pytest.mark.parametrize("settings", [{"epochs": 0}, {"smoothing": 1.0}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=r"epochs .* smoothing"):
        Imitation(**settings)
