"""Names beside what they name, in place of a legend: where a label overlaps nothing, or as little as can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.arrays import FloatArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ANCHORS = 24
"""Places on a curve that a label may point to, at most."""
DISTANCES = (0.0, 0.02, 0.05, 0.09, 0.14)
"""How far a label may stand from its anchor, in heights of the axes."""
ANGLES = np.deg2rad([0, 30, 60, 90, 120, 180, 240, 270, 300, 330])
SAMPLES = 120
"""Points that stand for a line when it is looked for under labels."""
GAP = 0.012
"""Room around a label, and its distance from a point that it names, in heights of the axes."""


@dataclass(frozen=True)
class Label:
    """A name and what it names.

    Attributes:
        text: the name.
        points: of the line it names, or the one point, data coordinates, (n, 2).
        colour: of the text.
    """

    text: str
    points: FloatArray
    colour: Any = "black"


def place_labels(axes: Axes, labels: Sequence[Label], fontsize: float = 9.0) -> list[Any]:
    """Write labels beside their lines, so that none overlaps another where there is room, each with a thin line to it.

    The layout of the figure is final afterwards: what is added later moves nothing.

    Args:
        axes: where all lines are drawn already.
        labels: first come, first served.
        fontsize: in points.

    Returns:
        The texts, in the order of `labels`.
    """
    figure = axes.figure.figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # places are in pixels of this layout
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    inside = axes.get_window_extent(renderer)
    lines = [axes.transData.transform(_dense(label.points)) for label in labels]
    taken: list[tuple[float, float, float, float]] = []
    texts = []
    for number, label in enumerate(labels):
        text = axes.text(0, 0, label.text, fontsize=fontsize, color=label.colour, ha="center", va="center", zorder=5)
        extent = text.get_window_extent(renderer)
        size = np.array([extent.width, extent.height])
        others = [line for other, line in enumerate(lines) if other != number]
        anchor, centre = _best_place(
            lines[number],
            others,
            size,
            taken,
            (inside.x0, inside.y0, inside.x1, inside.y1),
            single=len(label.points) == 1,
        )
        text.set_position(tuple(axes.transData.inverted().transform(centre)))
        half = size / 2
        taken.append((*(centre - half), *(centre + half)))
        edge = np.clip(anchor, centre - half, centre + half)
        if np.hypot(*(edge - anchor)) > 2 * GAP * inside.height:
            ends = axes.transData.inverted().transform(np.stack([edge, anchor]))
            axes.plot(ends[:, 0], ends[:, 1], color=label.colour, linewidth=0.6, alpha=0.8, zorder=4)
        texts.append(text)
    return texts


def _dense(points: FloatArray) -> FloatArray:
    """Points at even distances along a line, (SAMPLES, 2); a point alone stays alone."""
    if len(points) == 1:
        return points
    along = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(points, axis=0)).sum(1))])
    at = np.linspace(0, along[-1], SAMPLES)
    return np.stack([np.interp(at, along, points[:, axis]) for axis in (0, 1)], axis=1)


def _best_place(
    line: FloatArray,
    others: Sequence[FloatArray],
    size: FloatArray,
    taken: Sequence[tuple[float, float, float, float]],
    inside: tuple[float, float, float, float],
    single: bool,
) -> tuple[FloatArray, FloatArray]:
    """The anchor and the centre of a label of `size`, in pixels: the least of overlaps, of confusion, of distance."""
    height = inside[3] - inside[1]
    gap = GAP * height
    anchors = line[:: max(1, len(line) // ANCHORS)]
    # a label stands beside its anchor: its half size away in that direction, and some distance more
    directions = np.stack([np.cos(ANGLES), np.sin(ANGLES)], axis=1)
    away = np.array([gap + distance * height for distance in DISTANCES])
    offsets = (directions[:, None] * away[None, :, None] + directions[:, None] * (size / 2)).reshape(-1, 2)
    centres = (anchors[:, None] + offsets[None]).reshape(-1, 2)
    distance = np.broadcast_to(np.hypot(*np.moveaxis(offsets, -1, 0)), (len(anchors), len(offsets))).reshape(-1)
    low, high = centres - size / 2 - gap / 2, centres + size / 2 + gap / 2
    cost = (40 if single else 1) * distance / height  # a point has one place, and its name belongs beside it
    outside = (low < inside[:2]).any(1) | (high > inside[2:]).any(1)
    cost = cost + 1e6 * outside
    for box in taken:
        overlaps = (low < np.array(box[2:])).all(1) & (high > np.array(box[:2])).all(1)
        cost = cost + 1e4 * overlaps
    everything = np.concatenate([*others, line]) if others else line
    x, y = everything.T
    hidden = ((x > low[:, :1]) & (x < high[:, :1]) & (y > low[:, 1:]) & (y < high[:, 1:])).sum(1)
    cost = cost + 0.5 * hidden
    if others and not single:  # where another line is near, nobody can tell which of the two is named
        near = np.min(np.hypot(*np.moveaxis(anchors[:, None] - np.concatenate(others)[None], -1, 0)), axis=1)
        cost = cost + np.repeat(0.3 * (near < gap), len(offsets))
    best = int(cost.argmin())
    return anchors[best // len(offsets)], centres[best]
