"""The policy of a router network, for all learners that label tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agents.common.saving import POLICY_FILE, SavedPolicy, class_name, weights_fingerprint
from agents.router.network import RouterNetwork
from envs.decoding.observation import Observation, feature_width
from envs.models.pool import ModelPool, models_manifest
from envs.storage import write_tensors, write_text


@dataclass
class RouterPolicy(SavedPolicy):
    """Scores a decision with a router network.

    Attributes:
        network: in evaluation mode.
        models: names and fingerprints of the pool it was trained for; it reads the first one's states.
        features: what it sees, one of `envs.decoding.observation.FEATURES`.
        calibration: how its scores compare with the labels of examples held out.
    """

    network: RouterNetwork
    models: list[dict[str, str]]
    features: str = "hidden"
    calibration: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """Parameters read at every decision; they are part of the cost."""
        return sum(parameter.numel() for parameter in self.network.parameters())

    @property
    def fingerprint(self) -> str:
        """Tells routers with other weights apart."""
        return weights_fingerprint(self.features, self.network.state_dict())

    def score(self, observation: Observation) -> Tensor:
        return torch.sigmoid(self.network(observation.seen(self.features)))

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` and `policy.json`."""
        write_tensors(folder / "router.safetensors", self.network.state_dict())
        settings = {"class": class_name(type(self)), **self.settings()}
        write_text(folder / POLICY_FILE, json.dumps(settings, indent=1) + "\n")

    def settings(self) -> dict[str, Any]:
        """What stands in `policy.json` beside the class."""
        return {
            "models": self.models,
            "features": self.features,
            "width": self.network.width,
            "units": self.network.units,
            "calibration": self.calibration,
        }

    @classmethod
    def seen_width(cls, settings: Mapping[str, Any], pool: ModelPool) -> int:
        """Numbers seen at a decision over `pool` by a policy of these `settings`."""
        return feature_width(settings["features"], pool.slm.width)

    @classmethod
    def restored(cls, network: RouterNetwork, settings: Mapping[str, Any], pool: ModelPool) -> RouterPolicy:
        """The policy of these `settings` over `pool`, with a network in evaluation mode."""
        return cls(network, settings["models"], settings["features"], settings["calibration"])

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
        if settings["models"] != models_manifest(pool) or settings["width"] != cls.seen_width(settings, pool):
            raise ValueError(
                f"{folder}: the router was trained for {_named(settings['models'])} ({settings['width']} features); "
                f"the pool is {_named(models_manifest(pool))} ({pool.slm.width} wide): load that pool, or train for it"
            )
        network = RouterNetwork(settings["width"], units=settings.get("units"))
        network.load_state_dict(weights)
        network.eval().requires_grad_(False)
        return cls.restored(network.to(pool.slm.device), settings, pool)


def _named(models: list[dict[str, str]]) -> str:
    return ", ".join(f"{model['name']} ({model['fingerprint']})" for model in models)
