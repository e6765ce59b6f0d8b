import json
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.wrappers import RecordEpisodeStatistics
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from stable_baselines3.common.env_checker import check_env as sb3_check_env

import envs.storage
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.arrays import UNKNOWN
from envs.costs import MemoryTraffic, Seconds
from envs.decoding.judges import GAP, RANK
from envs.decoding.observation import FEATURES, feature_width
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.environments.rewards import OutcomeReward, ShortcutReward
from envs.environments.token_routing import RoutingEnv, RoutingVectorEnv
from envs.environments.tree_routing import TreeRoutingEnv, TreeRoutingVectorEnv
from envs.environments.vector import row_seeds
from envs.models.language_model import LanguageModel
from envs.prefix_tree.expander import TreeExpander
from envs.prefix_tree.tree import GOING_ON, PrefixTree
from envs.prefix_tree.tree_session import TreeSession, observation_at
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example, FirstExamples, Task

ID = "citer/TreeRouting-v1"
LIVE = "citer/TokenRouting-v1"
MAX_NEW = 10
SETTINGS = {"max_new_tokens": MAX_NEW, "reward": OutcomeReward(cost_weight=0.1)}


class Sums(Task):
    """Short prompts for the models of the tests; right is an answer of an even length, or an odd one."""

    name = "sums"

    def size(self, split):
        return 40 if split == "train" else 3

    def example(self, split, index):
        if not 0 <= index < self.size(split):
            raise IndexError(index)
        return Example(f"sums/{split}/{index}", f"{split}: {index} + {index} =", f" {2 * index}", str(index))

    def is_correct(self, example, response):
        return len(response) % 2 == int(example.answer) % 2


@pytest.fixture(scope="module")
def few():
    return FirstExamples(Sums(), 3)


@pytest.fixture
def passes(monkeypatch):
    """The passes that models make: which model, how many rows."""
    made, feed = [], LanguageModel.feed

    def counted(self, cache, rows, chunks, every_position=False):
        made.append((self.name, len(rows)))
        return feed(self, cache, rows, chunks, every_position)

    monkeypatch.setattr(LanguageModel, "feed", counted)
    return made


def small(pool, task, states):
    """A tree with room for so many states."""
    return PrefixTree(pool, task, MAX_NEW, memory=states * PrefixTree(pool, task, MAX_NEW).node_bytes)


def actions_for(pool, steps, rows, seed=0):
    return np.random.default_rng(seed).integers(0, len(pool), size=(steps, rows))


def play(vector, actions, seed=5):
    return [vector.reset(seed=seed), *(vector.step(chosen) for chosen in actions)]


def play_singly(environment, actions, seed=5):
    """What happens when an environment is reset at every end."""
    happened = [environment.reset(seed=seed)]
    for action in actions:
        happened.append(environment.step(int(action)))
        if happened[-1][2] or happened[-1][3]:
            happened.append(environment.reset())
    return happened


def assert_same(one, other):
    """Whatever environments return is the same, but for seconds."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if "seconds" not in key:
                assert_same(one[key], other[key])
    elif isinstance(one, list | tuple) or (isinstance(one, np.ndarray) and one.dtype == object):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, float | np.ndarray):
        # observations are float32, all else is exact but for the order of sums
        single = getattr(one, "dtype", None) == np.float32
        np.testing.assert_allclose(other, one, rtol=1e-5 if single else 1e-9, atol=1e-4 if single else 0)
    else:
        assert one == other


def assert_right(session):
    """Rows of a walk stand where their responses lead, and the tree knows their prompts."""
    for row, prompt in enumerate(session._prompts):
        nodes = session.nodes(row)
        assert session.tree.root(prompt) == nodes[0]
        assert np.array_equal(session.tree.written(nodes), session.response(row))
        assert np.array_equal(session.tree.depths[nodes], np.arange(len(nodes)))


# -- the environments -------------------------------------------------------------------------------------------------


def test_make_and_make_vec_work_without_arguments_and_pass_both_checkers(pool):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        environment = gym.make(ID)
        check_env(environment.unwrapped)
        sb3_check_env(environment.unwrapped)
    assert environment.unwrapped.observation_space.shape == (pool.slm.width,)
    vector = gym.make_vec(ID, num_envs=3)
    observations, _ = vector.reset(seed=0)
    assert observations in vector.observation_space


@pytest.mark.parametrize(
    ("name", "features", "reward"),
    [
        ("llama", "hidden", OutcomeReward(cost_weight=0.1)),
        ("gpt2", "hidden_logits", ShortcutReward()),
        ("three", "hidden_logits_history", OutcomeReward()),
        ("embedded", "hidden_logits_history", ShortcutReward(cost_weight=0.2)),
    ],
)
def test_a_tree_goes_through_the_episodes_of_live_decoding(pools, pool, few, passes, name, features, reward):
    pool = pools.get(name, pool)
    task = FirstExamples(ArithmeticTask("easy"), 2) if name == "embedded" else few
    longest = 31 if name == "embedded" else MAX_NEW
    settings = {"max_new_tokens": longest, "features": features, "reward": reward, "cost": MemoryTraffic()}
    rows, tree = 5, PrefixTree(pool, task, longest)
    actions = actions_for(pool, longest + 25, rows)
    live = play(RoutingVectorEnv(rows, pool=pool, task=task, **settings), actions)
    first = play(TreeRoutingVectorEnv(rows, tree=tree, **settings), actions)
    assert_same(live, first)
    known = len(tree)
    passes.clear()
    again = TreeRoutingVectorEnv(rows, tree=tree, **settings)
    assert_same(live, play(again, actions))
    single = gym.make(ID, tree=tree, **settings)
    assert single.unwrapped.tree is tree
    alone = play_singly(single, actions[:, 2], seed=row_seeds(5, rows)[2])
    assert not passes, "all that was asked is known"
    assert len(tree) == known
    assert_right(again.episodes.session)
    assert_same(
        play_singly(gym.make(LIVE, pool=pool, task=task, **settings), actions[:, 2], seed=row_seeds(5, rows)[2]), alone
    )
    terminated, truncated = (sum(step[kind].sum() for step in live[1:]) for kind in (2, 3))
    assert terminated, "what ends both ways was compared"
    assert truncated
    total = next(step[-1]["final_info"] for step in live[1:] if "final_info" in step[-1])
    assert (total["total_cost_seconds"][total["_total_cost_seconds"]] > 0).all()
    totals = [step[-1]["final_info"]["total_cost_seconds"] for step in first[1:] if "final_info" in step[-1]]
    assert not np.any(totals)


def test_an_empty_tree_that_is_given_is_the_one_that_grows(tiny_pool, few):
    tree = PrefixTree(tiny_pool, few, MAX_NEW)
    single, vector = TreeRoutingEnv(tree=tree, **SETTINGS), gym.make_vec(ID, num_envs=2, tree=tree, **SETTINGS)
    assert single.tree is single.episodes.session.tree is vector.unwrapped.episodes.session.tree is tree
    single.reset(seed=0)
    assert len(tree) == 1


def test_record_episode_statistics_count_what_happened(tiny_pool, few):
    environment = RecordEpisodeStatistics(gym.make(ID, pool=tiny_pool, task=few, **SETTINGS))
    steps = play_singly(environment, np.ones(2 * MAX_NEW))
    last = next(position for position, step in enumerate(steps) if len(step) == 5 and (step[2] or step[3]))
    assert steps[last][-1]["episode"]["l"] == last == steps[last][-1]["llm_tokens"]
    assert steps[last][-1]["episode"]["r"] == pytest.approx(sum(step[1] for step in steps[1 : last + 1]))


def test_render_shows_what_live_decoding_shows(tiny_pool, few):
    shown = []
    for make in (RoutingEnv, TreeRoutingEnv):
        environment = make(pool=tiny_pool, task=few, render_mode="ansi", **SETTINGS)
        environment.reset(seed=1)
        environment.step(1)
        shown.append(environment.render())
    assert shown[0] == shown[1]


# -- states -----------------------------------------------------------------------------------------------------------


def test_where_models_write_the_same_token_their_actions_share_a_child(pool, passes):
    task = FirstExamples(ArithmeticTask("hard"), 1)
    prompt = [pool.encode(task.example("train", 0).prompt)]
    row, trees = np.array([0]), [PrefixTree(pool, task, 14) for _ in range(2)]
    for tree in trees:
        session = TreeSession(tree, 1)
        session.start(row, prompt)
        for _ in range(14):
            session.step(row, np.array([0]))
    path = session.nodes(0)[:-1]
    explorer = TreeExpander(trees[1], 1)
    explorer.read_along(row, session.nodes(0)[-1:], 1)
    agreed = trees[1].tokens[path, 0] == trees[1].tokens[path, 1]
    assert 0 < agreed.sum() < len(path)
    assert np.array_equal(trees[1].children[path, 0] == trees[1].children[path, 1], agreed)
    # the first tree does not know what the LLM writes: it is asked, and the SLM reads nothing anew
    for expected, tree in zip((agreed.sum(), 0, 0), (trees[0], trees[0], trees[1]), strict=True):
        passes.clear()
        asked = TreeSession(tree, 1)
        asked.start(row, prompt)
        for alike in agreed:
            asked.step(row, np.array([int(alike)]))
        assert sum(name == pool.names[1] for name, _ in passes) == expected
        assert len(tree) == 15
        assert np.array_equal(asked.writers(0), agreed)


def test_opinions_agree_with_the_choice_that_is_known(pool, monkeypatch):
    """Another pass may find another of two equally likely tokens first; no draft is refused to be written again."""
    task = FirstExamples(ArithmeticTask("hard"), 1)
    row, tree = np.array([0]), PrefixTree(pool, task, 14)
    session = TreeSession(tree, 1)
    session.start(row, [pool.encode(task.example("train", 0).prompt)])
    for _ in range(14):
        session.step(row, np.array([0]))
    path, end = session.nodes(0)[:-1], session.nodes(0)[-1:]
    explorer = TreeExpander(tree, 1)
    explorer.read_along(row, end, 1)
    own = tree.tokens[path, 1] == tree.tokens[path, 0]
    assert 0 < own.sum() < len(path)
    read = explorer.session.read_with_opinions

    def contradicting(*arguments):
        choices, thought = read(*arguments)
        thought[:, GAP], thought[:, RANK] = 0.01, (thought[:, RANK] == 0).float()
        return choices, thought

    monkeypatch.setattr(explorer.session, "read_with_opinions", contradicting)
    explorer.read_along(row, end, 1, opinions=True)
    np.testing.assert_array_equal(tree.opinions[path, 0, RANK] == 0, own)
    np.testing.assert_array_equal(tree.opinions[path, 0, GAP], np.where(own, 0, np.float32(0.01)))


def test_tokens_learned_before_or_after_a_child_share_it(pools, few):
    tree = PrefixTree(pools["three"], few, MAX_NEW)
    features = np.ones((2, tree.features(np.zeros(1, dtype=int)).shape[1]), dtype=np.float32)
    root = tree.add_root(np.array([4, 5]), features[0], 7)
    tree.learn_tokens(np.array([root]), np.array([1]), np.array([8]))
    ends = np.zeros(2, dtype=np.int8)
    parents, slm = np.array([root, root]), np.array([9, 9])
    seven, eight = tree.add(parents, np.array([0, 2]), np.array([7, 8]), ends, features, slm)
    assert tree.children[root].tolist() == [seven, eight, eight]
    child = tree.add(np.array([eight]), np.array([1]), np.array([3]), ends[:1], features[:1], slm[:1])[0]
    tree.learn_tokens(np.array([eight, eight]), np.array([2, 0]), np.array([3, 9]))
    assert tree.children[eight].tolist() == [UNKNOWN, child, child]
    assert tree.written(tree.path(child)).tolist() == [8, 3]


@pytest.mark.parametrize(("name", "alike"), [("three", True), ("three", False), ("embedded", False)])
def test_rows_on_the_same_example_make_each_state_once(pools, pool, few, passes, name, alike):
    pool, rows = pools.get(name, pool), np.arange(8)
    tree = PrefixTree(pool, few, MAX_NEW)
    session = TreeSession(tree, 8)
    session.start(rows, [pool.encode("1 + 1 =")] * 8)
    choices = actions_for(pool, MAX_NEW, 8)
    active = rows
    for chosen in choices:
        step = session.step(active, np.full(len(active), chosen[0]) if alike else chosen[active])
        active = active[~(step.terminated | step.truncated)]
        if not len(active):
            break
    prefixes = {tuple(session.response(row)[:end]) for row in rows for end in range(len(session.response(row)) + 1)}
    assert len(tree) == len(prefixes)
    assert not alike or {count for _, count in passes} == {1}, "in one row for all"
    assert_right(session)


@pytest.mark.parametrize("name", ["llama", "gpt2", "three"])
def test_tokens_read_along_a_path_are_those_of_asking_at_every_node(pools, few, passes, name):
    pool = pools[name]
    tree, rows = PrefixTree(pool, few, MAX_NEW), np.arange(6)
    explorer, rng = TreeExpander(tree, len(rows)), np.random.default_rng(3)
    roots = explorer.roots(rows, [pool.encode(few.example("train", row % 3).prompt) for row in rows])
    nodes = roots.copy()
    for step in range(MAX_NEW):  # rows stop here and there: at the root, within, at the end
        going = np.flatnonzero((tree.ends[nodes] == GOING_ON) & (step < rows * 3))
        if len(going):
            actions = np.where(going % 2, len(pool) - 1, rng.integers(0, len(pool), len(going)))
            nodes[going] = explorer.step(going, nodes[going], actions)
    assert (tree.ends[nodes] != GOING_ON).any()
    assert (tree.ends[nodes] == GOING_ON).sum() > 1
    for model in range(1, len(pool)):
        explorer.read_along(rows[::-1], nodes, model)
    passes.clear()
    explorer.read_along(rows, nodes, len(pool) - 1)
    explorer.read_along(rows, nodes, 0)
    assert not passes, "all is known"
    session, row = Session(pool, 1, MAX_NEW), np.array([0])
    for node in nodes:
        path = tree.path(node)
        for length, before in enumerate(path[:-1]):
            response = tree.written(path)[:length]
            for model in range(len(pool)):
                session.start(row, [tree.prompts[int(tree.prompt_numbers[node])]], responses=[response])
                assert session.step(row, np.array([model])).tokens == tree.tokens[before, model]
    # the rows were overwritten, and go on from wherever they are sent
    for sent in (nodes, roots, nodes[::-1]):
        going = np.flatnonzero(tree.ends[sent] == GOING_ON)
        reached = explorer.step(going, sent[going], np.full(len(going), 1))
        for node in reached:
            if tree.ends[node] == GOING_ON:
                path = tree.path(node)
                session.start(row, [tree.prompts[int(tree.prompt_numbers[node])]], responses=[tree.written(path)])
                seen = session.observe(row)
                np.testing.assert_allclose(tree.features(path[-1:])[0, : pool.slm.width], seen.hidden[0], atol=1e-4)
                assert tree.tokens[node, 0] == session.step(row, np.array([0])).tokens


def test_a_known_token_stays_where_another_pass_would_choose_otherwise(tiny_pool, few):
    """Logits that are all but equal come out one way or the other."""
    tree, row = PrefixTree(tiny_pool, few, MAX_NEW), np.array([0])
    session, live = TreeSession(tree, 1), Session(tiny_pool, 1, MAX_NEW)
    prompt = tiny_pool.encode("2 + 2 =")
    session.start(row, [prompt])
    root = session.nodes(0)[0]
    other = next(token for token in range(2, 90) if token not in {*tree.tokens[root], *tiny_pool.end_tokens})
    tree.tokens[root, 0] = other
    assert session.step(row, row).tokens == other
    live.start(row, [prompt], responses=[np.array([other])])
    np.testing.assert_allclose(session.observe(row).hidden, live.observe(row).hidden, atol=1e-4)
    for _ in range(3):
        assert session.step(row, np.array([1])).tokens == live.step(row, np.array([1])).tokens
    assert_right(session)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_saved_tree_is_walked_without_a_pass_and_grows_on(pools, few, passes, tmp_path):
    pool, path = pools["three"], tmp_path / "folder" / "tree.safetensors"
    tree = PrefixTree(pool, few, MAX_NEW)
    PrefixTree(pool, few, MAX_NEW).save(path)
    assert len(PrefixTree(pool, few, MAX_NEW, path=path)) == 0
    old, new = actions_for(pool, 40, 4), actions_for(pool, 40, 4, seed=1)
    live = [play(RoutingVectorEnv(4, pool=pool, task=few, **SETTINGS), actions) for actions in (old, new)]
    assert_same(live[0], play(TreeRoutingVectorEnv(4, tree=tree, **SETTINGS), old))
    tree.save(path)
    passes.clear()
    loaded = PrefixTree(pool, few, MAX_NEW, path=path)
    assert len(loaded) == len(tree)
    assert_same(live[0], play(TreeRoutingVectorEnv(4, tree=loaded, **SETTINGS), old))
    assert not passes
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    one, other = load_file(path), load_file(again)
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert (one["verdicts"] != UNKNOWN).any()
    assert_same(live[1], play(TreeRoutingVectorEnv(4, tree=loaded, **SETTINGS), new))
    assert passes
    assert len(loaded) > len(tree)
    loaded.save(path)  # over the file that is mapped
    passes.clear()
    environment = TreeRoutingVectorEnv(4, pool=pool, task=few, path=path, **SETTINGS)
    for actions, happened in zip((old, new), live, strict=True):
        assert_same(happened, play(environment, actions))
    assert not passes


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_states_of_a_saved_tree_are_mapped(tiny_pool, few, tmp_path):
    path = tmp_path / "tree.safetensors"
    tree = PrefixTree(tiny_pool, few, MAX_NEW)
    play(TreeRoutingVectorEnv(2, tree=tree, **SETTINGS), actions_for(tiny_pool, 10, 2))
    tree.save(path)
    tree = PrefixTree(tiny_pool, few, MAX_NEW, path=path)
    spans = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line]
    bounds = [[int(bound, 16) for bound in span[0].split("-")] for span in spans]
    assert any(first <= tree._mapped.ctypes.data < last for first, last in bounds)


def test_a_file_is_whole_or_absent(tiny_pool, few, tmp_path, monkeypatch):
    path, tree = tmp_path / "tree.safetensors", PrefixTree(tiny_pool, few, MAX_NEW)
    environment = TreeRoutingEnv(tree=tree, **SETTINGS)
    play_singly(environment, np.ones(5))

    def full(tensors, partial, metadata):
        partial.write_bytes(b"half of it")
        raise OSError("no space left")

    tree.save(path)
    whole = path.read_bytes()
    monkeypatch.setattr(envs.storage, "save_file", full)
    for place, left in ((path, [whole]), (tmp_path / "another" / "tree", [])):
        with pytest.raises(OSError, match="no space"):
            tree.save(place)
        assert [found.read_bytes() for found in place.parent.iterdir() if found.is_file()] == left


def test_a_policy_scores_alike_on_a_tree_in_memory_and_one_reopened(tiny_pool, few, tmp_path):
    path = tmp_path / "tree.safetensors"
    tree = PrefixTree(tiny_pool, few, MAX_NEW)
    play(TreeRoutingVectorEnv(4, tree=tree, **SETTINGS), actions_for(tiny_pool, 40, 4))
    tree.save(path)
    again = PrefixTree(tiny_pool, few, MAX_NEW, path=path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policies = [
            RouterPolicy(RouterNetwork(feature_width(features, tiny_pool.slm.width)).eval(), [], features)
            for features in FEATURES
        ]
    going = np.flatnonzero(tree.ends[: tree.size] == GOING_ON)
    for count in (1, 2, 3, 5, len(going)):
        for first in range(0, len(going) - count + 1, 3):
            nodes = going[first : first + count]
            seen = [observation_at(one, nodes, np.zeros_like(nodes)) for one in (tree, again)]
            for observation in seen:
                for tensor in (observation.hidden, observation.kept_logit_features):
                    assert tensor.data_ptr() % 64 == 0, "bits of products depend on where memory lies"
                    assert tensor.is_contiguous()
            for policy in policies:
                with torch.no_grad():
                    assert torch.equal(policy.score(seen[0]), policy.score(seen[1]))


class Judged(Sums):
    """One prompt, and what counts as right is the example's answer alone."""

    judged = 0

    def is_correct(self, example, response):
        self.judged += 1
        return (len(response) == 0) == (example.answer == "none")


def test_examples_with_one_prompt_have_verdicts_of_their_own(tiny_pool, tmp_path):
    task, row, path = Judged(), np.array([0]), tmp_path / "tree.safetensors"
    tree = PrefixTree(tiny_pool, task, MAX_NEW)
    right, wrong = (Example(name, "2 + 2 =", " 4", name) for name in ("some", "none"))
    session = TreeSession(tree, 1)
    session.start(row, [tiny_pool.encode(right.prompt)])
    while session._active[0]:
        session.step(row, np.array([1]))
    end = session.nodes(0)[-1]
    if not tiny_pool.decode(session.response(0)):
        right, wrong = wrong, right
    assert tree.correct(end, right) is True
    assert tree.correct(end, right) is True
    assert task.judged == 1, "judged once"
    assert tree.correct(end, wrong) is False
    assert tree.correct(end, right) is True
    # a record whose answer was corrected is judged anew in a tree that was saved
    tree.save(path)
    again = PrefixTree(tiny_pool, task, MAX_NEW, path=path)
    task.judged = 0
    assert again.correct(end, right) is True
    assert task.judged == 0, "a verdict of the same example is kept"
    assert again.correct(end, Example(right.id, right.prompt, right.reference, wrong.answer)) is False


def test_a_tree_saved_before_verdicts_were_bound_opens_without_them(tiny_pool, few, tmp_path):
    path = tmp_path / "tree.safetensors"
    tree = PrefixTree(tiny_pool, few, MAX_NEW)
    play(TreeRoutingVectorEnv(2, tree=tree, **SETTINGS), actions_for(tiny_pool, 25, 2))
    tree.save(path)
    arrays = load_file(path)
    del arrays["judged_for"]
    finished = np.flatnonzero(arrays["verdicts"] != UNKNOWN)
    assert len(finished)
    arrays["verdicts"][finished] = 1 - arrays["verdicts"][finished]  # of answers that were corrected since
    save_file(arrays, path, metadata={"manifest": json.dumps(tree.manifest)})
    old = PrefixTree(tiny_pool, few, MAX_NEW, path=path)
    assert len(old) == len(tree)
    prompts = {tiny_pool.encode(example.prompt).tobytes(): example for example in few.examples("train")}
    for node in finished:
        example = prompts[old.prompt(node).tobytes()]
        assert old.correct(node, example) == tree.correct(node, example)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("children", lambda a: a.__setitem__((0, 0), 10_000), "children reach from -1 to 10000"),
        ("children", lambda a: a.__setitem__((0, 0), 0), "children are not those of their parents"),
        ("parents", lambda a: a.__setitem__(np.argmax(a >= 0), len(a) - 1), "depths do not follow"),
        ("parents", lambda a: a.__setitem__(np.argmax(a >= 0), UNKNOWN), "roots are not the states"),
        ("depths", lambda a: a.__setitem__(0, 2**30), "depths reach from"),
        ("tokens", lambda a: a.__setitem__((0, 0), -7), "tokens reach from -7"),
        ("prompt_tokens", lambda a: a.__setitem__(0, 2**40), "prompt_tokens reach"),
        ("prompt_offsets", lambda a: a.__setitem__(0, 1), "prompt_offsets do not divide"),
        ("verdicts", lambda a: a.__setitem__(0, 9), "verdicts reach"),
    ],
)
def test_a_damaged_tree_is_refused_with_what_is_wrong(tiny_pool, few, tmp_path, name, spoil, message):
    path = tmp_path / "tree.safetensors"
    tree = PrefixTree(tiny_pool, few, MAX_NEW)
    play(TreeRoutingVectorEnv(2, tree=tree, **SETTINGS), actions_for(tiny_pool, 25, 2))
    tree.save(path)
    arrays = load_file(path)
    spoil(arrays[name])
    save_file(arrays, path, metadata={"manifest": json.dumps(tree.manifest)})
    with pytest.raises(ValueError, match=rf"tree.safetensors is damaged \({message}.*delete it"):
        PrefixTree(tiny_pool, few, MAX_NEW, path=path)


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [40, 1], ids=["many", "one"])
def test_a_tree_with_little_memory_forgets_and_equals_live_decoding(pools, count):
    """Many examples: those that were not started for longest go. One: its states that no row has come by go."""
    pool, task, rows = pools["three"], FirstExamples(Sums(), count), 4
    tree = small(pool, task, rows * (MAX_NEW + 1))
    live = RoutingVectorEnv(rows, pool=pool, task=task, **SETTINGS)
    walked = TreeRoutingVectorEnv(rows, tree=tree, **SETTINGS)
    assert_same(live.reset(seed=0), walked.reset(seed=0))
    rng = np.random.default_rng(0)
    for _ in range(120):
        actions = rng.integers(0, 3, rows)
        assert_same(live.step(actions), walked.step(actions))
        assert len(tree) <= tree.capacity
        assert_right(walked.episodes.session)
    assert tree.evictions > 3


def test_a_saved_tree_forgets_too_and_is_saved_without_what_it_forgot(tiny_pool, passes, tmp_path):
    pool, task, path = tiny_pool, FirstExamples(Sums(), 30), tmp_path / "tree.safetensors"
    tree = small(pool, task, 100)
    vector = TreeRoutingVectorEnv(4, tree=tree, **SETTINGS)
    play(vector, actions_for(pool, 60, 4))
    assert tree.evictions
    tree.save(path)
    saved, whole = load_file(path), path.read_bytes()
    assert {len(saved[name]) for name in ("tokens", "features", "parents", "verdicts")} == {len(tree)}
    assert len(saved["roots"]) == len(tree.prompts) < 30
    passes.clear()
    loaded = PrefixTree(pool, task, MAX_NEW, tree.memory, path)
    for row in range(4):  # what was not forgotten is there
        session = TreeSession(loaded, 1)
        session.start(np.array([0]), [vector.episodes.session._prompts[row]])
        for writer in vector.episodes.session.writers(row):
            session.step(np.array([0]), np.array([int(writer)]))
        assert np.array_equal(session.response(0), vector.episodes.session.response(row))
    assert not passes
    actions = actions_for(pool, 80, 4, seed=1)
    live = play(RoutingVectorEnv(4, pool=pool, task=task, **SETTINGS), actions, seed=9)
    assert_same(live, play(TreeRoutingVectorEnv(4, tree=loaded, **SETTINGS), actions, seed=9))
    assert loaded.evictions
    assert path.read_bytes() == whole, "states that took the place of mapped ones are not in the file"
    loaded.save(path)
    assert_same(live, play(TreeRoutingVectorEnv(4, pool=pool, task=task, path=path, **SETTINGS), actions, seed=9))


def test_pinned_prompts_are_kept_until_nothing_else_can_go(tiny_pool):
    pool, task, row = tiny_pool, Sums(), np.array([0])
    tree = small(pool, task, 2 * MAX_NEW + 10)
    explorer = TreeExpander(tree, 1)
    prompts = [pool.encode(task.example("train", index).prompt) for index in range(40)]
    kept = []
    for prompt in prompts[:2]:
        node = explorer.roots(row, [prompt])
        while tree.ends[node] == GOING_ON:
            node = explorer.step(row, node, row)
        kept.append(tree.path(int(node[0])))
    written = [tree.written(path) for path in kept]
    walk = TreeSession(tree, 1)
    for prompt in prompts[2:]:
        walk.start(row, [prompt])
    assert tree.evictions
    assert all(np.array_equal(tree.written(path), tokens) for path, tokens in zip(kept, written, strict=True))
    walk.free(row)
    held = []
    with pytest.raises(ValueError, match="the responses in flight need more; raise memory or lower the rows"):  # noqa: PT012
        for prompt in prompts[2:]:
            explorer.roots(row, [prompt])
            held.append(prompt)
    for prompt in [prompts[0], *held]:
        tree.release(prompt)
    for prompt in prompts[12:]:
        walk.start(row, [prompt])
    assert tree.root(prompts[0]) == UNKNOWN
    assert np.array_equal(tree.written(kept[1]), written[1])


def test_a_number_that_names_another_state_now_is_not_where_a_row_stands(tiny_pool):
    pool, task, row = tiny_pool, Sums(), np.array([0])
    tree = small(pool, task, MAX_NEW + 5)
    early, late = TreeExpander(tree, 1), TreeExpander(tree, 1)
    prompts = [pool.encode(task.example("train", index).prompt) for index in range(10)]
    stood = early.step(row, early.roots(row, prompts[:1]), row)
    tree.release(prompts[0])
    for prompt in prompts[1:]:
        node = late.roots(row, [prompt])
        while tree.ends[node] == GOING_ON and (tree.root(prompts[0]) != UNKNOWN or node != stood):
            node = late.step(row, node, row)
        if tree.root(prompts[0]) == UNKNOWN and node == stood:
            break
        tree.release(prompt)
    assert node == stood
    reached = early.step(row, node, np.array([1]))
    live = Session(pool, 1, MAX_NEW)
    live.start(row, [prompt], responses=[tree.written(tree.path(int(node[0])))])
    assert tree.tokens[node, 1] == live.step(row, np.array([1])).tokens
    np.testing.assert_allclose(tree.features(reached)[:, : pool.slm.width], live.observe(row).hidden, atol=1e-4)


def test_walks_that_are_gone_or_freed_keep_nothing(tiny_pool):
    pool, task, rows = tiny_pool, Sums(), np.arange(3)
    tree = small(pool, task, 6 * (MAX_NEW + 1))
    prompts = [pool.encode(task.example("train", index).prompt) for index in range(36)]
    freed = TreeSession(tree, 3)
    for first in range(0, 18, 3):
        session = TreeSession(tree, 3)
        session.start(rows, prompts[first : first + 3])
        freed.start(rows, prompts[first + 18 : first + 21])
        for _ in range(MAX_NEW):
            going = rows[session._active]
            if len(going):
                session.step(going, np.ones_like(going))
        freed.free(rows)
    assert tree.evictions
    assert len(tree) <= tree.capacity


def test_trees_shared_by_environments_stay_right(pools):
    """Each forgets what the others may have known, at any time."""
    pool, task = pools["three"], FirstExamples(Sums(), 12)
    tree = small(pool, task, 8 * (MAX_NEW + 1))
    pairs = [
        (RoutingVectorEnv(rows, pool=pool, task=task, **SETTINGS), TreeRoutingVectorEnv(rows, tree=tree, **SETTINGS))
        for rows in (1, 2, 4)
    ]
    rng = np.random.default_rng(1)
    for seed, pair in enumerate(pairs):
        assert_same(*(environment.reset(seed=seed) for environment in pair))
    for _ in range(100):
        for live, walked in pairs:
            if rng.random() < 0.6:
                actions = rng.integers(0, 3, live.num_envs)
                assert_same(live.step(actions), walked.step(actions))
        for _, walked in pairs:
            assert_right(walked.episodes.session)
    assert tree.evictions > 3


# -- errors -----------------------------------------------------------------------------------------------------------


def test_environments_that_do_not_fit_the_tree_are_refused(pools, tiny_pool, few, passes):
    tree = PrefixTree(tiny_pool, few, MAX_NEW)
    for settings, message in [
        ({"sampling": Sampling(temperature=1.0)}, r"sampling at temperature 1.0 .* leave sampling out, or the tree"),
        ({"pool": pools["qwen2"]}, "made for another pool; give"),
        ({"task": Sums()}, "made for another task; give"),
        ({"max_new_tokens": 11}, r"ends responses after 10 tokens, .* after 11; give both the same"),
        ({"cost": Seconds()}, "cost seconds is measured.* choose another cost"),
        ({"path": Path("some/file")}, "a tree and the path some/file were given; give the tree alone"),
        ({"features": "all"}, "unknown features 'all'"),
        ({"capacity": 10_000}, "capacity 10000"),
    ]:
        for make in (TreeRoutingEnv, TreeRoutingVectorEnv):
            with pytest.raises(ValueError, match=message):
                make(**{"tree": tree, "max_new_tokens": MAX_NEW} | settings)
    TreeRoutingEnv(tree=tree, pool=tiny_pool, task=few, max_new_tokens=MAX_NEW, sampling=Sampling())
    with pytest.raises(ValueError, match=r"7 sequences .* up to 10 tokens .*\(70 states\); raise memory or lower"):
        TreeRoutingVectorEnv(7, tree=small(tiny_pool, few, 70), max_new_tokens=MAX_NEW)
    with pytest.raises(ValueError, match=r"holds 10 states of \d+ bytes, one response has up to 11; raise memory"):
        small(tiny_pool, few, 10)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, is 0"):
        PrefixTree(tiny_pool, few, 0)
    assert not passes


def test_bad_actions_rows_and_prompts_are_named(pools, few):
    pool = pools["three"]
    environment = gym.make_vec(ID, num_envs=2, pool=pool, task=few, max_new_tokens=MAX_NEW)
    environment.reset(seed=0)
    for actions in ([0, 3], [-1, 0], [0.5, 1.0], [0]):
        with pytest.raises(ValueError, match=r"actions must be 2 integers in 0\.\.2"):
            environment.step(np.array(actions))
    session, row = TreeSession(PrefixTree(pool, few, 1), 2), np.array([1])
    with pytest.raises(ValueError, match=r"rows \[1\] are not in flight; start them first"):
        session.step(row, row)
    session.start(row, [pool.encode("3 + 3 =")])
    session.step(row, row)
    with pytest.raises(ValueError, match=r"rows \[1\] are not in flight"):
        session.step(row, row)
    with pytest.raises(ValueError, match="row 1 has a prompt of 0 tokens"):
        session.start(row, [np.zeros(0, dtype=int)])
    with pytest.raises(ValueError, match="rows must be at least 1, is 0"):
        TreeSession(session.tree, 0)


def test_files_of_other_runs_and_of_other_kinds_are_refused(pools, tiny_pool, few, passes, tmp_path):
    path, tree = tmp_path / "tree.safetensors", PrefixTree(tiny_pool, few, MAX_NEW)
    play_singly(TreeRoutingEnv(tree=tree, **SETTINGS), np.ones(25))
    tree.save(path)
    passes.clear()
    for arguments, message in [
        ((pools["qwen2"], few, MAX_NEW), "with models .*llama_large.* this run has .*qwen2_large"),
        ((tiny_pool, ArithmeticTask(), MAX_NEW), "made with task sums, this run has arithmetic"),
        ((tiny_pool, few, 12), "made with max_new_tokens 10, this run has 12"),
        ((tiny_pool, few, MAX_NEW, 12 * tree.node_bytes), rf"holds {len(tree)} states of .* raise memory"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            PrefixTree(*arguments, path=path)
        assert str(path) in str(error.value)
    with safe_open(path, framework="numpy") as file:
        assert json.loads(file.metadata()["manifest"]) == tree.manifest
    no_tree = tmp_path / "no_tree"
    contents = [path.read_bytes()[:2000], b"", b"text"]
    for metadata in (None, {"format": "pt"}, {"manifest": "{"}):
        save_file({"a": np.zeros(3)}, no_tree, metadata=metadata)
        contents.append(no_tree.read_bytes())
    for content in contents:
        no_tree.write_bytes(content)
        with pytest.raises(ValueError, match="no_tree holds no readable tree; give a file that"):
            PrefixTree(tiny_pool, few, MAX_NEW, path=no_tree)
    for missing in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="holds no readable tree"):
            TreeRoutingEnv(pool=tiny_pool, task=few, path=missing, **SETTINGS)
    assert not passes


# -- the examples that come again -------------------------------------------------------------------------------------


def test_first_examples_are_those_of_the_task_and_no_others():
    task = FirstExamples(Sums(), 5, start=2)
    assert task.name == "sums"
    assert [task.size(split) for split in ("train", "validation", "test")] == [5, 1, 1]
    assert task.examples("train") == Sums().examples("train", 5, start=2)
    assert task.example("train", 3) is task.example("train", 3)
    for split, index in (("train", 5), ("train", -1), ("test", 1)):
        with pytest.raises(IndexError, match=rf"cut to {task.size(split)} {split} examples; there is no {index}"):
            task.example(split, index)
    rng = np.random.default_rng(0)
    assert {task.sample("train", rng).id for _ in range(100)} == {f"sums/train/{index}" for index in range(2, 7)}
    assert task.is_correct(task.example("train", 0), "12") is True
    endless = FirstExamples(ArithmeticTask(), 3, start=7)
    assert endless.size("test") == 3
    assert endless.example("test", 2) == ArithmeticTask().example("test", 9)
    for count, start in ((39, 2), (0, 0), (1, -1), (1, 40)):
        with pytest.raises(ValueError, match=f"sums has 40 train examples; {count} from {start} on were asked for"):
            FirstExamples(Sums(), count, start)
