"""Pictures: accuracy over cost, and learning curves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNITS = {
    "bytes": "memory traffic",
    "flops": "floating-point operations",
    "llm_tokens": "LLM tokens",
    "seconds": "seconds of forward passes",
    "dollars": "price",
}
ALONE = ("slm only", "llm only")
BASELINE_NAMES = {
    "random": "random routing",
    "query_oracle": "oracle, per query",
    "speculative": "speculative decoding",
    "oracle": "oracle",
}
FEW_POINTS = 25
"""A curve of fewer shows each."""


def front_name(name: str, front: Mapping[str, Any]) -> str:
    """What the front over the settings of the agent `name` is called."""
    return f"{name}, front of {len(front['settings'])}"


@contextmanager
def _figure(path: Path, dpi: int, columns: int, size: tuple[float, float]) -> Iterator[list[Axes]]:
    """Panels in a row, written to a PNG file at the end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    try:
        yield list(axes[0])
        write_whole(path, lambda partial: figure.savefig(partial, dpi=dpi, format="png"))
    finally:
        plt.close(figure)


def plot_curves(summary: Mapping[str, Any], path: Path, axis: str | None = None, alone: Sequence[str] = ALONE) -> None:
    """Draw accuracy over relative cost, a line per policy, to a PNG file.

    Args:
        summary: of an evaluation.
        path: of the file.
        axis: what the cost is; relative to LLM-only decoding where None.
        alone: what the two ends of all curves are called.
    """
    from matplotlib import colormaps

    colours = colormaps["tab10"]
    with _figure(path, dpi=130, columns=1, size=(8, 5)) as (axes,):
        for position, (name, policy) in enumerate(summary["policies"].items()):
            _draw_policy(axes, name, policy, colours(position % 10))
        for name, front in summary.get("fronts", {}).items():
            costs, accuracies = zip(*front["curve"], strict=True)
            # below the curves it is made of, which stay visible on it
            axes.plot(costs, accuracies, color="gold", linewidth=6, alpha=0.5, zorder=1, label=front_name(name, front))
        for name, baseline in summary["limits"].items():
            if "curve" in baseline:
                _draw_baseline(axes, name, baseline["curve"])
            else:  # one point
                _mark(axes, baseline[f"cost_{summary['cost']}"], baseline["accuracy"], "k*", BASELINE_NAMES[name])
        slm, llm = summary["models"]["slm"], summary["models"]["llm"]
        _mark(axes, slm["cost"], slm["accuracy"], "ks", alone[0])
        _mark(axes, llm["cost"], llm["accuracy"], "k^", alone[1])
        axes.axhline(0.95 * llm["accuracy"], color="grey", linewidth=0.8, linestyle=":")
        axes.set_xlabel(axis or f"cost relative to LLM-only decoding ({UNITS[summary['cost']]})")
        axes.set_ylabel(f"accuracy ({summary['examples']} {summary['split']} problems)")
        few = f": {' -> '.join(summary['pool'])}" if len(summary["pool"]) < 4 else ""
        axes.set_title(f"{summary['task']}{few}", fontsize="medium")
        axes.set_xlim(0, 1.03)
        axes.set_ylim(0, 1.02)
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")


def _draw_policy(axes: Axes, name: str, policy: Mapping[str, Any], colour: Any) -> None:
    """A curve and the band of its intervals; one that was not trained is dashed."""
    costs, accuracies = zip(*policy["curve"], strict=True)
    marker = "." if len(costs) < FEW_POINTS else ""
    axes.plot(costs, accuracies, "-" if policy["trained"] else "--", marker=marker, color=colour, label=name)
    grid, low, high = (np.array(column, dtype=float) for column in zip(*policy["band"], strict=True))
    axes.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)


def _draw_baseline(axes: Axes, name: str, curve: Sequence[Sequence[float]]) -> None:
    """A dotted curve: random routing in grey, the oracles in black."""
    costs, accuracies = zip(*curve, strict=True)
    colour = "grey" if name == "random" else "black"
    style = "-." if name == "query_oracle" else ":"
    axes.plot(costs, accuracies, color=colour, linestyle=style, label=BASELINE_NAMES[name])


def _mark(axes: Axes, cost: float, accuracy: float, marker: str, label: str) -> None:
    """One point, above all curves."""
    axes.plot(cost, accuracy, marker, label=label, zorder=3)


LEARNING = {
    "time/total_timesteps": ("rollout/ep_rew_mean", "rollout/success_rate"),
    "iteration": ("return", "accuracy", "llm_share"),
    "epoch": ("loss", "validation_loss"),
}
"""By what a learner counts its progress: the measurements that are drawn over it."""


@dataclass
class _LearningCurve:
    """One run of a learner: what it counts its progress by, and its rows, whether they count it or not."""

    progress: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)


def plot_learning(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw learning curves to a PNG file, a panel per run of the learner; False where its rows hold none."""
    curves = _learning_curves(rows)
    if not curves:
        return False
    with _figure(path, dpi=110, columns=len(curves), size=(6 * len(curves), 4)) as panels:
        for panel, (name, curve) in zip(panels, curves.items(), strict=True):
            _draw_learning(panel, name, curve)
    return True


def _learning_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, _LearningCurve]:
    """The rows of each run of a learner that counts its progress; the first count it names is the run's."""
    curves: dict[str, _LearningCurve] = {}
    for row in rows:
        for progress in LEARNING:
            if progress in row:
                curves.setdefault(f"{row.get('run', '')}", _LearningCurve(progress)).rows.append(row)
    return curves


def _draw_learning(panel: Axes, name: str, curve: _LearningCurve) -> None:
    for key in LEARNING[curve.progress]:
        points = [(row[curve.progress], row[key]) for row in curve.rows if key in row and curve.progress in row]
        if points:
            panel.plot(*zip(*points, strict=True), label=key.removeprefix("rollout/"))
    panel.set_title(name)
    panel.set_xlabel("tokens" if curve.progress == "time/total_timesteps" else curve.progress)
    panel.grid(alpha=0.3)
    panel.legend()
