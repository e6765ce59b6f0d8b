"""A query router as a policy on the token-level track."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agents.common.saving import POLICY_FILE, SavedPolicy, class_name, class_named, weights_fingerprint
from agents.query_routing.router import SUREST, QueryRouter
from envs.decoding.observation import Observation
from envs.models.pool import ModelPool, models_manifest
from envs.storage import check_manifest, write_tensors, write_text


@dataclass(frozen=True, eq=False)
class QueryPolicy(SavedPolicy):
    """Decides once a response, by a query router that sees the SLM's state after the prompt.

    Attributes:
        router: of the pool's models; the choice is between the first and the last.
        pool: names and fingerprints of the models it was made for.
        threshold: the score that becomes 0.5.
    """

    router: QueryRouter
    pool: Sequence[Mapping[str, str]]
    threshold: float = 0.5
    per_response: ClassVar[bool] = True

    @property
    def parameters(self) -> int:
        """Numbers read at a decision; they are part of the cost."""
        return self.router.parameters

    @property
    def fingerprint(self) -> str:
        """Tells policies with other routers or thresholds apart."""
        about = f"{class_name(type(self.router))} {self.threshold!r}"
        return weights_fingerprint(about, self.router.tensors())

    def slm_scores(self, embeddings: Tensor) -> Tensor:
        """Half of 1 + what the SLM is estimated to be better by, (n,), before the threshold is moved."""
        errors = self.router.errors(embeddings.float().cpu())
        return ((1 + errors[:, -1] - errors[:, 0]) / 2).clamp(SUREST, 1 - SUREST)

    def score(self, observation: Observation) -> Tensor:
        moved = self.slm_scores(observation.hidden).double().logit()
        threshold = min(max(self.threshold, SUREST), 1 - SUREST)
        # rounded, so that a score that equals the threshold is not the LLM's by the last bit
        return torch.sigmoid(moved - float(np.log(threshold / (1 - threshold)))).float()

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` and `policy.json`."""
        tensors = {name: value.contiguous() for name, value in self.router.tensors().items()}
        write_tensors(folder / "router.safetensors", tensors)
        settings = {
            "class": class_name(type(self)),
            "router": class_name(type(self.router)),
            "names": list(self.router.models),
            "models": list(self.pool),
            "threshold": self.threshold,
        }
        write_text(folder / POLICY_FILE, json.dumps(settings, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, pool: ModelPool) -> QueryPolicy:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such router in `folder`, or it was made for other models than the pool's.
        """
        try:
            settings: dict[str, Any] = json.loads((folder / POLICY_FILE).read_text())
            router: type[QueryRouter] = class_named(settings["router"], "router")
            tensors = load_file(folder / "router.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no readable query router: {error}; train one with experiments.train"
            ) from error
        check_manifest(folder, settings, {"models": models_manifest(pool)}, ["models"])
        return cls(router.of_tensors(tuple(settings["names"]), tensors), settings["models"], settings["threshold"])
