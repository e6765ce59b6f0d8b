"""Training a router on labelled tokens, with checkpoints and a calibration report."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from agents.common.policy import Track
from agents.router.dataset import LabelledTokens, held_out_rows
from agents.router.network import RouterNetwork
from envs.arrays import BoolArray, FloatArray, IntArray
from envs.progress import ProgressBar
from envs.storage import write_tensors


@dataclass(frozen=True)
class RouterTraining:
    """How a router is trained.

    Args:
        epochs: passes over the data; the weights of the best one (validation loss) are kept.
        patience: epochs without a better validation loss after which training stops.
        batch_size: tokens a step.
        lr: peak learning rate (AdamW).
        schedule: of the learning rate: `cosine`, down to 0 after the last epoch, or `constant`.
        weight_decay: of AdamW, which is Adam where it is 0.
        shuffle: whether batches are drawn anew every epoch; they are cut in the order of the tokens otherwise.
        standardise: whether inputs are standardised by the statistics of the training data.
        dropout: of the router.
        validation_share: share of the examples held out; the split is by example, never by token.
        units: of the router's hidden layers; twice the features and as many as these where None, as published; a linear
            router where empty.
        layout: of the hidden layers behind the first: `paper` (ReLU) or `released` (Dropout in its place).
        balanced: weigh the two classes alike in the loss. By default they are not: most tokens prefer the SLM, the
            score stays a probability, and the threshold, chosen by quantiles of the score, does the trading.
    """

    epochs: int = 12
    patience: int = 4
    batch_size: int = 1024
    lr: float = 2e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.01
    shuffle: bool = True
    standardise: bool = True
    dropout: float = 0.1
    validation_share: float = 0.1
    units: list[int] | None = None
    layout: Literal["paper", "released"] = "paper"
    balanced: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.patience < 1:
            raise ValueError(
                f"epochs ({self.epochs}) and patience ({self.patience}) must be at least 1 and batch_size "
                f"({self.batch_size}) at least 2"
            )
        if self.units is not None:
            if min(self.units, default=1) < 1:
                raise ValueError(f"units must be above 0, are {list(self.units)}; none of them makes a linear router")
            object.__setattr__(self, "units", [int(units) for units in self.units])  # whatever sequence came in
        for key, known in (("schedule", ("cosine", "constant")), ("layout", ("paper", "released"))):
            if getattr(self, key) not in known:
                raise ValueError(f"unknown {key} {getattr(self, key)!r}; choose {' or '.join(known)}")
        if not 0 < self.validation_share < 1 or not 0 <= self.dropout < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"validation_share ({self.validation_share}) must be in (0, 1), dropout ({self.dropout}) in [0, 1), "
                f"lr ({self.lr}) > 0, weight_decay ({self.weight_decay}) >= 0"
            )


def calibration(scores: FloatArray, prefers_slm: BoolArray, bins: int = 10) -> dict[str, Any]:
    """Reliability curve and expected calibration error (Guo et al. 2017), in bins of equally many scores.

    Args:
        scores: (n,).
        prefers_slm: labels, (n,).
        bins: at most so many.

    Returns:
        `ece`, and `reliability`: mean score, share of SLM labels and count of each bin, by rising score.
    """
    order = np.argsort(scores, kind="stable")
    curve = [
        [float(scores[part].mean()), float(prefers_slm[part].mean()), len(part)]
        for part in np.array_split(order, min(bins, len(order)))
    ]
    error = sum(abs(score - share) * count for score, share, count in curve) / max(1, len(order))
    return {"ece": error, "reliability": curve}


def fit_router(
    data: LabelledTokens,
    settings: RouterTraining,
    seed: int,
    track: Track,
    device: torch.device,
    label: str,
    checkpoint: Path | None = None,
    start: RouterNetwork | None = None,
) -> tuple[RouterNetwork, dict[str, Any]]:
    """Train a router network on labelled tokens.

    Args:
        data: the tokens, and their loss.
        settings: how to train.
        seed: of split, initialisation and batches.
        track: receives a row per epoch.
        device: where to train.
        label: names the run in rows and on the progress bar.
        checkpoint: file that is written after every epoch, and gone on from where it is there.
        start: a network of the same layers to train on from, which stays as it is; an untrained one where None.

    Returns:
        The network, and its calibration on the examples held out.

    Raises:
        ValueError: labels of one class only, too few examples to hold some out, or a checkpoint of other settings.
        FloatingPointError: the loss is not finite.
    """
    held_out = held_out_rows(data.examples, settings.validation_share, np.random.default_rng(seed))
    train, validation = data.kept & ~held_out, data.kept & held_out
    share = float(data.as_they_count(data.prefers_slm[train], train).mean()) if train.any() else math.nan
    if not 0 < share < 1:
        raise ValueError(
            f"{label}: all {int(train.sum())} training labels are the same (share of SLM labels {share}): there is "
            "nothing to learn; collect on more examples, or change the labels' settings"
        )
    fit = _RouterFit(data, settings, seed, device, label, train, share, start)
    if checkpoint is not None and checkpoint.is_file():
        fit.restore(checkpoint)
    for row in fit.history:
        track({"run": label, **row})
    with ProgressBar(total=settings.epochs, initial=len(fit.history), desc=f"router {label}", leave=False) as progress:
        while not fit.done():
            row = fit.epoch(validation)
            track({"run": label, **row})
            if checkpoint is not None:
                fit.save(checkpoint)
            progress.update()
    fit.network.load_state_dict(fit.best)
    network = fit.network.eval().requires_grad_(False)
    logits, rows = predict(network, data, validation, device)
    scores, labels = (
        data.as_they_count(some, rows) for some in (torch.sigmoid(logits).numpy(), data.prefers_slm[rows])
    )
    report = {"train_labels": int(train.sum()), "prefers_slm": share}
    return network, report | calibration(scores, labels)


class _RouterFit:
    """A router between two epochs of its training."""

    def __init__(
        self,
        data: LabelledTokens,
        settings: RouterTraining,
        seed: int,
        device: torch.device,
        label: str,
        train: BoolArray,
        share: float,
        start: RouterNetwork | None,
    ) -> None:
        self.data, self.settings, self.seed, self.device, self.label = data, settings, seed, device, label
        self.train, self.start = train, start
        self.weights = (1.0, 1.0) if not settings.balanced else (0.5 / (1 - share), 0.5 / share)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = RouterNetwork(data.width, settings.dropout, settings.units, settings.layout).to(device)
        if start is not None:
            self.network.load_state_dict(start.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.history: list[dict[str, Any]] = []
        self.best_loss, self.best = math.inf, copy.deepcopy(self.network.state_dict())
        count = int(train.sum())
        self.per_epoch = max(1, count // min(settings.batch_size, count))

    def done(self) -> bool:
        """Whether all epochs are made, or the last ones brought nothing."""
        losses = [row["validation_loss"] for row in self.history]
        late = bool(losses) and len(losses) - 1 - int(np.argmin(losses)) >= self.settings.patience
        return late or len(losses) >= self.settings.epochs

    def epoch(self, validation: BoolArray) -> dict[str, Any]:
        """One pass over the training rows; the row it is reported by."""
        number = len(self.history)
        if number == 0 and self.start is None and self.settings.standardise:
            self.network.standardise(*self._statistics())
        rng = np.random.default_rng([self.seed, number]) if self.settings.shuffle else None
        total = steps = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1000 + number)  # of dropout
            self.network.train()
            for features, rows in self.data.batches(self.train, self.settings.batch_size, rng):
                position = (number * self.per_epoch + steps) / (self.settings.epochs * self.per_epoch)
                share = 0.5 * (1 + math.cos(math.pi * min(1.0, position)))
                for group in self.optimizer.param_groups:
                    group["lr"] = self.settings.lr * (share if self.settings.schedule == "cosine" else 1)
                loss = self.data.loss(self.network(features.to(self.device).float()), rows, self.weights)
                if not torch.isfinite(loss):
                    ids = np.unique(self.data.examples[rows])[:5].tolist()
                    raise FloatingPointError(
                        f"router {self.label}: the loss is {loss.item()} in a batch of examples {ids}; look at their "
                        "features, or lower training.lr"
                    )
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                total += loss.item()
                steps += 1
        validation_loss = evaluate_loss(self.network, self.data, validation, self.device)
        if not math.isfinite(validation_loss):
            raise FloatingPointError(
                f"router {self.label}: the validation loss is {validation_loss} after epoch {number}"
            )
        if validation_loss < self.best_loss:
            self.best_loss, self.best = validation_loss, copy.deepcopy(self.network.state_dict())
        row = {"epoch": number, "loss": total / max(1, steps), "validation_loss": validation_loss}
        self.history.append(row)
        return row

    def _statistics(self) -> tuple[Tensor, Tensor]:
        count, total, squares = 0, torch.zeros(self.data.width).double(), torch.zeros(self.data.width).double()
        for features, _ in self.data.blocks(self.train):
            for part in features.split(65536):
                wide = part.double()
                count, total, squares = count + len(wide), total + wide.sum(0), squares + (wide**2).sum(0)
        mean = total / count
        return mean, (squares / count - mean**2).clamp(min=0).sqrt()

    def _about(self) -> str:
        return json.dumps(
            {
                "settings": asdict(self.settings),
                "seed": self.seed,
                "rows": int(self.train.sum()),
                "prefers_slm": int(self.data.prefers_slm[self.train].sum()),
                "width": self.data.width,
                **({"started": True} if self.start is not None else {}),
            }
        )

    def save(self, path: Path) -> None:
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value for name, value in state.items()}
        kept = {"about": self._about(), "history": self.history, "best_loss": self.best_loss}
        write_tensors(path, {name: value.contiguous() for name, value in tensors.items()}, {"fit": json.dumps(kept)})

    def restore(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt", device=str(self.device)) as file:
                kept = dict(json.loads((file.metadata() or {}).get("fit", "{}")))
                # copies, as those of read_tensors
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no readable checkpoint; delete it, and training begins anew") from error
        if kept.get("about") != self._about():
            raise ValueError(
                f"{path} is the checkpoint of {kept.get('about')}, this run is {self._about()}; delete it or "
                "give this run another folder"
            )
        try:
            self._restore(tensors, kept)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it, and training begins anew") from error

    def _restore(self, tensors: Mapping[str, Tensor], kept: Mapping[str, Any]) -> None:
        """Go on from the contents of a checkpoint; errors of any kind where they do not belong together."""
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "best": {}}
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "optimizer":
                number, key = rest.split(".")
                state.setdefault(int(number), {})[key] = value
            else:
                parts[kind][rest] = value
        found = {number: {key: value.shape for key, value in of.items()} for number, of in state.items()}
        shapes = [parameter.shape for parameter in self.network.parameters()]
        if found != {n: {"step": torch.Size(), "exp_avg": s, "exp_avg_sq": s} for n, s in enumerate(shapes)}:
            raise ValueError("the optimiser's state is not that of the network")
        copy.deepcopy(self.network).load_state_dict(parts["best"])
        self.network.load_state_dict(parts["network"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.best, self.best_loss = parts["best"], float(kept["best_loss"])
        history = list(kept["history"])
        if not all(math.isfinite(row["validation_loss"]) and row["epoch"] == n for n, row in enumerate(history)):
            raise ValueError("the history is not that of epochs")
        self.history = history


@torch.no_grad()
def predict(
    network: RouterNetwork, data: LabelledTokens, where: BoolArray, device: torch.device
) -> tuple[Tensor, IntArray]:
    """Logits of the rows `where`, float64, (m,), and their numbers, (m,)."""
    network.eval()
    logits, numbers = [torch.zeros(0).double()], [np.zeros(0, dtype=np.int64)]
    for features, rows in data.blocks(where):
        logits += [network(part.to(device).float()).double().cpu() for part in features.split(65536)]
        numbers.append(rows)
    return torch.cat(logits), np.concatenate(numbers)


def evaluate_loss(network: RouterNetwork, data: LabelledTokens, where: BoolArray, device: torch.device) -> float:
    """Mean loss of the rows `where`, (n,)."""
    logits, rows = predict(network, data, where, device)
    return data.loss(logits, rows).item() if len(rows) else 0.0
