import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import agents.preferences.store
from agents.citer import Citer
from agents.common.policy import Policy
from agents.common.rollout import Scheduling
from agents.heuristics import Always, Uncertainty
from agents.preferences.collector import PreferenceCollector
from agents.preferences.labels import DROPPED, Labels, shares
from agents.preferences.store import COLUMNS, FEATURES, PreferenceStore
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining
from envs.arrays import UNKNOWN
from envs.decoding.observation import Observation, all_features, feature_width, logit_features
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example

QUICK = {
    "examples": 20,
    "shard_examples": 6,
    "training": RouterTraining(epochs=2, batch_size=64),
    "scheduling": Scheduling(rows=16),
}


@pytest.fixture(scope="module")
def collected(pool, task, tmp_path_factory):
    """A finished fit: its folder, its policy, and its rows."""
    folder, rows = tmp_path_factory.mktemp("citer"), []
    policy = Citer(**QUICK).fit(pool, task, seed=1, track=rows.append, folder=folder)
    return folder, policy, rows


def same_weights(first, second):
    weights = (policy.network.state_dict().values() for policy in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# -- against the plain algorithm --------------------------------------------------------------------------------------


def plain_preferences(pool, task, example, policy, threshold, limit, branches=("slm",), rolled=(3,)):
    """The algorithm as the paper writes it: one token of each model at a time, a routed loop per rollout; no cache."""

    def next_token(model, tokens):
        output = model.network(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        return int(output.logits[0, -1].argmax()), output.hidden_states[-1][0, -1], output.logits[0, -1]

    def finish(tokens, count):
        while count < limit and tokens[-1] not in pool.end_tokens:
            slm_token, hidden, logits = next_token(pool.models[0], tokens)
            score = policy.score(
                Observation(hidden[None], logits[None], np.array([count]), np.array([0]), np.array([count]))
            )
            tokens = [*tokens, slm_token if score >= threshold else next_token(pool.models[1], tokens)[0]]
            count += 1
        return tokens

    prompt = pool.encode(example.prompt).tolist()
    reference = [*pool.encode(example.reference, special=False).tolist(), int(pool.end_tokens[0])]
    cases, outcomes = [], {"slm": [], "llm": []}
    for position, target in enumerate(reference):
        prefix = prompt + reference[:position]
        written = {name: next_token(model, prefix)[0] for name, model in zip(("slm", "llm"), pool.models, strict=True)}
        cases.append(1 if written["slm"] == target else 2 if written["llm"] == target else 3)
        for name, found in outcomes.items():
            if cases[-1] in rolled and name in branches and (len(branches) == 1 or written["slm"] != written["llm"]):
                whole = finish([*prefix, written[name]], position + 1)
                found.append(int(task.is_correct(example, pool.decode(np.array(whole[len(prompt) :])))))
            else:
                found.append(UNKNOWN)
    return cases, outcomes


@pytest.mark.parametrize(
    ("policy", "branches", "rolled"),
    [
        (Always(slm=True), "slm", (3,)),
        (Always(slm=True), "both", (3,)),
        (Uncertainty("max_probability"), "slm", (3,)),
        (Uncertainty("max_probability"), "both", (3,)),
        (Always(slm=True), "both", (2, 3)),
    ],
)
@torch.no_grad()
def test_preferences_equal_the_plain_algorithm(policy, branches, rolled, pool, task):
    examples = task.examples("train", 2, start=50)
    collector = PreferenceCollector(pool, task, examples, max_new_tokens=100, scheduling=Scheduling(rows=3))
    labels = Labels(case_2="rollout" if 2 in rolled else "llm", branches=branches)
    columns = collector.collect(range(2), labels, policy, 0.8)
    assert {*rolled} <= {*columns["case"]}
    for number, example in enumerate(examples):
        cases, outcomes = plain_preferences(
            pool, task, example, policy, 0.8, 100, ("slm",) if branches == "slm" else ("slm", "llm"), rolled
        )
        rows = columns["example"] == number
        assert columns["case"][rows].tolist() == cases
        for model in ("slm", "llm"):
            assert columns[f"{model}_outcome"][rows].tolist() == outcomes[model]


@pytest.mark.slow
def test_both_rounds_equal_the_plain_algorithm(pool, task, tmp_path):
    settings = Citer(examples=30, training=RouterTraining(epochs=3, batch_size=256), scheduling=Scheduling(rows=32))
    settings.fit(pool, task, seed=0, folder=tmp_path)
    weights = load_file(tmp_path / "round-1.safetensors")
    network = RouterNetwork(pool.slm.width)
    network.load_state_dict({k.removeprefix("best."): v for k, v in weights.items() if k.startswith("best.")})
    first, second = (PreferenceStore.open(tmp_path / f"round-{number}") for number in (1, 2))
    for store, policy in ((first, Always(slm=True)), (second, RouterPolicy(network.eval(), []))):
        columns = {name: store.column(name) for name in COLUMNS}
        for number, example in enumerate(task.examples("train", 30, start=1_000_000)):
            with torch.no_grad():
                cases, outcomes = plain_preferences(pool, task, example, policy, 0.5, limit=128)
            rows = columns["example"] == number
            positions = columns["position"][rows]
            assert columns["case"][rows].tolist() == np.array(cases)[positions].tolist()
            assert columns["slm_outcome"][rows].tolist() == np.array(outcomes["slm"])[positions].tolist()
            if store is first:
                assert rows.sum() == len(cases)
            else:
                assert positions.tolist() == np.flatnonzero(np.array(cases) == 3).tolist()


# -- labels and features ----------------------------------------------------------------------------------------------


def columns_of(cases, agree, slm=UNKNOWN, llm=UNKNOWN):
    count = len(cases)
    return {
        "case": np.array(cases),
        "slm_token": np.arange(count),
        "llm_token": np.where(agree, np.arange(count), -5),
        "slm_outcome": np.broadcast_to(slm, count).astype(np.int8),
        "llm_outcome": np.broadcast_to(llm, count).astype(np.int8),
    }


def test_labels_follow_the_settings():
    cases, agree = [1, 2, 3, 3, 3, 3], [True, False, True, True, False, False]
    columns = columns_of(cases, agree, slm=[-1, -1, 0, 1, 0, 1], llm=[-1, -1, -1, -1, 0, 1])
    expected = {
        Labels(): [1, 0, 0, 1, 0, 1],
        Labels(on_agreement="slm"): [1, 0, 1, 1, 0, 1],
        Labels(branches="both"): [1, 0, 1, 1, 1, 1],
        Labels(case_3="slm"): [1, 0, 1, 1, 1, 1],
        Labels(case_3="llm"): [1, 0, 0, 0, 0, 0],
        Labels(case_3="agreement"): [1, 0, 1, 1, 0, 0],
        Labels(case_3="drop"): [1, 0, DROPPED, DROPPED, DROPPED, DROPPED],
    }
    for labels, wanted in expected.items():
        assert labels.of(columns).tolist() == wanted
    worse = columns_of([3, 3, 3], [False] * 3, slm=[0, 0, 1], llm=[1, 0, 0])
    assert Labels(branches="both").of(worse).tolist() == [0, 1, 1]
    assert Labels().rolled_out(columns).tolist() == [False, False, True, True, True, True]
    for labels in (Labels(on_agreement="slm"), Labels(branches="both")):
        assert labels.rolled_out(columns).tolist() == [False, False, False, False, True, True]
    assert not Labels(case_3="llm").rolled_out(columns).any()


def test_shares_by_hand():
    columns = columns_of([1, 1, 2, 3], [True, True, False, True], slm=[-1, -1, -1, 1])
    found = shares(columns | {"label": np.array([1, 1, 0, DROPPED])})
    assert (found["case_1"], found["case_2"], found["case_3"]) == (0.5, 0.25, 0.25)
    assert (found["agree_in_case_3"], found["slm_rollouts"], found["slm_rollouts_right"]) == (1.0, 1, 1.0)
    assert (found["llm_rollouts"], found["prefers_slm"]) == (0, pytest.approx(2 / 3))


def test_logit_features_by_hand():
    probabilities = torch.tensor([[0.5, 0.25, 0.125, 0.125] + [0.0] * 20])
    found = logit_features(probabilities.log())
    assert found.shape == (1, feature_width("hidden_logits", 7) - 7)
    assert found[0, 0].item() == pytest.approx(1.75 * np.log(2), abs=1e-5)
    np.testing.assert_allclose(found[0, 1:4], np.log([0.5, 0.25, 0.125]), atol=1e-5)
    assert found.isfinite().all()


def test_stored_features_are_those_a_policy_sees(pool, task):
    example = task.example("train", 3)
    collector = PreferenceCollector(pool, task, [example], scheduling=Scheduling(rows=2))
    columns = collector.collect([0], Labels(case_3="slm"), Always(), 0.5)
    seen = []

    class Spy(Policy):
        def score(self, observation):
            seen.append(all_features(observation.hidden, observation.logits))
            return torch.ones(len(observation.positions))

    from agents.common.rollout import decode

    decode(pool, task, [example], Spy(), max_new_tokens=128)
    # as long as the SLM writes the reference, it is in the same states
    same = int(np.argmax(columns["case"] != 1)) + 1
    np.testing.assert_allclose(columns[FEATURES][:same], torch.cat(seen)[:same].half(), atol=2e-2)


# -- shards -----------------------------------------------------------------------------------------------------------


def test_rows_carry_what_made_them(collected, pool, task):
    folder, _, rows = collected
    first, second = (PreferenceStore.open(folder / f"round-{number}") for number in (1, 2))
    columns = {name: first.column(name) for name in COLUMNS}
    assert first.shards == 4
    counts = [len(pool.encode_response(task.example("train", 2_000_000 + e).reference)) for e in range(20)]
    assert np.bincount(columns["example"]).tolist() == counts
    assert columns["position"].tolist() == [p for count in counts for p in range(count)]
    assert set(columns["round"]) == {1}
    assert set(second.column("round")) == {2}
    third = columns["case"] == 3
    assert ((columns["slm_outcome"] != UNKNOWN) == third).all()
    assert second.column("position").tolist() == columns["position"][third].tolist()
    assert columns["label"].tolist() == Labels().of(columns).tolist()
    features = torch.cat([first.features(shard) for shard in range(4)])
    assert features.dtype == torch.float16
    assert features.shape == (sum(counts), feature_width("hidden_logits", pool.slm.width))
    by_run = {row["run"]: row for row in rows if "case_3" in row}
    assert by_run["round 1"]["case_3"] == pytest.approx(third.mean())
    assert {"ece", "reliability"} <= {key for row in rows for key in row}


def test_a_round_says_how_many_tokens_it_relabelled(collected, pool, task, tmp_path, caplog):
    folder, _, rows = collected
    first, second = (PreferenceStore.open(folder / f"round-{number}") for number in (1, 2))
    changed = first.column("label")[first.column("case") == 3] != second.column("label")
    told = {row["run"]: row.get("relabelled") for row in rows if "case_3" in row}
    assert told == {"round 1": None, "round 2": changed.sum()}
    again = []
    with caplog.at_level("INFO", "agents.citer"):
        # a threshold that leaves every token to the SLM, as in round 1
        Citer(**QUICK, threshold=0.0).fit(pool, task, seed=1, track=again.append, folder=tmp_path)
    assert [row["relabelled"] for row in again if "relabelled" in row] == [0]
    assert "round 2 relabelled no token: its rollouts agree with round 1's" in caplog.text
    losses = {
        number: [row["loss"] for row in again if row["run"] == f"round {number}" and "loss" in row] for number in (1, 2)
    }
    assert losses[1] == losses[2] != []


def test_what_is_finished_is_not_made_again(collected, pool, task, monkeypatch):
    folder, policy, rows = collected
    before = contents(folder / "round-1"), contents(folder / "round-2")
    monkeypatch.setattr(PreferenceCollector, "collect", None)
    monkeypatch.setattr(PreferenceCollector, "redo", None)
    again = []
    found = Citer(**QUICK).fit(pool, task, seed=1, track=again.append, folder=folder)
    assert again == rows
    assert (contents(folder / "round-1"), contents(folder / "round-2")) == before
    assert same_weights(found, policy)


@pytest.mark.parametrize("moment", [1, 9, 17, *(pytest.param(m, marks=pytest.mark.slow) for m in (5, 13, 21))])
def test_an_interrupted_fit_ends_with_the_same_bytes(collected, pool, task, tmp_path, interrupted_at, moment):
    folder, policy, rows = collected
    with interrupted_at(moment):
        Citer(**QUICK).fit(pool, task, seed=1, folder=tmp_path)
    again = []
    found = Citer(**QUICK).fit(pool, task, seed=1, track=again.append, folder=tmp_path)
    for number in (1, 2):
        assert contents(tmp_path / f"round-{number}") == contents(folder / f"round-{number}")
    assert again == rows
    assert same_weights(found, policy)


def test_a_damaged_shard_is_named_made_again_and_the_others_stay(collected, pool, task, tmp_path):
    folder, _, _ = collected
    copy = tmp_path / "round-1"
    shutil.copytree(folder / "round-1", copy)
    whole = contents(copy)
    path = copy / "shard-00002.arrow"
    path.write_bytes(path.read_bytes()[:-900])
    store = PreferenceStore.open(copy)
    assert store.check() == [2]
    with pytest.raises(ValueError, match=r"shard-00002\.arrow of 4 shards is damaged"):
        store.require()
    assert len(store.features(1)) == store.rows()[1]
    (copy / "shard-00000.json").unlink()
    with pytest.raises(ValueError, match=r"shard-00000\.arrow of 4 shards is missing"):
        store.require()
    settings = Citer(**QUICK, preferences=str(copy))
    with pytest.raises(ValueError, match="missing"):
        settings.fit(pool, task, seed=1)
    Citer(**QUICK).collect(pool, task, 1, copy)
    assert contents(copy) == whole


def test_preferences_of_other_settings_are_refused_with_both_named(collected, pool, task):
    folder, _, _ = collected
    given = str(folder / "round-1")
    with pytest.raises(ValueError, match=r"'on_agreement': 'rollout'.*'on_agreement': 'slm'"):
        Citer(**QUICK, preferences=given, labels=Labels(on_agreement="slm")).fit(pool, task, seed=1)
    with pytest.raises(ValueError, match=r"'start': 2000000.*'start': 3000000"):
        Citer(**QUICK, preferences=given).fit(pool, task, seed=2)
    with pytest.raises(ValueError, match="made with seed 1, this run has 2"):
        Citer(**QUICK).collect(pool, task, 2, folder / "round-1")
    with pytest.raises(ValueError, match="give a folder that"):
        Citer(**QUICK, preferences=str(folder)).fit(pool, task, seed=1)
    # what needs no rollouts may use those that are there
    shared = Citer(**QUICK, preferences=given, labels=Labels(case_3="llm")).fit(pool, task, seed=1)
    alone = Citer(**QUICK, labels=Labels(case_3="llm")).fit(pool, task, seed=1)
    assert same_weights(shared, alone)


def test_a_full_disk_is_an_error_that_says_so_and_leaves_the_finished_shards(pool, task, tmp_path, monkeypatch):
    write = agents.preferences.store.write_whole

    def full(path, how):
        if path.name == "shard-00002.arrow":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, how)

    with monkeypatch.context() as patch:
        patch.setattr("agents.preferences.store.write_whole", full)
        with pytest.raises(OSError, match=r"no space left for shard 2 .* the 2 shards before it are whole"):
            Citer(**QUICK).collect(pool, task, 1, tmp_path)
    store = PreferenceStore.open(tmp_path)
    assert store.missing() == [2, 3]
    assert store.check() == []
    assert not list(tmp_path.glob("*.partial"))


# -- bad input --------------------------------------------------------------------------------------------------------


class Few(ArithmeticTask):
    """The task with one example that is too long."""

    def example(self, split, index):
        example = super().example(split, index)
        if index % 1_000_000 != 3:
            return example
        return Example("task/long", example.prompt, "1 " * 200 + example.reference, example.answer)


def test_an_example_that_is_too_long_is_named_or_skipped_and_counted(pool, tmp_path):
    with pytest.raises(ValueError, match="example task/long has a reference of"):
        Citer(**QUICK).collect(pool, Few(), 0, tmp_path / "error")
    rows = []
    store = Citer(**QUICK, on_too_long="skip").collect(pool, Few(), 0, tmp_path / "skip", rows.append)
    assert store.skipped() == rows[0]["skipped"] == 1
    assert store.note(0)["skipped"] == ["task/long"]
    assert sorted(set(store.column("example"))) == [e for e in range(20) if e != 3]


def test_a_reference_that_ends_early_is_named(pool, task):
    end = pool.tokenizer.convert_ids_to_tokens(pool.end_token)
    early = Example("task/early", "A question?", f"half {end} whole", "1")
    with pytest.raises(ValueError, match="task/early: its reference holds an end-of-sequence token before its end"):
        PreferenceCollector(pool, task, [early])


def test_no_token_in_case_3_leaves_one_round(pool, task, tmp_path, monkeypatch):
    monkeypatch.setattr(Labels, "rolled_out", lambda self, columns: np.zeros(len(columns["case"]), dtype=bool))
    rows = []
    Citer(**QUICK).fit(pool, task, seed=1, track=rows.append, folder=tmp_path)
    assert not (tmp_path / "round-2").exists()
    assert {row["run"] for row in rows} == {"round 1"}


def test_a_checkpoint_of_other_settings_is_refused(collected, pool, task, tmp_path):
    folder, _, _ = collected
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    other = QUICK | {"training": RouterTraining(epochs=3, batch_size=64)}
    with pytest.raises(ValueError, match=r"round-1\.safetensors is the checkpoint of .*\"epochs\": 2.*\"epochs\": 3"):
        Citer(**other).fit(pool, task, seed=1, folder=copy)


def test_a_policy_says_how_well_it_is_calibrated(collected, tmp_path):
    _, policy, _ = collected
    policy.save(tmp_path)
    found = json.loads((Path(tmp_path) / "policy.json").read_text())["calibration"]
    assert 0 <= found["ece"] <= 1
    scores = [score for score, _, _ in found["reliability"]]
    assert scores == sorted(scores)
