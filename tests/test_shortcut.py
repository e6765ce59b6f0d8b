import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers.vector import RecordEpisodeStatistics
from stable_baselines3.common.env_checker import check_env as sb3_check_env

from agents.common.rollout import Scheduling
from agents.heuristics import Always
from agents.preferences.collector import PreferenceCollector
from agents.preferences.labels import DROPPED, Labels
from envs.arrays import NO_ACTION, UNKNOWN
from envs.costs import ALL_COSTS, Dollars, MemoryTraffic, Seconds
from envs.decoding.observation import feature_width
from envs.decoding.preference_rule import CASE_3
from envs.decoding.references import References
from envs.environments.rewards import ShortcutReward
from envs.environments.shortcut_routing import ShortcutRoutingEnv, ShortcutRoutingVectorEnv
from envs.environments.token_routing import RoutingEnv
from envs.environments.vector import row_seeds
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example

ID = "citer/ShortcutRouting-v1"
START = 1_000_000


@pytest.fixture(scope="module")
def examples(task):
    return task.examples("train", 12, start=START)


@pytest.fixture(scope="module")
def references(pool, examples):
    return References.read(pool, examples)


@pytest.fixture(scope="module")
def by_hand(pool):
    """Two solutions of six and one tokens; the cases of the first are 1, 2, 3, 3, 3, 1."""
    return References(
        examples=[Example("a", "p", "r", "1"), Example("b", "p", "r", "1")],
        starts=np.array([0, 6, 7]),
        prompt_lengths=np.array([3, 5]),
        features=np.ones((7, feature_width("hidden_logits", pool.slm.width)), dtype=np.float32),
        target=np.array([1, 2, 3, 4, 5, 6, 6]),
        slm_token=np.array([1, 9, 9, 8, 8, 6, 6]),
        llm_token=np.array([1, 2, 9, 9, 8, 0, 6]),
        profiles=pool.profiles,
        outcomes=np.array([-1, -1, 1, 0, -1, -1, -1]),
    )


def play(environment, actions, **reset):
    """The steps of one episode, its reset first."""
    steps = [environment.reset(**reset)]
    for action in actions:
        steps.append(environment.step(int(action)))
        if steps[-1][2] or steps[-1][3]:
            return steps
    raise AssertionError("the episode did not end")


# -- the environment --------------------------------------------------------------------------------------------------


def test_make_and_make_vec_work_without_arguments_and_pass_both_checkers(monkeypatch, pool):
    read, asked = References.read, []

    def read_a_few(pool, examples, max_new_tokens):
        asked.append([example.id for example in examples])
        return read(pool, examples[:5], max_new_tokens)

    monkeypatch.setattr(References, "read", read_a_few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = gym.make(ID)
        check_env(environment.unwrapped)
        sb3_check_env(environment.unwrapped)
    assert environment.unwrapped.observation_space.shape == (pool.slm.width,)
    vector = gym.make_vec(ID, num_envs=64)
    assert vector.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    observations, _ = vector.reset(seed=0)
    assert observations in vector.observation_space
    assert asked[0] == asked[1] == [f"arithmetic/default/train/{START + number}" for number in range(1000)]


@pytest.mark.parametrize("features", ["hidden", "hidden_logits_history"])
def test_vector_environment_goes_through_the_episodes_of_single_ones(references, features):
    settings = {"references": references, "features": features, "cost": MemoryTraffic(), "cost_weight": 0.05}
    count, horizon, seed = 7, 150, 11
    actions = np.random.default_rng(0).integers(0, 2, size=(horizon, count))
    vector = ShortcutRoutingVectorEnv(num_envs=count, **settings)
    observations, infos = vector.reset(seed=seed)
    singles = [ShortcutRoutingEnv(**settings) for _ in range(count)]
    for row, single in enumerate(singles):
        observation, info = single.reset(seed=row_seeds(seed, count)[row])
        assert np.array_equal(observation, observations[row])
        assert all(infos[key][row] == value and infos[f"_{key}"][row] for key, value in info.items())
    ended = 0
    for step in range(horizon):
        observations, rewards, terminated, truncated, infos = vector.step(actions[step])
        for row, single in enumerate(singles):
            observation, reward, terminated_, truncated_, info = single.step(int(actions[step, row]))
            assert rewards[row] == pytest.approx(reward, rel=1e-9)
            assert (terminated[row], truncated[row]) == (terminated_, truncated_)
            seen = infos
            if terminated_:
                ended += 1
                seen = infos["final_info"]
                assert infos["_final_obs"][row]
                assert infos["_final_info"][row]
                assert np.array_equal(infos["final_obs"][row], observation)
                observation, start = single.reset()
                assert all(infos[key][row] == value and infos[f"_{key}"][row] for key, value in start.items())
                assert not infos["_cost"][row]
            elif terminated.any():
                assert infos["final_obs"][row] is None
                assert not infos["_final_info"][row]
                assert not infos["_example"][row]
            assert np.array_equal(observations[row], observation)
            for key, value in info.items():
                assert seen[f"_{key}"][row]
                assert seen[key][row] == pytest.approx(value, rel=1e-9)
    assert ended > 2 * count


def test_the_same_seed_gives_the_same_episodes_and_an_index_the_one_asked(references):
    def episodes(seed):
        environment = ShortcutRoutingEnv(references=references)
        first = environment.reset(seed=seed)[1]["index"]
        return [first, *(environment.reset()[1]["index"] for _ in range(9))]

    assert episodes(3) == episodes(3) != episodes(4)
    environment = ShortcutRoutingEnv(references=references)
    observation, info = environment.reset(seed=0, options={"index": 7})
    assert (info["index"], info["example"]) == (7, references.examples[7].id)
    assert np.array_equal(observation, references.features[references.starts[7], : references.width])
    vector = ShortcutRoutingVectorEnv(num_envs=3, references=references)
    assert vector.reset(options={"indices": [2, None, 5]})[1]["index"][[0, 2]].tolist() == [2, 5]
    assert gym.make(ID, references=references).unwrapped.episodes.references is references


def test_some_rows_can_walk_without_the_others(references):
    settings = {"references": references, "features": "hidden_logits_history", "cost": MemoryTraffic()}
    together, apart = (ShortcutRoutingVectorEnv(num_envs=4, **settings).episodes for _ in range(2))
    for episodes in (together, apart):
        episodes.start(episodes.all_rows, [np.random.default_rng(0)] * 4, [0, 1, 2, 3])
    for _ in range(references.lengths[:4].min()):
        actions = np.array([1, 0, 1, 1])
        whole = together.step(together.all_rows, actions)
        for rows in (np.array([2]), np.array([0, 1, 3])):
            part = apart.step(rows, actions[rows])
            assert part.rewards.tolist() == whole.rewards[rows].tolist()
            assert part.terminated.tolist() == whole.terminated[rows].tolist()
            assert np.array_equal(apart.observe(rows), together.observe(rows))
    assert whole.terminated.any()
    ended = int(np.flatnonzero(whole.terminated)[0])
    assert not together.observe(together.all_rows)[ended].any()
    with pytest.raises(ValueError, match=rf"rows \[{ended}\] have no episode"):
        together.step(np.array([ended]), np.array([0]))


def test_states_do_not_depend_on_actions(references):
    count, horizon = 6, 120
    vectors = [
        ShortcutRoutingVectorEnv(count, references=references, features="hidden_logits_history") for _ in range(3)
    ]
    for vector in vectors:
        vector.reset(seed=5)
    rng = np.random.default_rng(0)
    for _ in range(horizon):
        choices = (np.zeros(count, dtype=int), np.ones(count, dtype=int), rng.integers(0, 2, count))
        slm, llm, splitmix64 = (vector.step(chosen) for vector, chosen in zip(vectors, choices, strict=True))
        for other in (llm, splitmix64):
            assert np.array_equal(other[2], slm[2])
            assert np.array_equal(other[0][:, :-1], slm[0][:, :-1])
        # the last of the history is the tokens since the LLM was chosen
        assert np.array_equal(slm[0][:, -1], slm[0][:, -2])
        assert not llm[0][:, -1].any()


def test_an_episode_ends_with_its_reference_alone(pool, references):
    vector = RecordEpisodeStatistics(ShortcutRoutingVectorEnv(num_envs=1, references=references, case_3="agreement"))
    vector.reset(seed=0, options={"indices": [4]})
    wanted = references.preferred_actions("agreement")[references.starts[4] : references.starts[5]]
    for position, action in enumerate(wanted):
        *_, terminated, truncated, infos = vector.step(np.array([action]))
        assert terminated[0] == (position == len(wanted) - 1)
        assert not truncated[0]
    assert infos["episode"]["l"][0] == len(pool.encode_response(references.examples[4].reference))
    assert infos["episode"]["r"][0] == pytest.approx(1)
    assert infos["final_info"]["agreement"][0] == 1
    assert infos["final_info"]["llm_tokens"][0] == wanted.sum()


# -- cases, preferences, rewards --------------------------------------------------------------------------------------


@torch.no_grad()
def test_cases_and_states_equal_those_of_a_plain_uncached_computation(pool, references):
    for number, example in enumerate(references.examples):
        prompt = pool.encode(example.prompt).tolist()
        reference = [*pool.encode(example.reference, special=False).tolist(), int(pool.end_token)]
        slm, llm = (
            model.network(torch.tensor([prompt + reference[:-1]]), output_hidden_states=True, use_cache=False)
            for model in pool.models
        )
        written = [output.logits[0, len(prompt) - 1 :].argmax(-1).tolist() for output in (slm, llm)]
        part = slice(references.starts[number], references.starts[number + 1])
        assert references.prompt_lengths[number] == len(prompt)
        assert references.target[part].tolist() == reference
        assert [references.slm_token[part].tolist(), references.llm_token[part].tolist()] == written
        assert references.case[part].tolist() == [
            1 if of_slm == target else 2 if of_llm == target else 3
            for target, of_slm, of_llm in zip(reference, *written, strict=True)
        ]
        states = slm.hidden_states[-1][0, len(prompt) - 1 :]
        np.testing.assert_allclose(references.features[part, : references.width], states, atol=1e-4)
    assert set(references.case) == {1, 2, 3}


@pytest.mark.parametrize(
    ("case_3", "third"),
    [
        ("slm", [0, 0, 0]),
        ("llm", [1, 1, 1]),
        ("agreement", [0, 1, 0]),
        ("drop", [NO_ACTION] * 3),
        ("outcome", [0, 1, NO_ACTION]),
    ],
)
def test_rewards_by_hand(by_hand, case_3, third):
    preferred = np.array([0, 1, *third, 0])
    assert by_hand.case.tolist() == [1, 2, 3, 3, 3, 1, 1]
    assert by_hand.preferred_actions(case_3).tolist() == [*preferred, 0]
    environment = ShortcutRoutingEnv(references=by_hand, case_3=case_3, cost_weight=0.25)
    for actions in ([0] * 6, [1] * 6, [0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]):
        steps = play(environment, actions, options={"index": 0})[1:]
        met = preferred == np.array(actions)
        np.testing.assert_allclose([step[1] for step in steps], met / 6 - 0.25 * np.array(actions))
        assert [step[-1]["cost"] for step in steps] == actions
        last = steps[-1][-1]
        assert last["agreement"] == pytest.approx(met.sum() / (preferred != NO_ACTION).sum())
        assert (last["llm_tokens"], last["total_cost"]) == (sum(actions), sum(actions))


def test_given_outcomes_stand_in_for_those_of_the_references(by_hand, references):
    given = np.array([0, 0, 0, 1, 0, -1, -1])
    assert by_hand.preferred_actions("outcome", given).tolist() == [0, 1, 1, 0, 1, 0, 0]
    none_left = np.full(len(references.target), UNKNOWN)
    dropped = references.preferred_actions("drop")
    assert np.array_equal(references.preferred_actions("outcome", none_left), dropped)


@pytest.mark.parametrize("pattern", [[0], [1], [0, 1], [1, 0, 0, 0, 1]], ids=str)
def test_where_responses_follow_the_reference_it_is_token_routing(pool, task, pattern):
    actions = (pattern * 128)[:128]
    drawn = task.example("train", START + 2)
    written = play(RoutingEnv(pool=pool, task=task), actions, options={"example": drawn})
    # what these actions write is made the reference
    example = Example("written", drawn.prompt, written[-1][-1]["text"], drawn.answer)
    assert pool.encode_response(example.reference).tolist() == [step[-1]["token"] for step in written[1:]]
    settings = {"cost": MemoryTraffic(), "features": "hidden_logits_history"}
    routing = RoutingEnv(pool=pool, task=task, reward=ShortcutReward(cost_weight=0.3), **settings)
    routed = play(routing, actions, options={"example": example})
    references = References.read(pool, [example])
    walked = play(ShortcutRoutingEnv(references=references, cost_weight=0.3, **settings), actions)
    assert len(routed) == len(walked)
    np.testing.assert_allclose(walked[0][0], routed[0][0], atol=1e-4)
    assert walked[0][1]["prompt_tokens"] == routed[0][1]["prompt_tokens"]
    for a, b in zip(walked[1:], routed[1:], strict=True):
        np.testing.assert_allclose(a[0], b[0], atol=1e-4)
        assert a[1:4] == (pytest.approx(b[1], rel=1e-9), *b[2:4])
        assert a[-1]["cost"] == pytest.approx(b[-1]["cost"], rel=1e-9)
    assert walked[-1][-1]["llm_tokens"] == routed[-1][-1]["llm_tokens"]
    assert walked[-1][-1]["total_cost"] == pytest.approx(sum(step[-1]["cost"] for step in walked[1:]))
    for cost in (cost for cost in ALL_COSTS if cost.reproducible):
        shortcut, unit = ShortcutRoutingEnv(references=references, cost=cost), cost.per_llm_token(pool.profiles)
        play(shortcut, [1] * 128)  # what the LLM reads in one episode it has to read again in the next
        found = [step[-1]["cost"] * unit for step in play(shortcut, actions)[1:]]
        np.testing.assert_allclose(found, [step[-1][f"cost_{cost.name}"] for step in routed[1:]])


# -- collected preferences --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def columns(pool, task, examples):
    collector = PreferenceCollector(pool, task, examples, scheduling=Scheduling(rows=16))
    return collector.collect(range(0, 12, 2), Labels(), Always(slm=True), 0.5)


def test_references_of_collected_columns_are_those_read_and_prefer_the_same(pool, examples, columns):
    read = References.read(pool, examples[::2])
    shuffled = np.random.default_rng(0).permutation(len(columns["example"]))
    found = References.from_columns({name: values[shuffled] for name, values in columns.items()}, pool, examples)
    assert [example.id for example in found.examples] == [example.id for example in read.examples]
    for name in ("starts", "prompt_lengths", "target", "slm_token", "llm_token", "case"):
        assert np.array_equal(getattr(found, name), getattr(read, name)), name
    np.testing.assert_allclose(found.features, read.features, atol=2e-2)
    assert found.outcomes is not None
    for case_3 in CASE_3:
        labels = Labels(case_3="rollout" if case_3 == "outcome" else case_3).of(columns)
        wanted = np.where(labels == DROPPED, NO_ACTION, 1 - labels)
        assert found.preferred_actions(case_3).tolist() == wanted.tolist()


def test_columns_of_other_examples_or_some_tokens_are_refused(pool, task, examples, columns):
    with pytest.raises(ValueError, match="columns lack features, position"):
        References.from_columns({k: v for k, v in columns.items() if k not in ("features", "position")}, pool, examples)
    with pytest.raises(ValueError, match="columns name examples 0 to 10, 3 were given"):
        References.from_columns(columns, pool, examples[:3])
    third = columns["case"] == 3
    with pytest.raises(ValueError, match=r"the columns hold \d+ of it; give columns of every token"):
        References.from_columns({name: values[third] for name, values in columns.items()}, pool, examples)
    with pytest.raises(ValueError, match="the examples they were collected on"):
        References.from_columns(columns, pool, task.examples("train", 12, start=START + 50))
    damaged = columns | {"features": np.full_like(columns["features"], np.nan)}
    with pytest.raises(ValueError, match=rf"example {examples[0].id}: its features are not finite"):
        References.from_columns(damaged, pool, examples)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost_weight": float("nan")}, "cost_weight must be a finite number >= 0, is nan"),
        ({"cost_weight": -1.0}, "cost_weight must be a finite number >= 0"),
        ({"case_3": "rollout"}, "unknown case_3 'rollout'; choose one of slm, llm, agreement, drop, outcome"),
        ({"case_3": "outcome"}, "case_3 outcome needs outcomes: give one for each token"),
        ({"case_3": "outcome", "outcomes": np.zeros(3)}, r"outcomes must be \d+ numbers, one for each token"),
        ({"features": "logits"}, "unknown features 'logits'"),
        ({"cost": Seconds()}, "cost seconds is measured"),
        ({"cost": Dollars(read=[0, 0], written=[0, 0])}, "price above 0"),
        ({"task": ArithmeticTask()}, "one or the other"),
    ],
)
def test_bad_settings_are_named(references, settings, message):
    with pytest.raises(ValueError, match=message):
        ShortcutRoutingEnv(references=references, **settings)
    with pytest.raises(ValueError, match=message):
        ShortcutRoutingVectorEnv(num_envs=2, references=references, **settings)


def test_references_that_cannot_be_walked_are_named(pool, task, examples):
    with pytest.raises(ValueError, match=rf"example {examples[0].id} has a reference of \d+ tokens"):
        ShortcutRoutingEnv(pool=pool, task=task, examples=3, max_new_tokens=5)
    end = pool.tokenizer.convert_ids_to_tokens(pool.end_token)
    with pytest.raises(ValueError, match="task/early: its reference holds an end-of-sequence token before its end"):
        References.read(pool, [Example("task/early", "A question?", f"half {end} whole", "1")])
    with pytest.raises(ValueError, match=r"the shortcut compares two models, the pool has .*; choose two"):
        References.read(ModelPool([*pool.models, pool.models[1]]), examples)
    with pytest.raises(ValueError, match="at least one"):
        References.read(pool, [])
    with pytest.raises(ValueError, match="unknown split 'training'"):
        ShortcutRoutingEnv(split="training")
    with pytest.raises(ValueError, match="0 from 1000000 on"):
        ShortcutRoutingEnv(examples=0)


def test_arrays_that_do_not_belong_together_are_named(by_hand):
    whole = {name: getattr(by_hand, name) for name in References.__dataclass_fields__}
    for change, message in (
        ({"slm_token": np.zeros(4, dtype=int)}, "slm_token has length 4, it must be 7 for 2 examples"),
        ({"starts": np.array([0, 7, 7])}, "starts"),
        ({"outcomes": np.full(7, 2)}, "outcomes must be 7 numbers"),
        ({"features": np.full_like(by_hand.features, np.inf)}, "example a: its features are not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            References(**whole | change)


def test_bad_actions_seeds_and_options_are_named(references):
    environment = ShortcutRoutingEnv(references=references)
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        environment.step(0)
    steps = references.lengths[0]
    play(environment, [0] * steps, options={"index": 0})
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        environment.step(0)
    environment.reset(seed=0)
    with pytest.raises(ValueError, match=r"actions must be 1 integers in 0\.\.1"):
        environment.step(2)
    with pytest.raises(ValueError, match=r"no example 12; .* index in 0\.\.11"):
        environment.reset(options={"index": 12})
    with pytest.raises(ValueError, match="unknown options example; an episode is chosen by 'index'"):
        environment.reset(options={"example": references.examples[0]})
    vector = ShortcutRoutingVectorEnv(num_envs=3, references=references)
    with pytest.raises(ValueError, match="2 seeds for 3 environments"):
        vector.reset(seed=[1, 2])
    with pytest.raises(ValueError, match="1 indices for 3 environments"):
        vector.reset(options={"indices": [1]})
    with pytest.raises(ValueError, match="num_envs"):
        ShortcutRoutingVectorEnv(num_envs=0, references=references)
