import json
import random
import warnings
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from hydra import compose, initialize_config_dir
from stable_baselines3.common.buffers import NStepReplayBuffer
from torch.utils.flop_counter import FlopCounterMode

from agents.common.policy import Policy, decision_profile
from agents.common.rollout import Scheduling, decode
from agents.common.saving import load_policy
from agents.common.selection import Selection
from agents.rl.algorithms import ALGORITHMS, DEFAULTS, value_probability
from agents.rl.cost_weights import GRID, CostWeights
from agents.rl.environments import ENVIRONMENTS
from agents.rl.inputs import Standardised, input_statistics
from agents.rl.sb3_extensions import Rows
from agents.rl.sb3_policy import Sb3Policy
from agents.rl.vec_env import VectorEnvBridge
from agents.sb3 import Imitation, StableBaselines, train
from envs.costs import PASSES, Flops, MemoryTraffic
from envs.decoding.judges import Gap
from envs.decoding.observation import Observation
from envs.environments.vector import row_seeds
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example
from experiments.common.config import CONF, build, register_schemas

CPU = torch.device("cpu")
CHECKED = {"environment": "checked_tree", "features": "hidden_logits_history_drafts"}


class Toy(VectorEnv):
    """What same-step environments share; subclasses say what is seen and earned."""

    metadata: ClassVar = {"autoreset_mode": AutoresetMode.SAME_STEP}

    def __init__(self, rows, width, length, limit=10**9):
        self.num_envs, self.limit = rows, limit
        self.lengths = np.broadcast_to(length, (rows,))
        self.limits = np.broadcast_to(limit, (rows,))
        self.single_observation_space = gym.spaces.Box(-1e6, 1e6, (width,), np.float32)
        self.single_action_space = gym.spaces.Discrete(2)
        self.observation_space = batch_space(self.single_observation_space, rows)
        self.action_space = batch_space(self.single_action_space, rows)
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.rng = np.random.default_rng(seed)
        self.time, self.episode = np.zeros((2, self.num_envs), dtype=int)
        self.observation = self.observe()
        return self.observation, {"example": self.names(), "_example": np.ones(self.num_envs, bool)}

    def names(self):
        return np.array([f"toy/{row}/{episode}" for row, episode in enumerate(self.episode)], dtype=object)

    def step(self, actions):
        rewards, costs = self.earn(actions)
        self.time += 1
        terminated, truncated = self.time >= self.lengths, self.time >= self.limits
        ended = terminated | truncated
        infos = {"cost": np.where(ended, 0, costs), "_cost": ~ended}
        final = self.observe()
        if ended.any():
            infos["final_obs"] = np.array([*final, None], dtype=object)[:-1]
            infos["final_info"] = {"cost": np.where(ended, costs, 0), "correct": rewards > 0}
            self.time[ended], self.episode[ended] = 0, self.episode[ended] + 1
            infos["example"], infos["_example"] = np.where(ended, self.names(), None), ended
        # the array is used again: a bridge that does not copy would see it change
        self.observation[:] = np.where(ended[:, None], self.observe(), final)
        return self.observation, rewards, terminated, truncated, infos


class Counting(Toy):
    """Observations say which row, episode and step; rewards and costs too."""

    def __init__(self, rows=4, length=3, limit=10**9):
        super().__init__(rows, 3, length, limit)

    def observe(self):
        return np.stack([np.arange(self.num_envs), self.episode, self.time], axis=-1).astype(np.float32)

    def earn(self, actions):
        return self.time + 1.0, (10.0 + self.time) * actions


class TwoStates(Toy):
    """In state 0 the SLM is right, in state 1 the LLM alone, at a small cost; a state is drawn for every step."""

    price = 0.1

    def __init__(self, rows=64, width=2, length=4, limit=10**9):
        super().__init__(rows, width, length, limit)

    def observe(self):
        seen = self.rng.normal(size=(self.num_envs, self.single_observation_space.shape[0]))
        seen[:, 0] = 50 + 10 * self.rng.integers(0, 2, self.num_envs)  # far from a unit scale
        return seen.astype(np.float32)

    @property
    def state(self):
        return (self.observation[:, 0] > 55).astype(int)

    def earn(self, actions):
        right = (actions == 1) | (self.state == 0)
        return right - self.price * actions, actions.astype(float)


class Endless(Toy):
    """One state, a reward of 1 a step, cut short after two."""

    def __init__(self, rows=16):
        super().__init__(rows, 1, 10**9, limit=2)

    def observe(self):
        return np.ones((self.num_envs, 1), dtype=np.float32)

    def earn(self, actions):
        return np.ones(self.num_envs), actions.astype(float)


def observed(seen, positions=None):
    n = len(seen)
    positions = np.zeros(n, dtype=int) if positions is None else positions
    return Observation(torch.as_tensor(seen, dtype=torch.float32), None, positions, np.arange(n), positions)


def small(algorithm, **settings):
    chosen = {"algorithm": algorithm, "num_envs": 16, "steps": 600, "net_arch": [16], "features": "hidden"}
    return StableBaselines(**chosen | settings)


# ---------------------------------------------------------------- bridge


def test_ended_rows_report_their_last_observation_and_how_they_ended():
    # row 0 terminates, row 1 is truncated, row 2 both at once: it did end; row 3 goes on
    bridge = VectorEnvBridge(Counting(4, [2, 9, 2, 9], [9, 2, 2, 9]))
    first = bridge.reset()
    second, rewards, ended, infos = bridge.step(np.array([0, 1, 0, 1]))
    np.testing.assert_array_equal(second, [[0, 0, 1], [1, 0, 1], [2, 0, 1], [3, 0, 1]])
    np.testing.assert_array_equal(first[:, 2], 0)
    assert not ended.any()
    assert infos == [{}, {}, {}, {}]
    third, rewards, ended, infos = bridge.step(np.array([0, 1, 0, 1]))
    np.testing.assert_array_equal(ended, [True, True, True, False])
    np.testing.assert_array_equal(third, [[0, 1, 0], [1, 1, 0], [2, 1, 0], [3, 0, 2]])
    np.testing.assert_array_equal(second[:, 2], 1)
    np.testing.assert_array_equal(rewards, [2, 2, 2, 2])
    for row in range(3):
        np.testing.assert_array_equal(infos[row]["terminal_observation"], [row, 0, 2])
        assert infos[row]["TimeLimit.truncated"] is (row == 1)
        assert (infos[row]["episode"]["r"], infos[row]["episode"]["l"]) == (3.0, 2)
        assert infos[row]["is_success"] is True
    assert infos[3] == {}


def test_a_truncated_response_may_count_as_ended():
    bridge = VectorEnvBridge(Counting(2, 9, 1), bootstrap=False)
    bridge.reset()
    assert [info["TimeLimit.truncated"] for info in bridge.step(np.zeros(2, int))[3]] == [False, False]


def test_rows_are_seeded_at_the_next_reset_alone():
    environment = Counting(3)
    bridge = VectorEnvBridge(environment)
    bridge.seed(7)
    bridge.reset()
    bridge.reset()
    assert environment.seeds == [row_seeds(7, 3), None]


def test_a_conditioned_bridge_charges_and_shows_each_episodes_weight():
    weights = CostWeights(0.01, 1.0)
    bridge = VectorEnvBridge(Counting(2, [2, 3]), weights)
    bridge.seed(3)
    first = bridge.reset()
    shown = first[:, -1]
    told = 0.01 * 100 ** ((shown + 1) / 2)  # the weight, out of its scaled logarithm
    assert bridge.observation_space.shape == (4,)
    assert ((told >= 0.01) & (told <= 1)).all()
    seen, rewards, _, _ = bridge.step(np.array([1, 1]))
    np.testing.assert_allclose(rewards, 1 - told * 10, rtol=1e-5)
    np.testing.assert_array_equal(seen[:, -1], shown)
    seen, rewards, ended, infos = bridge.step(np.array([1, 0]))
    np.testing.assert_array_equal(ended, [True, False])
    np.testing.assert_allclose(rewards, [2 - told[0] * 11, 2], rtol=1e-5)
    np.testing.assert_allclose(infos[0]["terminal_observation"], [0, 0, 2, shown[0]])
    assert infos[0]["episode"]["r"] == pytest.approx(3 - told[0] * 21, rel=1e-5)
    assert seen[0, -1] != shown[0]
    assert seen[1, -1] == shown[1]
    again = VectorEnvBridge(Counting(2, [2, 3]), weights)
    again.seed(3)
    np.testing.assert_array_equal(again.reset(), first)


def test_weights_are_even_on_a_logarithmic_scale():
    weights, rng = CostWeights(0.001, 0.1), np.random.default_rng(0)
    drawn = np.array([weights.draw(rng) for _ in range(4000)])
    assert 0.001 <= drawn.min() < drawn.max() <= 0.1
    assert abs(np.mean(drawn < 0.01) - 0.5) < 0.03
    np.testing.assert_allclose(weights.scaled(np.array([0.001, 0.01, 0.1])), [-1, 0, 1], atol=1e-9)
    np.testing.assert_allclose(weights.scaled(weights.grid(5)), [-1, -0.5, 0, 0.5, 1], atol=1e-9)


@pytest.mark.parametrize("what", ["a reward", "an observation", "a cost"])
def test_numbers_that_are_not_finite_are_named(what):
    environment = Counting(3, 9)
    bridge = VectorEnvBridge(environment, CostWeights() if what == "a cost" else None)
    bridge.reset()
    bad = np.array([0, 0, np.nan])
    if what == "an observation":
        environment.observe = lambda: np.zeros((3, 3)) + bad[:, None]
    else:
        costs = bad if what == "a cost" else np.zeros(3)
        environment.earn = lambda actions: (bad if what == "a reward" else np.zeros(3), costs)
    with pytest.raises(FloatingPointError, match=f"row 2 of Counting has {what} of nan, on example toy/2/0"):
        bridge.step(np.zeros(3, int))


def test_environments_that_cannot_be_bridged_are_refused():
    environment = Counting()
    environment.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
    with pytest.raises(ValueError, match="SAME_STEP"):
        VectorEnvBridge(environment)
    environment = Counting()
    environment.single_action_space = gym.spaces.Box(0, 1)
    with pytest.raises(ValueError, match="Discrete"):
        VectorEnvBridge(environment)
    environment = Counting()
    bridge = VectorEnvBridge(environment, CostWeights())
    bridge.reset()
    step = environment.step
    environment.step = lambda actions: (*step(actions)[:4], {})
    with pytest.raises(ValueError, match="'cost'"):
        bridge.step(np.zeros(4, int))


def test_inputs_come_to_a_unit_scale():
    bridge = VectorEnvBridge(TwoStates(256), CostWeights())
    mean, deviation = input_statistics(bridge, 0.5, 20, seed=0)
    np.testing.assert_allclose(mean, [55, 0, 0], atol=0.3)
    np.testing.assert_allclose(deviation, [5, 1, 1], atol=0.1)
    layer = Standardised(bridge.observation_space, mean, deviation)
    out = layer(torch.tensor([[50.0, 1.0, -1.0], [1e6, 0.0, 0.5]]))
    torch.testing.assert_close(out, torch.tensor([[-1.0, 1.0, -1.0], [10.0, 0.0, 0.5]]), atol=0.2, rtol=0)
    assert out[0, 2] == -1  # the weight, as it was


# ---------------------------------------------------------------- learning


def regret(policy):
    environment = TwoStates(rows=2000)
    seen, _ = environment.reset(seed=99)
    best = np.where(environment.state == 0, 1, 1 - environment.price)
    actions = (policy.score(observed(seen)).numpy() < 0.5).astype(int)
    return 1 - environment.earn(actions)[0].sum() / best.sum()


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_a_two_state_problem_is_won(algorithm, tiny_pool):
    settings = small(algorithm, num_envs=64, steps=24_000, lr=5e-3)
    rows = []
    trained = train(TwoStates(limit=3), settings, 0, rows.append, CPU)
    policy = Sb3Policy.of(trained, algorithm, tiny_pool, "hidden")
    assert regret(policy) < 0.05
    assert rows[-1]["rollout/ep_rew_mean"] > rows[0]["rollout/ep_rew_mean"]


@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_what_a_cut_response_would_have_earned_is_estimated_if_asked(algorithm):
    worth = {}
    for bootstrap in (False, True):
        quick = {"batch_size": 64} if algorithm == "dqn" else {}
        settings = small(algorithm, steps=5000, gamma=0.5, lr=3e-3, bootstrap=bootstrap, arguments=quick)
        policy = train(Endless(), settings, 0, lambda row: None, CPU).policy
        one = torch.ones(1, 1)
        with torch.no_grad():
            worth[bootstrap] = (policy.predict_values(one) if algorithm == "ppo" else policy.q_net(one).max()).item()
    # 1 + 1/2 + 1/4 + ...; else the mean of 1 + 1/2 and of 1
    assert worth[True] == pytest.approx(2, abs=0.15)
    assert worth[False] == pytest.approx(1.25, abs=0.15)


@pytest.mark.parametrize(("algorithm", "conditioned"), [("ppo", CostWeights()), ("dqn", None)])
def test_when_to_call_is_learned_where_drafts_are_checked(algorithm, conditioned, pool, tmp_path):
    task, rows = ArithmeticTask("easy"), []
    chosen = {"environment": "checked_tree", "features": "hidden_logits_history_drafts", "cost": "bytes"}
    measured = Selection(evaluations=1, examples=4, start=0, llm_shares=[0.1])
    learner = small(
        algorithm, steps=320, num_envs=8, examples=8, max_new_tokens=44, conditioned=conditioned, selection=measured,
        judge=Gap(1.5), arguments={"batch_size": 32}, **chosen,
    )  # fmt: skip
    policy = learner.fit(pool, task, track=rows.append)
    assert policy.judge == Gap(1.5)
    assert all(row["validation_cost"] > 0 for row in rows if "validation_cost" in row)
    assert any("validation_cost" in row for row in rows)
    policy.save(tmp_path)
    found = load_policy(tmp_path, pool)
    assert (found.judge, found.fingerprint) == (Gap(1.5), policy.fingerprint)
    examples = task.examples("validation", 3)
    first, second = (decode(pool, task, examples, one, 0.6, 44) for one in (policy, found))
    assert [one.tokens.tolist() for one in first] == [one.tokens.tolist() for one in second]
    drafted = decode(pool, task, examples, found, 0.0, 44)
    assert [len(one.scores) - len(one.tokens) for one in drafted] == [1, 1, 1]  # ends are decided on


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
def test_values_are_learned_from_returns_of_32_steps_and_nothing_warns_of_it(algorithm):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = train(TwoStates(16), small(algorithm, gamma=0.9), 0, lambda row: None, CPU)
    buffer = trained.replay_buffer
    assert isinstance(buffer, NStepReplayBuffer)
    assert (buffer.n_steps, buffer.gamma) == (32, 0.9)


@pytest.mark.parametrize("algorithm", ["dqn", "qrdqn"])
def test_returns_of_several_steps_are_those_summed_by_hand(algorithm):
    # rewards of 1 to 5 in episodes of 5 steps; the last of 18 steps is the third of its episode
    length, steps, n, gamma = 5, 18, 3, 0.5
    arguments = {"n_steps": n, "learning_starts": 10_000}
    settings = small(algorithm, num_envs=2, steps=2 * steps, gamma=gamma, arguments=arguments)
    np.random.seed(0)  # noqa: NPY002 (Stable-Baselines3 draws from it)
    drawn = train(Counting(2, length), settings, 0, lambda row: None, CPU).replay_buffer.sample(300)
    seen = set()
    for begun, ahead, summed, discount, done in zip(
        drawn.observations, drawn.next_observations, drawn.rewards, drawn.discounts, drawn.dones, strict=True
    ):
        row, episode, time = begun.int().tolist()
        count = min(n, length - time, steps - (length * episode + time))
        assert summed.item() == pytest.approx(sum(gamma**k * (time + 1 + k) for k in range(count)))
        assert discount.item() == gamma**count
        assert ahead.tolist() == [row, episode, time + count]
        assert done.item() == (time + count == length)
        seen.add((row, episode, time))
    assert len(seen) == 2 * steps


def test_a_conditioned_policy_changes_its_mind_where_it_should(tiny_pool):
    class Free(TwoStates):
        price = 0.0

    weights = CostWeights(0.1, 10.0)  # one right answer is worth one LLM token at a weight of 1
    settings = StableBaselines(
        num_envs=64, steps=100_000, net_arch=[32], lr=3e-3, features="hidden", conditioned=weights
    )
    trained = train(Free(), settings, 0, lambda row: None, CPU)
    policy = Sb3Policy.of(trained, "ppo", tiny_pool, "hidden", weights)
    states = observed([[50.0, 0.0], [60.0, 0.0]])
    easy, hard = np.array([policy.at(weight).score(states).numpy() for weight in weights.grid()]).T
    assert easy.min() > 0.5
    assert hard[0] < 0.2
    assert hard[-1] > 0.8
    assert 0.4 < np.exp(np.interp(0.5, hard, np.log(weights.grid()))) < 2.5
    np.testing.assert_allclose(policy.score(states), [easy.mean(), hard.mean()], rtol=1e-5)
    with pytest.raises(ValueError, match=r"not in \[0.1, 10.0\]"):
        policy.at(20)


def test_the_same_seed_gives_the_same_policy_and_leaves_global_generators_alone(tiny_pool):
    def global_states():
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002

    before = global_states()
    prints = []
    for seed in (0, 0, 1):
        trained = train(TwoStates(16), small("ppo"), seed, lambda row: None, CPU)
        prints.append(Sb3Policy.of(trained, "ppo", tiny_pool, "hidden").fingerprint)
    assert prints[0] == prints[1] != prints[2]
    assert global_states() == before


@pytest.mark.parametrize("prior", [0.5, 0.9])
def test_the_actor_begins_at_the_prior(prior, tiny_pool):
    trained = train(TwoStates(16), small("ppo", slm_prior=prior, lr=1e-12), 0, lambda row: None, CPU)
    score = Sb3Policy.of(trained, "ppo", tiny_pool, "hidden").score(
        observed(np.random.default_rng(0).normal(size=(50, 2)))
    )
    np.testing.assert_allclose(score, prior, atol=0.01)


@pytest.mark.parametrize(("schedule", "last"), [("constant", 1.0), ("linear", 0.0)])
@pytest.mark.parametrize("algorithm", ["ppo", "dqn"])
def test_the_learning_rate_falls_as_it_is_told(algorithm, schedule, last, monkeypatch):
    monkeypatch.setattr("agents.sb3.ROWS_REPORTED", 10**9)  # every rollout
    rows = []
    train(TwoStates(16), small(algorithm, steps=4096, lr=1e-3, schedule=schedule), 0, rows.append, CPU)
    rates = [row["train/learning_rate"] / 1e-3 for row in rows if "train/learning_rate" in row]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(last, abs=0.01)
    assert rates[len(rates) // 2] == pytest.approx((1 + last) / 2, abs=0.13)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_logged_rows_are_plain_numbers(algorithm):
    rows = []
    train(TwoStates(16), small(algorithm), 0, rows.append, CPU)
    assert rows[-1]["time/total_timesteps"] >= 600
    assert any("train/loss" in row or "train/value_loss" in row for row in rows)
    assert {"rollout/ep_rew_mean", "rollout/ep_len_mean", "rollout/success_rate"} <= set(rows[-1])
    for row in rows:
        assert row.pop("run") == algorithm
        assert all(type(value) is float for value in row.values())
        json.dumps(row, allow_nan=False)


def test_a_loss_that_is_not_finite_ends_training():
    kept = []
    writer = Rows(kept.append, "ppo")
    writer.write({"train/explained_variance": np.float64("nan"), "n": np.int64(3), "name": "x"}, {}, 1)
    assert kept == [{"run": "ppo", "n": 3.0}]
    with pytest.raises(FloatingPointError, match="train/loss is nan after 9 steps"):
        writer.write({"train/loss": float("nan")}, {}, 9)


def test_the_network_learns_with_its_own_threads_and_the_environment_with_all():
    class Watched(TwoStates):
        def step(self, actions):
            used.add(torch.get_num_threads())
            return super().step(actions)

    used, before = set(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        learning = []
        train(Watched(16), small("ppo"), 0, lambda row: learning.append(torch.get_num_threads()), CPU)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert used == {2}
    assert set(learning) == {1}


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize("conditioned", [None, CostWeights()])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_policies_come_back_from_their_files(algorithm, conditioned, tiny_pool, tmp_path):
    settings = small(algorithm, conditioned=conditioned)
    trained = train(TwoStates(16, width=tiny_pool.slm.width), settings, 0, lambda row: None, CPU)
    policy = Sb3Policy.of(trained, algorithm, tiny_pool, "hidden", conditioned)
    rng = np.random.default_rng(0)
    steps = [
        observed(rng.normal(50, 5, size=(7, tiny_pool.slm.width)), np.full(7, position)) for position in (0, 1, 2, 0)
    ]
    policy.save(tmp_path / "policy")
    loaded = load_policy(tmp_path / "policy", tiny_pool)
    assert isinstance(loaded, Sb3Policy)
    assert sorted(path.name for path in (tmp_path / "policy").iterdir()) == ["policy.json", "policy.safetensors"]
    for step in steps:
        expected = policy.score(step)
        assert expected.shape == (7,)
        assert ((expected >= 0) & (expected <= 1)).all()
        torch.testing.assert_close(loaded.score(step), expected)
    assert loaded.fingerprint == policy.fingerprint
    assert loaded.parameters == policy.parameters > 0
    if conditioned is not None:
        policy.at(0.01).save(tmp_path / "at")
        there = load_policy(tmp_path / "at", tiny_pool)
        torch.testing.assert_close(there.score(steps[-1]), policy.at(0.01).score(steps[-1]))
        assert there.fingerprint != policy.fingerprint


def test_parameters_are_those_of_the_actor(tiny_pool):
    trained = train(TwoStates(16), small("ppo"), 0, lambda row: None, CPU)
    assert Sb3Policy.of(trained, "ppo", tiny_pool, "hidden").parameters == 2 * 16 + 16 + 16 * 2 + 2


@pytest.mark.parametrize("conditioned", [None, CostWeights()])
def test_a_decision_is_charged_every_input_and_one_reading(conditioned, tiny_pool):
    environment = TwoStates(16, width=tiny_pool.slm.width)
    trained = train(environment, small("ppo", conditioned=conditioned), 0, lambda row: None, CPU)
    policy = Sb3Policy.of(trained, "ppo", tiny_pool, "hidden", conditioned)
    rates = [cost.rates([decision_profile(policy)])[0, PASSES] for cost in (MemoryTraffic(), Flops())]
    with FlopCounterMode(display=False) as counted:
        policy.score(observed(np.zeros((1, tiny_pool.slm.width)), np.zeros(1, dtype=int)))
    biases = 16 + 2  # which the counter leaves out
    assert rates[0] == 4 * policy.parameters
    assert rates[1] == counted.get_total_flops() + 2 * biases * (1 if conditioned is None else GRID)
    if conditioned is not None:
        assert rates[1] == 2 * GRID * policy.parameters
        assert Flops().rates([decision_profile(policy.at(0.01))])[0, PASSES] == 2 * policy.parameters


def test_a_recurrent_policy_remembers_its_episode_and_no_other(tiny_pool):
    trained = train(TwoStates(16), small("recurrent_ppo", steps=3000, lr=3e-2), 0, lambda row: None, CPU)
    policy = Sb3Policy.of(trained, "recurrent_ppo", tiny_pool, "hidden")
    seen = torch.tensor([[50.0, 1.0], [60.0, -1.0], [50.0, 0.5]])

    def at(position, rows):
        positions = np.full(len(rows), position)
        return policy.score(Observation(seen[rows], None, positions, np.array(rows), positions))

    together = torch.stack([at(position, [0, 1, 2]) for position in range(3)])
    apart = torch.stack([at(position, [row])[0] for row in (2, 0, 1) for position in range(3)]).view(3, 3).T
    torch.testing.assert_close(together[:, [2, 0, 1]], apart)
    assert (together[1] - together[0]).abs().max() > 1e-4  # the same input a step later: the state differs


def test_states_of_episodes_that_ended_are_forgotten(tiny_pool, task):
    trained = train(TwoStates(16, width=tiny_pool.slm.width), small("recurrent_ppo"), 0, lambda row: None, CPU)
    policy = Sb3Policy.of(trained, "recurrent_ppo", tiny_pool, "hidden")
    kept = []

    class Watched(Policy):
        def score(self, observation):
            kept.append(len(policy._states))
            return policy.score(observation)

        def forget(self, episodes):
            policy.forget(episodes)

    examples = [Example(f"short/{number}", f"{number}+1=", "2", "2") for number in range(7)]
    decode(tiny_pool, task, examples, Watched(), max_new_tokens=8, scheduling=Scheduling(rows=2))
    assert max(kept) == 2
    assert not policy._states


def test_value_scores_order_by_advantage():
    values = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, -1.0], [0.0, 0.2, 1.0]])
    scores = value_probability(values)
    torch.testing.assert_close(scores, torch.sigmoid(torch.tensor([0.5, 0.0, -1.0])))


def test_archives_are_read_only_if_trusted(tiny_pool, tmp_path):
    trained = train(TwoStates(16, width=tiny_pool.slm.width), small("dqn"), 0, lambda row: None, CPU)
    trained.save(tmp_path / "archive.zip")
    with pytest.raises(ValueError, match="trusted=True"):
        Sb3Policy.from_archive(tmp_path / "archive.zip", tiny_pool, "dqn", "hidden")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy = Sb3Policy.from_archive(tmp_path / "archive.zip", tiny_pool, "dqn", "hidden", trusted=True)
    states = observed(np.random.default_rng(0).normal(size=(5, tiny_pool.slm.width)))
    torch.testing.assert_close(policy.score(states), Sb3Policy.of(trained, "dqn", tiny_pool, "hidden").score(states))
    with pytest.raises(ValueError, match="hidden_logits of this pool"):
        Sb3Policy.from_archive(tmp_path / "archive.zip", tiny_pool, "dqn", "hidden_logits", trusted=True)


def test_an_archive_of_plain_stable_baselines_can_be_wrapped_and_saved(tiny_pool, tmp_path):
    from stable_baselines3 import PPO

    bridge = VectorEnvBridge(TwoStates(4, width=tiny_pool.slm.width))
    PPO("MlpPolicy", bridge, n_steps=8, batch_size=32, seed=0, device="cpu").save(tmp_path / "plain.zip")
    policy = Sb3Policy.from_archive(tmp_path / "plain.zip", tiny_pool, "ppo", "hidden", trusted=True)
    policy.save(tmp_path / "policy")
    states = observed(np.random.default_rng(0).normal(size=(5, tiny_pool.slm.width)))
    torch.testing.assert_close(load_policy(tmp_path / "policy", tiny_pool).score(states), policy.score(states))


def test_policies_of_others_and_broken_ones_are_refused(tiny_pool, pools, tmp_path):
    trained = train(TwoStates(16, width=tiny_pool.slm.width), small("ppo"), 0, lambda row: None, CPU)
    policy = Sb3Policy.of(trained, "ppo", tiny_pool, "hidden")
    policy.save(tmp_path)
    with pytest.raises(ValueError, match=r"was trained for .*llama_small.* the pool is .*gpt2_small"):
        load_policy(tmp_path, pools["gpt2"])
    with pytest.raises(ValueError, match="conditioned"):
        policy.at(0.01)
    settings = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(settings | {"arguments": {"net_arch": [8]}}))
    with pytest.raises(ValueError, match="does not fit"):
        load_policy(tmp_path, tiny_pool)
    (tmp_path / "policy.json").write_text(json.dumps(settings | {"algorithm": "os:system"}))
    with pytest.raises(ValueError, match="unknown algorithm 'os:system'"):
        load_policy(tmp_path, tiny_pool)
    (tmp_path / "policy.safetensors").write_bytes(b"none")
    with pytest.raises(ValueError, match="holds no readable policy"):
        load_policy(tmp_path, tiny_pool)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "sac"}, "unknown algorithm 'sac'; choose one of ppo"),
        ({"environment": "maze"}, "unknown environment 'maze'; choose one of tree"),
        ({"cost": "euros"}, "unknown cost 'euros'"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'; choose one of constant, linear"),
        ({"features": "all"}, "unknown features 'all'"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"net_arch": [8, 0]}, "net_arch"),
        ({"cost_weight": float("nan")}, "cost_weight"),
        ({"gamma": 1.5}, "gamma"),
        ({"slm_prior": 1.0}, "slm_prior"),
        ({"conditioned": {"low": 1}}, "CostWeights"),
        ({"start": Imitation()}, "start is of ppo on environment=checked_tree"),
        ({"start": Imitation(), "judge": Gap(1.0)} | CHECKED, "start.teacher.judge .* must be the judge played with"),
        ({"start": Imitation(), "algorithm": "a2c"} | CHECKED, "start is of ppo"),
        ({"arguments": {"nsteps": 5}}, "PPO takes no 'nsteps' here; it takes n_steps"),
        ({"algorithm": "dqn", "arguments": {"gae_lambda": 1}}, "DQN takes no 'gae_lambda'"),
        ({"arguments": {"learning_rate": 1}}, "learning_rate has a place of its own: lr"),
        ({"arguments": {"policy_kwargs": {"lstm_hidden_size": 5}}}, "ActorCriticPolicy takes no 'lstm_hidden_size'"),
    ],
)
def test_bad_settings_are_named_before_anything_runs(settings, message):
    with pytest.raises(ValueError, match=message):
        StableBaselines(**settings)


def test_weights_out_of_range_are_refused():
    for low, high in ((0, 1), (1, 1), (0.1, float("inf")), (float("nan"), 1)):
        with pytest.raises(ValueError, match="conditioned"):
            CostWeights(low, high)


def test_arguments_reach_the_algorithm_and_its_network():
    given = {"n_steps": 8, "policy_kwargs": {"lstm_hidden_size": 5}}
    trained = train(TwoStates(16), small("recurrent_ppo", arguments=given), 0, lambda row: None, CPU)
    assert trained.n_steps == 8
    assert trained.policy.lstm_actor.hidden_size == 5
    assert set(DEFAULTS) == set(ALGORITHMS)


def test_arguments_are_settings_on_the_command_line():
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", overrides=["agent=ppo", "+agent.arguments.clip_range=0.1"])
    assert dict(build(config, "agent").arguments) == {"clip_range": 0.1}


@pytest.mark.parametrize("environment", ENVIRONMENTS)
def test_every_environment_is_made_from_the_learners_examples(environment, pool):
    task = ArithmeticTask()
    made = StableBaselines(environment=environment, num_envs=4, examples=5).make(pool, task, seed=2)
    first = task.training_start(2)
    expected = {task.example("train", first + i).id for i in range(5)}
    _, infos = made.reset(seed=0)
    assert set(infos["example"]) <= expected
    bridge = VectorEnvBridge(made, CostWeights())
    bridge.reset()
    for _ in range(3):
        seen, _, _, _ = bridge.step(np.array([0, 1, 0, 1]))
    assert seen.shape == (4, pool.slm.width + 11 + 1)


def test_the_usual_doors_of_stable_baselines_open():
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    agent = PPO("MlpPolicy", "citer/TokenRouting-v1", n_steps=8, batch_size=8, n_epochs=1, device="cpu", seed=0)
    assert agent.learn(8).num_timesteps == 8
    for name in ("TokenRouting", "TreeRouting"):
        vector = make_vec_env(f"citer/{name}-v1", 4, env_kwargs={"max_new_tokens": 4})
        assert vector.reset().shape == (4, *agent.observation_space.shape)
        assert len(vector.get_images()) == 4
    shortcut = make_vec_env("citer/ShortcutRouting-v1", 2, env_kwargs={"examples": 3})
    assert PPO("MlpPolicy", shortcut, n_steps=8, batch_size=16, device="cpu").learn(16).num_timesteps == 16


def test_a_policy_leaves_the_algorithm_it_was_made_of_free_to_learn(tiny_pool):
    from stable_baselines3 import PPO

    environment = TwoStates(4)
    agent = PPO("MlpPolicy", VectorEnvBridge(environment), n_steps=8, batch_size=32, device="cpu", seed=0)
    policy = Sb3Policy.of(agent, "ppo", tiny_pool, "hidden")
    kept = {name: tensor.clone() for name, tensor in policy.network.state_dict().items()}
    agent.learn(32)
    assert all(parameter.requires_grad for parameter in agent.policy.parameters())
    assert all(torch.equal(tensor, policy.network.state_dict()[name]) for name, tensor in kept.items())
    assert any((tensor != agent.policy.state_dict()[name]).any() for name, tensor in kept.items())
