"""A network per model that predicts whether its answer to a query is right; and what routers of networks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import Track, untracked
from agents.common.saving import saved_as
from agents.query_routing.learner import QueryLearner
from agents.query_routing.router import SUREST, EmbeddedQueries, QueryRouter
from agents.router.dataset import LabelledTokens, held_out_rows
from agents.router.network import RouterNetwork
from agents.router.training import RouterTraining, fit_router


@dataclass(frozen=True, eq=False)
class NetworksRouter(QueryRouter):
    """A router that consists of router networks.

    Attributes:
        networks: in evaluation mode.
    """

    networks: tuple[RouterNetwork, ...]

    def tensors(self) -> dict[str, Tensor]:
        parts = (network.state_dict().items() for network in self.networks)
        return {f"{number}.{name}": value for number, part in enumerate(parts) for name, value in part}

    @classmethod
    def of_tensors(cls, models: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Self:
        parts: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            number, rest = name.split(".", 1)
            parts.setdefault(int(number), {})[rest] = value
        return cls(models, tuple(network_of(parts[number]) for number in sorted(parts)))


def network_of(weights: Mapping[str, Tensor]) -> RouterNetwork:
    """The router network that has these weights, in evaluation mode."""
    layers = {int(name.split(".")[1]): value for name, value in weights.items() if value.dim() == 2}
    units = [len(layers[number]) for number in sorted(layers)]
    return RouterNetwork.of_weights(weights, len(weights["mean"]), units[:-1])


def constant_network(width: int, share: float) -> RouterNetwork:
    """A linear network that says `share` of everything, whose features are (n, width)."""
    network = RouterNetwork(width, units=[]).requires_grad_(False)
    weights = network.state_dict()
    weights["layers.0.weight"].zero_()
    weights["layers.0.bias"].fill_(float(np.log(share / (1 - share))))
    return network.eval()


@saved_as("mlp")
class MlpRouter(NetworksRouter):
    """Asks each model's network how likely the model is to be wrong; logits are those of being right."""

    def errors(self, embeddings: Tensor) -> Tensor:
        return torch.stack([torch.sigmoid(-network(embeddings.float())) for network in self.networks], dim=1)


@dataclass(frozen=True)
class QueryMlp(QueryLearner):
    """A baseline: for each model a network that predicts whether its answer is right, by itself.

    A model that joins needs a network of its own. One that is always right, or never, on the queries trained on is
    predicted to be right as often as it is on all.

    Args:
        training: how each network is trained.
    """

    training: RouterTraining = field(default_factory=lambda: RouterTraining(batch_size=128, epochs=20))

    def fit_queries(
        self, train: EmbeddedQueries, known: EmbeddedQueries, seed: int = 0, track: Track = untracked
    ) -> MlpRouter:
        self.check(known.models, len(known))
        queries = np.arange(len(known))
        held_out = held_out_rows(queries, self.training.validation_share, np.random.default_rng(seed))
        networks = []
        for number, name in enumerate(known.models):
            right = known.correct[:, number]
            if len(np.unique(right[~held_out])) < 2:
                share = float(np.clip(right.mean(), SUREST, 1 - SUREST))
                networks.append(constant_network(known.embeddings.shape[1], share))
                track({"run": f"mlp {name}", "constant": share})
                continue
            data = LabelledTokens.in_memory(known.embeddings.float(), right, queries)
            network, report = fit_router(data, self.training, seed, track, torch.device("cpu"), f"mlp {name}")
            track({"run": f"mlp {name}", **report})
            networks.append(network)
        return MlpRouter(known.models, tuple(networks))
