"""What policies are evaluated on, and how their curves are drawn."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agents.common.rollout import Scheduling
from envs.costs import ALL_COSTS
from envs.tasks.task import Split, check_split
from experiments.reporting.tables import COLUMNS

EVERY = "all"
"""What `transcripts_of` calls all policies."""


@dataclass(frozen=True)
class EvaluationSettings:
    """Settings of an evaluation; `conf/evaluation` holds those of the commands.

    Args:
        split: of the task that problems are taken from: `train`, `validation` or `test`.
        start: the first problem of the split.
        examples: how many problems every policy answers at every threshold.
        max_new_tokens: the longest answer, in tokens.
        cost: the unit of curves, tables and comparisons: `bytes`, `flops`, `llm_tokens`, `seconds` or `dollars`; what
            is measured is kept in all of them.
        llm_shares: the thresholds of a policy are these quantiles of its score on validation problems that the SLM
            answers alone; about this share of decisions goes to the LLM.
        thresholds_by: `calls`: the thresholds of a policy that checks drafts are those at which these shares of
            decisions are calls. Where None they are quantiles too, in long answers of drafts that nobody would make.
        threshold_examples: validation problems that thresholds are chosen on.
        refine: how many thresholds are put between two that a share of the LLM's accuracy lies between, at most; it
            ends where their costs are as close as can be measured. Of a policy with a judge, those beside the
            cheapest.
        refine_curve: the same on the problems themselves, for the curve, not at all where None: such thresholds choose
            no operating point.
        report: whether a table, pictures and a page are made; where not, `experiments.report` can make them later.
        bootstrap: resamplings behind every interval.
        transcripts: problems whose answers the page shows; 0 for none.
        transcripts_of: the policy whose answers are shown, or `all`; the first one where None.
        draft_tokens: tokens that speculative decoding, the price to beat, drafts at a time; 0 for none of it.
        oracle_budget: answers that the oracle tries per problem; 0 for no oracle.
        oracle: the old name of `oracle_budget`; always None once the settings are made.
        shared: a folder for the baselines, which no policy changes, so that several evaluations measure them once;
            they are kept with the evaluation itself where None.
        tree: a file: answers are decoded through a replay tree that is kept there, so that no state is decoded twice,
            and nothing is timed; every token is decoded where None. Runs that share a file wait for each other; with a
            `*` in its name there are several, and a run takes one that no other is using.
        tree_memory: bytes that the tree may take.
        traces: whether a trace of every episode is written beside what is kept of it, for `experiments.verify`.
        columns: of the table that is printed: `few`, which fit most terminals, or `all`; table.md holds all.
        scheduling: how answers share passes.

    Raises:
        ValueError: a setting is of a wrong type or out of range; the error names it.
    """

    split: Split = "test"
    start: int = 0
    examples: int = 300
    max_new_tokens: int = 128
    cost: str = "bytes"
    llm_shares: tuple[float, ...] = (0.01, 0.02, 0.04, 0.06, 0.09, 0.12, 0.16, 0.21, 0.28, 0.4, 0.6, 0.8)
    thresholds_by: Literal["calls"] | None = None
    threshold_examples: int = 200
    refine: int = 6
    refine_curve: int | None = 6
    report: bool = True
    bootstrap: int = 1000
    transcripts: int = 10
    transcripts_of: str | None = None
    draft_tokens: int = 16
    oracle_budget: int = 300
    oracle: int | None = None
    shared: Path | None = None
    tree: Path | None = None
    tree_memory: int = 2_000_000_000
    traces: bool = True
    columns: str = "few"
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        units = [cost.name for cost in ALL_COSTS]
        if self.cost not in units:
            raise ValueError(f"unknown cost {self.cost!r}; choose one of {', '.join(units)}")
        if self.columns not in COLUMNS:
            raise ValueError(f"unknown columns {self.columns!r}; choose one of {', '.join(COLUMNS)}")
        if self.thresholds_by not in (None, "calls"):
            raise ValueError(
                f"unknown thresholds_by {self.thresholds_by!r}; choose calls, or None for quantiles of scores"
            )
        if self.oracle is not None:
            logging.getLogger(__name__).warning("oracle is called oracle_budget now: answers tried per problem")
            object.__setattr__(self, "oracle_budget", self.oracle)
            object.__setattr__(self, "oracle", None)
        for key in (*_AT_LEAST, "draft_tokens", "oracle_budget"):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{key} must be a whole number, is {value!r}")
        if self.refine_curve is not None and (not isinstance(self.refine_curve, int) or self.refine_curve < 1):
            raise ValueError(f"refine_curve must be at least 1 or None, is {self.refine_curve!r}")
        if not isinstance(self.traces, bool):
            raise ValueError(f"traces must be true or false, is {self.traces!r}")
        if self.draft_tokens < 0:
            raise ValueError(
                f"draft_tokens must be at least 1, or 0 for no speculative decoding; it is {self.draft_tokens}"
            )
        if self.oracle_budget < 0:
            raise ValueError(
                f"oracle_budget is how many answers are tried per problem, 0 for none; it is {self.oracle_budget}"
            )
        shares = list(self.llm_shares)
        if not shares or not all(isinstance(share, (int, float)) and 0 < share < 1 for share in shares):
            raise ValueError(f"llm_shares must lie between 0 and 1, at least one; they are {shares}")
        for key, least in _AT_LEAST.items():
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, is {getattr(self, key)}")
        check_split(self.split)
        # whatever sequence was given, and paths given as text
        object.__setattr__(self, "llm_shares", tuple(shares))
        for key in ("shared", "tree"):
            if getattr(self, key) is not None:
                object.__setattr__(self, key, Path(getattr(self, key)))

    @property
    def thresholds_at(self) -> dict[str, object]:
        """What thresholds are found at, as manifests say it; curves were not refined in those of before."""
        curve = {"refine_curve": self.refine_curve} if self.refine_curve else {}
        shares = list(self.llm_shares)
        return {"llm_shares": shares, "examples": self.threshold_examples, "refine": self.refine, **curve}

    @property
    def thresholds_found(self) -> dict[str, object]:
        """What thresholds are found at, and by what, as manifests say it; there was no choice before."""
        by = {"thresholds_by": self.thresholds_by} if self.thresholds_by else {}
        return {"thresholds_at": self.thresholds_at, **by}

    def shown(self, policies: Sequence[str]) -> list[str]:
        """Of these policies, those whose answers are shown.

        Raises:
            ValueError: `transcripts_of` is none of them.
        """
        if self.transcripts_of is None:
            return list(policies)[:1]
        if self.transcripts_of == EVERY:
            return list(policies)
        if self.transcripts_of not in policies:
            raise ValueError(
                f"transcripts_of is {self.transcripts_of!r}; choose one of {', '.join(policies)}, or {EVERY}"
            )
        return [self.transcripts_of]


_AT_LEAST = {
    "examples": 1,
    "threshold_examples": 1,
    "refine": 0,
    "bootstrap": 1,
    "max_new_tokens": 1,
    "start": 0,
    "transcripts": 0,
    "tree_memory": 1,
}
