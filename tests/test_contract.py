import copy
import gc
import pickle
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from envs.costs import MemoryTraffic
from envs.decoding.judges import Gap
from envs.decoding.references import References
from envs.decoding.sampling import Sampling
from envs.environments.checked_routing import CheckedRoutingEnv, CheckedRoutingVectorEnv
from envs.environments.picture import COLOURS, HEIGHT, WIDTH, picture, wrapped
from envs.environments.render import PROMPT, STANDS, Stretch
from envs.environments.shortcut_routing import ShortcutRoutingEnv, ShortcutRoutingVectorEnv
from envs.environments.token_routing import RoutingEnv, RoutingVectorEnv
from envs.environments.tree_routing import TreeRoutingEnv, TreeRoutingVectorEnv
from envs.environments.vector import row_seeds
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import FirstExamples

ROWS = 3
KINDS = {
    "token": (RoutingEnv, RoutingVectorEnv),
    "tree": (TreeRoutingEnv, TreeRoutingVectorEnv),
    "shortcut": (ShortcutRoutingEnv, ShortcutRoutingVectorEnv),
    "checked": (CheckedRoutingEnv, CheckedRoutingVectorEnv),
    "checked_tree": (CheckedRoutingEnv, CheckedRoutingVectorEnv),
}


@pytest.fixture(scope="module")
def settings(tiny_pool, pool):
    few = FirstExamples(ArithmeticTask("easy"), 12)
    live = {"pool": tiny_pool, "task": Short(few), "max_new_tokens": 14}
    references = References.read(pool, few.examples("train", 6), max_new_tokens=128)
    tree = PrefixTree(tiny_pool, live["task"], live["max_new_tokens"], memory=2**24)
    checked = {"judge": Gap(3.0)}
    return {
        "token": live,
        "tree": live,
        "shortcut": {"references": references},
        "checked": live | checked,
        "checked_tree": checked | {"tree": tree, "max_new_tokens": live["max_new_tokens"]},
    }


class Short(FirstExamples):
    """Problems of a few letters, so that tiny models with few positions hold them."""

    def __init__(self, task):
        super().__init__(task, task.count)

    def example(self, split, index):
        whole = super().example(split, index)
        return replace(whole, prompt=whole.prompt[-40:])


def same(ours, theirs):
    """The values of infos that have a mask, of one row after the other."""
    assert {key for key in ours if not key.startswith("_")} == {key for key in theirs if not key.startswith("_")}
    for key, value in theirs.items():
        if key.startswith("_"):
            np.testing.assert_array_equal(ours[key], value, err_msg=key)
        elif isinstance(value, dict):
            same(ours[key], value)
        elif "seconds" not in key:
            for row in np.flatnonzero(theirs[f"_{key}"]):
                if key == "final_obs" or isinstance(value[row], float):
                    np.testing.assert_allclose(ours[key][row], value[row], atol=1e-4, rtol=1e-6, err_msg=key)
                else:
                    assert ours[key][row] == value[row], key


def compare(ours, theirs):
    np.testing.assert_allclose(ours[0], theirs[0], atol=1e-4)
    for mine, other in zip(ours[1:-1], theirs[1:-1], strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-6)
    same(ours[-1], theirs[-1])


@pytest.mark.parametrize("mode", ["NextStep", "same_step", AutoresetMode.DISABLED])
@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_environment_is_gymnasiums_over_single_ones_in_every_mode(settings, kind, mode):
    single, vector = KINDS[kind]
    rows = vector(ROWS, autoreset_mode=mode, **settings[kind])
    chosen = rows.metadata["autoreset_mode"]
    singles = SyncVectorEnv([partial(single, **settings[kind])] * ROWS, autoreset_mode=chosen)
    assert "autoreset_mode" not in vector.metadata
    compare(rows.reset(seed=5), singles.reset(seed=row_seeds(5, ROWS)))
    rng, ends = np.random.default_rng(0), 0
    for _ in range(100 if kind == "shortcut" else 45):  # the other ones' episodes have 14 steps at most
        actions = rng.integers(0, 2, ROWS)
        ours, theirs = rows.step(actions), singles.step(actions)
        compare(ours, theirs)
        over = ours[2] | ours[3]
        ends += over.sum()
        if over.any() and chosen is AutoresetMode.DISABLED:
            with pytest.raises(gym.error.ResetNeeded, match="call reset"):
                rows.step(actions)
            compare(rows.reset(options={"reset_mask": over}), singles.reset(options={"reset_mask": over}))
    assert ends > ROWS


def test_autoreset_modes_are_named(settings):
    with pytest.raises(ValueError, match="unknown autoreset_mode 'later'; choose one of NextStep, SameStep, Disabled"):
        RoutingVectorEnv(2, autoreset_mode="later", **settings["token"])
    environment = gym.make_vec(
        "citer/TokenRouting-v1", num_envs=2, autoreset_mode=AutoresetMode.NEXT_STEP, **settings["token"]
    )
    assert environment.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    environment.reset(seed=0)
    assert environment.step(np.array([0, 1]))[0].shape == environment.observation_space.shape


def test_a_mask_resets_its_rows_with_their_seeds_and_leaves_the_others(settings):
    environment = ShortcutRoutingVectorEnv(ROWS, **settings["shortcut"])
    with pytest.raises(gym.error.ResetNeeded, match="call reset for all rows first"):
        environment.reset(options={"reset_mask": np.array([True, False, False])})
    environment.reset(seed=0)
    before = environment.step(np.zeros(ROWS, dtype=int))[0]
    mask = np.array([False, True, False])
    after, infos = environment.reset(seed=[None, 9, 9], options={"reset_mask": mask, "indices": [None, 4, None]})
    np.testing.assert_array_equal(after[[0, 2]], before[[0, 2]])
    assert infos["index"][1] == 4
    assert infos["_index"].tolist() == mask.tolist()
    for wrong in (np.array([0, 1, 0]), np.zeros(ROWS, dtype=bool), np.ones(2, dtype=bool)):
        with pytest.raises(ValueError, match=r"options\['reset_mask'\] must hold 3 booleans, one of them true"):
            environment.reset(options={"reset_mask": wrong})


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_without_an_episode_asks_for_a_reset(settings, kind):
    environment = KINDS[kind][0](**settings[kind])
    with pytest.raises(gym.error.ResetNeeded, match="call reset before the next step"):
        environment.step(0)
    environment.reset(seed=0)
    while not any(environment.step(0)[2:4]):
        pass
    with pytest.raises(gym.error.ResetNeeded, match="call reset before the next step"):
        environment.step(0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_environment_gives_back_its_memory_and_says_that_it_is_closed(settings, kind):
    for environment in (KINDS[kind][0](**settings[kind]), KINDS[kind][1](2, **settings[kind])):
        environment.reset(seed=0)
        environment.step(np.ones(environment.action_space.shape, dtype=int))
        held = [weakref.ref(environment.episodes)]
        if kind == "token":
            session = environment.episodes.session
            held += [weakref.ref(layer.keys) for cache in session._caches for layer in cache.layers]
            del session
        environment.close()
        environment.close()
        gc.collect()
        assert [ref() for ref in held] == [None] * len(held)
        for call in (environment.reset, partial(environment.step, 0), environment.render):
            with pytest.raises(gym.error.ClosedEnvironmentError, match="closed and has given back its memory"):
                call()


NAMED = {"models": ["embedded/slm", "embedded/llm"], "task": "arithmetic-easy", "cost": "bytes"}
LENGTHS = {
    "TokenRouting": {"max_new_tokens": 6},
    "TreeRouting": {"max_new_tokens": 6},
    "ShortcutRouting": {"examples": 3},
    "CheckedRouting": {"max_new_tokens": 6, "judge": "first_disagreement"},
}
VERSIONS = {name: "v0" if name == "CheckedRouting" else "v1" for name in LENGTHS}


@pytest.mark.parametrize("name", LENGTHS)
def test_an_environment_made_by_names_is_made_again_from_its_spec_as_json(name):
    arguments = NAMED | LENGTHS[name] | ({} if name == "ShortcutRouting" else {"reward": "outcome"})
    first = gym.make(f"citer/{name}-{VERSIONS[name]}", **arguments)
    again = gym.make(gym.envs.registration.EnvSpec.from_json(first.spec.to_json()))
    assert again.spec == first.spec
    assert first.unwrapped.episodes.cost == MemoryTraffic()
    for action, seed in ((None, 4), (1, None), (0, None)):
        ours, theirs = (e.reset(seed=seed) if action is None else e.step(action) for e in (first, again))
        assert np.array_equal(ours[0], theirs[0])
        assert ours[1:] == theirs[1:]
    assert gym.make_vec(f"citer/{name}-{VERSIONS[name]}", num_envs=2, **arguments).spec.to_json()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "algebra"}, ValueError, "unknown task 'algebra'; choose one of arithmetic, arithmetic-easy"),
        ({"cost": "byte"}, ValueError, "unknown cost 'byte'; choose one of bytes, flops, llm_tokens, seconds, dollars"),
        (
            {"pool": "embedded"},
            TypeError,
            r"pool must be a ModelPool, or give models=\[names\]; it is 'embedded', a str",
        ),
        ({"task": 3}, TypeError, "task must be a Task or one of arithmetic, .*; it is 3, a int"),
        ({"models": "embedded/slm"}, TypeError, "models must hold names of models, SLM first, is 'embedded/slm'"),
        ({"models": ["embedded/slm", "no/where/at/all"]}, ValueError, "unknown model 'no/where/at/all'"),
        ({"max_new_tokens": "12"}, TypeError, "max_new_tokens must be an Integral; it is '12', a str"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens must be an Integral; it is True, a bool"),
    ],
)
@pytest.mark.parametrize("name", LENGTHS)
def test_wrong_arguments_are_named_when_the_environment_is_built(name, arguments, error, message):
    with pytest.raises(error, match=message):
        gym.make(f"citer/{name}-{VERSIONS[name]}", **arguments)


def test_a_pool_beside_names_and_an_unknown_reward_are_refused(tiny_pool):
    with pytest.raises(ValueError, match="models are named beside a pool"):
        RoutingEnv(pool=tiny_pool, models=["embedded/slm", "embedded/llm"])
    with pytest.raises(ValueError, match="unknown reward 'result'; choose one of outcome, shortcut"):
        RoutingEnv(reward="result")


def test_ids_of_the_first_version_are_named_with_their_successors():
    with pytest.raises(gym.error.DeprecatedEnv, match="citer/TokenRouting-v1"):
        gym.make("citer/TokenRouting-v0")


def test_the_module_before_an_id_spares_the_import():
    # a new Python has to find the environment; that its models are loaded, which takes seconds, is seen in this one
    code = "import gymnasium; gymnasium.make('envs:citer/TokenRouting-v1', task=3)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=100)
    assert "TypeError: task must be a Task or one of arithmetic" in done.stderr
    assert gym.make("envs:citer/TokenRouting-v1").spec.id == "citer/TokenRouting-v1"


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_of_one_size_and_show_who_wrote(settings, kind):
    single, vector = KINDS[kind]
    environment = single(render_mode="rgb_array", **settings[kind])
    assert "rgb_array" in environment.metadata["render_modes"]
    environment.reset(seed=0)
    frames = [environment.render()]
    for action in (0, 1, 1):
        environment.step(action)
        frames.append(environment.render())
    assert {(frame.shape, frame.dtype) for frame in frames} == {((HEIGHT, WIDTH, 3), np.dtype(np.uint8))}
    red = [int((np.abs(frame.astype(int) - COLOURS[1]).sum(-1) < 30).sum()) for frame in frames]
    assert red[0] == red[1] == 0 < red[2]
    assert (frames[0] != frames[1]).any()
    rows = vector(2, render_mode="rgb_array", **settings[kind])
    rows.reset(seed=row_seeds(0, 2))
    assert [frame.shape for frame in rows.render()] == [(HEIGHT, WIDTH, 3)] * 2
    assert RoutingEnv(**settings["token"]).render() is None


def test_text_that_is_too_long_for_a_picture_loses_its_beginning():
    stretches = [Stretch(PROMPT, "ab\nc"), Stretch(1, "d"), Stretch(0, "x", True), Stretch(STANDS, ""), Stretch(1, "f")]
    assert wrapped(stretches, columns=3) == [
        [Stretch(PROMPT, "a"), Stretch(PROMPT, "b")],
        [Stretch(PROMPT, "c"), Stretch(1, "d"), Stretch(0, "x", True), Stretch(STANDS, "")],
        [Stretch(1, "f")],
    ]
    end = "\n".join(map(str, range(40)))
    drawn = picture([Stretch(0, end)])
    np.testing.assert_array_equal(drawn, picture([Stretch(0, "x\n" * 50 + end)]))
    assert (drawn != picture([Stretch(0, end[:-1])])).any()


def test_record_video_takes_the_frames(settings, tmp_path):
    pytest.importorskip("moviepy")
    environment = gym.wrappers.RecordVideo(RoutingEnv(render_mode="rgb_array", **settings["token"]), str(tmp_path))
    environment.reset(seed=0)
    while not any(environment.step(1)[2:4]):
        pass
    environment.close()
    assert list(tmp_path.glob("*.mp4"))


@pytest.fixture
def mixed(tiny_pool):
    """A task of four prompts, the third too long beside 20 new tokens in 128 positions."""

    class Mixed(FirstExamples):
        def example(self, split, index):
            return replace(super().example(split, index), prompt="abc " * (30 if index == 2 else 3 + index))

    return {"pool": tiny_pool, "task": Mixed(ArithmeticTask("easy"), 4), "max_new_tokens": 20}


@pytest.mark.parametrize("kind", ["token", "tree"])
def test_a_prompt_that_is_too_long_is_an_error_at_once_or_skipped_or_cut(mixed, kind):
    single, vector = KINDS[kind]
    with pytest.raises(ValueError, match="1 of 4 train examples have prompts longer than the 108 tokens"):
        single(**mixed)
    skipping = vector(4, on_too_long="skip", **mixed)
    drawn = {name for seed in range(8) for name in skipping.reset(seed=seed)[1]["example"]}
    assert sorted(int(name[-1]) for name in drawn) == [0, 1, 3]
    with pytest.raises(ValueError, match="prompt of 120 tokens"):
        skipping.reset(options={"indices": [2, 0, 0, 0]})
    cutting = single(on_too_long="truncate", **mixed)
    assert cutting.reset(options={"index": 2})[1]["prompt_tokens"] == 108
    end = mixed["pool"].encode("abc " * 30)[-108:]
    np.testing.assert_array_equal(cutting.episodes.session._tokens[0, :108], end)
    assert cutting.step(1)[1] <= 0
    with pytest.raises(ValueError, match="unknown on_too_long 'cut'; choose one of error, skip, truncate"):
        single(on_too_long="cut", **mixed)
    with pytest.raises(ValueError, match="3 of 3 train examples have prompts longer than the 2 tokens"):
        single(on_too_long="skip", **mixed | {"max_new_tokens": 126, "task": FirstExamples(ArithmeticTask(), 3)})


def test_an_empty_split_is_named(tiny_pool):
    class Empty(FirstExamples):
        def size(self, split):
            return 0 if split == "test" else 4

    with pytest.raises(ValueError, match="task arithmetic has no test examples; choose another split"):
        RoutingEnv(pool=tiny_pool, task=Empty(ArithmeticTask(), 4), split="test", max_new_tokens=9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sequential_order_comes_by_each_example_once_a_pass(settings, kind):
    rows = KINDS[kind][1](ROWS, order="sequential", autoreset_mode="SameStep", **settings[kind])
    count = 6 if kind == "shortcut" else 12
    for _ in range(2):  # a reset with a seed begins anew
        _, infos = rows.reset(seed=1)
        started = infos["example"].tolist()
        assert [int(name.rsplit("/")[-1]) for name in started] == [0, 1, 2]
        while len(started) < 2 * count:
            infos = rows.step(np.zeros(ROWS, dtype=int))[-1]
            started += infos["example"][infos["_example"]].tolist() if "example" in infos else []
        for begin in (0, count):
            assert len(set(started[begin : begin + count])) == count
    single = KINDS[kind][0](order="sequential", **settings[kind])
    names = [single.reset(seed=0 if number == 0 else None)[1]["example"] for number in range(count)]
    assert names == started[:count]
    assert single.reset(options={"index": 4})[1]["example"] == names[4]
    with pytest.raises(ValueError, match=rf"0\.\.{count - 1}"):
        single.reset(options={"index": count})
    with pytest.raises(ValueError, match="unknown order 'sorted'; choose one of random, sequential"):
        KINDS[kind][0](order="sorted", **settings[kind])


@pytest.mark.parametrize("kind", ["token", "tree"])
def test_the_infos_say_what_the_slm_would_have_written(settings, kind):
    single, other = (KINDS[kind][0](**settings[kind]) for _ in range(2))
    single.reset(seed=3)
    other.reset(seed=3)
    assert single.step(0)[-1]["slm_token"] == (info := other.step(1)[-1])["slm_token"]
    assert single.step(0)[-1]["slm_token"] in range(len(settings[kind]["pool"].tokenizer))
    assert info["model"] == 1


def numbers_alone(state):
    if isinstance(state, dict):
        return all(numbers_alone(value) for value in state.values())
    return all(map(numbers_alone, state)) if isinstance(state, list) else state.dtype.kind in "biuf"


def replayed(environment, actions):
    """What steps gave, each with its observation; a reset behind every end."""
    steps = []
    for action in actions:
        observation, reward, terminated, truncated, info = environment.step(action)
        info = {key: value for key, value in info.items() if "seconds" not in key}
        steps.append((observation, reward, terminated, truncated, info))
        if np.ndim(terminated) == 0 and (terminated or truncated):
            steps.append((environment.reset()[0], 0.0, False, False, {}))
    return steps


def same_steps(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine[0], other[0], atol=1e-4)
        for a, b in zip(mine[1:4], other[1:4], strict=True):
            np.testing.assert_allclose(a, b, atol=1e-9)
        if np.ndim(mine[1]):
            same(mine[4], other[4])
        else:
            ours_info, theirs_info = dict(mine[4]), dict(other[4])
            assert ours_info.pop("taken_back", ()) == theirs_info.pop("taken_back", ())
            if "text" not in ours_info:
                assert ours_info == pytest.approx(theirs_info)
            assert ours_info.keys() == theirs_info.keys()


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_restored_and_replayed_gives_the_same_steps(settings, kind, sampling):
    more = {"sampling": sampling} if kind in ("token", "checked") else {}
    environment, other = (KINDS[kind][0](**settings[kind] | more) for _ in range(2))
    with pytest.raises(gym.error.ResetNeeded, match="call reset first"):
        environment.get_state()
    environment.reset(seed=2)
    actions = np.random.default_rng(3).integers(0, 2, 40).tolist()
    replayed(environment, actions[:5])
    state = environment.get_state()
    assert numbers_alone(state)
    first = replayed(environment, actions[5:])
    environment.set_state(state)
    same_steps(replayed(environment, actions[5:]), first)
    other.set_state(state)
    same_steps(replayed(other, actions[5:]), first)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_take_the_states_of_other_rows(settings, kind):
    rows = KINDS[kind][1](ROWS, **settings[kind])
    rows.reset(seed=4)
    actions = np.random.default_rng(1).integers(0, 2, (30, ROWS))
    replayed(rows, actions[:4])
    state = rows.get_state(np.array([0, 2]))
    rows.set_state(state, np.array([2, 1]))
    for step in replayed(rows, np.repeat(actions[4:, :1], ROWS, axis=1)):
        np.testing.assert_allclose(step[0][2], step[0][0], atol=1e-4)
        assert step[1][2] == pytest.approx(step[1][0])
    with pytest.raises(ValueError, match="the state is of 2 rows, to be restored in 3"):
        rows.set_state(state)


@pytest.mark.parametrize("vector", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_and_pickles_go_on_as_the_environment_does(settings, kind, vector):
    made = KINDS[kind][1](2, **settings[kind]) if vector else KINDS[kind][0](**settings[kind])
    fresh = pickle.loads(pickle.dumps(made))
    same_steps([(*fresh.reset(seed=1)[:1], 0, 0, 0, {})], [(*made.reset(seed=1)[:1], 0, 0, 0, {})])
    actions = np.random.default_rng(2).integers(0, 2, (40, 2))
    actions = list(actions) if vector else actions[:, 0].tolist()
    replayed(made, actions[:4])
    copied, sent = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    assert copied.observation_space == sent.observation_space == made.observation_space
    expected = replayed(made, actions[4:])
    same_steps(replayed(copied, actions[4:]), expected)
    same_steps(replayed(sent, actions[4:]), expected)
