"""What a query router sees on the token track: the models' states behind the prompt, and the words of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from agents.common.policy import VIEWS
from agents.query_routing.embeddings import TextEmbedder, TextEmbedding
from envs.decoding.observation import Observation

PREFIX = "inputs."
"""Begins the names of tensors that a saved router has of its inputs."""


def check_views(sees: Sequence[str]) -> tuple[str, ...]:
    """What a router sees, in the order of VIEWS.

    Raises:
        ValueError: it sees nothing, something twice, or something that there is not.
    """
    if isinstance(sees, str) or not sees or len(set(sees)) != len(sees) or not set(sees) <= set(VIEWS):
        raise ValueError(f"sees must name some of {', '.join(VIEWS)}, each once; it is {sees!r}")
    return tuple(view for view in VIEWS if view in sees)


@dataclass(frozen=True, eq=False)
class PromptViews:
    """Prompts as they can be seen.

    Attributes:
        slm: the SLM's states behind them, float32, (n, width).
        llm: the LLM's, float32, (n, width); None where nobody sees them.
        prompts: their texts, n; None where nobody sees them.
    """

    slm: Tensor
    llm: Tensor | None = None
    prompts: Sequence[str] | None = None

    @classmethod
    def of(cls, observation: Observation) -> PromptViews:
        """What an observation holds of the prompts."""
        llm = observation.llm_prompt_states
        return cls(observation.hidden.float().cpu(), None if llm is None else llm.float().cpu(), observation.prompts)


@dataclass(frozen=True, eq=False)
class RouterInputs:
    """Makes one vector of what a router sees of a prompt.

    Where it sees more than one thing, each is divided by its own root mean squared distance from the mean of the
    training queries, so that none drowns the others where distances are compared; a router that sees the SLM's state
    alone sees it as it is.

    Attributes:
        sees: of VIEWS, in their order.
        scales: what each is divided by, float32, (views,).
        text: embeds the prompts; None where they are not seen.
    """

    sees: tuple[str, ...] = ("slm",)
    scales: Tensor | None = None
    text: TextEmbedder | None = None

    @classmethod
    def fit(cls, sees: Sequence[str], views: PromptViews, text: TextEmbedding, seed: int = 0) -> RouterInputs:
        """The inputs of a router that is trained on these prompts.

        Raises:
            ValueError: they hold too few words for the embedding.
        """
        sees = check_views(sees)
        embedder = text.fit(views.prompts or [], seed) if "text" in sees else None
        unscaled = cls(sees, None, embedder)
        parts = [part.double() for part in unscaled._parts(views)]
        scales = [(part - part.mean(0)).square().sum(1).mean().sqrt().clamp(min=1e-4) for part in parts]
        return cls(sees, torch.stack(scales).float() if len(sees) > 1 else None, embedder)

    @property
    def parameters(self) -> int:
        """Numbers read to make a vector of a prompt, beside the models' own."""
        text = 0 if self.text is None else self.text.parameters
        return text + (0 if self.scales is None else len(self.scales))

    def vectors(self, views: PromptViews) -> Tensor:
        """What the router sees of prompts: float32, (n, width)."""
        parts = self._parts(views)
        if self.scales is not None:
            parts = [part / scale for part, scale in zip(parts, self.scales, strict=True)]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def tensors(self) -> dict[str, Tensor]:
        """All numbers it consists of."""
        found = {} if self.scales is None else {"scales": self.scales}
        if self.text is not None:
            found |= {"weights": self.text.weights, "directions": self.text.directions}
        return {PREFIX + name: tensor for name, tensor in found.items()}

    def settings(self) -> dict[str, Any]:
        """All else, as plain data."""
        text = {} if self.text is None else {"terms": self.text.terms, "most_terms": self.text.most_terms}
        return {"sees": list(self.sees), **text}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """What `tensors` and `settings` gave; what was saved before there was a choice sees the SLM's state.

        Raises:
            ValueError, KeyError: they do not belong together.
        """
        sees = check_views(settings.get("sees", ("slm",)))
        scales = tensors[PREFIX + "scales"] if len(sees) > 1 else None
        if scales is not None and scales.shape != (len(sees),):
            raise ValueError(f"{len(sees)} views need as many scales, there are {tuple(scales.shape)}")
        text = None
        if "text" in sees:
            weights, directions = tensors[PREFIX + "weights"], tensors[PREFIX + "directions"]
            text = TextEmbedder(settings["terms"], weights, directions, settings["most_terms"])
        return cls(sees, scales, text)

    def _parts(self, views: PromptViews) -> list[Tensor]:
        parts = []
        for view in self.sees:
            if view == "text":
                assert self.text is not None
                parts.append(self.text.embed(_there(view, views.prompts)))
            else:
                parts.append(_there(view, views.llm if view == "llm" else views.slm).float())
        return parts


def _there(view: str, seen: Any) -> Any:
    if seen is None:
        raise ValueError(
            f"the router sees {view!r} of each prompt, and the observation does not hold it; decode with "
            "agents.common.rollout, or make observations with its `look`"
        )
    return seen
