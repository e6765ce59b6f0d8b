import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.citer import Citer
from agents.common.policy import policy_from
from agents.common.rollout import Scheduling, decode
from agents.common.saving import load_policy
from agents.heuristics import Always, Random, Uncertainty
from agents.preferences.collector import PreferenceCollector
from agents.router.dataset import LabelledTokens, held_out_rows, preference_loss
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router
from envs.costs import READ, SECONDS, WRITTEN
from envs.decoding.observation import Observation
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example
from experiments.common.config import CONF, build, register_schemas
from experiments.traces.recorder import Recorder
from experiments.traces.trace import SUFFIX, read_trace
from experiments.verification.checking import walk

AGENTS = sorted(path.stem for path in (CONF / "agent").glob("*.yaml"))


def variants():
    """Agents that differ from an earlier one in settings alone: of its class, and of its algorithm."""
    seen, found = set(), []
    for name in AGENTS:
        text = (CONF / "agent" / f"{name}.yaml").read_text()
        kind = tuple(re.findall(r"^(?:  - /schema@_here_|algorithm): (\S+)", text, re.MULTILINE))
        found += [name] if kind in seen else []
        seen.add(kind)
    return found


VARIANTS = variants()
QUICK = {
    "examples": 12,
    "max_new_tokens": 44,  # the longest reference has 36
    "training.epochs": 2,
    "training.batch_size": 64,
    "scheduling.rows": 16,
    "text.dimensions": 4,
    "steps": 256,
    "num_envs": 8,
    "memory": 2**26,
    "iterations": 2,
    "batch": 4,
    "rows": 8,
    **{f"{part}.examples": 12 for part in ("citer", "expert")},
    **{f"{part}.training.epochs": 2 for part in ("citer", "expert")},
    "expert.memory": 2**26,
    "validation_examples": 4,
    "selection.evaluations": 1,
    "selection.examples": 2,
    "selection.llm_shares": [0.2],
}


def agent(name):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("train", overrides=[f"agent={name}"])
    for key, value in QUICK.items():
        if OmegaConf.select(config.agent, key) is not None:
            OmegaConf.update(config.agent, key, value)
    return build(config, "agent")


def same(first, second):
    return all(
        np.array_equal(a.tokens, b.tokens) and np.array_equal(a.writers, b.writers)
        for a, b in zip(first, second, strict=True)
    )


@pytest.fixture(scope="module")
def easy():
    """Problems of short answers: what a pass takes is the same for all rows, so that tests take as long as answers."""
    return ArithmeticTask("easy")


def answers(pool, task, policy, scheduling=None):
    """Six answers of a policy."""
    examples = task.examples("validation", 6)
    return decode(pool, task, examples, policy, 0.5, max_new_tokens=44, scheduling=scheduling or Scheduling())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in VARIANTS else name for name in AGENTS]
)
def test_every_agent_fits_and_decodes(name, pool, easy, tmp_path):
    task = easy
    rows = []
    policy = policy_from(agent(name), pool, task, seed=3, track=rows.append)
    examples = task.examples("validation", 6)
    episodes = answers(pool, task, policy, Scheduling(rows=4))
    assert [episode.example for episode in episodes] == examples
    for episode in episodes:
        assert ((episode.scores >= 0) & (episode.scores <= 1)).all()
        if policy.judge is None:
            np.testing.assert_array_equal(episode.writers == 0, episode.scores >= 0.5)
        assert episode.correct == task.is_correct(episode.example, episode.text)
        assert episode.ledger[:, WRITTEN].sum() == len(episode.tokens)
    if policy.judge is not None:  # its decisions give these writers, and this ledger
        Recorder(pool, task, "validation", max_new_tokens=44).routed(tmp_path / "one", episodes, name, policy, 0.5)
        trace = read_trace(tmp_path / f"one{SUFFIX}")
        for one in trace.episodes:
            np.testing.assert_array_equal(one.ledger[:, :SECONDS], walk(trace.head, one).entries[:, :SECONDS])
    assert all(json.dumps(row) for row in rows)
    assert same(episodes, answers(pool, task, policy_from(agent(name), pool, task, seed=3)))
    if hasattr(policy, "save"):
        policy.save(tmp_path / "policy")
        assert same(episodes, answers(pool, task, load_policy(tmp_path / "policy", pool)))


@pytest.mark.parametrize("program", ["train", "evaluate"])
def test_random_routing_draws_by_the_runs_seed(program):
    from hydra import compose, initialize_config_dir

    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        chosen = ["agent=random"] if program == "train" else []
        config = compose(program, overrides=[*chosen, "seed=5"])
    group, name = (config, "agent") if program == "train" else (config.agents, "random")
    assert build(group, name) == Random(seed=5)


def test_programs_take_policies_and_learners_and_nothing_else(pool, task):
    assert policy_from(Always(), pool, task) == Always()
    with pytest.raises(ValueError, match="str is no agent"):
        policy_from("citer", pool, task)


@pytest.mark.parametrize("policy", [Random(seed=5), Uncertainty("margin")])
def test_scheduling_changes_no_token(policy, pool, easy):
    task, examples = easy, easy.examples("test", 7)
    expected = decode(pool, task, examples, policy, 0.6, scheduling=Scheduling(rows=1, gather=0))
    for scheduling in (Scheduling(rows=3, gather=0), Scheduling(rows=3, gather=1), Scheduling(rows=7, gather=0.5)):
        assert same(expected, decode(pool, task, examples, policy, 0.6, scheduling=scheduling))


def test_gathering_saves_llm_passes_and_reads_the_same_tokens(pool, task):
    examples = task.examples("test", 8)
    runs = [decode(pool, task, examples, Random(1), 0.2, scheduling=Scheduling(8, gather)) for gather in (0, 1)]
    for one, other in zip(*runs, strict=True):
        np.testing.assert_array_equal(one.ledger[:, : READ + 1], other.ledger[:, : READ + 1])


def test_random_is_uniform_and_nested():
    positions = np.tile(np.arange(100), 100)
    observation = Observation(
        torch.zeros(10_000, 2), torch.zeros(10_000, 2), positions, np.repeat(np.arange(100), 100), positions
    )
    scores = Random(seed=1).score(observation).numpy()
    assert abs(scores.mean() - 0.5) < 0.01
    assert np.abs(np.histogram(scores, bins=10, range=(0, 1))[0] - 1000).max() < 150
    assert len(np.unique(scores)) == 10_000
    assert not np.array_equal(scores, Random(seed=2).score(observation).numpy())


@pytest.mark.parametrize("measure", ["max_probability", "margin", "entropy"])
def test_uncertainty_orders_sure_before_unsure(measure):
    logits = torch.zeros(3, 12)
    logits[0, 0], logits[1, 0], logits[1, 1] = 9, 2, 1
    scores = Uncertainty(measure).score(Observation(torch.zeros(3, 2), logits, *[np.zeros(3)] * 3)).numpy()
    assert scores[0] > scores[1] > scores[2]
    assert scores.min() >= -1e-6
    assert scores.max() <= 1


def toy_data(examples=60, each=50):
    """Two states: in one the SLM should write, in the other it should not."""
    rng = np.random.default_rng(0)
    state = rng.integers(0, 2, size=examples * each)
    hidden = np.stack([2.0 * state - 1, rng.normal(size=len(state))], axis=-1)
    return torch.from_numpy(hidden).half(), torch.from_numpy(state == 1), np.repeat(np.arange(examples), each)


def train(hidden, labels, examples, track=lambda row: None, checkpoint=None, **settings):
    chosen = RouterTraining(**{"epochs": 4, "batch_size": 256} | settings)
    data = LabelledTokens.in_memory(hidden, labels.numpy(), examples)
    return fit_router(data, chosen, 0, track, torch.device("cpu"), "toy", checkpoint)[0]


def test_the_router_learns_a_two_state_problem():
    hidden, labels, examples = toy_data()
    rows = []
    network = train(hidden, labels, examples, rows.append, epochs=30)
    policy = RouterPolicy(network, [])
    scores = policy.score(Observation(hidden, torch.zeros(len(hidden), 2), examples, examples, examples))
    regret = (scores.round().bool() != labels).float().mean()
    assert regret < 0.01
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]


def test_training_repeats_and_survives_any_last_batch():
    hidden, labels, examples = toy_data()
    first, second = (train(hidden, labels, examples).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    # 45 training examples of 50 tokens: 2250 rows, which leaves a batch of one behind 173 of 13
    train(hidden[:2500], labels[:2500], examples[:2500], batch_size=13, epochs=1)


class BrokenOff(BaseException):
    pass


@pytest.mark.parametrize("epochs_before", [1, 2, 3])
def test_training_resumed_from_a_checkpoint_gives_the_bytes_of_training_at_once(tmp_path, epochs_before):
    hidden, labels, examples = toy_data()
    hidden = torch.cat([hidden, torch.sin(torch.arange(len(hidden) * 35.0)).view(-1, 35).half()], dim=-1)  # not a 16th
    settings = {"epochs": 5, "batch_size": 97, "dropout": 0.2, "units": [33, 17]}
    whole = train(hidden, labels, examples, checkpoint=tmp_path / "whole", **settings)

    def broken_off(row):
        if row["epoch"] == epochs_before:
            raise BrokenOff

    parts = tmp_path / "parts"
    with pytest.raises(BrokenOff):
        train(hidden, labels, examples, broken_off, parts, **settings)
    assert parts.read_bytes() != (tmp_path / "whole").read_bytes()
    resumed = train(hidden, labels, examples, checkpoint=parts, **settings)
    assert parts.read_bytes() == (tmp_path / "whole").read_bytes(), "weights, their best, the optimiser's state"
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_the_best_epoch_is_kept_not_the_last(monkeypatch):
    losses = iter([0.5, 0.1, 0.9])
    snapshots = []

    def fake(network, *args):
        snapshots.append({key: value.clone() for key, value in network.state_dict().items()})
        return next(losses)

    monkeypatch.setattr("agents.router.training.evaluate_loss", fake)
    network = train(*toy_data(), epochs=3)
    assert all(torch.equal(value, snapshots[1][key]) for key, value in network.state_dict().items())
    assert not all(torch.equal(snapshots[2][key], snapshots[1][key]) for key in snapshots[1])


def test_no_example_is_on_both_sides_of_the_split(monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "agents.router.training.held_out_rows", lambda *args: seen.setdefault("mask", held_out_rows(*args))
    )
    hidden, labels, examples = toy_data()
    train(hidden, labels, examples, epochs=1)
    assert not set(examples[seen["mask"]]) & set(examples[~seen["mask"]])
    assert len(set(examples[seen["mask"]])) == 6


def test_preference_loss_by_hand():
    loss = preference_loss(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
    assert loss.item() == pytest.approx((np.log(2) + np.log(1 + np.exp(2))) / 2, rel=1e-6)


def test_bad_labels_and_settings_are_named(pool, task):
    hidden, labels, examples = toy_data()
    with pytest.raises(ValueError, match="nothing to learn"):
        train(hidden, torch.ones_like(labels), examples)
    with pytest.raises(ValueError, match="two examples"):
        train(hidden, labels, np.zeros_like(examples))
    with pytest.raises(FloatingPointError, match="batch of examples"):
        train(hidden * float("nan"), labels, examples)
    for settings, message in (
        ({"rounds": 0}, "rounds"),
        ({"continuation": "maybe"}, "maybe"),
        ({"threshold": 2}, "threshold"),
    ):
        with pytest.raises(ValueError, match=message):
            Citer(**settings)
    with pytest.raises(ValueError, match="gather"):
        Scheduling(gather=2)
    with pytest.raises(ValueError, match="no examples"):
        decode(pool, task, [], Always())
    long = Example("task/long", "1 " * 600, "1", "1")
    with pytest.raises(ValueError, match="example task/long has a prompt"):
        decode(pool, task, [*task.examples("test", 2), long], Always())
    with pytest.raises(ValueError, match="task/long"):
        PreferenceCollector(pool, task, [long])


def test_a_saved_policy_for_other_models_is_refused(pool, tmp_path):
    models = [{"name": name, "fingerprint": "0"} for name in ("another/model", "embedded/llm")]
    policy = RouterPolicy(RouterNetwork(pool.slm.width).eval(), models)
    policy.save(tmp_path)
    with pytest.raises(ValueError, match="another/model"):
        load_policy(tmp_path, pool)
    with pytest.raises(ValueError, match="holds no readable"):
        load_policy(tmp_path / "nowhere", pool)
    (tmp_path / "policy.json").write_text('{"class": "os.path.join"}')
    with pytest.raises(ValueError, match=r"os\.path\.join is not a policy"):
        load_policy(tmp_path, pool)
    assert not list(Path(tmp_path).glob("*.partial"))
