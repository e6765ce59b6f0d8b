"""Evaluations of policies that check drafts, against their traces."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agents.checking.entropy import CheckedEntropy
from agents.checking.speculative import Speculative
from envs.decoding.judges import FirstDisagreement, Gap
from envs.environments.render import STANDS, Checked, stretches_of
from experiments.evaluation.kept import KeptEvaluation
from experiments.evaluation.runner import evaluate
from experiments.evaluation.settings import EvaluationSettings
from experiments.traces.trace import TakenBack, read_trace, write_trace
from experiments.verification.checking import wrong_verdicts
from experiments.verification.evaluation import Verification

SETTINGS = EvaluationSettings(
    examples=5, threshold_examples=4, llm_shares=(0.1, 0.4), oracle_budget=0, draft_tokens=4, transcripts=5,
    bootstrap=5, max_new_tokens=96, refine=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(pool, task, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checked") / "run"
    policies = {"checked_entropy": CheckedEntropy(), "adaptive": Speculative(32, 0.6)}
    evaluate(pool, task, policies, SETTINGS, folder)
    return folder, policies


@pytest.fixture
def verified(run, pool, task, monkeypatch):
    """Verifies what is there; the policies are those that were evaluated."""
    folder, policies = run
    monkeypatch.setattr(
        "experiments.verification.policies.Policies._find", lambda self, name: policies.get(name, "unknown")
    )

    def check():
        return Verification(task, pool).check(KeptEvaluation.read(folder / "runs" / "manifest.json"))

    return check


def test_checked_answers_are_verified_with_all_their_decisions(run, verified):
    found = verified()
    assert not found.faults
    assert not [one for one in found.unchecked if "config.yaml" not in one]  # no program made this run
    traces = [read_trace(path) for path in run[0].glob("runs/**/*.parquet")]
    checked = [trace for trace in traces if trace.head.decoding == "checked"]
    assert {trace.head.policy for trace in checked} == {"checked_entropy", "adaptive"}
    assert any(one.taken_back for trace in checked for one in trace.episodes)
    decisions = sum(len(one.scores) for trace in traces for one in trace.episodes)
    assert found.counts["scores"] == decisions


def test_the_page_shows_what_a_trace_says_was_taken_back(run, pool):
    page, shown = (run[0] / "index.html").read_text(), json.loads((run[0] / "transcripts.json").read_text())
    traces = [read_trace(path) for path in sorted(run[0].glob("runs/checked_entropy/*.parquet"))]
    for trace in traces:
        answers = [
            [[*stretch[::2], *stretch[3:]] for stretch in answer["stretches"]] for answer in shown["checked_entropy"]
        ]
        told = [
            [
                [max(one.writer, 0), one.text, *said(one)]
                for one in stretches_of(pool, episode.response, episode.writers, checked)
            ]
            for episode in trace.episodes
            for checked in [Checked.of(episode.taken_back, episode.ledger)]
        ]
        if answers == told:
            break
    else:
        pytest.fail("no trace has the answers of the page")
    backs = [back for episode in trace.episodes for back in episode.taken_back]
    assert page.count("<del>") == 1 + len(backs) > 1  # and what explains it
    assert page.count('class="call" title') == sum(one[2:] == ["stands"] for answer in told for one in answer) > 1


def said(stretch):
    return ["taken back"] if stretch.taken_back else ["stands"] if stretch.writer == STANDS else []


def lowered(one, trace):
    drafting = np.flatnonzero(one.scores >= trace.head.threshold)
    one.scores[drafting[0]] = trace.head.threshold / 2


def other_draft(one, trace):
    one.taken_back[0].tokens[0] += 1


def other_judge(one, trace):
    trace.head.settings["judge"]["tau"] = 1e9


def other_ledger(one, trace):
    one.ledger[1, 0] += 1


@pytest.mark.parametrize("change", [lowered, other_draft, other_judge, other_ledger])
def test_what_is_changed_is_found(run, verified, change):
    paths = sorted(run[0].glob("runs/checked_entropy/*.parquet"))
    path = next(path for path in paths if any(one.taken_back for one in read_trace(path).episodes))
    kept = path.read_bytes()
    trace = read_trace(path)
    change(next(one for one in trace.episodes if one.taken_back), trace)
    write_trace(path, trace)
    try:
        assert any(fault.file == path for fault in verified().faults)
    finally:
        path.write_bytes(kept)


def test_thresholds_are_quantiles_of_scores_before_drafted_ends(run):
    thresholds = KeptEvaluation.read(run[0] / "runs" / "manifest.json").manifest["thresholds"]["checked_entropy"]
    assert 0 < thresholds[0] < thresholds[-1] < 1
    assert CheckedEntropy().judge == Gap(2.0)


def test_what_was_taken_back_in_a_near_tie_is_by_as_much_a_near_tie(monkeypatch):
    """In half precision another pass may find the drafted token the likeliest, and the LLM's own next to it."""
    head = SimpleNamespace(models=["slm", "llm"])
    logits = torch.tensor([[0.0, 0.0, 0.0, 9.0], [1.0, 7.9, 8.0, 0.0]])
    monkeypatch.setattr("experiments.verification.checking.walk", lambda head, episode: SimpleNamespace(stood=[]))

    def gaps(written, drafted):
        back = TakenBack(position=1, writer=0, tokens=np.array([drafted]))
        episode = SimpleNamespace(response=np.array([3, written]), taken_back=[back])
        return [gap for _, _, gap in wrong_verdicts(FirstDisagreement(), head, episode, logits)]

    assert gaps(written=1, drafted=2) == pytest.approx([0.1], abs=1e-5)
    assert gaps(written=0, drafted=2) == pytest.approx([7.0])
    assert gaps(written=2, drafted=2) == [np.inf]
    assert gaps(written=2, drafted=1) == []
