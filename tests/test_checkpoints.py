"""Trainings that are broken off and started again go on, and end where undisturbed ones do."""

import json
import shutil
import time
from dataclasses import replace
from multiprocessing import get_context

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from agents.common.checkpoints import STATE_FILE, Checkpoints, flat, nested, read
from agents.common.selection import Selection
from agents.rl.cost_weights import CostWeights
from agents.rl.vec_env import VectorEnvBridge
from agents.sb3 import StableBaselines
from agents.tapo import Tapo
from envs.environments.tree_routing import TreeRoutingVectorEnv

ABOUT = {"seed": 0, "settings": {"lr": 0.1, "steps": 5}}
# rollouts of 32 steps, so that not every one ends with a checkpoint
ON_POLICY = {"n_steps": 4, "ent_coef": 0.01}
PPO = {**ON_POLICY, "batch_size": 16, "n_epochs": 2}
# a buffer of 15 steps, which is full and written over before the end
OFF_POLICY = {"buffer_size": 120, "learning_starts": 40, "batch_size": 16, "gradient_steps": 2, "n_steps": 3}
LEARNERS = {
    "ppo": {"algorithm": "ppo", "arguments": PPO, "schedule": "linear"},
    "a2c": {"algorithm": "a2c", "arguments": ON_POLICY},
    "dqn": {"algorithm": "dqn", "arguments": OFF_POLICY},
    "qrdqn": {"algorithm": "qrdqn", "arguments": OFF_POLICY},
    "recurrent_ppo": {"algorithm": "recurrent_ppo", "arguments": PPO | {"policy_kwargs": {"lstm_hidden_size": 4}}},
    "ppo_conditioned": {"algorithm": "ppo", "arguments": PPO, "conditioned": CostWeights()},
    "ppo, every token decoded": {"algorithm": "ppo", "arguments": PPO, "environment": "token"},
    "dqn, on references": {
        "algorithm": "dqn",
        "arguments": OFF_POLICY,
        "environment": "shortcut",
        "max_new_tokens": 128,
    },
}
# on-policy, with a replay buffer, with states of its own
FAST = ("ppo", "dqn", "recurrent_ppo")
SELECTION = Selection(evaluations=3, examples=4, llm_shares=(0.1, 0.4))
TAPO = Tapo(
    start="scratch",
    examples=12,
    iterations=4,
    batch=4,
    branches=2,
    rows=8,
    memory=2**24,
    max_new_tokens=24,
    lr=0.01,
    selection=SELECTION,
)


class Interruption(BaseException):
    pass


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr("agents.sb3.STATISTICS_STEPS", 6)


def tiny(learner):
    return StableBaselines(
        **{
            "steps": 256,
            "num_envs": 8,
            "examples": 12,
            "max_new_tokens": 24,
            "net_arch": [8],
            "checkpoint_steps": 60,
            "selection": SELECTION,
        }
        | LEARNERS[learner]
    )


def broken_off(after):
    """A track that keeps rows, and breaks the training off instead of keeping one more."""
    rows = []

    def track(row):
        if len(rows) == after:
            raise Interruption
        rows.append(row)

    return rows, track


def measured(rows):
    """Rows without what is timed, the later of two for the same steps."""
    plain = [{key: value for key, value in row.items() if key not in ("time/fps", "time/time_elapsed")} for row in rows]
    progress = ("time/total_timesteps", "iteration")
    return list({(*map(row.get, progress), "validation_cost" in row): row for row in plain}.values())


def same_tensors(first, second):
    one, other = first.tensors(), second.tensors()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# -- what lies on disk ------------------------------------------------------------------------------------------------


STATE = {
    "rows": {"wide": np.array([2**64 - 1, 0], dtype=np.uint64), "over": np.array([True, False])},
    "texts": [np.frombuffer(b"long", dtype=np.uint8), np.zeros(0, dtype=np.uint8)],
    "position": np.array(7),
    "turned": np.arange(6.0).reshape(2, 3).T,
}


def equal(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one.dtype == other.dtype and one.shape == other.shape and np.array_equal(one, other)


def test_states_are_flattened_and_come_back():
    assert sorted(flat(STATE)) == ["position", "rows/over", "rows/wide", "texts/#0", "texts/#1", "turned"]
    assert equal(nested(flat(STATE)), STATE)


def test_a_checkpoint_holds_what_was_kept_and_replaces_the_one_before(tmp_path):
    checkpoints = Checkpoints(tmp_path, ABOUT)
    assert checkpoints.newest() is None
    checkpoints.save(5, {"weights": np.zeros(2)}, {"made": 5})
    checkpoints.save(10, STATE, {"made": 10}, lambda folder: (folder / "more").write_text("more"))
    again = Checkpoints(tmp_path, ABOUT)
    arrays, about = read(again.newest())
    assert equal(arrays, STATE)
    assert about == {"made": 10}
    assert (again.newest() / "more").read_text() == "more"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000010", "manifest.json"]
    arrays["position"][...] = 8  # what is read may be written to


def test_one_that_is_not_whole_does_not_count_and_is_cleared_away(tmp_path, interrupted_at):
    checkpoints = Checkpoints(tmp_path, ABOUT)
    checkpoints.save(5, STATE, {})
    with interrupted_at(1):
        checkpoints.save(10, STATE, {})
    assert checkpoints.newest().name == "000000000005"
    (tmp_path / "000000000010.partial").mkdir()  # of a process that was killed
    (tmp_path / "000000000010.partial" / STATE_FILE).write_text("half")
    (tmp_path / "000000000004").mkdir()  # an older one, of which the files are deleted already
    assert checkpoints.newest().name == "000000000005"
    checkpoints.save(10, STATE, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000000010", "manifest.json"]


def test_checkpoints_of_another_training_are_refused_by_name(tmp_path):
    Checkpoints(tmp_path, ABOUT)
    with pytest.raises(ValueError, match=r"was made with settings \{'lr': 0.1\}, this run has \{'lr': 0.2\}"):
        Checkpoints(tmp_path, {"seed": 0, "settings": {"lr": 0.2, "steps": 5}})


def test_a_disk_that_takes_nothing_is_named(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, ABOUT)
    checkpoints.save(5, STATE, {})

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(10, STATE, {}, full)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["000000000005"]


def test_where_nothing_is_to_be_kept_nothing_is():
    checkpoints = Checkpoints(None, ABOUT)
    checkpoints.save(5, STATE, {})
    assert checkpoints.newest() is None


# -- trainings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "learner", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LEARNERS]
)
def test_an_agent_that_was_broken_off_ends_with_the_same_bits(learner, pool, task, tmp_path, monkeypatch):
    agent, whole = tiny(learner), []
    undisturbed = agent.fit(pool, task, seed=3, track=whole.append, folder=tmp_path / "whole")
    rows, track = broken_off(after=6 * len(whole) // 10)
    with pytest.raises(Interruption):
        agent.fit(pool, task, seed=3, track=track, folder=tmp_path / "cut")
    kept = sorted((tmp_path / "cut" / "checkpoints").glob("0*"))
    assert len(kept) == 1
    monkeypatch.setattr("agents.rl.inputs.input_statistics", None)  # what was made before is not made again
    again = []
    found = agent.fit(pool, task, seed=3, track=again.append, folder=tmp_path / "cut")
    assert 60 <= int(kept[0].name) < again[0]["time/total_timesteps"]
    assert measured([*rows, *again]) == measured(whole)
    assert again[-1]["time/total_timesteps"] == whole[-1]["time/total_timesteps"] == 256
    assert same_tensors(found, undisturbed)
    assert [path.name for path in kept[0].parent.iterdir() if path.is_dir()] == ["trained"]


def test_killed_at_every_file_an_agent_still_ends_with_the_same_bits(pool, task, tmp_path, interrupted_at):
    agent = tiny("dqn")
    undisturbed = agent.fit(pool, task, seed=3)  # without a folder
    for moment in (2, 3, 5, 1):
        with interrupted_at(moment):
            agent.fit(pool, task, seed=3, folder=tmp_path)
    assert same_tensors(agent.fit(pool, task, seed=3, folder=tmp_path), undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("learner", ["ppo", "dqn", "tapo"])
def test_killed_at_random_moments_it_ends_with_the_same_bits(learner, pool, task, tmp_path):
    agent, rng, kills = TAPO if learner == "tapo" else tiny(learner), np.random.default_rng(0), 0
    undisturbed = agent.fit(pool, task, seed=3, folder=tmp_path / "whole")
    processes, begun = get_context("fork"), time.monotonic()
    agent.fit(pool, task, seed=3, folder=tmp_path / "timed")
    seconds = time.monotonic() - begun
    while kills < 8:
        process = processes.Process(target=agent.fit, args=(pool, task, 3), kwargs={"folder": tmp_path / "cut"})
        process.start()
        process.join(rng.uniform(0.2, 0.9) * seconds)
        if process.exitcode is None:
            process.kill()
            kills += 1
        else:
            assert process.exitcode == 0
            assert same_tensors(agent.fit(pool, task, seed=3, folder=tmp_path / "cut"), undisturbed)
            shutil.rmtree(tmp_path / "cut")
        process.join()
    assert same_tensors(agent.fit(pool, task, seed=3, folder=tmp_path / "cut"), undisturbed)


def test_tapo_that_was_broken_off_ends_with_the_same_bits(pool, task, tmp_path, interrupted_at):
    whole = []
    undisturbed = TAPO.fit(pool, task, seed=3, track=whole.append, folder=tmp_path / "whole")
    assert [row["iteration"] for row in whole] == [0, 1, 2, 3, 4]  # the last one is measured alone
    rows, track = broken_off(after=2)
    with pytest.raises(Interruption):
        TAPO.fit(pool, task, seed=3, track=track, folder=tmp_path / "cut")
    again = []
    with interrupted_at(2):  # its next checkpoint, of which the tree is written and the rest is not
        TAPO.fit(pool, task, seed=3, track=again.append, folder=tmp_path / "cut")
    found = TAPO.fit(pool, task, seed=3, track=again.append, folder=tmp_path / "cut")
    assert [row["iteration"] for row in again] == [2, 2, 3, 4]
    assert measured([*rows, *again]) == whole
    assert same_tensors(found, undisturbed)


def test_what_is_trained_is_not_trained_again(pool, task, tmp_path, monkeypatch):
    agent = tiny("ppo")
    first = agent.fit(pool, task, seed=3, folder=tmp_path / "ppo")
    improved = replace(TAPO, iterations=1).fit(pool, task, seed=3, folder=tmp_path / "tapo")
    monkeypatch.setattr("agents.sb3.train", None)
    monkeypatch.setattr("agents.tapo._Improvement", None)
    rows = []
    again = agent.fit(pool, task, seed=3, track=rows.append, folder=tmp_path / "ppo")
    assert again.fingerprint == first.fingerprint
    found = replace(TAPO, iterations=1).fit(pool, task, seed=3, track=rows.append, folder=tmp_path / "tapo")
    assert found.fingerprint == improved.fingerprint
    assert rows == []


@pytest.fixture(scope="module")
def broken(pool, task, tmp_path_factory):
    """The folder of a training of PPO that was broken off."""
    folder = tmp_path_factory.mktemp("ppo")
    _, track = broken_off(after=4)
    with pytest.raises(Interruption):
        tiny("ppo").fit(pool, task, seed=3, track=track, folder=folder)
    return folder


def test_other_settings_are_refused_by_name(pool, task, broken):
    agent = tiny("ppo")
    for other, what in ((replace(agent, lr=0.5), "'lr': 0.5"), (replace(agent, arguments={**PPO, "n_epochs": 3}), "3")):
        with pytest.raises(ValueError, match=rf"checkpoints was made with settings .*{what}.*another folder"):
            other.fit(pool, task, seed=3, folder=broken)
    with pytest.raises(ValueError, match="made with seed 3, this run has 4"):
        agent.fit(pool, task, seed=4, folder=broken)
    with pytest.raises(ValueError, match="made with settings"):
        TAPO.fit(pool, task, seed=3, folder=broken)


@pytest.mark.parametrize("fault", ["cut off", "a weight is missing", "other shapes", "no tree"])
def test_a_damaged_checkpoint_is_named_and_may_be_deleted(fault, pool, task, broken, tmp_path):
    shutil.copytree(broken, tmp_path, dirs_exist_ok=True)
    [folder] = (tmp_path / "checkpoints").glob("0*")
    path = folder / STATE_FILE
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif fault == "no tree":
        (folder / "replay.tree").write_bytes(b"none")
    else:
        _, about = read(folder)
        arrays = load_file(path)
        name = next(name for name in arrays if name.startswith("policy/") and name.endswith("weight"))
        arrays[name] = arrays[name][1:]
        if fault == "a weight is missing":
            del arrays[name]
        save_file(arrays, path, {"about": json.dumps(about)})
    with pytest.raises(ValueError, match=f"{folder.name}.* (damaged|readable)"):
        tiny("ppo").fit(pool, task, seed=3, folder=tmp_path)
    shutil.rmtree(folder)
    rows, track = broken_off(after=1)
    with pytest.raises(Interruption):
        tiny("ppo").fit(pool, task, seed=3, track=track, folder=tmp_path)
    assert rows[0]["time/total_timesteps"] == 32  # it begins anew


def test_checkpoints_that_never_come_are_refused():
    with pytest.raises(ValueError, match="checkpoint_steps must be at least 1 or None, is 0"):
        StableBaselines(checkpoint_steps=0)
    with pytest.raises(ValueError, match="checkpoint_iterations must be at least 1, is 0"):
        Tapo(checkpoint_iterations=0)


def test_a_bridge_goes_on_from_its_state(pool, task):
    def bridge():
        environment = TreeRoutingVectorEnv(4, pool=pool, task=task, max_new_tokens=6)
        return VectorEnvBridge(environment, CostWeights())

    first, second = bridge(), bridge()
    rng = np.random.default_rng(0)
    first.seed(1)
    first.reset()
    for _ in range(8):
        first.step(rng.integers(0, 2, 4))
    second.set_state(first.get_state())
    for _ in range(8):
        actions = rng.integers(0, 2, 4)
        one, other = first.step(actions), second.step(actions)
        np.testing.assert_allclose(one[0], other[0], atol=1e-5)
        np.testing.assert_array_equal(one[1], other[1])
        np.testing.assert_array_equal(one[2], other[2])
        for info, told in zip(one[3], other[3], strict=True):
            assert info.keys() == told.keys()
            assert info.get("is_success") == told.get("is_success")
            if "episode" in info:
                assert (info["episode"]["r"], info["episode"]["l"]) == (told["episode"]["r"], told["episode"]["l"])
