import importlib
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import RecordEpisodeStatistics
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import envs
from envs.costs import Dollars, MemoryTraffic, Seconds
from envs.decoding.sampling import Sampling
from envs.environments.rewards import OutcomeReward, ShortcutReward, Transition
from envs.environments.shortcut_routing import ShortcutRoutingEnv, ShortcutRoutingVectorEnv
from envs.environments.token_routing import RoutingEnv, RoutingVectorEnv
from envs.environments.tree_routing import TreeRoutingEnv, TreeRoutingVectorEnv
from envs.environments.vector import row_seeds
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask

ID = "citer/TokenRouting-v1"


@pytest.fixture(scope="module")
def pool():
    return embedded_pool()


def play(environment, seed, choose, episodes=1):
    """Observations, rewards and infos of whole episodes; later ones follow without a seed."""
    history = []
    for number in range(episodes):
        observation, info = environment.reset(seed=seed if number == 0 else None)
        steps, done = [(observation, info)], False
        while not done:
            observation, reward, terminated, truncated, info = environment.step(choose(len(steps) - 1))
            steps.append((observation, reward, terminated, truncated, info))
            done = terminated or truncated
        history.append(steps)
    return history


def without_seconds(info):
    return {key: value for key, value in info.items() if "seconds" not in key}


def test_make_works_without_arguments_and_passes_both_checkers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = gym.make(ID)
        check_env(environment.unwrapped)
        sb3_check_env(environment.unwrapped)
    assert environment.unwrapped.observation_space.shape == (embedded_pool().slm.width,)
    assert environment.unwrapped.action_space == gym.spaces.Discrete(2)


def test_make_vec_works_without_arguments():
    environment = gym.make_vec(ID, num_envs=3)
    assert environment.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, _ = environment.reset(seed=0)
    assert observations.shape == (3, embedded_pool().slm.width)
    assert observations in environment.observation_space


def test_registration_imports_nothing_heavy():
    import subprocess
    import sys

    code = "import sys, envs; dir(envs); sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'datasets')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert envs.__file__ is not None


def test_public_names_are_those_of_the_modules_that_define_them():
    assert sorted(envs._MODULES) == sorted(envs.__all__) == sorted(set(dir(envs)) & set(envs.__all__))
    for name in envs.__all__:
        defined = getattr(envs, name)
        assert defined is getattr(importlib.import_module(envs._MODULES[name]), name)
        assert defined.__module__ == envs._MODULES[name]
    with pytest.raises(AttributeError, match="module 'envs' has no attribute 'RoutingEnvironment'; its names are"):
        envs.RoutingEnvironment  # noqa: B018


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0, top_p=0.9)])
@pytest.mark.parametrize("reward", [OutcomeReward(cost_weight=0.1), ShortcutReward()])
def test_vector_environment_goes_through_the_episodes_of_single_ones(pool, sampling, reward):
    settings = {"pool": pool, "sampling": sampling, "reward": reward, "cost": MemoryTraffic(), "max_new_tokens": 60}
    count, horizon, seed = 3, 130, 11
    actions = np.random.default_rng(0).integers(0, 2, size=(horizon, count))
    vector = RoutingVectorEnv(num_envs=count, **settings)
    observations, infos = vector.reset(seed=seed)
    singles = [RoutingEnv(**settings) for _ in range(count)]
    for row, single in enumerate(singles):
        observation, info = single.reset(seed=row_seeds(seed, count)[row])
        np.testing.assert_allclose(observation, observations[row], atol=1e-4)
        assert info["example"] == infos["example"][row]
    ended = 0
    for step in range(horizon):
        observations, rewards, terminated, truncated, infos = vector.step(actions[step])
        for row, single in enumerate(singles):
            observation, reward_, terminated_, truncated_, info = single.step(int(actions[step, row]))
            assert rewards[row] == pytest.approx(reward_, rel=1e-6)
            assert (terminated[row], truncated[row]) == (terminated_, truncated_)
            seen = infos
            if terminated_ or truncated_:
                ended += 1
                seen = infos["final_info"]
                np.testing.assert_allclose(infos["final_obs"][row], observation, atol=1e-4)
                observation, start = single.reset()
                assert infos["example"][row] == start["example"]
            np.testing.assert_allclose(observations[row], observation, atol=1e-4)
            for key, value in without_seconds(info).items():
                assert seen[f"_{key}"][row]
                assert seen[key][row] == pytest.approx(value) if isinstance(value, float) else seen[key][row] == value
    assert ended > count


def test_the_same_seed_gives_the_same_episodes(pool):
    def choose(step):
        return step % 3 == 0

    first, second = (play(RoutingEnv(pool=pool), 7, choose, episodes=2) for _ in range(2))
    other = play(RoutingEnv(pool=pool), 8, choose)
    for a, b in zip(first, second, strict=True):
        assert [step[-1].get("token") for step in a] == [step[-1].get("token") for step in b]
        assert a[-1][-1]["text"] == b[-1][-1]["text"]
        assert all(np.array_equal(x[0], y[0]) for x, y in zip(a, b, strict=True))
    assert first[0][0][1]["example"] != first[1][0][1]["example"]
    assert first[0][0][1]["example"] != other[0][0][1]["example"]


def test_the_info_of_an_episode_adds_up(pool):
    (steps,) = play(RoutingEnv(pool=pool, reward=OutcomeReward(cost_weight=0.25)), 3, lambda step: step % 2)
    last = steps[-1][-1]
    assert last["slm_tokens"] + last["llm_tokens"] == len(steps) - 1
    assert last["llm_tokens"] == sum(step[-1]["model"] for step in steps[1:])
    for unit in ("bytes", "flops", "llm_tokens", "dollars"):
        total = sum(step[-1][f"cost_{unit}"] for step in steps)
        assert last[f"total_cost_{unit}"] == pytest.approx(total)
    assert last["total_cost_seconds"] > 0
    returned = sum(step[1] for step in steps[1:])
    assert returned == pytest.approx(last["correct"] - 0.25 * last["llm_tokens"])
    task, tokens = ArithmeticTask(), np.array([step[-1]["token"] for step in steps[1:]])
    assert pool.decode(tokens) == last["text"]
    example = task.example("train", int(steps[0][1]["example"].rsplit("/", 1)[1]))
    assert task.is_correct(example, last["text"]) == last["correct"]


def test_a_cost_of_the_users_own_shows_in_the_info(pool):
    environment = RoutingEnv(pool=pool, cost=Dollars(read=[0, 0], written=[0, 3e6]))
    environment.reset(seed=0)
    _, reward, *_, info = environment.step(1)
    assert info["cost_dollars"] == pytest.approx(3)
    assert reward == pytest.approx(-0.01)
    with pytest.raises(ValueError, match="price above 0"):
        RoutingEnv(pool=pool, cost=Dollars(read=[0, 0], written=[0, 0]))


def test_truncation_and_termination_stay_apart(pool):
    cut = play(RoutingEnv(pool=pool, max_new_tokens=5), 0, lambda step: 0)[0][-1]
    whole = play(RoutingEnv(pool=pool), 0, lambda step: 0)[0][-1]
    assert (cut[2], cut[3]) == (False, True)
    assert (whole[2], whole[3]) == (True, False)
    assert not whole[0].any()
    assert cut[0].any()


def test_a_given_example_is_the_one_asked(pool):
    example = ArithmeticTask("easy").example("test", 5)
    environment = RoutingEnv(pool=pool, render_mode="ansi")
    _, info = environment.reset(seed=0, options={"example": example})
    assert info["example"] == example.id
    assert environment.render() == example.prompt


def test_render_colours_the_tokens_of_the_llm_alone(pool):
    environment = RoutingEnv(pool=pool, render_mode="ansi")
    environment.reset(seed=1)
    environment.step(0)
    plain = environment.render()
    environment.step(1)
    assert "\033[" not in plain
    assert environment.render().startswith(plain + "\033[1;31m")


def test_record_episode_statistics_count_what_happened(pool):
    environment = RecordEpisodeStatistics(RoutingEnv(pool=pool))
    (steps,) = play(environment, row_seeds(2, 2)[0], lambda step: 1)
    assert steps[-1][-1]["episode"]["l"] == len(steps) - 1
    vector = VectorRecordEpisodeStatistics(RoutingVectorEnv(num_envs=2, pool=pool))
    vector.reset(seed=2)
    for count in range(1, 129):
        *_, infos = vector.step(np.ones(2, dtype=int))
        if "episode" in infos and infos["_episode"][0]:
            assert infos["episode"]["l"][0] == count == len(steps) - 1
            assert infos["episode"]["r"][0] == pytest.approx(steps[-1][-1]["episode"]["r"])
            break
    else:
        pytest.fail("the first row never ended")


def test_shortcut_reward_pays_for_agreement_along_the_reference_alone():
    def one(**changes):
        values = {"actions": 0, "tokens": 5, "slm_tokens": 5, "reference_tokens": 5} | changes
        arrays = {key: np.array([value]) for key, value in values.items()}
        return ShortcutReward()(
            Transition(
                **arrays,
                reference_lengths=np.array([4]),
                costs=np.array([1.0]),
                ended=np.array([False]),
                correct=np.array([False]),
            )
        )[0]

    assert one() == 0.25
    assert one(actions=1) == 0, "the SLM would have written it too"
    assert one(actions=1, slm_tokens=3) == 0.25
    assert one(tokens=3, slm_tokens=3) == 0
    assert one(reference_tokens=-1, tokens=-1, slm_tokens=-1) == 0, "off the reference"


def test_shortcut_reward_along_a_reference_equals_the_share_of_agreements(pool):
    environment = RoutingEnv(pool=pool, reward=ShortcutReward(cost_weight=0.0))
    environment.reset(seed=4)
    reference = pool.encode(environment.episodes.examples[0].reference, special=False)
    total, agreed = 0.0, 0
    for target in reference:
        _, reward, terminated, truncated, info = environment.step(0)
        total += reward
        if info["token"] != target or terminated or truncated:
            break
        agreed += 1
    assert total == pytest.approx(agreed / (len(reference) + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "training"}, "unknown split 'training'"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"render_mode": "human"}, "unknown render_mode 'human'"),
        ({"capacity": 10_000}, "capacity 10000"),
    ],
)
def test_bad_settings_are_named(pool, settings, message):
    with pytest.raises(ValueError, match=message):
        RoutingEnv(pool=pool, **settings)
    with pytest.raises(ValueError, match=message):
        RoutingVectorEnv(num_envs=2, pool=pool, **settings)


@pytest.mark.parametrize("kind", [RoutingEnv, TreeRoutingEnv, ShortcutRoutingEnv])
def test_unknown_settings_are_named_and_those_there_are(kind):
    vector = {RoutingEnv: RoutingVectorEnv, TreeRoutingEnv: TreeRoutingVectorEnv}.get(kind, ShortcutRoutingVectorEnv)
    for make in (kind, vector):
        with pytest.raises(TypeError, match=r"unknown settings cost_wieght, pol; \w+Settings has pool, task, cost, .*"):
            make(cost_wieght=1.0, max_new_tokens=5, pol=None)


def test_unknown_options_are_refused_rather_than_passed_over(pool):
    single, vector = RoutingEnv(pool=pool), RoutingVectorEnv(num_envs=2, pool=pool)
    with pytest.raises(ValueError, match="unknown options exmple; an episode is chosen by 'example' or 'index'"):
        single.reset(options={"exmple": None, "index": 3})
    with pytest.raises(ValueError, match="unknown options example; an episode is chosen by 'examples'"):
        vector.reset(options={"example": ArithmeticTask().example("test", 0)})
    with pytest.raises(ValueError, match=r"options\['examples'\] holds 1 examples for 2 environments"):
        vector.reset(options={"examples": [None]})
    assert vector.reset(seed=0, options={})[1]["example"].tolist() == vector.reset(seed=0)[1]["example"].tolist()


def test_some_rows_can_step_without_the_others(pool):
    together, apart = (RoutingVectorEnv(num_envs=3, pool=pool, max_new_tokens=20).episodes for _ in range(2))
    generators = [[np.random.default_rng(row) for row in range(3)] for _ in range(2)]
    together.start(together.all_rows, generators[0], [None] * 3)
    apart.start(np.array([0, 2]), [generators[1][0], generators[1][2]], [None] * 2)
    apart.start(np.array([1]), [generators[1][1]], [None])
    actions = np.random.default_rng(1).integers(0, 2, (4, 3))
    for chosen in actions:
        whole = together.step(together.all_rows, chosen)
        for rows in (np.array([1]), np.array([0, 2])):
            part = apart.step(rows, chosen[rows])
            np.testing.assert_allclose(part.rewards, whole.rewards[rows])
            assert part.infos["token"].tolist() == whole.infos["token"][rows].tolist()
    np.testing.assert_allclose(apart.observe(apart.all_rows), together.observe(together.all_rows), atol=1e-4)


def test_bad_actions_seeds_and_weights_are_named(pool):
    environment = RoutingEnv(pool=pool)
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be 1 integers in 0\.\.1"):
        environment.step(2)
    with pytest.raises(ValueError, match="2 seeds for 3 environments"):
        RoutingVectorEnv(num_envs=3, pool=pool).reset(seed=[1, 2])
    with pytest.raises(ValueError, match="num_envs"):
        RoutingVectorEnv(num_envs=0, pool=pool)
    with pytest.raises(ValueError, match="cost_weight"):
        OutcomeReward(cost_weight=float("nan"))


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)])
def test_measured_costs_of_the_steps_sum_to_the_total_less_the_reading_of_the_prompt(pool, sampling):
    settings = {"pool": pool, "cost": Seconds(), "sampling": sampling, "reward": OutcomeReward(1.0)}
    (steps,) = play(RoutingEnv(**settings, max_new_tokens=12), 3, lambda step: step % 3 == 1)
    costs = [step[-1]["cost_seconds"] for step in steps]
    assert min(costs) > 0
    assert sum(costs) == pytest.approx(steps[-1][-1]["total_cost_seconds"])
    unit = Seconds().per_llm_token(pool.profiles)
    assert sum(step[-1]["cost"] for step in steps[1:]) * unit == pytest.approx(sum(costs[1:]))
    vector = RoutingVectorEnv(num_envs=3, **settings, max_new_tokens=6)
    _, infos = vector.reset(seed=0)
    sums, ended = infos["cost_seconds"].copy(), 0
    for step in range(14):
        *_, infos = vector.step(np.full(3, step % 2))
        for row in range(3):
            if "final_info" in infos and infos["_final_info"][row]:
                ended += 1
                final = infos["final_info"]
                assert sums[row] + final["cost_seconds"][row] == pytest.approx(final["total_cost_seconds"][row])
                sums[row] = 0
            sums[row] += infos["cost_seconds"][row]
    assert ended >= 6


def test_neighbouring_seeds_share_no_rows_and_seeds_are_integers_of_any_kind(pool):
    assert not set(row_seeds(0, 256)) & set(row_seeds(1, 256))
    assert row_seeds(5, 3) == row_seeds(np.int64(5), 8)[:3]
    assert len(set(row_seeds(5, 256))) == 256
    vector = RoutingVectorEnv(num_envs=3, pool=pool, max_new_tokens=2)
    first = vector.reset(seed=0)[1]["example"].tolist()
    assert not set(first) & set(vector.reset(seed=1)[1]["example"].tolist())
    assert vector.reset(seed=np.int64(0))[1]["example"].tolist() == first
    single = RoutingEnv(pool=pool, max_new_tokens=2)
    assert single.reset(seed=np.int64(3))[1]["example"] == single.reset(seed=3)[1]["example"]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        vector.reset(seed=-1)


def test_a_row_whose_seed_is_none_keeps_its_generator(pool):
    vector, other = (RoutingVectorEnv(num_envs=2, pool=pool, max_new_tokens=2) for _ in range(2))
    vector.reset(seed=[1, 2])
    other.reset(seed=[1, 2])
    renewed, going_on = vector.reset(seed=[7, None])[1]["example"], other.reset()[1]["example"]
    assert renewed[1] == going_on[1]
    assert renewed[0] == vector.reset(seed=[7, 0])[1]["example"][0] != going_on[0]


def test_by_default_a_token_of_the_middle_model_is_cheaper_than_one_of_the_largest(pools):
    environment = RoutingEnv(pool=pools["three"], max_new_tokens=8)
    costs = []
    for action in range(3):
        environment.reset(seed=0)
        costs.append(environment.step(action)[-1]["cost"])
    _, middle, largest = pools["three"].profiles
    assert costs == [0, pytest.approx(middle.parameters / largest.parameters), 1]
    assert costs[1] < 1


def test_a_pool_in_the_wrong_order_is_warned_of_and_the_warning_can_be_silenced(pool):
    turned = ModelPool(pool.models[::-1])
    for make in (RoutingEnv, TreeRoutingEnv):
        with pytest.warns(envs.ModelOrderWarning, match="embedded/llm stands before embedded/slm and is larger"):
            make(pool=turned, max_new_tokens=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RoutingEnv(pool=pool, max_new_tokens=4)
        RoutingEnv(pool=ModelPool([pool.slm, pool.slm]), max_new_tokens=4)
        warnings.simplefilter("ignore", envs.ModelOrderWarning)
        RoutingEnv(pool=turned, max_new_tokens=4)
