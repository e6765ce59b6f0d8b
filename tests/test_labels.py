"""What CITER's labels are made of, rollouts in case 2, references that the LLM wrote, the released code's training."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import agents.preferences.llm_references
from agents.citer import Citer, CiterRounds
from agents.common.rollout import Scheduling
from agents.preferences.composition import (
    CaseTwoSample,
    composition,
    composition_table,
    right_by_kind,
    sample_table,
    token_kinds,
)
from agents.preferences.labels import DROPPED, Labels
from agents.preferences.llm_references import FILE, llm_references
from agents.preferences.store import COLUMNS, PreferenceStore
from agents.router.dataset import LabelledTokens
from agents.router.network import RELEASED, RouterNetwork
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router
from envs.arrays import NO_ACTION, UNKNOWN
from envs.decoding.preference_rule import preferred_actions
from envs.models.pool import models_manifest
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import FirstExamples
from experiments.common.tracking import Tracker
from experiments.training.run import labels_summary
from tests.test_preferences import contents, same_weights
from tests.test_saved_before import SAVED

QUICK = {
    "examples": 6,
    "shard_examples": 4,
    "training": RouterTraining(epochs=1, batch_size=64),
    "scheduling": Scheduling(rows=16),
}
DISAGREEMENTS = Labels(case_2="rollout", on_agreement="slm")


def columns_of(store):
    return {name: store.column(name) for name in COLUMNS}


# -- case 2 -----------------------------------------------------------------------------------------------------------


def test_a_label_in_case_2_follows_its_rollouts():
    columns = {
        "case": np.array([1, 2, 2, 3, 3]),
        "slm_token": np.arange(5),
        "llm_token": np.array([0, -1, -1, 3, -1]),
        "slm_outcome": np.array([UNKNOWN, 0, 1, 1, 0], dtype=np.int8),
        "llm_outcome": np.array([UNKNOWN, 0, 1, 1, 1], dtype=np.int8),
    }
    expected = {
        Labels(): [1, 0, 0, 1, 0],
        Labels(case_2="rollout"): [1, 0, 1, 1, 0],
        Labels(case_2="rollout", branches="both"): [1, 1, 1, 1, 0],
        Labels(case_2="rollout", case_3="llm"): [1, 0, 1, 0, 0],
        Labels(case_2="rollout", case_3="drop"): [1, 0, 1, DROPPED, DROPPED],
    }
    for labels, wanted in expected.items():
        assert labels.of(columns).tolist() == wanted, labels
    assert Labels(case_2="rollout", case_3="llm").rolled_out(columns).tolist() == [False, True, True, False, False]
    assert DISAGREEMENTS.rolled_out(columns).tolist() == [False, True, True, False, True]
    assert [labels.rolls for labels in (Labels(), Labels(case_3="llm"), Labels(case_2="rollout", case_3="llm"))] == [
        True, False, True,
    ]  # fmt: skip
    with pytest.raises(ValueError, match="unknown case_2 'slm'; choose one of llm, rollout"):
        Labels(case_2="slm")


def test_a_sample_of_rollouts_is_even_over_examples_and_the_rest_is_left_out():
    rng = np.random.default_rng(0)
    example = np.repeat([3, 4, 9, 5], [40, 1, 30, 50])  # as they lie in a batch
    columns = {
        "example": example,
        "case": rng.integers(1, 4, len(example)),
        "slm_token": np.zeros(len(example), dtype=int),
        "llm_token": rng.integers(0, 2, len(example)),
    }
    for every in (2, 3, 7):
        for needed in (Labels(), Labels(on_agreement="slm"), Labels(case_2="rollout")):
            labels, all_of_them = replace(needed, rollout_every=every), needed.rolled_out(columns)
            drawn = labels.rolled_out(columns)
            assert not (drawn & ~all_of_them).any()
            for number in np.unique(example):
                own = drawn[all_of_them & (example == number)]
                places = np.flatnonzero(own)
                assert set(np.diff(places)) <= {every}
                assert places.size == 0 or (places[0] < every and places[-1] >= len(own) - every)
            # whatever else is in the batch, an example's tokens are the same
            alone = [labels.rolled_out({k: v[example == n] for k, v in columns.items()}) for n in (3, 4, 9, 5)]
            assert drawn.tolist() == np.concatenate(alone).tolist()
            outcome = np.where(drawn, 1, UNKNOWN).astype(np.int8)
            found = labels.of({**columns, "slm_outcome": outcome, "llm_outcome": outcome})
            kept = needed.of({**columns, "slm_outcome": np.ones_like(outcome), "llm_outcome": np.ones_like(outcome)})
            assert found.tolist() == np.where(all_of_them & ~drawn, DROPPED, kept).tolist()
            assert labels.counts(columns).tolist() == np.where(drawn, every, 1).tolist()
            assert needed.counts(columns) is None
    first = {
        tuple(np.flatnonzero(Labels(rollout_every=2).rolled_out({**columns, "example": example + n}))) for n in (0, 1)
    }
    assert len(first) == 2  # two examples with the same tokens give others of them
    assert Labels(rollout_every=2).rolled_out({k: v[:0] for k, v in columns.items()}).shape == (0,)
    for bad in ({"rollout_every": 0}, {"rollout_every": 2, "case_3": "llm"}):
        with pytest.raises(ValueError, match=r"rollout_every is .: it must be at least 1, and 1 where neither"):
            Labels(**bad)


def test_training_sees_the_sample_alone_in_all_rounds(pool, task, tmp_path):
    rows: list[dict] = []
    labels = Labels(rollout_every=3)
    Citer(**QUICK, labels=labels).fit(pool, task, seed=1, track=rows.append, folder=tmp_path)
    first, second = (columns_of(PreferenceStore.open(tmp_path / f"round-{number}")) for number in (1, 2))
    rolled = labels.rolled_out(first)
    third = first["case"] == 3
    assert 0 < rolled.sum() < third.sum()
    assert ((first["slm_outcome"] != UNKNOWN) == rolled).all()
    assert ((first["label"] == DROPPED) == (third & ~rolled)).all()
    assert second["position"].tolist() == first["position"][rolled].tolist()
    assert DROPPED not in second["label"]
    for row in (row for row in rows if "slm_rollouts" in row):
        assert row["slm_rollouts"] == rolled.sum()
        assert sum(kind["dropped"] for kind in row["composition"]["case_3"].values()) == (third & ~rolled).sum()


def test_the_rule_knows_outcomes_in_case_2():
    case, agree, outcomes = np.array([1, 2, 2, 2]), np.array([True, False, False, False]), np.array([0, 0, 1, UNKNOWN])
    assert preferred_actions(case, agree, "llm", outcomes).tolist() == [0, 1, 1, 1]
    assert preferred_actions(case, agree, "llm", outcomes, "outcome").tolist() == [0, 1, 0, NO_ACTION]
    with pytest.raises(ValueError, match="case_2 outcome needs outcomes"):
        preferred_actions(case, agree, "llm", None, "outcome")
    with pytest.raises(ValueError, match="unknown case_2 'slm'"):
        preferred_actions(case, agree, "llm", outcomes, "slm")


@pytest.fixture(scope="module")
def rolled(pool, task, tmp_path_factory):
    """A fit with rollouts wherever the models disagree, finished by the LLM: its folder and its rows."""
    folder, rows = tmp_path_factory.mktemp("rolled"), []
    settings = Citer(**QUICK, labels=DISAGREEMENTS, continuation="llm", sample=CaseTwoSample(positions=5))
    settings.fit(pool, task, seed=1, track=rows.append, folder=folder)
    return folder, rows


def test_with_case_2_left_to_the_llm_collections_are_what_they_were(rolled, pool, task, tmp_path):
    settings = Citer(**QUICK, labels=Labels(on_agreement="slm"), continuation="llm")
    published = settings.collect(pool, task, 1, tmp_path)
    found, more = columns_of(published), columns_of(PreferenceStore.open(rolled[0] / "round-1"))
    second = found["case"] == 2
    assert second.any()
    assert set(found["slm_outcome"][second]) == {UNKNOWN}
    assert UNKNOWN not in more["slm_outcome"][second]
    for name in COLUMNS:
        elsewhere = ~second if name in ("slm_outcome", "label") else slice(None)
        assert found[name][elsewhere].tolist() == more[name][elsewhere].tolist(), name


def test_a_later_round_rolls_case_2_out_again(pool, task, tmp_path):
    Citer(**QUICK, labels=DISAGREEMENTS).fit(pool, task, seed=1, folder=tmp_path)
    first, second = (columns_of(PreferenceStore.open(tmp_path / f"round-{number}")) for number in (1, 2))
    again = DISAGREEMENTS.rolled_out(first)
    assert second["position"].tolist() == first["position"][again].tolist()
    assert {2, 3} == {*second["case"]}


def test_what_was_collected_before_serves_and_is_refused_by_name(pool, task, tmp_path):
    kept = Path(shutil.copytree(SAVED / "preferences", tmp_path / "kept"))
    before = {"examples": 6, "shard_examples": 4, "training": QUICK["training"], "preferences": str(kept)}
    # the manifest is the one that was written before there was a choice, to the letter
    manifest = {"format": 1, **CiterRounds(Citer(**before), pool, task, 7).manifest(None, 1), "shards": 2}
    assert list(manifest.items()) == list(json.loads((kept / "manifest.json").read_text()).items())
    Citer(**before, rounds=1).fit(pool, task, seed=7)
    with pytest.raises(ValueError, match=r"was made with labels .*, this run has .*'case_2': 'rollout'"):
        Citer(**before, labels=Labels(case_2="rollout")).fit(pool, task, seed=7)
    with pytest.raises(ValueError, match=r"was made with shared .*, this run has .*'references': 'llm'"):
        Citer(**before, references="llm", labels=Labels(case_3="llm")).fit(pool, task, seed=7)


# -- what labels are made of ------------------------------------------------------------------------------------------


def test_a_tasks_tokens_are_of_a_kind(pool, task):
    wanted = {
        "number": ["7", "12"],
        "operator": [" + ", "= ", " / "],
        "mark": ["\n#### ", "##"],
        "wording": [" apples", " ", "."],
    }
    for kind, tokens in wanted.items():
        assert {task.token_kind(token) for token in tokens} == {kind}
    assert FirstExamples(task, 2).token_kind("7") == "number"
    assert super(ArithmeticTask, task).token_kind("7") == "other"
    tokens = pool.encode_response("So 4 + 3 = 7.\n#### 7")
    kinds = token_kinds(tokens, pool, task)
    assert kinds[-1] == "end"
    assert "end" not in kinds[:-1]
    assert [pool.decode(tokens[kinds == kind]) for kind in ("number", "mark")] == ["4377", "\n#### "]
    assert "".join(pool.decode(tokens[kinds == "operator"]).split()) == "+="


def test_composition_sums_to_all_labels():
    rng = np.random.default_rng(0)
    columns = {"case": rng.integers(1, 4, 200), "label": rng.integers(-1, 2, 200)}
    kinds = np.array(["end", "number", "wording"])[rng.integers(0, 3, 200)]
    found = composition(columns, kinds)
    assert sum(count for kinds in found.values() for labels in kinds.values() for count in labels.values()) == 200
    here = (columns["case"] == 2) & (kinds == "number")
    assert found["case_2"]["number"] == {
        name: int((columns["label"][here] == label).sum()) for name, label in (("slm", 1), ("llm", 0), ("dropped", -1))
    }
    alone = composition({"case": np.array([1]), "label": np.array([1])}, np.array(["end"]))
    assert alone == {"case_1": {"end": {"slm": 1, "llm": 0, "dropped": 0}}, "case_2": {}, "case_3": {}}
    lines = composition_table(found).splitlines()
    assert len(lines) == 10
    shares = [float(line.split()[-1][:-1]) for line in lines[1:]]
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert shares == sorted(shares, reverse=True)


def test_rows_say_what_labels_are_made_of(rolled, pool, task):
    folder, rows = rolled
    columns = columns_of(PreferenceStore.open(folder / "round-1"))
    [row] = [row for row in rows if "composition" in row]
    assert row["problems"] == 6
    counts = {
        case: sum(map(sum, (labels.values() for labels in kinds.values())))
        for case, kinds in row["composition"].items()
    }
    assert counts == {f"case_{case}": (columns["case"] == case).sum() for case in (1, 2, 3)}
    slm = sum(labels["slm"] for kinds in row["composition"].values() for labels in kinds.values())
    assert slm == (columns["label"] == 1).sum()
    ends = sum(sum(kinds.get("end", {}).values()) for kinds in row["composition"].values())
    assert ends == 6
    # the LLM finished these rollouts as well, so that a sample of them says the same
    drawn = CaseTwoSample(positions=5).draw(columns, 1)
    assert (columns["case"][drawn] == 2).all()
    assert len(drawn) == 5
    kinds = CiterRounds(Citer(**QUICK), pool, task, 1).kinds(columns)
    assert row["case_2_sample"] == right_by_kind(columns["slm_outcome"][drawn], kinds[drawn])
    assert json.dumps(row)


def test_a_sample_is_drawn_by_the_seed_and_no_larger_than_case_2():
    columns = {"case": np.array([1, 2, 3] * 20)}
    some, again, other = (CaseTwoSample(positions=8).draw(columns, seed).tolist() for seed in (0, 0, 1))
    assert some == again != other
    assert CaseTwoSample(positions=59).draw(columns, 0).tolist() == list(range(1, 60, 3))
    for wrong, message in (({"positions": -1}, "positions"), ({"finisher": "router"}, "unknown finisher 'router'")):
        with pytest.raises(ValueError, match=message):
            CaseTwoSample(**wrong)
    table = sample_table({"number": {"rollouts": 4, "right": 1}, "wording": {"rollouts": 12, "right": 12}})
    assert [line.split() for line in table.splitlines()[1:]] == [
        ["wording", "12", "12", "100.0%"],
        ["number", "4", "1", "25.0%"],
    ]


def test_a_summary_says_what_the_last_round_trained_on(tmp_path, capsys):
    made = [composition({"case": np.array([2]), "label": np.array([label])}, np.array(["number"])) for label in (1, 0)]
    with Tracker(tmp_path) as track:
        assert labels_summary(track) == {}
        for number, counts in enumerate(made, 1):
            track({"run": f"round {number}", "composition": counts})
        assert labels_summary(track) == {"composition": made[1]}
    assert "case 2  number       1    0    1        0         100.0%" in capsys.readouterr().out


def test_preferences_on_other_references_are_named(pool, task):
    rounds = CiterRounds(Citer(**QUICK), pool, task, 1)
    with pytest.raises(ValueError, match="the preferences hold 3 tokens, the references of their 2 examples"):
        rounds.kinds({"example": np.array([0, 1, 1])})


def test_the_end_has_no_label_where_that_is_asked_for(rolled, pool, task, tmp_path):
    rows = []
    Citer(**QUICK, labels=Labels(case_3="llm"), end_labels=False).fit(pool, task, seed=1, track=rows.append)
    [row] = [row for row in rows if "composition" in row]
    dropped = {kind: labels["dropped"] for kinds in row["composition"].values() for kind, labels in kinds.items()}
    assert dropped.pop("end") > 0
    assert set(dropped.values()) == {0}
    of_ends = [kinds["end"] for kinds in row["composition"].values() if "end" in kinds]
    assert sum(labels["dropped"] for labels in of_ends) == 6


# -- references that the LLM wrote ------------------------------------------------------------------------------------


class Odd(ArithmeticTask):
    """Only odd numbers are right."""

    def is_correct(self, example, response):
        return super().is_correct(example, response) and int(example.answer) % 2 == 1


def test_the_llms_references_are_its_right_answers(pool, tmp_path, monkeypatch):
    task = Odd()
    examples = task.examples("train", 12, start=3_000_000)
    found = llm_references(pool, task, examples, tmp_path, scheduling=Scheduling(rows=8))
    kept = [answer is not None for answer in found]
    assert 0 < sum(kept) < 12
    for example, answer in zip(examples, found, strict=True):
        if answer is not None:
            assert task.is_correct(example, pool.decode(answer))
            assert answer[-1] in pool.end_tokens
    monkeypatch.setattr(agents.preferences.llm_references, "decode_alone", None)
    again = llm_references(pool, task, examples, tmp_path)
    assert [None if answer is None else answer.tolist() for answer in again] == json.loads(
        (tmp_path / FILE).read_text()
    )


@pytest.fixture(scope="module")
def answered(pool, tmp_path_factory):
    """A fit on the LLM's right answers: its folder, its policy and its rows."""
    folder, rows = tmp_path_factory.mktemp("answered"), []
    policy = Citer(**QUICK, references="llm", labels=DISAGREEMENTS).fit(pool, Odd(), 1, rows.append, folder)
    return folder, policy, rows


def test_only_right_answers_are_walked(answered, pool):
    folder, _, rows = answered
    answers = json.loads((folder / "round-1" / FILE).read_text())
    columns = columns_of(PreferenceStore.open(folder / "round-1"))
    right = [number for number, answer in enumerate(answers) if answer is not None]
    assert 0 < len(right) < 6
    assert np.unique(columns["example"]).tolist() == right
    assert [len(answers[number]) for number in right] == np.bincount(columns["example"])[right].tolist()
    # it wrote these tokens itself; what is left is rounding
    assert (columns["case"] == 3).mean() < 0.01
    written = columns["llm_token"][columns["case"] == 2].tolist()
    pairs = zip(columns["example"], columns["position"], columns["case"], strict=True)
    assert written == [answers[example][position] for example, position, case in pairs if case == 2]
    told = [row for row in rows if "problems" in row]
    assert {row["problems"] for row in told} == {len(right)}
    assert {row["skipped"] for row in told} == {0}


@pytest.mark.parametrize("moment", [3, 6])
def test_an_interrupted_fit_on_the_llms_references_ends_with_the_same_bytes(
    answered, pool, tmp_path, interrupted_at, moment
):
    folder, policy, rows = answered
    settings = Citer(**QUICK, references="llm", labels=DISAGREEMENTS)
    with interrupted_at(moment):
        settings.fit(pool, Odd(), seed=1, folder=tmp_path)
    again = []
    found = settings.fit(pool, Odd(), 1, again.append, tmp_path)
    for number in (1, 2):
        assert contents(tmp_path / f"round-{number}") == contents(folder / f"round-{number}")
    assert again == rows
    assert same_weights(found, policy)


def test_preferences_on_the_llms_references_serve_others_of_these_alone(answered, pool):
    given = {**QUICK, "preferences": str(answered[0] / "round-1"), "labels": Labels(case_3="llm")}
    rows = []
    Citer(**given, references="llm").fit(pool, Odd(), seed=1, track=rows.append)
    assert sum(row.get("slm_rollouts", 0) for row in rows) == 0
    with pytest.raises(ValueError, match=r"was made with shared \{'references': 'llm'\}"):
        Citer(**given).fit(pool, Odd(), seed=1)


def test_references_that_are_missing_or_damaged_are_named(answered, pool, task, tmp_path):
    copy = Path(shutil.copytree(answered[0] / "round-1", tmp_path / "copy"))
    settings = Citer(**QUICK, references="llm", labels=DISAGREEMENTS)
    for text, message in (("[[1]]", "it holds 1 answers, there are 6 problems"), ("{", "holds no readable answers")):
        (copy / FILE).write_text(text)
        with pytest.raises(ValueError, match=message):
            settings.collect(pool, Odd(), 1, copy)
    (copy / FILE).unlink()
    with pytest.raises(ValueError, match=r"lacks references\.json, the answers; give another folder"):
        settings.collect(pool, Odd(), 1, copy)

    class Never(ArithmeticTask):
        def is_correct(self, example, response):
            return False

    with pytest.raises(ValueError, match="embedded/llm has no right answer to 6 training problems"):
        settings.collect(pool, Never(), 1, tmp_path / "never")
    with pytest.raises(ValueError, match="unknown references 'mine'"):
        Citer(references="mine")


# -- the released code's network and training -------------------------------------------------------------------------


def test_the_released_layout_has_no_relu_between_its_last_layers(pool, tmp_path):
    torch.manual_seed(0)
    width = pool.slm.width
    network = RouterNetwork(width, layout="released").eval()
    paper = RouterNetwork(width).eval()
    paper.load_state_dict({name: value for name, value in network.state_dict().items() if name != RELEASED})
    features = torch.randn(7, width)
    first, norm, _, _, second, _, last = network.layers
    hidden = second(torch.relu(norm(first(features))))
    torch.testing.assert_close(network(features), last(hidden)[:, 0])
    torch.testing.assert_close(paper(features), last(torch.relu(hidden))[:, 0])
    assert not torch.allclose(network(features), paper(features))
    RouterPolicy(network, models_manifest(pool)).save(tmp_path)
    loaded = RouterPolicy.load(tmp_path, pool)
    torch.testing.assert_close(loaded.network(features), network(features))
    network.train()
    dropped = [layer.p for layer in network.layers if isinstance(layer, torch.nn.Dropout)]
    assert dropped == [0.1, 0.1]


def labelled(count=50, examples=5):
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(3, 2, size=(count, 2))).half()
    return LabelledTokens.in_memory(
        features, rng.random(count) < 0.5, np.repeat(np.arange(examples), count // examples)
    )


def test_a_row_that_counts_for_three_is_three_rows(monkeypatch):
    counts = np.where(np.arange(50) % 4 == 0, 3, 1)
    data = replace(labelled(), counts=counts)
    spread = np.repeat(np.arange(50), counts)
    features, _ = next(data.blocks(np.ones(50, dtype=bool)))
    repeated = LabelledTokens.in_memory(features[spread], data.prefers_slm[spread], data.examples[spread])
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=50)).float()
    for weights in ((1.0, 1.0), (0.7, 2.0)):
        one = data.loss(logits, np.arange(50), weights) * 50
        torch.testing.assert_close(one, repeated.loss(logits[spread], np.arange(len(spread)), weights) * len(spread))
    # what is reported of the rows held out, and of the labels, is that of as many rows
    monkeypatch.setattr("agents.router.training.evaluate_loss", lambda *_: 1.0)
    monkeypatch.setattr(
        "agents.router.training._RouterFit.epoch", lambda self, _: self.history.append({"validation_loss": 1.0}) or {}
    )
    settings = RouterTraining(epochs=1, units=[3], standardise=False)
    reports = [fit_router(of, settings, 0, lambda row: None, torch.device("cpu"), "toy")[1] for of in (data, repeated)]
    assert reports[0].pop("train_labels") < reports[1].pop("train_labels")
    assert reports[0] == reports[1]
    assert reports[0] != fit_router(labelled(), settings, 0, lambda row: None, torch.device("cpu"), "toy")[1]


def test_batches_in_one_order_are_those_of_the_tokens():
    data = labelled()
    where = np.arange(50) % 5 != 0
    rows = [rows.tolist() for _, rows in data.batches(where, 12, None)]
    assert rows == np.flatnonzero(where)[:36].reshape(3, 12).tolist()
    shuffled = [rows.tolist() for _, rows in data.batches(where, 12, np.random.default_rng(0))]
    assert shuffled != rows
    assert {row for part in shuffled for row in part} <= {*np.flatnonzero(where)}


def test_training_goes_as_its_settings_say(monkeypatch):
    rates, statistics = {}, {}
    for schedule in ("cosine", "constant"):
        seen = rates[schedule] = []
        step = torch.optim.AdamW.step

        def noted(optimizer, *args, seen=seen, step=step, **named):
            seen.append(optimizer.param_groups[0]["lr"])
            return step(optimizer, *args, **named)

        with monkeypatch.context() as patch:
            patch.setattr(torch.optim.AdamW, "step", noted)
            standardise = schedule == "cosine"
            settings = RouterTraining(
                epochs=2, batch_size=10, lr=0.01, schedule=schedule, standardise=standardise, units=[3]
            )
            network, _ = fit_router(labelled(), settings, 0, lambda row: None, torch.device("cpu"), "toy")
        statistics[standardise] = network.mean
    assert set(rates["constant"]) == {0.01}
    assert rates["cosine"] == sorted(rates["cosine"], reverse=True)
    assert rates["cosine"][-1] < 0.005
    assert statistics[False].tolist() == [0, 0]
    assert (statistics[True] > 2).all()
    for wrong in ({"schedule": "linear"}, {"layout": "mine"}):
        with pytest.raises(ValueError, match=rf"unknown {next(iter(wrong))}"):
            RouterTraining(**wrong)
