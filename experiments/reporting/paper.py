"""What the paper's headlines say, beside what the same comparisons come to here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.reporting.tables import markdown_table

LEVEL = "0.95"
GAINS = ("0.25", "0.50")
"""Costs, fixed beforehand, at which accuracies are compared."""


@dataclass(frozen=True)
class PaperHeadline:
    """What a paper says of CITER against a rival.

    Attributes:
        rival: as the paper calls it.
        agents: what it is here, names in `conf/agent`.
        saving: share of the cost that CITER saves at equal accuracy.
        gain: points of accuracy that it gains at equal cost.
    """

    rival: str
    agents: tuple[str, ...]
    saving: float
    gain: int


PAPER = (
    PaperHeadline("Co-LLM", ("collm",), saving=0.27, gain=17),
    PaperHeadline("RouteLLM", ("routellm_mf", "routellm_sw", "routellm_classifier"), saving=0.30, gain=12),
    PaperHeadline("CITER-S", ("citer_s",), saving=0.42, gain=23),
)
"""The headlines of Zheng et al. 2025."""


def headlines(summary: Mapping[str, Any]) -> str:
    """CITER against what the paper compares it with; empty where neither is there."""
    rows = [
        _headline_row(headline, agent, summary["policies"][agent]["against_citer"])
        for headline in PAPER
        for agent in headline.agents
        if "against_citer" in summary["policies"].get(agent, {})
    ]
    if not rows:
        return ""
    gains = [f"points above at cost {cost}" for cost in GAINS]
    headers = ["CITER against", "saving here", "saving in the paper", *gains, "points in the paper"]
    return markdown_table(headers, rows)


def _headline_row(headline: PaperHeadline, agent: str, against_citer: Mapping[str, Any]) -> list[str]:
    ratio = against_citer[f"ratio_at_{LEVEL}"]
    # the ratio is the rival's cost over CITER's; what the rival gains, CITER loses
    saving, *saving_interval = (None if r is None else 1 - 1 / r for r in (ratio["value"], *ratio["interval"]))
    gains = [against_citer[f"gain_at_{cost}"] for cost in GAINS]
    return [
        f"{headline.rival} (`{agent}`)",
        _in_brackets(percent, saving, saving_interval),
        f"up to {headline.saving:.0%}",
        *(_in_brackets(points, gain["value"], gain["interval"][::-1]) for gain in gains),
        f"up to {headline.gain}",
    ]


def _in_brackets(shown: Callable[[float | None], str], value: float | None, interval: Sequence[float | None]) -> str:
    """A value, its interval behind it; "none" where there is no value."""
    return "none" if value is None else f"{shown(value)} [{shown(interval[0])}, {shown(interval[1])}]"


def percent(value: float | None) -> str:
    """A share as a whole percentage."""
    return "none" if value is None else f"{value:z.0%}"  # no -0%


def points(loss: float | None) -> str:
    """A rival's gain as the points that it is below, with one digit."""
    return "none" if loss is None else f"{-100 * loss:z.1f}"
