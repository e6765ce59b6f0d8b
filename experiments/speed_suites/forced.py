"""Models that write what is laid down for them: decisions made by one pair, timed on another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from agents.common.policy import Observation, Policy
from agents.common.rollout import Episode
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.arrays import IntArray
from envs.costs import PASSES
from envs.decoding.observation import TakenBack
from envs.models.kv_cache import SlotCache
from envs.models.language_model import LanguageModel
from envs.models.pool import ModelPool, models_manifest

CERTAIN = 1e4
"""Added to the logit of the token that is laid down: above whatever random weights give, for any judge too."""


@dataclass
class Script:
    """What is written of one response, by whoever writes it, what the SLM drafts in vain, and what is decided.

    Attributes:
        prompt: tokens of the prompt.
        tokens: of the response, (n,).
        refused: drafts that the LLM takes back, in their order.
        choices: whether the SLM goes on, at each decision, in their order.
    """

    prompt: int
    tokens: IntArray
    refused: Sequence[TakenBack] = ()
    choices: Sequence[bool] = ()
    _taken_back: int = field(default=0, init=False)
    _decided: int = field(default=0, init=False)

    @classmethod
    def of(cls, episode: Episode, prompt: int, threshold: float) -> Script:
        """Of a response behind a prompt of so many tokens, decoded at a threshold."""
        scores = episode.scores[: int(episode.decisions[PASSES])]
        return cls(prompt, episode.tokens, episode.taken_back, (scores >= threshold).tolist())

    def next_tokens(self, places: IntArray, slm: bool) -> IntArray:
        """What a model writes at places of the response, (n,); behind its end, and before it, that does not matter.

        An LLM that looks at a place where a draft was refused has refused it: what stands there is another token.
        """
        tokens = self.tokens[np.clip(places, 0, len(self.tokens) - 1)]
        pending = self.refused[self._taken_back] if self._taken_back < len(self.refused) else None
        if pending is None:
            return tokens
        if slm:
            inside = places - pending.position
            drafted = (inside >= 0) & (inside < len(pending.tokens))
            return np.where(drafted, pending.tokens[np.clip(inside, 0, len(pending.tokens) - 1)], tokens)
        self._taken_back += int(pending.position <= places[-1])
        return tokens

    def next_choice(self) -> bool:
        """Whether the SLM goes on.

        Raises:
            RuntimeError: all that was decided has been asked for.
        """
        if self._decided == len(self.choices):
            raise RuntimeError(f"a response that was decided on {self._decided} times is decided on once more")
        self._decided += 1
        return self.choices[self._decided - 1]


class ForcedModel(LanguageModel):
    """A model whose passes are made, and whose logits then say what a script does.

    Args:
        name: what errors and reports call it.
        network: of any weights.
        tokenizer: of the pair whose responses are laid down.
        slm: whether it drafts.

    Attributes:
        scripts: of the rows of a cache, the first ones.
    """

    def __init__(self, name: str, network: PreTrainedModel, tokenizer: Any, slm: bool) -> None:
        super().__init__(name, network, tokenizer)
        self.slm = slm
        self.scripts: Sequence[Script] = ()

    @torch.inference_mode()
    def feed(
        self, cache: SlotCache, rows: IntArray, chunks: Sequence[IntArray], every_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.feed`.

        Raises:
            ValueError: a row has no script.
        """
        if rows.max() >= len(self.scripts):
            raise ValueError(f"{self.name} writes by scripts, and has {len(self.scripts)}; row {rows.max()} was fed")
        hidden, logits = super().feed(cache, rows, chunks, every_position)
        counts = [len(chunk) if every_position else 1 for chunk in chunks]
        tokens = []
        for row, count in zip(rows.tolist(), counts, strict=True):
            script = self.scripts[row]
            behind = int(cache.lengths[row]) - script.prompt
            tokens.append(script.next_tokens(behind + 1 - count + np.arange(count), self.slm))
        logits[torch.arange(len(logits)), torch.from_numpy(np.concatenate(tokens))] += CERTAIN
        return hidden, logits


class ForcedPolicy(Policy):
    """Computes the scores of a policy, and then decides what is laid down.

    Args:
        policy: whose computation is made, and is part of the cost.

    Attributes:
        scripts: of the episodes, by their numbers.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy, self.judge = policy, policy.judge
        self.scripts: Sequence[Script] = ()

    def score(self, observation: Observation) -> Tensor:
        self.policy.score(observation)
        return torch.tensor(
            [float(self.scripts[episode].next_choice()) for episode in observation.host_episodes.tolist()]
        )

    def forget(self, episodes: IntArray) -> None:
        self.policy.forget(episodes)

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.policy.observes

    @property
    def sees(self) -> Sequence[str]:
        return self.policy.sees

    @property
    def parameters(self) -> int:
        return self.policy.parameters

    @property
    def inputs_per_decision(self) -> int:
        return self.policy.inputs_per_decision


def as_large(policy: Policy, pool: ModelPool) -> Policy:
    """A policy that computes for a larger pair what this one does for its own.

    A router's network has random weights and hidden layers that are as many times as wide as its input is; what has no
    weights computes as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(policy, RouterPolicy):
        width = policy.input_width(policy.settings(), pool)
        units = [max(1, round(count * width / policy.network.width)) for count in policy.network.units]
        about = {**policy.settings(), "models": models_manifest(pool), "width": width, "units": units}
        return policy.restored(about, RouterNetwork(width, units=units).state_dict(), pool)
    if policy.parameters == 0 and not policy.per_response:
        return policy
    raise ValueError(
        f"{type(policy).__name__} cannot be timed on another pair: it is no router network; choose policies of citer, "
        "expert, checked or the like"
    )
