"""A query router as a policy on the token-level track."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from agents.common.saving import SavedPolicy, saved_as, saved_class, saved_name
from agents.query_routing.inputs import PREFIX, PromptViews, RouterInputs
from agents.query_routing.router import SUREST, QueryRouter
from envs.decoding.observation import Observation
from envs.models.pool import ModelPool


@saved_as("query")
@dataclass(frozen=True, eq=False)
class QueryPolicy(SavedPolicy):
    """Decides once a response, by a query router that sees the prompt: the models' states behind it, its words.

    Attributes:
        router: of the pool's models; the choice is between the first and the last.
        models: names and fingerprints of the pool it was made for.
        threshold: the score that becomes 0.5.
        inputs: what the router sees.
    """

    per_response: ClassVar[bool] = True
    weights_file: ClassVar[str] = "router.safetensors"

    router: QueryRouter
    models: Sequence[Mapping[str, str]]
    threshold: float = 0.5
    inputs: RouterInputs = field(default_factory=RouterInputs)

    @property
    def sees(self) -> Sequence[str]:
        """What its observations hold, of VIEWS; where that is the LLM's state the LLM reads every prompt."""
        return self.inputs.sees

    @property
    def parameters(self) -> int:
        """Numbers read at a decision; they are part of the cost."""
        return self.router.parameters + self.inputs.parameters

    def about(self) -> str:
        seen = self.inputs.settings()
        more = "" if self.inputs.sees == ("slm",) else f" {json.dumps(seen)}"
        return f"{saved_name(type(self.router))} {self.threshold!r}{more}"

    def tensors(self) -> dict[str, Tensor]:
        return self.router.tensors() | self.inputs.tensors()

    def settings(self) -> dict[str, Any]:
        return {
            "router": saved_name(type(self.router)),
            "names": list(self.router.models),
            "models": list(self.models),
            "threshold": self.threshold,
            **self.inputs.settings(),
        }

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> Self:
        kind: type[QueryRouter] = saved_class(settings["router"], QueryRouter, "router")  # type: ignore[type-abstract]
        inputs = RouterInputs.restored(settings, tensors)
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        return cls(kind.of_tensors(tuple(settings["names"]), own), settings["models"], settings["threshold"], inputs)

    def slm_scores(self, embeddings: Tensor) -> Tensor:
        """Half of 1 + what the SLM is estimated to be better by, (n,), before the threshold is moved.

        Args:
            embeddings: what the router sees, as `inputs` makes it, (n, width).
        """
        errors = self.router.errors(embeddings.float().cpu())
        return ((1 + errors[:, -1] - errors[:, 0]) / 2).clamp(SUREST, 1 - SUREST)

    def score(self, observation: Observation) -> Tensor:
        moved = self.slm_scores(self.inputs.vectors(PromptViews.of(observation))).double().logit()
        threshold = min(max(self.threshold, SUREST), 1 - SUREST)
        # rounded, so that a score that equals the threshold is not the LLM's by the last bit
        return torch.sigmoid(moved - float(np.log(threshold / (1 - threshold)))).float()
