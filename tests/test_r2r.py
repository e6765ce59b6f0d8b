import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from agents.citer import Citer
from agents.common.policy import Policy
from agents.common.rollout import Scheduling, decode
from agents.common.saving import load_policy
from agents.preferences.store import COLUMNS, PreferenceStore
from agents.r2r import R2R, Divergence, R2RPolicy, hidden_and_top_logits
from agents.router.network import RouterNetwork
from agents.router.training import RouterTraining, fit_router
from envs.arrays import UNKNOWN
from envs.decoding.observation import Observation
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example, FirstExamples, Task
from experiments.common.config import CONF, build, register_schemas

QUICK = {
    "examples": 11,
    "shard_examples": 3,
    "training": RouterTraining(epochs=2, batch_size=64),
    "scheduling": Scheduling(rows=16),
}


@pytest.fixture(scope="module")
def fitted(pool, task, tmp_path_factory):
    """A finished fit: its folder, its policy, and its rows."""
    folder, rows = tmp_path_factory.mktemp("r2r"), []
    policy = R2R(**QUICK).fit(pool, task, seed=1, track=rows.append, folder=folder)
    return folder, policy, rows


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def same_weights(first, second):
    weights = (policy.network.state_dict().values() for policy in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def observation(pool, count=5):
    hidden, logits = (torch.randn(count, width) for width in (pool.slm.width, pool.vocab_size))
    return Observation(hidden, logits, *[np.arange(count)] * 3)


# -- labels -----------------------------------------------------------------------------------------------------------


def test_labels_by_hand():
    columns = {
        "slm_token": np.array([7, 8, 8, 8, 8]),
        "llm_token": np.array([7, 9, 9, 9, 9]),
        "slm_outcome": np.array([UNKNOWN, 1, 0, 1, 0], dtype=np.int8),
        "llm_outcome": np.array([UNKNOWN, 1, 1, 0, 0], dtype=np.int8),
    }
    assert Divergence().rolled_out(columns).tolist() == [False, True, True, True, True]
    # the models agree; neutral; it spoils the answer; it mends it, which diverges too; both are wrong
    assert Divergence().of(columns).tolist() == [1, 1, 0, 0, 1]


def plain_labels(pool, task, example, limit):
    """R2R as the paper describes it, one token of each model at a time, no cache.

    Returns the LLM's own response, its verdict, the labels, and the verdicts with the SLM's token.
    """

    def next_token(model, tokens):
        return int(model.network(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())

    def finish(tokens):
        while len(tokens) < len(prompt) + limit and tokens[-1] not in pool.end_tokens:
            tokens = [*tokens, next_token(pool.models[1], tokens)]
        return tokens

    def right(tokens):
        return int(task.is_correct(example, pool.decode(np.array(tokens[len(prompt) :]))))

    prompt = pool.encode(example.prompt).tolist()
    own = finish(prompt)
    labels, outcomes = [], []
    for position in range(len(prompt), len(own)):
        slm = next_token(pool.slm, own[:position])
        same = slm == own[position]
        outcomes.append(UNKNOWN if same else right(finish([*own[:position], slm])))
        labels.append(int(same or outcomes[-1] == right(own)))
    return own[len(prompt) :], right(own), labels, outcomes


class Chosen(ArithmeticTask):
    """Three problems: the LLM's answer to the first is wrong, that to the third takes 68 tokens."""

    def example(self, split, index):
        return super().example(split, 1_000_000 + [78, 9, 18][index % 1_000_000])


@torch.no_grad()
def test_labels_equal_the_plain_algorithm(pool, tmp_path):
    task = Chosen()
    settings = R2R(examples=3, shard_examples=2, max_new_tokens=58, scheduling=Scheduling(rows=6))
    store = settings.collect(pool, task, 0, tmp_path)
    columns = {name: store.column(name) for name in COLUMNS}
    verdicts = []
    for number, example in enumerate(task.examples("train", 3, start=1_000_000)):
        own, right, labels, outcomes = plain_labels(pool, task, example, limit=58)
        verdicts.append(right)
        rows = columns["example"] == number
        if own[-1] not in pool.end_tokens:
            assert (number, rows.any(), store.note(1)["skipped"]) == (2, False, [example.id])
            continue
        differ = np.array(outcomes) != UNKNOWN
        assert columns["position"][rows].tolist() == list(range(len(own)))
        assert columns["llm_token"][rows].tolist() == own
        assert columns["label"][rows].tolist() == labels
        assert columns["slm_outcome"][rows].tolist() == outcomes
        assert columns["llm_outcome"][rows].tolist() == np.where(differ, right, UNKNOWN).tolist()
    assert verdicts == [0, 1, 0]
    assert store.skipped() == 1
    assert 0 < (columns["label"] == 0).sum() < (columns["slm_token"] != columns["llm_token"]).sum()


def test_where_every_answer_is_right_there_is_nothing_to_learn(pool, task, monkeypatch):
    monkeypatch.setattr(ArithmeticTask, "is_correct", lambda self, example, response: True)
    with pytest.raises(ValueError, match="nothing to learn"):
        R2R(**QUICK | {"examples": 4}).fit(pool, task, seed=1)


# -- features ---------------------------------------------------------------------------------------------------------


def test_what_is_seen_by_hand():
    seen = hidden_and_top_logits(torch.tensor([[5.0, 6.0]]), torch.tensor([[0.5, -2.0, 3.0]]), 2)
    assert seen.tolist() == [[5.0, 6.0, 3.0, 0.5]]
    assert hidden_and_top_logits(torch.zeros(1, 2), torch.tensor([[0.5, -2.0, 3.0]]), 100)[0, 2:].tolist() == [
        3,
        0.5,
        -2,
    ]


@torch.no_grad()
def test_a_router_is_trained_on_what_its_policy_sees(fitted, pool, task, monkeypatch):
    folder, policy, _ = fitted
    trained, seen = [], []

    def fit(data, *settings, **named):
        trained.append(data)
        return fit_router(data, *settings, **named)

    monkeypatch.setattr("agents.r2r.fit_router", fit)
    R2R(**QUICK).fit(pool, task, seed=1, folder=folder)
    [data] = trained
    blocks = torch.cat([features for features, _ in data.blocks(data.kept)]).float()
    assert blocks.shape[1] == data.width == policy.network.width == 48 + 100 + 48

    class Spy(Policy):
        def score(self, observation):
            hook = policy.network.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
            policy.score(observation)
            hook.remove()
            return torch.zeros(len(observation.positions))

    for number in (0, 7, 10):
        example = task.example("train", 2_000_000 + number)
        seen.clear()
        [episode] = decode(pool, task, [example], Spy(), max_new_tokens=128)
        rows = blocks[data.examples == number]
        np.testing.assert_allclose(rows, torch.cat(seen), atol=2e-2)
        ids = torch.from_numpy(np.concatenate([pool.encode(example.prompt), episode.tokens[:-1]]))[None]
        read = pool.slm.network(ids, output_hidden_states=True, use_cache=False)
        hidden, logits = read.hidden_states[-1][0, -len(rows) :], read.logits[0, -len(rows) :]
        embedded = pool.slm.network.get_input_embeddings().weight[logits.argmax(-1)]
        expected = torch.cat([hidden, logits.sort(descending=True).values[:, :100], embedded], dim=-1)
        np.testing.assert_allclose(rows, expected, atol=2e-2)


class Parity(Task):
    """Right is what holds an even number of characters: random models are, now and then."""

    name = "parity"

    def size(self, split):
        return 40

    def example(self, split, index):
        return Example(f"parity/{index}", f"{index} {split}", "an", "an")

    def is_correct(self, example, response):
        return len(response) % 2 == 0


def test_a_small_vocabulary_gives_all_its_logits(tiny_pool, tmp_path):
    settings = R2R(examples=6, max_new_tokens=40, training=RouterTraining(epochs=1, batch_size=16))
    policy = settings.fit(tiny_pool, Parity(), seed=0, folder=tmp_path)
    store = PreferenceStore.open(tmp_path / "paths")
    assert store.features(0).shape[1] == tiny_pool.slm.width + tiny_pool.vocab_size
    policy.save(tmp_path / "policy")
    assert load_policy(tmp_path / "policy", tiny_pool).network.width == 2 * tiny_pool.slm.width + tiny_pool.vocab_size


# -- the policy -------------------------------------------------------------------------------------------------------


def test_a_saved_policy_scores_the_same(fitted, pool, tmp_path):
    _, policy, _ = fitted
    policy.save(tmp_path)
    loaded = load_policy(tmp_path, pool)
    assert isinstance(loaded, R2RPolicy)
    assert loaded.top_logits == 100
    seen = observation(pool)
    assert torch.equal(loaded.score(seen), policy.score(seen))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["policy.json", "router.safetensors"]
    settings = json.loads((tmp_path / "policy.json").read_text())
    assert settings["calibration"] == policy.calibration
    (tmp_path / "policy.json").write_text(json.dumps(settings | {"top_logits": 50}))
    with pytest.raises(ValueError, match="load that pool, or train for it"):
        load_policy(tmp_path, pool)


def test_a_decision_reads_the_network_and_one_embedding(fitted, pool):
    _, policy, _ = fitted
    weights = sum(parameter.numel() for parameter in policy.network.parameters())
    assert policy.parameters == weights + pool.slm.width


def test_a_replay_tree_is_refused_with_the_way_out(fitted, pool, task):
    _, policy, _ = fitted
    examples = FirstExamples(task, 2)
    with pytest.raises(ValueError, match=r"100 largest logits.*without evaluation\.tree"):
        decode(pool, examples, examples.examples("validation", 2), policy, tree=PrefixTree(pool, examples, 128))


# -- shards -----------------------------------------------------------------------------------------------------------


def test_rows_say_what_was_collected(fitted):
    folder, _, rows = fitted
    store = PreferenceStore.open(folder / "paths")
    columns = {name: store.column(name) for name in COLUMNS}
    assert store.shards == 4
    assert np.unique(columns["example"]).tolist() == list(range(11))
    assert rows[0]["tokens"] == len(columns["label"])
    assert (rows[0]["walked"], rows[0]["skipped"]) == (11, 0)
    assert rows[0]["divergent"] == (columns["label"] == 0).mean()
    assert rows[0]["differ"] > rows[0]["divergent"] > 0
    assert {"ece", "reliability"} <= set(rows[-1])


class Interruption(BaseException):
    pass


def test_an_interrupted_collection_goes_on_after_the_last_shard(fitted, pool, task, tmp_path, monkeypatch):
    folder, policy, rows = fitted
    walk, begun = R2R._walk, []

    def interrupted(self, pool, task, examples):
        begun.append(len(examples))
        if len(begun) == 3:
            raise Interruption
        return walk(self, pool, task, examples)

    monkeypatch.setattr(R2R, "_walk", interrupted)
    with pytest.raises(Interruption):
        R2R(**QUICK).fit(pool, task, seed=1, folder=tmp_path)
    assert PreferenceStore.open(tmp_path / "paths").missing() == [2, 3]
    again = []
    found = R2R(**QUICK).fit(pool, task, seed=1, track=again.append, folder=tmp_path)
    assert begun == [3, 3, 3, 3, 2]
    assert contents(tmp_path / "paths") == contents(folder / "paths")
    assert again == rows
    assert same_weights(found, policy)
    monkeypatch.setattr(R2R, "_walk", None)
    assert same_weights(R2R(**QUICK).fit(pool, task, seed=1, folder=tmp_path), policy)


def test_a_shard_without_a_whole_response_holds_no_rows(pool, tmp_path):
    settings = R2R(**QUICK | {"examples": 3, "shard_examples": 1}, max_new_tokens=58)
    rows = []
    settings.fit(pool, Chosen(), 1, rows.append, tmp_path)
    assert [count > 0 for count in PreferenceStore.open(tmp_path / "paths").rows()] == [True, True, False]
    assert (rows[0]["walked"], rows[0]["skipped"]) == (2, 1)


def test_what_other_settings_collected_is_refused(fitted, pool, task):
    folder, _, _ = fitted
    with pytest.raises(ValueError, match="made with top_logits 100, this run has 7"):
        R2R(**QUICK, top_logits=7).fit(pool, task, seed=1, folder=folder)
    with pytest.raises(ValueError, match="give this run another folder"):
        Citer(**QUICK, preferences=str(folder / "paths")).fit(pool, task, seed=1)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", [{"examples": 1}, {"max_new_tokens": 0}, {"top_logits": 0}, {"shard_examples": 0}])
def test_settings_out_of_range_are_named(setting):
    [key] = setting
    with pytest.raises(ValueError, match=f"{key} must be at least"):
        R2R(**setting)


class Long(ArithmeticTask):
    """The task with one problem that is too long."""

    def example(self, split, index):
        example = super().example(split, index)
        return replace(example, id="task/long", prompt="1 " * 600) if index % 1_000_000 == 3 else example


def test_bad_input_is_refused_before_any_model_runs(pool, task, monkeypatch):
    monkeypatch.setattr("agents.r2r.decode", None)
    with pytest.raises(ValueError, match=r"example task/long has a prompt of .* drop the example"):
        R2R(**QUICK).fit(pool, Long(), seed=0)
    with pytest.raises(ValueError, match="lower max_new_tokens"):
        R2R(**QUICK, max_new_tokens=600).fit(pool, task, seed=0)


def test_responses_that_do_not_end_are_an_error_that_says_what_to_raise(pool, task):
    with pytest.raises(
        ValueError, match=r"to 0 of 11 training problems ended by themselves.*raise max_new_tokens \(9\)"
    ):
        R2R(**QUICK, max_new_tokens=9).fit(pool, task, seed=1)


# -- the router's size ------------------------------------------------------------------------------------------------


def weights_of(agent, pool):
    settings = build(composed(agent), "agent").training
    width = R2RPolicy.input_width({"top_logits": 100}, pool)
    return sum(weight.numel() for weight in RouterNetwork(width, units=settings.units).parameters())


def composed(agent):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("train", overrides=[f"agent={agent}"])


def test_the_router_is_as_large_beside_its_slm_as_published(pool):
    slm = sum(weight.numel() for weight in pool.slm.network.parameters())
    assert slm == 70_896
    assert weights_of("r2r", pool) == 2_801
    assert 0.035 < weights_of("r2r", pool) / slm < 0.045
    assert weights_of("r2r_small", pool) == 23_809
