"""A router trained on labelled tokens: its policy, its loss and its training, for all learners that label tokens."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from agents.networks import RouterNetwork
from agents.policy import POLICY_FILE, Track
from envs.cache import IntArray
from envs.models import ModelPool
from envs.session import Observation


@dataclass
class RouterPolicy:
    """Scores a decision with a router network on the SLM's hidden state.

    Attributes:
        network: in evaluation mode.
        models: names of the pool it was trained for; it reads the first one's hidden states.
    """

    network: RouterNetwork
    models: list[str]

    @property
    def parameters(self) -> int:
        """Parameters read at every decision; they are part of the cost."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def score(self, observation: Observation) -> Tensor:
        logits = self.network(observation.hidden.float())
        return torch.sigmoid(logits)

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` and `policy.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.network.state_dict(), folder / "router.partial")
        os.replace(folder / "router.partial", folder / "router.safetensors")
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        settings = {"class": name, "models": self.models, "width": self.network.width}
        (folder / "policy.partial").write_text(json.dumps(settings, indent=1) + "\n")
        os.replace(folder / "policy.partial", folder / POLICY_FILE)

    @classmethod
    def load(cls, folder: Path, pool: ModelPool) -> RouterPolicy:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no router in `folder`, or it reads another model than the pool's SLM.
        """
        try:
            settings = json.loads((folder / POLICY_FILE).read_text())
            weights = load_file(folder / "router.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"{folder} holds no readable router; train one with experiments.train") from error
        if settings["width"] != pool.slm.width or settings["models"] != pool.names:
            raise ValueError(
                f"{folder}: the router was trained for {', '.join(settings['models'])} ({settings['width']} wide); the "
                f"pool is {', '.join(pool.names)} ({pool.slm.width} wide): load that pool, or train for this one"
            )
        network = RouterNetwork(settings["width"])
        network.load_state_dict(weights)
        return cls(network.eval().to(pool.slm.device), settings["models"])


@dataclass(frozen=True)
class RouterTraining:
    """How a router is trained.

    Args:
        epochs: passes over the data; the weights of the best one (validation loss) are kept.
        batch_size: tokens a step.
        lr: peak learning rate (AdamW, cosine).
        weight_decay: of AdamW.
        dropout: of the router.
        validation_share: share of the examples held out; the split is by example, never by token.
    """

    epochs: int = 12
    batch_size: int = 1024
    lr: float = 2e-3
    weight_decay: float = 0.01
    dropout: float = 0.1
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2:
            raise ValueError(f"epochs ({self.epochs}) must be at least 1 and batch_size ({self.batch_size}) at least 2")
        if not 0 < self.validation_share < 1 or not 0 <= self.dropout < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"validation_share ({self.validation_share}) must be in (0, 1), dropout ({self.dropout}) in [0, 1), "
                f"lr ({self.lr}) > 0, weight_decay ({self.weight_decay}) >= 0"
            )


def preference_loss(logits: Tensor, prefers_slm: Tensor) -> Tensor:
    """Negative log-likelihood of preferences under Bradley-Terry (Zheng et al. 2025, eq. 5): binary cross-entropy.

    Args:
        logits: log-odds that the SLM should write, (n,).
        prefers_slm: the labels, 0 or 1, (n,).
    """
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, prefers_slm)


def fit_router(
    hidden: Tensor,
    prefers_slm: Tensor,
    examples: IntArray,
    settings: RouterTraining,
    seed: int,
    track: Track,
    device: torch.device,
    label: str,
) -> RouterNetwork:
    """Train a router network on labelled tokens.

    Args:
        hidden: hidden states, float16, (n, width).
        prefers_slm: labels, 0 or 1, (n,).
        examples: the example each token is from, (n,).
        settings: how to train.
        seed: of split, initialisation and batches.
        track: receives a row per epoch.
        device: where to train.
        label: names the run in rows and on the progress bar.

    Raises:
        ValueError: labels of one class only, or too few examples to hold some out.
        FloatingPointError: the loss is not finite.
    """
    rng = np.random.default_rng(seed)
    held_out = _held_out(examples, settings.validation_share, rng)
    classes = prefers_slm[torch.from_numpy(~held_out)].unique().tolist()
    if len(classes) < 2:
        raise ValueError(f"all training labels are {classes}: there is nothing to learn; collect on more examples")
    torch_rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = RouterNetwork(hidden.shape[1], settings.dropout).to(device)
        train_rows = torch.from_numpy(np.flatnonzero(~held_out))
        sample = hidden[train_rows].float()
        network.standardise(sample)
        optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        per_epoch = max(1, len(train_rows) // settings.batch_size)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * per_epoch)
        best_loss, best = math.inf, copy.deepcopy(network.state_dict())
        for epoch in tqdm(range(settings.epochs), desc=f"router {label}", leave=False):
            network.train()
            total = 0.0
            for rows in _batches(train_rows, settings.batch_size, torch_rng):
                loss = preference_loss(network(hidden[rows].float().to(device)), prefers_slm[rows].float().to(device))
                if not torch.isfinite(loss):
                    ids = np.unique(examples[rows.numpy()])[:5].tolist()
                    raise FloatingPointError(f"router {label}: the loss is {loss.item()} in a batch of examples {ids}")
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.item()
            validation = evaluate_loss(network, hidden, prefers_slm, held_out, device)
            track({"run": label, "epoch": epoch, "loss": total / per_epoch, "validation_loss": validation})
            if not math.isfinite(validation):
                raise FloatingPointError(f"router {label}: the validation loss is {validation} after epoch {epoch}")
            if validation < best_loss:
                best_loss, best = validation, copy.deepcopy(network.state_dict())
    network.load_state_dict(best)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def evaluate_loss(
    network: RouterNetwork,
    hidden: Tensor,
    prefers_slm: Tensor,
    where: npt.NDArray[np.bool_],
    device: torch.device,
) -> float:
    """Mean preference loss of the rows `where`, (n,)."""
    network.eval()
    rows = torch.from_numpy(np.flatnonzero(where))
    losses = [
        preference_loss(network(hidden[part].float().to(device)), prefers_slm[part].float().to(device)).item()
        * len(part)
        for part in rows.split(65536)
    ]
    return sum(losses) / max(1, len(rows))


def _held_out(examples: IntArray, share: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Which rows belong to the examples held out; at least one example on either side."""
    known = np.unique(examples)
    if len(known) < 2:
        raise ValueError("a router needs at least two examples, to hold one out")
    count = min(max(1, round(share * len(known))), len(known) - 1)
    return np.isin(examples, rng.permutation(known)[:count])


def _batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Shuffled batches of exactly `size` rows; a smaller remainder is left to later epochs, for BatchNorm's sake."""
    shuffled = rows[torch.randperm(len(rows), generator=generator)]
    size = min(size, len(rows))
    for first in range(0, len(shuffled) - size + 1, size):
        yield shuffled[first : first + size]
