"""The policy of a router network, for all learners that label tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from agents.common.saving import SavedPolicy, saved_as
from agents.router.network import RouterNetwork
from envs.decoding.observation import Observation, feature_width
from envs.models.pool import ModelPool


@saved_as("router")
@dataclass
class RouterPolicy(SavedPolicy):
    """Scores a decision with a router network.

    Attributes:
        network: in evaluation mode.
        models: names and fingerprints of the pool it was trained for; it reads the first one's states.
        features: what it sees, one of `envs.decoding.observation.FEATURES`.
        calibration: how its scores compare with the labels of examples held out.
    """

    weights_file: ClassVar[str] = "router.safetensors"

    network: RouterNetwork
    models: list[dict[str, str]]
    features: str = "hidden"
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters read at every decision; they are part of the cost."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    def score(self, observation: Observation) -> Tensor:
        return torch.sigmoid(self.network(observation.vector(self.features)))

    def about(self) -> str:
        return self.features

    def tensors(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def settings(self) -> dict[str, Any]:
        return {
            "models": self.models,
            "features": self.features,
            "width": self.network.width,
            "units": self.network.units,
            "calibration": self.calibration,
        }

    @classmethod
    def input_width(cls, settings: Mapping[str, Any], pool: ModelPool) -> int:
        return feature_width(settings["features"], pool.slm.width)

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> Self:
        network = restored_network(settings, tensors, pool)
        return cls(network, settings["models"], settings["features"], settings["calibration"])


def restored_network(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> RouterNetwork:
    """The network of saved `settings` and weights, in evaluation mode, on the device of the pool's SLM."""
    return RouterNetwork.of_weights(tensors, settings["width"], settings.get("units")).to(pool.slm.device)
