"""index.html: what was trained and measured, on one page that needs nothing else."""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGE = "index.html"
TEMPLATE = Path(__file__).parent / "page.html"
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class Training:
    """One training run, as far as the page shows it.

    Attributes:
        name: of the policy.
        seconds: that it took, those of an earlier start not counted; None where that is not known.
        rows: its measurements, which learning curves are drawn from.
    """

    name: str
    seconds: float | None
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class PageParts:
    """What a page shows besides a summary.

    Attributes:
        about: what each policy is, a part of a sentence; empty where nothing is said.
        trainings: of the policies that were trained.
        transcripts: answers by policy, as `transcripts` gives them.
        seconds_of: problems that seconds were measured on, where it is not all of them.
        machine: processor, cores and versions, as `experiments.common.timing.machine` gives them.
        began: when all of it began, `time.time()`.
        next: commands to go on with, each with what it does.
    """

    about: Mapping[str, str] = field(default_factory=dict)
    trainings: Sequence[Training] = ()
    transcripts: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    seconds_of: int | None = None
    machine: Mapping[str, Any] | None = None
    began: float | None = None
    next: Sequence[tuple[str, str]] = ()


def page(summary: Summary, parts: PageParts) -> str:
    """The page, which holds its pictures.

    Args:
        summary: of an evaluation, or of several that were merged.
        parts: what else is shown.
    """
    from jinja2 import Environment, StrictUndefined

    from experiments.reporting.figures import UNITS, curves_svg, learning_svg
    from experiments.reporting.tables import cells, most_wanted, narrowed, table
    from experiments.reporting.transcripts import markup

    full = table(summary)
    few = narrowed(full, most_wanted(full))
    learning = [(training, learning_svg(training.rows)) for training in parts.trainings]
    names = summary["policies"]
    shown = {
        "summary": summary,
        "parts": parts,
        "unit": UNITS[summary["cost"]],
        "models": _models(summary),
        "curve": _embedded(curves_svg(summary)),
        "learning": [(training, _embedded(svg)) for training, svg in learning if svg],
        "few": cells(few),
        "full": cells(full) if len(few.columns) < len(full.columns) else None,
        "about": {name: parts.about[name] for name in names if name in parts.about},
        "thresholds": {name: len(seeds[0]) for name, seeds in summary.get("thresholds", {}).items()},
        "trained": [name for name, policy in names.items() if policy["trained"]],
        "checked": any("calls" in answer for some in parts.transcripts.values() for answer in some),
        "took": None if parts.began is None else _duration(time.time() - parts.began),
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": lambda share: f"{100 * share:.0f} %", "duration": _duration}
    environment.filters |= {"markup": markup, "by_problem": lambda answers: list(zip(*answers, strict=True))}
    return environment.from_string(TEMPLATE.read_text()).render(shown)


def _embedded(svg: str) -> str:
    """A drawing as the source of an image: what it names inside stays apart from other drawings."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" if svg else ""


def _models(summary: Summary) -> list[tuple[str, str]]:
    """Each model's name, and its size in words; empty where it is not known."""
    sizes = summary.get("parameters") or [None] * len(summary["pool"])
    return [(name, "" if size is None else _size(size)) for name, size in zip(summary["pool"], sizes, strict=True)]


def _size(parameters: int) -> str:
    for power, word in ((9, "billion"), (6, "million"), (3, "thousand")):
        if parameters >= 10**power:
            return f"{parameters / 10**power:.3g} {word} parameters"
    return f"{parameters} parameters"


def _duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} minutes"
