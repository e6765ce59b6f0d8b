"""Queries and what each model of a pool made of them by itself: all that routing whole queries needs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.storage import write_text

MOST = float(np.finfo(np.float64).max)
"""The largest price there is."""


@dataclass(frozen=True, eq=False)
class QueryOutcomes:
    """Whether each model of a pool answers each query rightly, and what its answer costs.

    Attributes:
        prompts: the n queries.
        groups: what kind of query each is, for reports; n names.
        models: names of the K models, cheapest first.
        correct: (n, K).
        costs: of each answer, in any one unit, (n, K).

    Raises:
        ValueError: a pool of one model, models named twice, arrays that do not belong together, or costs that are not
            positive numbers.
    """

    prompts: Sequence[str]
    groups: Sequence[str]
    models: tuple[str, ...]
    correct: BoolArray
    costs: FloatArray

    def __post_init__(self) -> None:
        check_models(self.models)
        shape = (len(self.prompts), len(self.models))
        if not self.prompts or self.correct.shape != shape or self.costs.shape != shape or len(self.groups) != shape[0]:
            raise ValueError(
                f"query outcomes: {shape[0]} prompts and {shape[1]} models need arrays of shape {shape} and as many "
                f"groups as prompts; correct has {self.correct.shape}, costs {self.costs.shape}, there are "
                f"{len(self.groups)} groups"
            )
        bad = np.flatnonzero(~(np.isfinite(self.costs) & (self.costs > 0)).all(0))
        if len(bad):
            raise ValueError(f"costs of {self.models[bad[0]]} must be positive numbers; mend its price")

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, chosen: IntArray) -> QueryOutcomes:
        """Some of the queries, by number, (m,)."""
        prompts, groups = ([values[i] for i in chosen] for values in (self.prompts, self.groups))
        return replace(self, prompts=prompts, groups=groups, correct=self.correct[chosen], costs=self.costs[chosen])

    def of(self, models: Sequence[str]) -> QueryOutcomes:
        """The same queries for some of the models, cheapest first (on average; equals by name), however they are named.

        Raises:
            ValueError: a model that has no outcomes here, or fewer than two.
        """
        columns = sorted(
            columns_of(models, self.models),
            key=lambda column: (float(self.costs[:, column].mean()), self.models[column]),
        )
        return replace(
            self,
            models=tuple(self.models[column] for column in columns),
            correct=self.correct[:, columns],
            costs=self.costs[:, columns],
        )

    @classmethod
    def read(cls, path: Path, prices: Mapping[str, float] | None = None) -> QueryOutcomes:
        """Read JSON lines: `{"prompt", "group", "correct": {model: bool}, "prices": {model: number}}`.

        Models stand as `of` orders them, so that what is written and read again routes as what was measured.

        Args:
            path: the file; `group` and `prices` may be missing in it.
            prices: of an answer by each model, where a line has none.

        Raises:
            ValueError: a line that is not such an object, that names other models than the first, or that has a model
                without a price; the error names the line.
        """
        prices = dict(prices or {})
        try:
            lines = [line for line in path.read_text().split("\n") if line.strip()] if path.is_file() else []
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no text ({error}); give a file of JSON lines in UTF-8") from error
        if not lines:
            raise ValueError(f"{path} holds no query outcomes; give a file of JSON lines (prompt, group, correct)")
        read = [_Line.parse(f"{path}, line {number}", line, prices) for number, line in enumerate(lines, 1)]
        models = sorted(read[0].correct, key=lambda model: read[0].prices[model])
        for line in read:
            if set(line.correct) != set(models):
                raise ValueError(
                    f"{line.place} has outcomes of {', '.join(line.correct)}, the first line of {', '.join(models)}; "
                    "every query needs an outcome of every model"
                )
        check_models(models, read[0].place)
        outcomes = cls(
            [line.prompt for line in read],
            [line.group for line in read],
            tuple(models),
            np.array([[line.correct[model] for model in models] for line in read]),
            np.array([[line.prices[model] for model in models] for line in read], dtype=np.float64),
        )
        return outcomes.of(models)

    def write(self, path: Path) -> None:
        """Write what `read` reads, with the costs as prices."""
        rows = zip(self.prompts, self.groups, self.correct.astype(bool).tolist(), self.costs.tolist(), strict=True)
        lines = [
            json.dumps(
                {
                    "prompt": prompt,
                    "group": group,
                    "correct": dict(zip(self.models, correct, strict=True)),
                    "prices": dict(zip(self.models, costs, strict=True)),
                }
            )
            for prompt, group, correct, costs in rows
        ]
        write_text(path, "".join(f"{line}\n" for line in lines))


@dataclass(frozen=True)
class _Line:
    """One line of a file of query outcomes."""

    place: str
    prompt: str
    group: str
    correct: Mapping[str, bool]
    prices: Mapping[str, float]

    @classmethod
    def parse(cls, place: str, text: str, prices: Mapping[str, float]) -> _Line:
        try:
            row: dict[str, Any] = json.loads(text)
            prompt, correct = row["prompt"], row["correct"]
            own = {**prices, **row.get("prices", {})}
            group = str(row.get("group", ""))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{place}: not an object with prompt and correct: {error!r}") from error
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{place}: the prompt is empty; drop the line or complete it")
        if not isinstance(correct, dict) or not all(isinstance(right, bool) for right in correct.values()):
            raise ValueError(f"{place}: correct must say true or false of each model, it is {correct!r}")
        unpriced = [model for model in correct if model not in own]
        if unpriced:
            raise ValueError(
                f"{place} names {', '.join(unpriced)} without a price; the prices are of {', '.join(own) or 'nobody'}: "
                "add it to prices"
            )
        for model in correct:
            price = own[model]
            number = isinstance(price, int | float) and not isinstance(price, bool)
            if not number or not 0 < price <= MOST:
                raise ValueError(f"{place}: costs of {model} must be positive numbers, its price is {price!r}; mend it")
        return cls(place, prompt, group, correct, own)


def check_models(models: Sequence[str], place: str = "") -> None:
    """Refuse fewer than two models to route among, and names that stand twice; `place` is named where there is one."""
    if len(models) < 2:
        raise ValueError(
            f"{place and f'{place}: '}a router needs at least two models to choose from; the pool has "
            f"{', '.join(models) or 'none'}"
        )
    if len(set(models)) != len(models):
        raise ValueError(f"the models of a pool need distinct names; they are {', '.join(models)}")


def columns_of(models: Sequence[str], known: Sequence[str]) -> IntArray:
    """Where each of `models` stands among those with outcomes, (m,).

    Raises:
        ValueError: one has none; the error names it.
    """
    missing = [model for model in models if model not in known]
    if missing:
        raise ValueError(
            f"there are no outcomes of {', '.join(missing)}; let it answer the validation queries first (there are "
            f"outcomes of {', '.join(known)})"
        )
    return np.array([list(known).index(model) for model in models], dtype=np.int64)


def fewest_queries(name: str, count: int, queries: npt.ArrayLike) -> None:
    """Refuse a setting that asks for more of something than there are queries."""
    most = len(np.asarray(queries))
    if not 1 <= count <= most:
        raise ValueError(f"{name} must be in 1..{most}, the number of queries it is fitted on; it is {count}")
