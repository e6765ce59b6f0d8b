"""How long the LLM writes once it is called: a token, some tokens, or to the end of a step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from agents.common.policy import Observation, Policy, Scores
from envs.arrays import BoolArray
from envs.decoding.observation import Drafts


class Span(ABC):
    """How long the LLM writes once it is called.

    A call writes one token, as any macro action of the LLM does that goes on for n passes. So a span is nothing but
    decisions that are taken already: until it is over, the LLM is called again. It keeps nothing of its own, since
    `Drafts` says what was written since the call that it began with.
    """

    @abstractmethod
    def goes_on(self, drafts: Drafts) -> BoolArray:
        """Whether the LLM, which wrote the last token, writes the next one too, (n,)."""

    def hold(self, scores: Scores, drafts: Drafts) -> Scores:
        """A policy's scores, (n,), but 0 where the LLM goes on."""
        on = self.goes_on(drafts)
        if not on.any():
            return scores
        if isinstance(scores, np.ndarray):
            return np.where(on, np.zeros_like(scores), scores)
        return scores.masked_fill(torch.from_numpy(on).to(scores.device), 0.0)


@dataclass(frozen=True)
class Tokens(Span):
    """So many tokens; fewer where the response ends.

    Args:
        n: at least 1.

    Raises:
        ValueError: it is not.
    """

    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, is {self.n}; it is how many tokens the LLM writes")

    def goes_on(self, drafts: Drafts) -> BoolArray:
        # what the LLM wrote in a row is whole spans, and what there is of the present one
        return np.asarray(drafts.runs % self.n != 0)


@dataclass(frozen=True)
class ToEndOfStep(Span):
    """To the end of a step of the response: of a sentence or a line.

    A step ends behind a token whose text ends with a mark, spaces left out: by default `.` or a line break, so that the
    sentences of a reasoning are steps, and its lines. Where a full stop also stands inside a step (decimals that are
    several tokens), leave it out.

    Args:
        marks: what a step ends with.
        corrections: goes on only with what the LLM writes in the place of drafts that were taken back; a call that let
            all stand writes a token.

    Raises:
        ValueError: there are no marks, or one is blank but for line breaks.
    """

    marks: tuple[str, ...] = (".", "\n")
    corrections: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.marks, str) or not self.marks or not all(mark.strip(" ") for mark in self.marks):
            raise ValueError(f"marks must be texts that steps end with, such as '.'; they are {self.marks!r}")
        object.__setattr__(self, "marks", tuple(self.marks))  # a yaml gives a list

    def at_border(self, drafts: Drafts) -> BoolArray:
        """Whether a step begins with the next token, (n,): behind a step's end, and at the beginning of a response."""
        return np.array([text is None or text.rstrip(" ").endswith(self.marks) for text in drafts.last_texts()], bool)

    def goes_on(self, drafts: Drafts) -> BoolArray:
        on = drafts.runs > 0
        if self.corrections:
            on = on & drafts.corrected
        return on & ~self.at_border(drafts) if on.any() else on


ONE = Tokens(1)
SPANS: Mapping[str, type[Span]] = {"tokens": Tokens, "to_end_of_step": ToEndOfStep}
"""Spans by the names that saved policies have for them."""


def described_span(span: Span) -> dict[str, Any]:
    """A span of SPANS as plain data: its name and its settings.

    Raises:
        ValueError: it is none of these.
    """
    for name, kind in SPANS.items():
        if type(span) is kind:
            return {"name": name, **asdict(span)}  # type: ignore[call-overload]
    raise ValueError(f"{type(span).__qualname__} cannot be saved; there are {', '.join(SPANS)}")


def span_of(description: Mapping[str, Any]) -> Span:
    """The span that was `described_span`.

    Raises:
        ValueError: it is none of SPANS.
    """
    settings = dict(description)
    kind = SPANS.get(settings.pop("name", ""))
    if kind is None:
        raise ValueError(f"unknown span {description.get('name')!r}; there are {', '.join(SPANS)}")
    return kind(**settings)


class SpanningPolicy(Policy):
    """A policy with a judge and a span.

    Attributes:
        span: how long the LLM writes once it is called.
    """

    span: Span

    @property
    def fingerprint(self) -> str:
        """See `Policy`; what writes a token at a call has the one that it had before there were spans."""
        return super().fingerprint + ("" if self.span == ONE else f" {self.span}")


def drafts_of(observation: Observation) -> Drafts:
    """What was drafted; a policy with a judge is always shown it."""
    assert observation.drafts is not None, "a policy with a judge sees drafts"
    return observation.drafts
