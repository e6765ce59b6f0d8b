"""Pictures: accuracy over cost, and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.storage import write_whole

UNITS = {
    "bytes": "memory traffic",
    "flops": "floating-point operations",
    "llm_tokens": "LLM tokens",
    "seconds": "seconds of forward passes",
    "dollars": "price",
}
ALONE = ("slm only", "llm only")
LIMITS = {
    "random": "random routing",
    "query_oracle": "oracle, per query",
    "speculative": "speculative decoding",
    "oracle": "oracle",
}


def plot_curves(summary: Mapping[str, Any], path: Path, axis: str | None = None, alone: Sequence[str] = ALONE) -> None:
    """Draw accuracy over relative cost, a line per policy, to a PNG file.

    Args:
        summary: of an evaluation.
        path: of the file.
        axis: what the cost is; relative to LLM-only decoding where None.
        alone: what the two ends of all curves are called.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for position, (name, policy) in enumerate(summary["policies"].items()):
        costs, accuracies = zip(*policy["curve"], strict=True)
        style = "-" if policy["trained"] else "--"
        colour = colours[position % 10]
        axes.plot(costs, accuracies, style, marker="." if len(costs) < 25 else "", color=colour, label=name)
        grid, low, high = (np.array(column, dtype=float) for column in zip(*policy["band"], strict=True))
        axes.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
    for name, limit in summary["limits"].items():
        if "curve" not in limit:
            axes.plot(limit[f"cost_{summary['cost']}"], limit["accuracy"], "k*", label=LIMITS[name], zorder=3)
            continue
        axes.plot(
            *zip(*limit["curve"], strict=True),
            color="grey" if name == "random" else "black",
            ls="-." if name == "query_oracle" else ":",
            label=LIMITS[name],
        )
    for name, label in zip(("slm", "llm"), alone, strict=True):
        model = summary["models"][name]
        axes.plot(model["cost"], model["accuracy"], "k^" if name == "llm" else "ks", label=label, zorder=3)
    axes.axhline(0.95 * summary["models"]["llm"]["accuracy"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(axis or f"cost relative to LLM-only decoding ({UNITS[summary['cost']]})")
    axes.set_ylabel(f"accuracy ({summary['examples']} {summary['split']} problems)")
    few = f": {' -> '.join(summary['pool'])}" if len(summary["pool"]) < 4 else ""
    axes.set_title(f"{summary['task']}{few}", fontsize="medium")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


LEARNING = {
    "time/total_timesteps": ("rollout/ep_rew_mean", "rollout/success_rate"),
    "iteration": ("return", "accuracy", "llm_share"),
    "epoch": ("loss", "validation_loss"),
}
"""By what a learner counts its progress: the measurements that are drawn over it."""


def plot_learning(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw learning curves to a PNG file, a panel per run of the learner; False where its rows hold none."""
    curves: dict[str, tuple[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        for count in LEARNING:
            if count in row:
                curves.setdefault(f"{row.get('run', '')}", (count, []))[1].append(row)
    if not curves:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4), layout="constrained", squeeze=False)
    for panel, (name, (count, measured)) in zip(axes[0], curves.items(), strict=True):
        for key in LEARNING[count]:
            points = [(row[count], row[key]) for row in measured if key in row and count in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=key.removeprefix("rollout/"))
        panel.set_title(name)
        panel.set_xlabel("tokens" if count == "time/total_timesteps" else count)
        panel.grid(alpha=0.3)
        panel.legend()
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)
    return True
