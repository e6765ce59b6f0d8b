"""Evaluating policies, stage by stage: thresholds, baselines, a sweep, a summary, a report.

From a pool, a task and policies to a curve:

    evaluation = Evaluation(pool, task, EvaluationSettings(examples=100))
    results = evaluation.run({"entropy": Uncertainty()})
    summary = summarize(results)
    plot_curves(summary, Path("curve.png"))

Each stage can be called by itself, see `Evaluation.run`. Given a folder, every piece is kept, and none is made again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from agents.common.policy import Policy, Track, untracked
from agents.oracle import Oracle
from envs.models.pool import ModelPool, models_manifest
from envs.prefix_tree.tree import PrefixTree
from envs.progress import ProgressBar
from envs.storage import copy_files, keep_manifest, write_text
from envs.tasks.task import Example, Task
from experiments.common.locks import one_at_a_time, one_of
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines, measure_baselines
from experiments.evaluation.decoder import ExampleDecoder
from experiments.evaluation.kept import CHOSEN, VALIDATED
from experiments.evaluation.operating_points import ThresholdSearch, threshold_to_use
from experiments.evaluation.report import RESULTS, ResultRows, baseline_runs, write_report
from experiments.evaluation.settings import EvaluationSettings
from experiments.evaluation.summary import Results, ran_out, summarize
from experiments.evaluation.threshold_sweep import choose_thresholds, quantiles, record_scores
from experiments.reporting.page import PAGE, PageParts, Training
from experiments.reporting.transcripts import transcripts
from experiments.traces.recorder import Recorder
from experiments.traces.trace import SUFFIX

TRANSCRIPTS = "transcripts.json"
"""In a folder: the answers that its page shows."""


class Evaluation:
    """The stages of one evaluation: the same problems, answered in every way that is compared.

    Args:
        pool: the models, SLM first.
        task: where problems come from, and who judges the answers.
        settings: see `EvaluationSettings`; its defaults where None.
        folder: receives `results.jsonl` and, in `runs/`, every piece when it is made; nothing is kept where None.
        track: receives the rows of `results.jsonl`.
        first: the number of the first problem, where other processes answer those before it.

    Raises:
        ValueError: the task has fewer problems.
    """

    def __init__(
        self,
        pool: ModelPool,
        task: Task,
        settings: EvaluationSettings | None = None,
        folder: Path | None = None,
        track: Track = untracked,
        first: int = 0,
    ) -> None:
        self.pool, self.task, self.settings = pool, task, settings or EvaluationSettings()
        self.folder, self.track, self.first = folder, track, first
        self._quantiles: Mapping[str, Sequence[float]] = {}
        self.examples: Sequence[Example] = task.examples(
            self.settings.split, self.settings.examples, start=self.settings.start
        )

    @property
    def runs(self) -> Path | None:
        """The folder of what is not made again."""
        return self.folder and self.folder / "runs"

    @cached_property
    def tree(self) -> PrefixTree | None:
        """The replay tree that is decoded through, read from `settings.tree` if it is there; None if it is not set."""
        path = self.settings.tree
        if path is None:
            return None
        return PrefixTree(
            self.pool,
            self.task,
            self.settings.max_new_tokens,
            self.settings.tree_memory,
            path if path.is_file() else None,
        )

    @cached_property
    def decoder(self) -> ExampleDecoder:
        """Answers the problems."""
        return ExampleDecoder(
            self.pool,
            self.task,
            self.examples,
            self.settings.max_new_tokens,
            self.settings.scheduling,
            self.tree,
            self.first,
        )

    @cached_property
    def validation(self) -> ExampleDecoder:
        """Answers the validation problems."""
        return self.decoder.on(self.task.examples("validation", self.settings.threshold_examples))

    @cached_property
    def recorder(self) -> Recorder | None:
        """Writes the traces of what is decoded; None where they are not asked for."""
        settings = self.settings
        if not settings.traces:
            return None
        return Recorder(
            self.pool,
            self.task,
            settings.split,
            settings.start,
            settings.max_new_tokens,
            settings.scheduling,
            settings.tree is None,
        )

    def about(self) -> dict[str, Any]:
        """Which problems are answered by which models, as summaries say it."""
        return {
            "task": self.task.name,
            "pool": self.pool.names,
            "split": self.settings.split,
            "max_new_tokens": self.settings.max_new_tokens,
            "start": self.settings.start,
        }

    def run(self, policies: Mapping[str, Policy], trained: Sequence[str] = (), seed: int = 0) -> Results:
        """All that is measured: thresholds, baselines, and every policy at each threshold, on validation problems too.

        Args:
            policies: by name; summaries compare the others with the first.
            trained: names of those that learned anything.
            seed: that they were trained with.
        """
        first = self.thresholds(policies, trained, seed)
        baselines = self.baselines()
        thresholds, validated = self.validate(policies, first, baselines)
        swept, runs = self.sweep(policies, thresholds, baselines, seed)
        return Results(
            self.about(),
            baselines,
            policies={name: [runs[name]] for name in policies},
            trained=frozenset(trained),
            thresholds={name: [swept[name]] for name in policies},
            validated={name: [[*tried, *[None] * (len(runs[name]) - len(tried))]] for name, tried in validated.items()},
        )

    def thresholds(
        self, policies: Mapping[str, Policy], trained: Sequence[str] = (), seed: int = 0
    ) -> dict[str, list[float]]:
        """The first thresholds of each policy, quantiles of its score; in a folder, kept with what made them.

        Args:
            policies: by name.
            trained: names of those that learned anything, kept with the thresholds.
            seed: that they were trained with, kept too.

        Raises:
            ValueError: the folder holds an evaluation of other policies, or with other settings.
        """

        def chosen() -> dict[str, Any]:
            scores = record_scores(self.validation, policies, self.settings.thresholds_by)
            self._quantiles = quantiles(scores)
            return {
                "thresholds": choose_thresholds(scores, self.settings.llm_shares),
                "quantiles": self._quantiles,
                "trained": list(trained),
                "seed": seed,
                "parameters": [profile.parameters for profile in self.pool.profiles],
            }

        if self.runs is None:
            return dict(chosen()["thresholds"])
        manifest = {
            **self._problems,
            **self.settings.thresholds_found,
            "timed": self.settings.tree is None,
            "policies": {name: policy.fingerprint for name, policy in policies.items()},
        }
        kept = keep_manifest(self.runs / "manifest.json", manifest, self.runs, chosen)
        self._quantiles = kept["quantiles"]
        return dict(kept["thresholds"])

    def baselines(self) -> Baselines:
        """Each model alone, on validation problems too, speculative decoding and the oracle.

        They are taken from, or kept in, `settings.shared` if it is set; another run that measures them there is waited
        for.

        Raises:
            ValueError: other models, problems or settings made what is there.
        """
        settings = self.settings
        place = settings.shared or self.runs
        with nullcontext() if settings.shared is None else one_at_a_time(settings.shared):
            baselines = measure_baselines(
                self.decoder,
                Oracle(budget=settings.oracle_budget) if settings.oracle_budget else None,
                settings.draft_tokens,
                place,
                {**self._problems, "timed": settings.tree is None, "validation": settings.threshold_examples},
                self.validation,
                self.recorder,
            )
            if self.runs and place and place != self.runs:
                baselines.save(self.runs)
                if self.recorder is not None:
                    copy_files(place, self.runs, f"*{SUFFIX}")
        if baselines.exhausted:
            logging.getLogger(__name__).warning(ran_out(baselines))
        return baselines

    def validate(
        self, policies: Mapping[str, Policy], thresholds: Mapping[str, Sequence[float]], baselines: Baselines
    ) -> tuple[dict[str, list[float]], dict[str, list[Answers | None]]]:
        """The answers to the validation problems that operating points are chosen by, see `ThresholdSearch`.

        Args:
            policies: by name.
            thresholds: of each policy, as `thresholds` gives them.
            baselines: with the models' answers to the same problems.

        Returns:
            All thresholds of each policy, those added last, and its answers at those that were tried.
        """
        assert baselines.validation is not None
        chosen, validated = {}, {}
        for name, policy in ProgressBar(policies.items(), desc="validate"):

            def tried(threshold: float, number: int, name: str = name, policy: Policy = policy) -> Answers:
                return self.answers(policy, threshold, name, number, self.validation)

            search = self._search(name, baselines.validation, self.settings.refine)
            find = search.try_few if policy.judge is None else search.try_all
            chosen[name], validated[name] = find(thresholds[name], tried)
        return chosen, validated

    def sweep(
        self,
        policies: Mapping[str, Policy],
        thresholds: Mapping[str, Sequence[float]],
        baselines: Baselines,
        seed: int = 0,
    ) -> tuple[dict[str, list[float]], dict[str, list[Answers]]]:
        """The answers of every policy at each of its thresholds; rows go to `results.jsonl` as they come.

        Others are put between them where costs would be read off wide gaps, see `ThresholdSearch`.

        Args:
            policies: by name.
            thresholds: of each policy.
            baselines: of the same problems; their rows come first.
            seed: that the policies were trained with, named in the rows.

        Returns:
            All thresholds of each policy, those added last, and its answers at each.
        """
        rows = ResultRows(baselines.llm, seed, self.folder and self.folder / RESULTS, self.track)
        for name, answers in baseline_runs(baselines, self.settings.cost):
            rows.record(name, None, answers)
        swept, runs = {}, {}
        with ProgressBar(total=sum(map(len, thresholds.values())), desc="evaluate", mininterval=0.5) as progress:
            for name, policy in policies.items():

                def answered(threshold: float, number: int, name: str = name, policy: Policy = policy) -> Answers:
                    found = self.answers(policy, threshold, name, number)
                    rows.record(name, threshold, found)
                    progress.update()
                    return found

                search = self._search(name, (baselines.slm, baselines.llm), self.settings.refine_curve or 0)
                swept[name], runs[name] = search.sweep(thresholds[name], answered)
        if self.runs is not None:
            write_text(self.runs / CHOSEN, json.dumps(swept, indent=1) + "\n")
        return swept, runs

    def _search(self, name: str, ends: tuple[Answers, Answers], refine: int) -> ThresholdSearch:
        return ThresholdSearch(ends, self._quantiles.get(name, ()), self.settings.cost, refine)

    def answers(
        self, policy: Policy, threshold: float, name: str, number: int, decoder: ExampleDecoder | None = None
    ) -> Answers:
        """The answers of the policy `name` at its threshold `number`, kept in the folder if there is one.

        Those of `validation` are kept apart; they are to the problems that are evaluated on where `decoder` is None.
        """
        place = self.runs and (self.runs if decoder is None else self.runs / VALIDATED)
        path = place and place / name / f"{number:02d}.safetensors"
        by = decoder or self.decoder

        def decoded() -> Answers:
            episodes = by.decode(policy, threshold, name)
            recorder = self.recorder if decoder is None else self.recorder and self.recorder.on_validation()
            if path is not None and recorder is not None:
                recorder.routed(path, episodes, name, policy, threshold)  # first: what is kept has a trace
            return Answers.of(episodes, self.pool, policy, by.timed)

        return Answers.kept(path, decoded)

    def transcripts(self, policies: Mapping[str, Policy], results: Results) -> dict[str, list[dict[str, Any]]]:
        """The first `settings.transcripts` answers of those policies that the settings name, as plain data.

        Each policy is used at its operating point for 95 % of the LLM's accuracy.
        """
        some = self.decoder.on(self.examples[: self.settings.transcripts])
        episodes = {}
        for name in self.settings.shown(list(policies)):
            thresholds, validation = results.thresholds[name][0], results.baselines.validation
            assert validation is not None
            number = threshold_to_use(results.validated[name][0], validation[1], self.settings.cost)
            # who never gets there is shown where it asks most of the LLM
            chosen = max(thresholds) if number is None else thresholds[number]
            episodes[name] = some.decode(policies[name], chosen, "transcripts")
        return transcripts(self.pool, episodes, [name for name in episodes if policies[name].judge is not None])

    def save_tree(self) -> None:
        """Write the replay tree to `settings.tree`, if there is one; `evaluate` keeps other writers away."""
        if self.tree is not None and self.settings.tree is not None:
            self.tree.save(self.settings.tree)

    @cached_property
    def _problems(self) -> dict[str, Any]:
        """What makes the baselines, and anything else that is measured here."""
        return {
            **self.about(),
            "models": models_manifest(self.pool),
            "examples": self.settings.examples,
            "oracle": self.settings.oracle_budget,  # by the name that folders of before know it by
            "draft_tokens": self.settings.draft_tokens,
        }


def evaluate(
    pool: ModelPool,
    task: Task,
    policies: Mapping[str, Policy],
    settings: EvaluationSettings,
    folder: Path,
    track: Track = untracked,
    trained: Sequence[str] = (),
    seed: int = 0,
    trainings: Sequence[Training] = (),
    first: int = 0,
) -> dict[str, Any] | None:
    """Run every stage, and write everything into `folder`; what is there already is not made again.

    Runs that share a replay tree take turns: each goes on from the states of those before it, and none are lost.

    Args:
        pool: the models.
        task: where problems come from.
        policies: by name; the others are compared with the first.
        settings: of the evaluation.
        folder: of the run.
        track: receives rows.
        trained: names of the policies that learned anything.
        seed: that they were trained with; the bootstrap draws from it too.
        trainings: whose learning curves the page shows.
        first: the number of the first problem, where other processes answer those before it.

    Returns:
        The contents of `summary.json`; None where settings ask for no report.
    """
    settings.shown(list(policies))  # refuses before anything is decoded
    with nullcontext() if settings.tree is None else one_of(settings.tree) as tree:
        settings = replace(settings, tree=tree)
        evaluation = Evaluation(pool, task, settings, folder, track, first)
        results = evaluation.run(policies, trained, seed)
        shown = evaluation.transcripts(policies, results) if settings.transcripts else {}
        write_text(folder / TRANSCRIPTS, json.dumps(shown, indent=1) + "\n")
        evaluation.save_tree()
    if not settings.report:
        print(f"wrote {folder}; experiments.report makes a table of it")
        return None
    summary = {
        **summarize(results, settings.cost, settings.bootstrap, seed),
        "seed": seed,
        "parameters": [profile.parameters for profile in pool.profiles],
    }
    write_report(summary, folder, settings.columns, PageParts(trainings=trainings, transcripts=shown))
    print(f"wrote {folder}; open {folder / PAGE}")
    return summary
