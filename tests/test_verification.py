"""Evaluations against their traces: what is right passes, and whatever is changed is found."""

import json

import numpy as np
import pytest

from agents.checking.speculative import speculate
from agents.common.policy import Policy
from agents.common.rollout import Scheduling
from agents.heuristics import Random, Uncertainty
from envs.costs import COLUMNS, SECONDS
from experiments.evaluation.kept import KeptEvaluation
from experiments.evaluation.runner import Evaluation, evaluate
from experiments.evaluation.settings import EvaluationSettings
from experiments.traces.recorder import Recorder
from experiments.traces.trace import read_trace, write_trace
from experiments.verification.evaluation import Verification
from experiments.verification.ledgers import expected_ledger
from experiments.verify import named_folder
from tests.corruptions import CORRUPTIONS, copied, corrupt
from tests.programs import call

FEW = {
    "examples": 5, "threshold_examples": 4, "llm_shares": (0.1, 0.4), "oracle_budget": 6, "draft_tokens": 4,
    "transcripts": 0, "bootstrap": 5,
}  # fmt: skip
FEWER = FEW | {"examples": 3, "threshold_examples": 2, "llm_shares": (0.3,), "oracle_budget": 2}
COUNTED = [column for column in range(COLUMNS) if column != SECONDS]
ARGUMENTS = [f"{name}={list(value) if isinstance(value, tuple) else value}" for name, value in FEW.items()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the program, through the live engine."""
    folder = tmp_path_factory.mktemp("verified") / "run"
    call("evaluate", "agents=[entropy]", *(one.replace(" ", "") for one in ARGUMENTS), f"hydra.run.dir={folder}")
    return folder


@pytest.fixture(scope="module")
def verified(pool, task):
    def check(folder, models=pool, **settings):
        evaluation = KeptEvaluation.read(folder / "runs" / "manifest.json")
        return Verification(task, models, **settings).check(evaluation)

    return check


def test_a_run_is_verified_in_one_line(run, tmp_path, capsys):
    call("verify", str(run), f"hydra.run.dir={tmp_path}")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("right: ")
    found = json.loads((tmp_path / "verification.json").read_text())
    assert found["right"]
    assert not found["faults"] + found["unchecked"]
    checked = found["checked"]
    traces = [read_trace(path) for path in run.glob("runs/**/*.parquet")]
    assert checked["tokens"] == sum(len(one.response) for trace in traces for one in trace.episodes) > 1000
    assert (
        checked["verdicts"] == checked["episodes"] == sum(len(trace.episodes) for trace in traces) > 5 * len(traces) / 2
    )
    assert checked["scores"] == sum(len(one.scores) for trace in traces for one in trace.episodes)
    assert checked["rows"] == len((run / "results.jsonl").read_text().splitlines())


def test_a_fault_is_listed_with_its_file_and_episode_and_ends_the_program_with_1(run, tmp_path, capsys):
    folder = copied(run, tmp_path / "run")
    path = folder / "runs" / "entropy" / "01.parquet"
    trace = read_trace(path)
    trace.episodes[3].response[7] += 1
    write_trace(path, trace)
    with pytest.raises(SystemExit) as end:
        call("verify", f"folder={folder}", f"hydra.run.dir={tmp_path / 'out'}")
    assert end.value.code == 1
    printed = capsys.readouterr().out
    assert f"{path}, episode 3: token 7 is " in printed
    assert printed.splitlines()[-1].startswith("WRONG: ")


def test_rescoring_runs_no_model_and_still_judges(run, tmp_path, verified, monkeypatch):
    monkeypatch.setattr("envs.models.language_model.LanguageModel.feed", None)
    found = verified(run, models=None)
    assert not found.faults
    assert "tokens" not in found.counts
    for kind in ("a verdict", "a kept cost", "a ledger entry", "a number of a row", "an end of sequence"):
        folder = copied(run, tmp_path / "run")
        corrupt(folder, kind, np.random.default_rng(0))
        assert verified(folder, models=None).faults, kind


def test_a_sample_is_drawn_with_its_seed(run, verified):
    one, same, other = (verified(run, sample=9, seed=seed).counts["tokens"] for seed in (0, 0, 1))
    assert one == same != other
    assert one < verified(run).counts["tokens"]
    with pytest.raises(ValueError, match="sample must be at least 1, is 0"):
        verified(run, sample=0)


def found(run, verified, kind, seed, folder):
    copied(run, folder)
    file = corrupt(folder, kind, np.random.default_rng(seed))
    faults = verified(folder).faults
    assert faults, f"{kind}, seed {seed}: not found in {file}"
    if file is not None:
        # what stands beside a trace is compared with it, so that a fault of one may be named at the other
        stem = file.partition(".")[0]
        assert any(fault.file.name.partition(".")[0] == stem for fault in faults), (kind, seed, file, faults)


@pytest.mark.parametrize("kind", ["a token", "a score on its side of the threshold", "a draft", "a kept cost"])
def test_a_corruption_is_found(run, verified, kind, tmp_path):
    found(run, verified, kind, 0, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_a_hundred_random_corruptions_are_found(run, verified, tmp_path, number):
    kinds = [*CORRUPTIONS]
    for seed in range(number * 25, (number + 1) * 25):
        found(run, verified, kinds[seed % len(kinds)], seed, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "settings"),
    [
        ("citer", ["agent.examples=24", "agent.training.epochs=1"]),
        ("recurrent_ppo", ["agent.steps=256", "agent.num_envs=8", "agent.selection.examples=4"]),
        ("r2r_small", ["agent.examples=24", "agent.training.epochs=1"]),
        ("mlp", ["agent.examples=24"]),
        ("routellm_mf", ["agent.examples=24", "agent.sees=[slm,llm,text]"]),
        ("margin", []),
    ],
)
def test_scores_of_what_was_trained_are_computed_again(agent, settings, tmp_path, capsys):
    settings = [*settings, *(f"evaluation.{one.replace(' ', '')}" for one in ARGUMENTS)]
    call("train", f"agent={agent}", *settings, "evaluate=true", f"hydra.run.dir={tmp_path / 'run'}")
    call("verify", f"{tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert found["right"]
    assert not found["unchecked"]
    path = tmp_path / "run" / "evaluation" / "runs" / agent / "00.parquet"
    trace = read_trace(path)
    one = trace.episodes[1]
    one.scores[:] = one.scores / 2 if one.scores[0] < trace.head.threshold else (1 + one.scores) / 2
    write_trace(path, trace)
    with pytest.raises(SystemExit):
        call("verify", f"{tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'out'}")
    assert f"{path}, episode 1: the score at decision" in capsys.readouterr().out


@pytest.mark.slow
def test_models_in_half_precision_are_decoded_again_and_verified(tmp_path, capsys):
    settings = [one.replace(" ", "") for one in ARGUMENTS if not one.startswith(("examples=", "oracle_budget="))]
    settings += ["models.dtype=bfloat16", "examples=30", "oracle_budget=0"]
    call("evaluate", "agents=[margin]", *settings, f"hydra.run.dir={tmp_path / 'run'}")
    call("verify", f"{tmp_path / 'run'}", f"hydra.run.dir={tmp_path / 'out'}")
    found = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert found["right"]
    # a whole response is rounded otherwise than one that is written token by token
    assert found["checked"]["responses decoded again"] > 0
    assert found["largest_score_difference"] < 1e-4


class Once(Policy):
    """Decides once, by the first token: a policy of whole responses."""

    per_response = True

    def score(self, observation):
        return observation.logit_features[:, 1].exp()

    def __repr__(self):
        return "Once()"


def test_an_evaluation_through_a_replay_tree_is_verified(pool, task, tmp_path, verified):
    settings = EvaluationSettings(**FEWER, tree=tmp_path / "states.tree")
    evaluate(pool, task, {"entropy": Uncertainty(), "once": Once()}, settings, tmp_path / "run")
    found = verified(tmp_path / "run")
    assert not found.faults
    assert read_trace(tmp_path / "run" / "runs" / "once" / "00.parquet").head.environment == "citer/TreeRouting-v1"


def test_a_pool_of_three_and_a_policy_that_decides_once_are_verified(pools, tmp_path):
    from tests.test_speculative import Letters

    task, three = Letters(), pools["three"]
    settings = EvaluationSettings(**FEWER | {"max_new_tokens": 20}, scheduling=Scheduling(rows=4))
    evaluate(three, task, {"random": Random(3), "once": Once()}, settings, tmp_path)
    found = Verification(task, three).check(KeptEvaluation.read(tmp_path / "runs" / "manifest.json"))
    assert not found.faults
    assert found.counts["tokens"] > 200
    trace = read_trace(tmp_path / "runs" / "llm.parquet")
    assert {writer for one in trace.episodes for writer in one.writers} == {2}
    trace = read_trace(tmp_path / "runs" / "once" / "00.parquet")
    assert trace.head.per_response
    assert {len({*one.writers.tolist()}) for one in trace.episodes} == {1}


@pytest.mark.parametrize("drafts", [1, 3])
def test_the_ledger_of_speculative_decoding_follows_from_writers_and_drafts(pools, drafts, tmp_path):
    from tests.test_speculative import Letters, kin_of

    task = Letters()
    kin = kin_of(pools["llama"])
    episodes = speculate(kin, task, task.examples("test", 30), drafts, 24)
    assert sum(len(episode.taken_back) for episode in episodes) > 5
    assert sum(episode.terminated for episode in episodes) > 3
    Recorder(kin, task, "test", max_new_tokens=24).speculative(tmp_path / "run", episodes, "speculative", drafts)
    trace = read_trace(tmp_path / "run.parquet")
    for one in trace.episodes:
        np.testing.assert_array_equal(one.ledger[:, COUNTED], expected_ledger(trace.head, one)[:, COUNTED])


def test_a_near_tie_on_another_machine_is_named_and_no_fault(run, pool, task, tmp_path, monkeypatch):
    import experiments.verification.evaluation as module
    from experiments.verification.forcing import Unlike

    evaluation = KeptEvaluation.read(run / "runs" / "manifest.json")
    real = module.unlike_tokens

    def nearly(gap):
        def unlike(pool, head, episodes, policy=None):
            unlike, scores = real(pool, head, episodes, policy)
            also = [Unlike(2, 4, "token 4 is 5", gap)] if head.policy in ("slm", "speculative", "oracle") else []
            return [*unlike, *also], scores

        return unlike

    monkeypatch.setattr(module, "unlike_tokens", nearly(5e-5))
    here = Verification(task, pool).check(evaluation)
    assert not here.faults
    # decoded again here, where the passes can be repeated; those of the oracle's search are not
    assert [tie.file.stem for tie in here.near_ties] == ["oracle"]
    assert here.counts["responses decoded again"] == 2
    monkeypatch.setattr(module, "same_machine", lambda head, pool: False)
    there = Verification(task, pool).check(evaluation)
    assert not there.faults
    assert len(there.near_ties) == 3
    assert str(there.near_ties[0]).endswith(".parquet, episode 2: token 4 is 5")
    monkeypatch.setattr(module, "unlike_tokens", nearly(2e-4))
    assert len(Verification(task, pool).check(evaluation).faults) == 3


def test_what_cannot_be_verified_is_refused_with_the_way_out(run, tmp_path, capsys, pools, task):
    def refused(*arguments):
        with pytest.raises(SystemExit) as end:
            call("verify", *arguments, f"hydra.run.dir={tmp_path / 'out'}")
        assert end.value.code == 2
        return "".join(capsys.readouterr())

    assert "there is no folder nowhere" in refused("nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no evaluations" in refused(f"{tmp_path / 'empty'}")
    untraced = copied(run, tmp_path / "untraced")
    for path in untraced.glob("runs/**/*.parquet"):
        path.unlink()
    assert "holds no traces; evaluate again" in refused(f"{untraced}")
    nameless = copied(run, tmp_path / "nameless")
    (nameless / "config.yaml").unlink()
    assert "says which task it had; choose: task=NAME" in refused(f"{nameless}")
    call("verify", f"{nameless}", "task=arithmetic", "models=embedded", f"hydra.run.dir={tmp_path / 'out'}")
    with pytest.raises(ValueError, match="was made with models"):
        Verification(task, pools["llama"]).check(KeptEvaluation.read(run / "runs" / "manifest.json"))


def test_a_folder_stands_on_the_command_line_by_itself(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert named_folder(["outputs/run", "sample=3"]) == ["folder='outputs/run'", "sample=3"]
    assert named_folder(["it's here"]) == ["folder='it\\'s here'"]
    assert named_folder([f"{tmp_path}/a=b"]) == [f"folder='{tmp_path}/a=b'"]
    assert named_folder(["one", "--cfg", "job", "-m"]) == ["folder='one'", "--cfg", "job", "-m"]


def test_evaluations_of_before_have_no_traces_and_go_on(run, pool, task, tmp_path):
    """What was kept before there were traces still loads; what is decoded from then on is traced."""
    folder = copied(run, tmp_path / "run")
    for path in folder.glob("runs/**/*.parquet"):
        path.unlink()
    (folder / "runs" / "entropy" / "01.safetensors").unlink()
    settings = EvaluationSettings(**FEW)
    Evaluation(pool, task, settings, folder).run({"entropy": Uncertainty()})
    assert [path.name for path in folder.glob("runs/**/*.parquet")] == ["01.parquet"]
    assert (folder / "runs" / "entropy" / "01.safetensors").is_file()
