"""Every wrapper of Gymnasium that fits a Box observation and a Discrete action goes around every environment."""

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import wrappers as single
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import vector

import envs
from envs.decoding.references import References
from envs.environments.checked_routing import CheckedRoutingEnv, CheckedRoutingVectorEnv
from envs.environments.shortcut_routing import ShortcutRoutingEnv, ShortcutRoutingVectorEnv
from envs.environments.token_routing import RoutingEnv, RoutingVectorEnv
from envs.environments.tree_routing import TreeRoutingEnv, TreeRoutingVectorEnv
from envs.tasks.task import FirstExamples

IDS = ("citer/TokenRouting-v1", "citer/TreeRouting-v1", "citer/ShortcutRouting-v1", "citer/CheckedRouting-v0")
LOW, HIGH = np.float32(-1), np.float32(1)


def reversed_action(env):
    return single.TransformAction(env, lambda action: env.action_space.n - 1 - action, env.action_space)


SINGLE = {
    "DelayObservation": lambda env: single.DelayObservation(env, delay=1),
    "DtypeObservation": lambda env: single.DtypeObservation(env, np.float64),
    "FlattenObservation": single.FlattenObservation,
    "FrameStackObservation": lambda env: single.FrameStackObservation(env, 2),
    "TransformObservation": lambda env: single.TransformObservation(env, lambda seen: seen / 2, env.observation_space),
    "MaxAndSkipObservation": lambda env: single.MaxAndSkipObservation(env, skip=2),
    "NormalizeObservation": single.NormalizeObservation,
    "ReshapeObservation": lambda env: single.ReshapeObservation(env, (2, env.observation_space.shape[0] // 2)),
    "RescaleObservation": lambda env: single.RescaleObservation(env, LOW, HIGH),
    "TimeAwareObservation": lambda env: single.TimeAwareObservation(single.TimeLimit(env, 100)),
    "TransformAction": reversed_action,
    "StickyAction": lambda env: single.StickyAction(env, 0.25),
    "RepeatAction": lambda env: single.RepeatAction(env, 2),
    "ClipReward": lambda env: single.ClipReward(env, 0.0, 1.0),
    "TransformReward": lambda env: single.TransformReward(env, lambda reward: 2 * reward),
    "NormalizeReward": single.NormalizeReward,
    "TimeLimit": lambda env: single.TimeLimit(env, 5),
    "Autoreset": single.Autoreset,
    "PassiveEnvChecker": single.PassiveEnvChecker,
    "OrderEnforcing": single.OrderEnforcing,
    "RecordEpisodeStatistics": single.RecordEpisodeStatistics,
    "AddRenderObservation": lambda env: single.AddRenderObservation(env, render_only=False),
    "RenderCollection": single.RenderCollection,
    "AddWhiteNoise": lambda env: single.AddWhiteNoise(env, probability_of_noise_per_pixel=0.5),
    "ObstructView": lambda env: single.ObstructView(env, obstructed_pixels_ratio=0.5, obstruction_width=20),
    "ArrayConversion": lambda env: single.ArrayConversion(env, np, np),
    "NumpyToTorch": single.NumpyToTorch,
}
VECTOR = {
    "TransformObservation": lambda env: vector.TransformObservation(
        env, lambda seen: seen / 2, env.observation_space, env.single_observation_space
    ),
    "VectorizeTransformObservation": lambda env: vector.VectorizeTransformObservation(
        env, single.DtypeObservation, dtype=np.float64
    ),
    "VectorizeTransformAction": lambda env: vector.VectorizeTransformAction(
        env, single.TransformAction, func=lambda action: 1 - action, action_space=env.single_action_space
    ),
    "VectorizeTransformReward": lambda env: vector.VectorizeTransformReward(
        env, single.ClipReward, min_reward=0.0, max_reward=1.0
    ),
    "DictInfoToList": vector.DictInfoToList,
    "FlattenObservation": vector.FlattenObservation,
    "ReshapeObservation": lambda env: vector.ReshapeObservation(env, (2, env.single_observation_space.shape[0] // 2)),
    "RescaleObservation": lambda env: vector.RescaleObservation(env, LOW, HIGH),
    "DtypeObservation": lambda env: vector.DtypeObservation(env, np.float64),
    "NormalizeObservation": vector.NormalizeObservation,
    "TransformAction": lambda env: vector.TransformAction(env, lambda actions: 1 - actions, env.action_space),
    "TransformReward": lambda env: vector.TransformReward(env, lambda rewards: 2 * rewards),
    "ClipReward": lambda env: vector.ClipReward(env, 0.0, 1.0),
    "NormalizeReward": vector.NormalizeReward,
    "RecordEpisodeStatistics": vector.RecordEpisodeStatistics,
}
NEXT_STEP = {
    *("TransformObservation", "FlattenObservation", "ReshapeObservation", "RescaleObservation", "DtypeObservation"),
    *("NormalizeObservation", "VectorizeTransformObservation"),
}
"""What Gymnasium itself refuses in same-step mode, where it would leave the last observations as they are."""
VECTOR_UNFIT = {
    "ArrayConversion": "DLPack takes no booleans and strings, which the infos of vector environments hold",
    "NumpyToTorch": "as ArrayConversion",
}
PIXELS = "it is for pictures as observations"
BOX_ACTIONS = "it is for Box actions, ours are Discrete"
UNFIT = {
    "AtariPreprocessing": "it is for Atari games",
    "DiscretizeObservation": "it counts every cell of a grid over all dimensions, of which a hidden state has too many",
    "FilterObservation": "it is for Dict observations",
    "GrayscaleObservation": PIXELS,
    "ResizeObservation": PIXELS,
    "ClipAction": BOX_ACTIONS,
    "DiscretizeAction": BOX_ACTIONS,
    "RescaleAction": BOX_ACTIONS,
    "HumanRendering": "it opens a window, and needs pygame",
    "RecordVideo": "it needs moviepy; `tests/test_contract.py` runs it where that is there",
    "JaxToNumpy": "it needs jax",
    "JaxToTorch": "it needs jax",
}


@pytest.fixture(scope="module")
def makers(pool, task):
    """Makers of a single and a vector environment by id."""
    problems = FirstExamples(task, 4)
    decoded = {"pool": pool, "task": problems, "max_new_tokens": 12}
    walked = {**decoded, "memory": 2**24}
    references = References.read(pool, problems.examples("train"))
    return {
        IDS[0]: (partial(RoutingEnv, **decoded), partial(RoutingVectorEnv, 3, **decoded)),
        IDS[1]: (partial(TreeRoutingEnv, **walked), partial(TreeRoutingVectorEnv, 3, **walked)),
        IDS[2]: (
            partial(ShortcutRoutingEnv, references=references),
            partial(ShortcutRoutingVectorEnv, 3, references=references),
        ),
        IDS[3]: (
            partial(CheckedRoutingEnv, **decoded, features="hidden"),
            partial(CheckedRoutingVectorEnv, 3, **decoded, features="hidden"),
        ),
    }  # fmt: skip


def test_every_wrapper_and_every_id_has_its_place():
    names = {name for name in (*single.__all__, *vector.__all__) if name != "vector"}
    assert names == {*SINGLE, *VECTOR, *UNFIT}
    assert not {*SINGLE, *VECTOR} & {*UNFIT}
    assert set(vector.__all__) - {*UNFIT} == {*VECTOR, *VECTOR_UNFIT}
    assert {spec for spec in gym.registry if spec.startswith("citer/")} == {*IDS}


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("env_id", IDS)
def test_single_environments_take_the_wrapper(env_id, name, makers):
    pictures = name in ("AddRenderObservation", "RenderCollection", "AddWhiteNoise", "ObstructView")
    environment = makers[env_id][0](render_mode="rgb_array" if pictures else None)
    if name in ("AddWhiteNoise", "ObstructView"):
        environment = single.AddRenderObservation(environment, render_only=True)
    wrapped = SINGLE[name](environment)
    observation, _ = wrapped.reset(seed=1)
    wrapped.action_space.seed(1)
    ended = 0
    for _ in range(200):
        if ended:
            break
        assert wrapped.observation_space.contains(
            np.asarray(observation, wrapped.observation_space.dtype)
        ) or isinstance(wrapped.observation_space, gym.spaces.Dict)
        observation, reward, terminated, truncated, _ = wrapped.step(int(wrapped.action_space.sample()))
        assert np.isfinite(float(reward))
        if terminated or truncated:
            ended += 1
            if name != "Autoreset":
                observation, _ = wrapped.reset()
    assert ended


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("name", VECTOR)
@pytest.mark.parametrize("env_id", IDS)
def test_vector_environments_take_the_wrapper(env_id, name, mode, makers):
    environment = makers[env_id][1](autoreset_mode=mode)
    if name in NEXT_STEP and mode is AutoresetMode.SAME_STEP:
        with pytest.raises(ValueError, match="NEXT_STEP"):
            VECTOR[name](environment)
        return
    wrapped = VECTOR[name](environment)
    wrapped.reset(seed=1)
    wrapped.action_space.seed(1)
    for _ in range(20):
        observations, rewards, *_ = wrapped.step(wrapped.action_space.sample())
        assert len(observations) == len(rewards) == 3
        assert np.isfinite(np.asarray(rewards)).all()


@pytest.mark.parametrize("env_id", IDS)
def test_a_registered_id_repeats(env_id, makers):
    def played(environment):
        environment.reset(seed=5)
        environment.action_space.seed(5)
        return [environment.step(int(environment.action_space.sample()))[:4] for _ in range(8)]

    first, second = (played(makers[env_id][0]()) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert envs.__all__
