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
from envs.arrays import IntArray
from envs.decoding.observation import TakenBack
from envs.models.kv_cache import SlotCache
from envs.models.language_model import LanguageModel

CERTAIN = 1e4
"""Added to the logit of the token that is laid down: above whatever random weights give."""


@dataclass
class Script:
    """What is written of one response, by whoever writes it, and what the SLM drafts in vain.

    Attributes:
        prompt: tokens of the prompt.
        tokens: of the response, (n,).
        refused: drafts that the LLM takes back, in their order.
    """

    prompt: int
    tokens: IntArray
    refused: Sequence[TakenBack] = ()
    _taken_back: int = field(default=0, init=False)

    @classmethod
    def of(cls, episode: Episode, prompt: int) -> Script:
        """Of a decoded response behind a prompt of so many tokens."""
        return cls(prompt, episode.tokens, episode.taken_back)

    def next_tokens(self, places: IntArray, slm: bool) -> IntArray:
        """What a model writes at places of the response, (n,); behind its end, and before it, that does not matter.

        An LLM that looks at a place where a draft was refused has refused it.
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


class ForcedModel(LanguageModel):
    """A model whose passes are made, and whose logits then say what a script does; one row at a time.

    Args:
        name: what errors and reports call it.
        network: of any weights.
        tokenizer: of the pair whose responses are laid down.
        slm: whether it drafts.
    """

    def __init__(self, name: str, network: PreTrainedModel, tokenizer: Any, slm: bool) -> None:
        super().__init__(name, network, tokenizer)
        self.slm = slm
        self.script: Script | None = None

    @torch.inference_mode()
    def feed(
        self, cache: SlotCache, rows: IntArray, chunks: Sequence[IntArray], every_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See `LanguageModel.feed`.

        Raises:
            ValueError: several rows, or no script.
        """
        if len(rows) != 1 or self.script is None:
            raise ValueError(f"{self.name} writes one row at a time, by a script; {len(rows)} rows were fed")
        hidden, logits = super().feed(cache, rows, chunks, every_position)
        behind = int(cache.lengths[rows[0]]) - self.script.prompt
        places = behind + 1 - len(logits) + np.arange(len(logits))
        tokens = self.script.next_tokens(places, self.slm)
        logits[torch.arange(len(logits)), torch.from_numpy(tokens)] += CERTAIN
        return hidden, logits


class ForcedPolicy(Policy):
    """Computes the scores of a policy, and then chooses the writers that are laid down.

    Args:
        policy: whose computation is made, and is part of the cost.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.writers: Sequence[int] = ()

    def score(self, observation: Observation) -> Tensor:
        self.policy.score(observation)
        return torch.tensor([float(self.writers[place] == 0) for place in observation.host_positions.tolist()])

    @property
    def parameters(self) -> int:
        return self.policy.parameters

    @property
    def inputs_per_decision(self) -> int:
        return self.policy.inputs_per_decision
