"""Pictures: accuracy over cost, and learning curves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from envs.arrays import FloatArray
from envs.storage import write_whole
from experiments.reporting.labels import Label, place_labels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

UNITS = {
    "bytes": "memory traffic",
    "flops": "floating-point operations",
    "llm_tokens": "LLM tokens",
    "seconds": "seconds of forward passes",
    "dollars": "price",
}
ALONE = ("slm only", "llm only")
BASELINE_NAMES = {
    "line": "a coin per query",
    "query_oracle": "oracle, per query",
    "speculative": "speculative decoding",
    "oracle": "oracle",
}
FEW_POINTS = 25
"""A curve of fewer shows each."""
NAMED = 8
"""Policies that are named in a picture; more cannot be told apart."""
TARGET = 0.95
"""Share of the LLM's accuracy that a line marks."""


def front_name(name: str, front: Mapping[str, Any]) -> str:
    """What the front over the settings of the agent `name` is called."""
    return f"{name}, front of {len(front['settings'])}"


@contextmanager
def _figure(target: Path | IO[bytes], dpi: int, columns: int, size: tuple[float, float]) -> Iterator[list[Axes]]:
    """Panels in a row, written at the end: to a PNG file, or as an SVG drawing on no ground."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # without pyplot, which keeps every figure and takes long to import
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    yield list(figure.subplots(1, columns, squeeze=False)[0])
    if isinstance(target, Path):
        write_whole(target, lambda partial: _write_png(partial, figure))
    else:
        with mpl.rc_context({"svg.hashsalt": "citer-gym"}):  # the same drawing has the same bytes
            figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})


def _write_png(path: Path, figure: Figure) -> None:
    """A PNG file of 256 colours, which takes a third of one of all, and says what is drawn."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("Description", json.dumps(drawn(figure)))  # whether a picture is of today's numbers can be told
    whole = BytesIO()
    figure.savefig(whole, format="png")
    with Image.open(whole) as picture:
        picture.convert("RGB").quantize(256).save(path, format="png", optimize=True, pnginfo=about)


def drawn(figure: Figure) -> list[dict[str, Any]]:
    """The lines of a figure as plain data: of each its label, and some of its points with five digits."""

    def rounded(values: Any) -> list[float]:
        some = np.linspace(0, len(values) - 1, min(len(values), 20)).astype(int)
        return [float(f"{values[place]:.5g}") for place in some]

    lines = [line for panel in figure.axes for line in panel.get_lines()]
    return [
        {"label": f"{line.get_label()}", "x": rounded(line.get_xdata()), "y": rounded(line.get_ydata())}
        for line in lines
    ]


def _svg(draw: Callable[[IO[bytes]], object]) -> str:
    """What `draw` writes, as text."""
    file = BytesIO()
    draw(file)
    return file.getvalue().decode()


def plot_curves(
    summary: Mapping[str, Any],
    path: Path,
    axis: str | None = None,
    alone: Sequence[str] = ALONE,
    logarithmic: bool = False,
) -> None:
    """Draw accuracy over relative cost, a line per policy, to a PNG file.

    Args:
        summary: of an evaluation.
        path: of the file.
        axis: what the cost is; relative to LLM-only decoding where None.
        alone: what the two ends of all curves are called.
        logarithmic: the axis of costs, for many policies at a small share of the LLM's cost.
    """
    _draw_curves(summary, path, axis, alone, logarithmic)


def curves_svg(summary: Mapping[str, Any]) -> str:
    """The same as an SVG drawing on no ground, for a page."""
    return _svg(lambda file: _draw_curves(summary, file, None, ALONE))


def _draw_curves(
    summary: Mapping[str, Any],
    target: Path | IO[bytes],
    axis: str | None,
    alone: Sequence[str],
    logarithmic: bool = False,
) -> None:
    from matplotlib import colormaps

    colours, named = colormaps["tab10"], named_policies(summary)
    unnamed = [name for name in summary["policies"] if name not in named]
    slm, llm = summary["models"]["slm"], summary["models"]["llm"]
    with _figure(target, dpi=130, columns=1, size=(8, 5)) as (axes,):
        labels = []
        first = slm["cost"] if logarithmic else 0.0
        if logarithmic:
            _logarithmic_costs(axes, first)
        else:
            axes.set_xlim(0, 1.03)
        for name in unnamed:
            _draw_policy(axes, summary["policies"][name], "lightgrey", banded=False)
        for position, name in enumerate(named):
            colour = colours(position)
            labels.append(Label(name, _draw_policy(axes, summary["policies"][name], colour), colour))
            _mark_chosen(axes, summary["policies"][name], f"cost_{summary.get('cost')}", colour)
        for name, front in summary.get("fronts", {}).items():
            points = _to_the_end(front["curve"])
            # below the curves it is made of, which stay visible on it
            _line(axes, points, color="gold", linewidth=6, alpha=0.5, zorder=1)
            labels.append(Label(front_name(name, front), points, "darkgoldenrod"))
        for name, baseline in summary["limits"].items():
            shown = BASELINE_NAMES[name]
            if "curve" in baseline:
                labels.append(_draw_baseline(axes, name, shown, baseline["curve"]))
            else:  # one point
                labels.append(_mark(axes, baseline[f"cost_{summary['cost']}"], baseline["accuracy"], "k*", shown))
        labels.append(_mark(axes, slm["cost"], slm["accuracy"], "ks", alone[0]))
        labels.append(_mark(axes, llm["cost"], llm["accuracy"], "k^", alone[1]))
        target_line = np.array([[first, TARGET * llm["accuracy"]], [1.0, TARGET * llm["accuracy"]]])
        axes.plot(*target_line.T, color="grey", linewidth=0.8, linestyle=":")
        best = "the LLM" if alone is ALONE else "the best model"
        labels.append(Label(f"{TARGET:.0%} of {best}'s accuracy".replace("%", " %"), target_line, "dimgrey"))
        scale = ", logarithmic scale" if logarithmic else ""
        axes.set_xlabel((axis or f"cost relative to LLM-only decoding ({UNITS[summary['cost']]})") + scale)
        axes.set_ylabel(f"accuracy ({summary['examples']} {summary['split']} problems)")
        few = f": {' -> '.join(summary['pool'])}" if len(summary["pool"]) < 4 else ""
        grey = f"; in grey, not named: {len(unnamed)} more" if unnamed else ""
        axes.set_title(f"{summary['task']}{few}{grey}", fontsize="medium")
        axes.set_ylim(*_accuracies(labels))
        axes.grid(alpha=0.3)
        place_labels(axes, sorted(labels, key=lambda label: len(label.points) > 1))  # a point has one place


def named_policies(summary: Mapping[str, Any]) -> list[str]:
    """The policies that a picture names, in the order of the summary: the first, and the cheapest for their accuracy.

    At most NAMED of them.
    """
    policies = summary["policies"]

    def dear(name: str) -> tuple[bool, bool, float]:
        cost = policies[name].get("cost_at", {}).get(f"{TARGET:.2f}")
        return name != summary.get("first"), cost is None, cost or 0.0

    chosen = sorted(policies, key=dear)[:NAMED]
    return [name for name in policies if name in chosen]


def _to_the_end(curve: Sequence[Sequence[float]]) -> FloatArray:
    """A curve up to the cost of LLM-only decoding, (n, 2): who pays for more keeps the accuracy there is."""
    points = np.array(curve, dtype=float)
    return points if points[-1, 0] >= 1 else np.concatenate([points, [[1.0, points[-1, 1]]]])


def _logarithmic_costs(axes: Axes, first: float) -> None:
    """Costs from `first` to that of LLM-only decoding on a logarithmic axis, on which straight lines are bent."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log")
    axes.set_xlim(first * 0.85, 1.15)
    axes.xaxis.set_major_locator(FixedLocator([0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.7, 1.0]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _line(axes: Axes, points: FloatArray, **style: Any) -> None:
    """Draw a line that is straight in accuracy over cost: on a logarithmic axis it is bent, and has more points."""
    if axes.get_xscale() == "log":
        along = np.arange(len(points))
        at = np.linspace(0, along[-1], 20 * along[-1] + 1)
        points = np.stack([np.interp(at, along, points[:, axis]) for axis in (0, 1)], axis=1)
    axes.plot(*points.T, **style)


def _accuracies(labels: Sequence[Label]) -> tuple[float, float]:
    """The range of accuracies that is shown: down to a tenth below the lowest of what is named."""
    lowest = min(float(label.points[:, 1].min()) for label in labels)
    return max(0.0, np.floor(10 * lowest - 0.5) / 10), 1.04


def _draw_policy(axes: Axes, policy: Mapping[str, Any], colour: Any, banded: bool = True) -> FloatArray:
    """A curve and the band of its intervals; one that was not trained is dashed. Its points, (n, 2)."""
    measured, points = np.array(policy["curve"], dtype=float), _to_the_end(policy["curve"])
    _line(axes, points, linestyle="-" if policy["trained"] else "--", color=colour)
    if len(measured) < FEW_POINTS:
        axes.plot(*measured.T, ".", color=colour)
    if banded:
        grid, low, high = (np.array(column, dtype=float) for column in zip(*policy["band"], strict=True))
        axes.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
    return points


def _mark_chosen(axes: Axes, policy: Mapping[str, Any], cost: str, colour: Any) -> None:
    """A ring at the operating point that validation chooses for TARGET, where one is known."""
    point = policy.get("operating_points", {}).get(f"{TARGET:.2f}")
    if point is not None:
        axes.plot(point[cost]["value"], point["accuracy"]["value"], "o", color=colour, fillstyle="none", markersize=8)


def _draw_baseline(axes: Axes, name: str, shown: str, curve: Sequence[Sequence[float]]) -> Label:
    """A dotted curve: the straight line between the models in grey, the oracles in black."""
    colour = "grey" if name == "line" else "black"
    points = _to_the_end(curve)
    _line(axes, points, color=colour, linestyle="-." if name == "query_oracle" else ":")
    return Label(shown, points, colour)


def _mark(axes: Axes, cost: float, accuracy: float, marker: str, name: str) -> Label:
    """One point, above all curves."""
    axes.plot(cost, accuracy, marker, zorder=3)
    return Label(name, np.array([[cost, accuracy]]))


@dataclass(frozen=True)
class LearningAxis:
    """How a learner counts its progress.

    Attributes:
        name: of the axis, with its unit.
        shown: what is drawn over it, and how each is called.
        measure: what that is, the name of the other axis.
        first: what the first count is shown as.
    """

    name: str
    shown: Mapping[str, str]
    measure: str
    first: int = 0


_VALIDATED = {
    "validation_cost": "cost at 95 % of the LLM's accuracy (validation)",
    "validation_accuracy": "mean accuracy of the curve (validation)",
}
LEARNING = {
    "time/total_timesteps": LearningAxis(
        "tokens decided on",
        {"rollout/ep_rew_mean": "return", "rollout/success_rate": "share of right answers", **_VALIDATED},
        "mean over the last training responses",
    ),
    "iteration": LearningAxis(
        "iteration",
        {
            "return": "return",
            "accuracy": "share of right answers",
            "llm_share": "share of tokens by the LLM",
            **_VALIDATED,
        },
        "mean over the iteration's responses",
    ),
    "epoch": LearningAxis(
        "epoch (passes over the training tokens)",
        {"loss": "training", "validation_loss": "validation (problems held out)"},
        "loss (cross-entropy, nats per token)",
        first=1,
    ),
}
"""By what a learner counts its progress, and what is drawn over it."""


@dataclass
class _LearningCurve:
    """One run of a learner: what it counts its progress by, and its rows, whether they count it or not."""

    progress: str
    rows: list[Mapping[str, Any]] = field(default_factory=list)


def plot_learning(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw learning curves to a PNG file, a panel per run of the learner; False where its rows hold none."""
    return _plot_learning(rows, path)


def learning_svg(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same as an SVG drawing on no ground, for a page; empty where rows hold none."""
    return _svg(lambda file: _plot_learning(rows, file))


def _plot_learning(rows: Sequence[Mapping[str, Any]], target: Path | IO[bytes]) -> bool:
    curves = _learning_curves(rows)
    if not curves:
        return False
    with _figure(target, dpi=110, columns=len(curves), size=(5 * len(curves), 3.5)) as panels:
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
    from matplotlib.ticker import MaxNLocator

    axis = LEARNING[curve.progress]
    for key, shown in axis.shown.items():
        points = [(row[curve.progress] + axis.first, row[key]) for row in curve.rows if {key, curve.progress} <= {*row}]
        if points:
            panel.plot(*zip(*points, strict=True), marker="." if len(points) < FEW_POINTS else "", label=shown)
    panel.set_title(name, fontsize="medium")
    panel.set_xlabel(axis.name)
    panel.set_ylabel(axis.measure)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.3)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(framealpha=0.3)
