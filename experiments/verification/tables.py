"""Rows and summaries of an evaluation, computed again from what is kept of the answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.costs import ModelProfile
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.kept import KeptEvaluation
from experiments.evaluation.report import RESULTS, baseline_runs, result_row
from experiments.evaluation.summary import Results, summarize
from experiments.reporting.tables import markdown, table
from experiments.verification.findings import Findings

SUMMARY, TABLE = "summary.json", "table.md"
ROUNDED = 2e-6
"""How far numbers may differ that were rounded to six digits, and as a share, those that were not."""


def check_tables(evaluation: KeptEvaluation, models: Sequence[ModelProfile], findings: Findings) -> None:
    """Compare `results.jsonl` and `summary.json` with what the answers come to.

    The answers are those that are kept, which were compared with their traces before.

    Args:
        evaluation: it.
        models: the sizes of its models.
        findings: where faults go.
    """
    folder = evaluation.runs.parent
    missing = evaluation.missing()
    if missing is not None and (folder / SUMMARY).is_file():
        findings.fault(missing, None, "it is missing, and the evaluation was complete")
        return
    if missing is not None:
        findings.unchecked.append(f"{folder}: rows and summary, for {missing} is not there: it was interrupted")
        return
    baselines = Baselines.load(evaluation.runs)
    policies = {name: [evaluation.answers(name)] for name in evaluation.manifest["policies"]}
    reported = (folder / SUMMARY).is_file() or _settings(evaluation).get("report", True)
    summary = _read(folder / SUMMARY, findings) if reported else {"cost": _settings(evaluation).get("cost")}
    unit = str(summary.get("cost")) if isinstance(summary, Mapping) else ""
    if unit not in baselines.slm.costs:
        findings.fault(
            folder / SUMMARY, None, f"its unit of costs is {unit!r}, answers have {list(baselines.slm.costs)}"
        )
        return
    rows = [
        {"policy": name, **result_row(None, evaluation.seed, answers, baselines.llm)}
        for name, answers in baseline_runs(baselines, unit)
    ]
    for name, runs in policies.items():
        thresholds = evaluation.thresholds[name]
        rows += [
            {"policy": name, **result_row(threshold, evaluation.seed, answers, baselines.llm)}
            for threshold, answers in zip(thresholds, runs[0], strict=True)
        ]
    _check_rows(folder / RESULTS, rows, findings)
    if not reported:
        return
    samples = _settings(evaluation).get("bootstrap")
    if samples is None:
        findings.unchecked.append(f"{folder / SUMMARY}: no config.yaml says how many resamplings are behind it")
        return
    results = Results(
        {key: evaluation.manifest[key] for key in ("task", "pool", "split", "max_new_tokens", "start")},
        baselines,
        policies=policies,
        trained=frozenset(evaluation.manifest["trained"]),
        thresholds={name: [evaluation.thresholds[name]] for name in policies},
        validated={name: [tried] for name in policies if (tried := evaluation.validated(name)) is not None},
    )
    summarized = summarize(results, unit, samples, evaluation.seed)
    wanted = {**summarized, "seed": evaluation.seed, "parameters": [model.parameters for model in models]}
    for what in differences(summary, json.loads(json.dumps(wanted))):
        findings.fault(folder / SUMMARY, None, what)
    findings.count("summaries")
    _check_table(folder / TABLE, summary, findings)


def _check_table(path: Path, summary: Mapping[str, Any], findings: Findings) -> None:
    """Compare a table with the summary beside it, line by line."""
    notes = "".join(f"\n{note}\n" for note in summary.get("notes", ()))
    try:
        kept, wanted = path.read_text().splitlines(), (markdown(table(summary)) + notes).splitlines()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        # a summary that is changed, which is said elsewhere, may make no table
        findings.fault(path, None, f"it cannot be compared with the summary: {type(error).__name__}: {error}")
        return
    if len(kept) != len(wanted):
        findings.fault(path, None, f"it has {len(kept)} lines, the summary gives {len(wanted)}")
    for number, (there, here) in enumerate(zip(kept, wanted, strict=False), start=1):
        if there != here:
            findings.fault(path, None, f"line {number} is {there!r}, the summary gives {here!r}")
    findings.count("lines of tables", len(wanted))


def _check_rows(path: Path, rows: list[dict[str, Any]], findings: Findings) -> None:
    kept = _read(path, findings, lines=True)
    if not isinstance(kept, list):
        return
    if len(kept) != len(rows):
        findings.fault(path, None, f"it has {len(kept)} rows, the answers give {len(rows)}")
    for number, (there, here) in enumerate(zip(kept, rows, strict=False), start=1):
        for what in differences(there, json.loads(json.dumps(here))):
            findings.fault(path, None, f"row {number} ({here['policy']}): {what}")
    findings.count("rows", len(rows))


def _settings(evaluation: KeptEvaluation) -> Mapping[str, Any]:
    """The settings of an evaluation; empty where they are not known."""
    config = evaluation.config.get("evaluation") if evaluation.program == "train" else evaluation.config
    return config or {}


def differences(kept: Any, wanted: Any, name: str = "") -> Iterator[str]:
    """Where two trees of plain data differ: numbers by more than their rounding, all else at all."""
    if isinstance(kept, Mapping) and isinstance(wanted, Mapping):
        for key in [*wanted, *(key for key in kept if key not in wanted)]:
            inner = f"{name}.{key}" if name else f"{key}"
            if key not in kept or key not in wanted:
                yield f"{inner} {'is missing' if key not in kept else 'is not of its answers'}"
            else:
                yield from differences(kept[key], wanted[key], inner)
    elif isinstance(kept, list) and isinstance(wanted, list) and len(kept) == len(wanted):
        for number, (one, other) in enumerate(zip(kept, wanted, strict=True)):
            yield from differences(one, other, f"{name}[{number}]")
    elif _is_number(kept) and _is_number(wanted):
        if not math.isclose(kept, wanted, rel_tol=ROUNDED, abs_tol=ROUNDED):
            yield f"{name} is {kept}, the answers give {wanted}"
    elif kept != wanted:
        yield f"{name} is {_short(kept)}, the answers give {_short(wanted)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path, findings: Findings, lines: bool = False) -> Any:
    """The contents of a JSON file, or of one with a document a line; None, and a fault, where it cannot be read."""
    try:
        text = path.read_text()
        return [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    except (OSError, ValueError) as error:
        findings.fault(path, None, f"it cannot be read: {error}")
        return None
