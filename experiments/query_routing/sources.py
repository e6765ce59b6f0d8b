"""Where query outcomes come from: a file, or a pool of models that answer the problems of some tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from agents.common.rollout import Scheduling
from agents.query_routing.learner import answer_alone
from agents.query_routing.outcomes import QueryOutcomes, check_models
from envs.models.pool import models_manifest
from envs.storage import keep_manifest, write_manifest
from envs.tasks.task import Example, Split, Task, check_split


class OutcomesSource(Protocol):
    """Gives query outcomes."""

    @property
    def name(self) -> str:
        """What reports call it."""

    def read(self, folder: Path) -> QueryOutcomes:
        """The outcomes; what took long is kept in `folder`."""


@dataclass(frozen=True)
class OutcomesFile:
    """Outcomes of models that have answered already, one query a line; see `QueryOutcomes.read`.

    Args:
        path: of the file.
        prices: of an answer by each model, where the lines have none.
    """

    path: str
    prices: Mapping[str, float] | None = None

    @property
    def name(self) -> str:
        return Path(self.path).stem

    def read(self, folder: Path) -> QueryOutcomes:
        return QueryOutcomes.read(Path(self.path), self.prices)


@dataclass(frozen=True)
class PoolAnswers:
    """Lets every model of a pool answer problems by itself; costs are bytes of memory traffic.

    Args:
        pool: the models, a `ModelPool`.
        tasks: where problems come from, `Task`s, each a group of queries.
        examples: problems of each task, all prompts distinct: one that a task before has too is passed over.
        split: of the tasks.
        start: the first problem.
        max_new_tokens: the longest answer.
        scheduling: how answers share passes.
    """

    pool: Any  # a schema takes what builds a ModelPool, or Tasks, for nothing but Any
    tasks: Mapping[str, Any]
    examples: int = 1000
    split: Split = "test"
    start: int = 0
    max_new_tokens: int = 128
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        check_models(self.pool.names)
        check_split(self.split)
        if not self.tasks or self.examples < 1:
            raise ValueError(f"name at least one task, and examples ({self.examples}) of each")

    @property
    def name(self) -> str:
        return f"{len(self.pool)} models on {', '.join(self.tasks)}"

    def read(self, folder: Path) -> QueryOutcomes:
        about = {
            "models": models_manifest(self.pool),
            "tasks": {key: task.name for key, task in self.tasks.items()},
            "examples": self.examples,
            "split": self.split,
            "start": self.start,
            "max_new_tokens": self.max_new_tokens,
        }
        path, manifest = folder / "outcomes.jsonl", folder / "outcomes.json"
        if path.is_file() and manifest.is_file():
            keep_manifest(manifest, about, place=path)
            return QueryOutcomes.read(path)
        parts = []
        prompts: set[str] = set()
        for key, task in self.tasks.items():
            examples = list(islice(distinct_examples(task, self.split, self.start, prompts), self.examples))
            if len(examples) < self.examples:
                raise ValueError(
                    f"task {key} has {len(examples)} distinct {self.split} examples from {self.start} on that no task "
                    f"before it has; {self.examples} were asked for: lower examples, or leave the task out"
                )
            part, _ = answer_alone(self.pool, task, examples, self.max_new_tokens, self.scheduling)
            parts.append((key, part))
        outcomes = QueryOutcomes(
            [prompt for _, part in parts for prompt in part.prompts],
            [key for key, part in parts for _ in part.prompts],
            parts[0][1].models,
            np.concatenate([part.correct for _, part in parts]),
            np.concatenate([part.costs for _, part in parts]),
        )
        write_manifest(manifest, about)
        outcomes.write(path)
        # what a second start reads, to the bit: the order of models, and of every sum over them
        return QueryOutcomes.read(path)


def distinct_examples(task: Task, split: Split, start: int, prompts: set[str]) -> Iterator[Example]:
    """The examples of `split` from `start` on whose prompts are not in `prompts`, to which each is added.

    One query under two groups, or in train and test of a random split, would be known before it is asked.
    """
    size = task.size(split)
    for index in count(start) if size is None else range(start, size):
        example = task.example(split, index)
        if example.prompt not in prompts:
            prompts.add(example.prompt)
            yield example
