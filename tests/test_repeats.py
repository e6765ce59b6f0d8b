"""A law of every program: started twice in one folder, or once in each of two, it comes to equal summaries."""

import json

import pytest

from tests.programs import call

EVALUATING = [
    "examples=2", "threshold_examples=2", "llm_shares=[0.3]", "bootstrap=5", "oracle_budget=2", "max_new_tokens=24",
    "draft_tokens=8",
]  # fmt: skip
STARTS = {
    "train": [
        "agent=citer", "agent.examples=6", "agent.max_new_tokens=72", "agent.training.epochs=1",
        "agent.training.batch_size=64", "evaluate=true",
        *(f"evaluation.{setting}" for setting in EVALUATING), "evaluation.transcripts=0",
        "evaluation.oracle_budget=0", "evaluation.draft_tokens=0",
    ],
    "evaluate": [
        *EVALUATING, "transcripts=0", "~agents.entropy", "+agent@agents.citer_s=citer_s", "agents.citer_s.examples=6",
    ],
    "collect": ["agent=citer", "agent.examples=4", "agent.shard_examples=2"],
    "queries": [
        "experiment=changing_pool", "~outcomes.tasks.plus_minus", "~outcomes.tasks.times_over",
        "~outcomes.tasks.plus_times", "~outcomes.tasks.minus_over", "~outcomes.tasks.easy", "outcomes.examples=16",
        "outcomes.max_new_tokens=32", "validation_queries=5", "splits=2", "bootstrap=5", "~agents.mlp",
        "~agents.uniroute_learned", "results=null",
    ],
}  # fmt: skip


def untimed(value):
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if not key.endswith("seconds")}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize("script", STARTS)
def test_two_starts_come_to_equal_summaries(script, tmp_path, monkeypatch):
    # pictures and pages are made of the summaries, and drawing them takes as long as all else
    for module in ("experiments.evaluation.report", "experiments.query_routing.report"):
        monkeypatch.setattr(f"{module}.plot_curves", lambda *given: None)
    monkeypatch.setattr("experiments.evaluation.report.page", lambda *given: "")
    monkeypatch.setattr("experiments.training.run.plot_learning", lambda *given: None)

    def summary(folder):
        call(script, *STARTS[script], f"hydra.run.dir={folder}")
        written = sorted(folder.rglob("summary.json"))
        assert written
        return {f"{path.relative_to(folder)}": untimed(json.loads(path.read_text())) for path in written}

    def files(folder):
        kept = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".arrow", ".jsonl")]
        return {path: path.read_bytes() for path in kept}

    first = summary(tmp_path / "one")
    made = files(tmp_path / "one")
    assert made
    assert summary(tmp_path / "one") == first
    assert files(tmp_path / "one") == made
    assert summary(tmp_path / "another") == first
