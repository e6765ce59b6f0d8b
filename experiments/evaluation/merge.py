"""Evaluations of several runs as one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from envs.environments.render import Checked
from envs.models.source import ModelSpec, Source
from envs.storage import write_text
from experiments.common.multirun import JOBS
from experiments.common.tracking import METRICS
from experiments.evaluation.answers import Answered, Answers
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.kept import KeptEvaluation, kept_below, lost_jobs, not_evaluated_yet, run_folder, told_apart
from experiments.evaluation.operating_points import Tried
from experiments.evaluation.report import RESULTS, write_report
from experiments.evaluation.summary import Front, Results, summarize
from experiments.reporting.page import PAGE, PageParts, Training
from experiments.reporting.transcripts import Tokenized, transcript
from experiments.traces.schema import CHECKED
from experiments.traces.trace import SUFFIX, Trace, TracedEpisode, read_trace

ALONE = {"the SLM alone": "slm", "the LLM alone": "llm"}
"""Whose answers are shown above those of policies, and their traces."""
LONGEST = 60
"""Characters that settings take in a name."""


@dataclass(frozen=True)
class NamedRun:
    """One policy of one evaluation, and what it is called beside the others.

    Attributes:
        evaluation: it is of.
        agent: what its own evaluation calls it.
        differing: settings in which runs of that agent differ.
    """

    evaluation: KeptEvaluation
    agent: str
    differing: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The agent, and what differs: `ppo cost_weight=0.02`; the rest of what is too long is a digest."""
        words = ", ".join(f"{key}={_word(value)}" for key, value in self.differing.items())
        if len(words) > LONGEST:
            words = f"{words[: LONGEST - 9]}~{hashlib.sha256(words.encode()).hexdigest()[:8]}"
        return f"{self.agent} {words}".strip()

    @property
    def is_trained(self) -> bool:
        """Whether anything was learned for it."""
        return self.agent in self.evaluation.manifest["trained"]

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts settings by their values: numbers as numbers."""
        values = self.differing.values()
        return tuple((0, value, "") if _is_number(value) else (1, 0, _word(value)) for value in values)


def gather(
    folders: Path | Sequence[Path], first: str | None = None, partial: bool = False, agents: Sequence[str] = ()
) -> Results:
    """All evaluations below `folders`; runs of an agent are told apart by their settings, then by their training seeds.

    Args:
        folders: of a multirun, or several of them.
        first: the policy that the others are compared with, or an agent, the first of its settings; the first by name
            where None.
        partial: leave out runs that are not finished.
        agents: whose policies alone are wanted; all where empty.

    Raises:
        ValueError: there are none, one is not finished, or they are not of one experiment.
    """
    places = [folders] if isinstance(folders, Path) else list(folders)
    return _merged(named_runs(_finished(places, partial), agents), first)


def _finished(folders: Sequence[Path], partial: bool) -> list[KeptEvaluation]:
    """The evaluations below `folders`, all of one experiment."""
    evaluations = [one for folder in folders for one in kept_below(folder)]
    missing = {one.runs.parent: path for one in evaluations if (path := one.missing())}
    waiting = [run for folder in folders for run in not_evaluated_yet(folder)]
    lost = [job for folder in folders for job in lost_jobs(folder)]
    if partial:
        for place in (*missing, *waiting):
            print(f"{place} is not finished and left out")
        for job in lost:
            print(f"{job.splitlines()[0]} is not there and left out")
        evaluations = [one for one in evaluations if one.runs.parent not in missing]
    elif missing:
        raise ValueError(
            f"{next(iter(missing.values()))} is missing: that evaluation was interrupted; start it again first"
        )
    if not evaluations:
        where = ", ".join(map(str, folders))
        raise ValueError(f"{where} holds no evaluations; run experiments.train -m evaluate=true first")
    if waiting and not partial:
        raise ValueError(
            f"not evaluated yet: {', '.join(map(str, waiting))}; start the multirun again with its hydra.sweep.dir, or "
            "report on what is finished with --partial"
        )
    if lost and not partial:
        lines = "\n".join(f"  {job}" for job in lost)
        raise ValueError(
            f"{len(lost)} jobs are not there, so that means would be over holes:\n{lines}\nstart the multirun again, "
            f"which makes these alone; or report on what is there with --partial; or, where one is wanted no more, "
            f"delete its record in {JOBS}/"
        )
    for one in evaluations[1:]:
        _check_same_experiment(evaluations[0], one)
    return evaluations


def _check_same_experiment(one: KeptEvaluation, other: KeptEvaluation) -> None:
    for key in one.experiment.keys() & other.experiment.keys():
        there, here = one.experiment[key], other.experiment[key]
        if there != here:
            raise ValueError(
                f"{one.runs.parent} and {other.runs.parent} are not of one experiment: {key} {there} and {here}; "
                "report on a folder of one experiment"
            )


def named_runs(evaluations: Sequence[KeptEvaluation], agents: Sequence[str] = ()) -> list[NamedRun]:
    """Every policy of every evaluation, told apart from others that are called the same.

    Args:
        evaluations: of one experiment.
        agents: whose policies alone are wanted; all where empty.

    Raises:
        ValueError: one of `agents` is not there.
    """
    same: dict[str, list[KeptEvaluation]] = {}
    for one in evaluations:
        for agent in one.manifest["policies"]:
            same.setdefault(agent, []).append(one)
    if unknown := [agent for agent in agents if agent not in same]:
        raise ValueError(f"there is no agent {unknown[0]!r}; there are {', '.join(sorted(same))}")
    same = {agent: ones for agent, ones in same.items() if not agents or agent in agents}
    return [
        NamedRun(one, agent, differing)
        for agent, ones in same.items()
        for one, differing in zip(
            ones, told_apart([one.settings(agent) for one in ones], [one.seed for one in ones]), strict=True
        )
    ]


def _merged(named: Sequence[NamedRun], first: str | None) -> Results:
    runs: dict[str, dict[int, NamedRun]] = {}
    for run in named:
        seed = run.evaluation.seed
        if seed in runs.setdefault(run.name, {}):
            raise ValueError(f"{run.evaluation.runs}: {run.name} with seed {seed} is there twice; report on fewer runs")
        runs[run.name][seed] = run
    trained = {run.name for run in named if run.is_trained}
    any_run = {name: next(iter(of_seeds.values())) for name, of_seeds in runs.items()}
    if first is not None and first not in runs:
        of_agent = [name for name, run in any_run.items() if run.agent == first]
        if not of_agent:
            raise ValueError(f"there is no policy {first!r}; there are {', '.join(sorted(runs))}")
        first = min(of_agent, key=lambda name: any_run[name].order)
    names = sorted(
        runs, key=lambda name: (name != first, name not in trained, any_run[name].agent, any_run[name].order)
    )
    by_seed = {name: [runs[name][seed] for seed in sorted(runs[name])] for name in names}
    thresholds = {name: [run.evaluation.thresholds[run.agent] for run in by_seed[name]] for name in names}
    place = named[0].evaluation
    about = {key: place.manifest[key] for key in ("task", "pool", "split", "start", "max_new_tokens")}
    answers = {name: [run.evaluation.answers(run.agent) for run in by_seed[name]] for name in names}
    baselines = Baselines.load(place.runs)
    # evaluations through a replay tree are not timed: seconds are compared where all of them have some
    units = set(baselines.slm.costs).intersection(*(one.costs for seeds in answers.values() for one in _each(seeds)))
    policies = {name: [[one.in_units(units) for one in runs] for runs in seeds] for name, seeds in answers.items()}
    tried = {name: [run.evaluation.validated(run.agent) for run in by_seed[name]] for name in names}
    validated = {
        name: [[one and one.in_units(units) for one in runs] for runs in seeds if runs]
        for name, seeds in tried.items()
        if baselines.validation and all(seeds)
    }
    return Results(
        about,
        baselines.in_units(units),
        policies=policies,
        trained=frozenset(trained),
        thresholds=thresholds,
        fronts=_fronts(by_seed, policies, validated),
        validated=validated,
    )


def _each(seeds: Answered) -> Iterator[Answers]:
    return (one for runs in seeds for one in runs)


def _fronts(
    runs: Mapping[str, Sequence[NamedRun]], policies: Mapping[str, Answered], validated: Mapping[str, Sequence[Tried]]
) -> dict[str, Front]:
    """For each agent with several settings: all of them as one policy, for the seeds that they share."""
    settings: dict[str, list[str]] = {}
    for name, of_seeds in runs.items():
        settings.setdefault(of_seeds[0].agent, []).append(name)
    fronts = {}
    for agent, names in settings.items():
        places = {name: {run.evaluation.seed: place for place, run in enumerate(runs[name])} for name in names}
        seeds = sorted(set.intersection(*(set(of_seeds) for of_seeds in places.values())))

        pairs = [[(name, places[name][seed]) for name in names] for seed in seeds]
        if len(names) > 1 and seeds:
            fronts[agent] = Front(
                owners=[[name for name, place in some for _ in policies[name][place]] for some in pairs],
                runs=[[one for name, place in some for one in policies[name][place]] for some in pairs],
                validated=[[one for name, place in some for one in validated[name][place]] for some in pairs]
                if validated.keys() >= set(names)
                else None,
            )
    return fronts


def of_first_seed(runs: Sequence[NamedRun]) -> dict[str, NamedRun]:
    """The run of each policy's first seed."""
    return {run.name: run for run in sorted(runs, key=lambda run: run.evaluation.seed, reverse=True)}


def trainings(runs: Sequence[NamedRun]) -> list[Training]:
    """The learning curves of runs of trained policies, as far as they have measured any."""
    paths = {run.name: run_folder(run.evaluation.runs) / METRICS for run in runs if run.is_trained}
    return [
        Training(name, None, [json.loads(line) for line in path.read_text().splitlines()])
        for name, path in paths.items()
        if path.is_file()
    ]


def side_by_side(runs: Sequence[NamedRun], count: int) -> dict[str, list[dict[str, Any]]]:
    """The first answers of each model alone and of each policy, as traces have them: a tokenizer is all that runs.

    Args:
        runs: one of each policy, of the same problems; shown is its operating point for 95 % of the LLM's accuracy.
        count: answers of each; fewer where a trace holds fewer.

    Returns:
        By policy, as `experiments.reporting.transcripts` gives them.

    Raises:
        ValueError: an evaluation has no traces, or the tokenizer of its models cannot be read.
    """
    traces: dict[str, Trace] = {}
    for name, piece in ALONE.items():
        found = [path for run in runs if (path := run.evaluation.runs / f"{piece}{SUFFIX}").is_file()]
        if found:
            traces[name] = read_trace(found[0])
    for run in runs:
        kept = run.evaluation
        path = kept.runs / run.agent / f"{kept.number_to_trace(run.agent):02d}{SUFFIX}"
        if not path.is_file():
            raise ValueError(
                f"there is no {path}: answers are shown of evaluations with traces (evaluation.traces=true)"
            )
        traces[run.name] = read_trace(path)
    head = next(iter(traces.values())).head
    text = Tokenized(Source.find(ModelSpec(head.models[0])).tokenizer, head.settings["end_tokens"])
    count = min(count, *(len(trace.episodes) for trace in traces.values()))
    return {name: [_shown(text, trace, one) for one in trace.episodes[:count]] for name, trace in traces.items()}


def _shown(text: Tokenized, trace: Trace, one: TracedEpisode) -> dict[str, Any]:
    checked = Checked.of(one.taken_back, one.ledger) if trace.head.decoding == CHECKED else None
    about = {"id": one.example, "prompt": text.decode(one.prompt).strip(), "right": one.correct, "answer": None}
    return about | transcript(text, one.response, one.writers, checked)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _word(value: Any) -> str:
    """A setting's value in a name."""
    return value if isinstance(value, str) else json.dumps(value)


def result_rows(named: Sequence[NamedRun]) -> str:
    """The rows of all results, one after the other, under the names that tell policies apart."""
    lines = []
    names = {(run.evaluation.runs, run.agent): run.name for run in named}
    for evaluation in sorted({run.evaluation.runs for run in named}):
        for line in (evaluation.parent / RESULTS).read_text().splitlines():
            row = json.loads(line)
            lines.append(json.dumps({**row, "policy": names.get((evaluation, row["policy"]), row["policy"])}) + "\n")
    return "".join(lines)


def report(
    folders: Path | Sequence[Path],
    first: str | None,
    unit: str,
    samples: int,
    out: Path | None = None,
    partial: bool = False,
    columns: str = "few",
    seconds: Mapping[str, float | None] | None = None,
    parts: PageParts | None = None,
    agents: Sequence[str] = (),
    transcripts: int = 0,
) -> dict[str, Any]:
    """Write the merged report.

    Args:
        folders: of the runs, one or several.
        first: see `gather`.
        unit: of costs that curves and comparisons are in.
        samples: of the bootstrap.
        out: where it is written; into the first of `folders` where None.
        partial: leave out runs that are not finished.
        columns: of the table that is printed, `few` or `all`.
        seconds: of each policy at 95 % of the LLM's accuracy over those of LLM-only decoding, where they were measured
            apart.
        parts: what the page shows besides.
        agents: see `gather`.
        transcripts: problems whose answers the page shows side by side, as traces have them; 0 for none.

    Raises:
        ValueError: see `gather`; answers are to be shown, and an evaluation has no traces.

    Returns:
        The contents of `summary.json`.
    """
    places = [folders] if isinstance(folders, Path) else list(folders)
    place = out or places[0]
    named = named_runs(_finished(places, partial), agents)
    results, firsts, parts = _merged(named, first), of_first_seed(named), parts or PageParts()
    shown = [firsts[name] for name in results.policies]
    if transcripts:
        parts = replace(parts, transcripts=side_by_side(shown, transcripts))
    if not parts.trainings:
        parts = replace(parts, trainings=trainings(shown))
    summary = summarize(results, unit, samples, seed=0)
    for name, ratio in (seconds or {}).items():
        summary["policies"][name]["cost_at_by_unit"]["seconds"] = {"0.95": ratio}
    # what evaluations of before do not say stays unsaid
    summary["parameters"] = named[0].evaluation.manifest.get("parameters")
    write_text(place / RESULTS, result_rows(named))
    write_report(summary, place, columns, parts)
    print(f"wrote {place}; open {place / PAGE}")
    return summary
