"""The policy of a Stable-Baselines3 network: how it scores decisions, and files that hold numbers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from agents.common.saving import SavedPolicy, saved_as
from agents.rl.algorithms import algorithm_named
from agents.rl.cost_weights import GRID, CostWeights
from envs.arrays import IntArray
from envs.decoding.judges import Judge, described, judge_of
from envs.decoding.observation import Observation, feature_width
from envs.environments.episodes import HIDDEN_BOUND
from envs.models.pool import ModelPool, models_manifest

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm


@saved_as("sb3")
@dataclass
class Sb3Policy(SavedPolicy):
    """Scores a decision with a network of Stable-Baselines3.

    The score is the actor's probability of the SLM (PPO, A2C, recurrent PPO), or the sigmoid of the SLM's advantage in
    value over the best other model (DQN, QR-DQN: the mean over quantiles).

    A conditioned policy saw the cost weight while it was trained. Its score is the mean probability of the SLM over a
    grid of weights. The SLM's probability rises with the weight, so that the score says from which weight on the SLM
    is chosen, and one sweep of the threshold draws the whole front; `at(weight)` is the policy for one weight.

    Attributes:
        network: the policy network of Stable-Baselines3, in evaluation mode.
        algorithm: one of ALGORITHMS.
        models: names and fingerprints of the pool it was trained for.
        features: what it sees, one of `envs.decoding.observation.FEATURES`.
        arguments: of the network's class, plain numbers and names.
        standardised: whether the network standardises what it sees, by statistics that are part of its weights.
        conditioned: the weights it was trained with; None where there was one.
        weight: the cost weight it decides for; None for the mean over the grid.
        judge: which drafted tokens stand; None where it was trained to route tokens, of which none is checked.
    """

    network: Any
    algorithm: str
    models: list[dict[str, str]]
    features: str
    arguments: dict[str, Any] = field(default_factory=dict)
    standardised: bool = True
    conditioned: CostWeights | None = None
    weight: float | None = None
    judge: Judge | None = None
    # state of the recurrent part by episode, each (2, layers, weights, hidden)
    _states: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.network.set_training_mode(False)
        self.network.requires_grad_(False)

    @property
    def width(self) -> int:
        """Features seen at a decision, the cost weight not counted."""
        return int(self.network.observation_space.shape[0]) - (self.conditioned is not None)

    @property
    def parameters(self) -> int:
        """Parameters read at every decision; a conditioned policy reads them once for its whole grid."""
        head = algorithm_named(self.algorithm).head(self.network)
        return sum(parameter.numel() for module in head for parameter in module.parameters())

    def about(self) -> str:
        judge = "" if self.judge is None else f" {described(self.judge)}"  # others keep the name of before
        return f"{self.algorithm} {self.features} {self.conditioned} {self.weight}{judge}"

    @property
    def inputs_per_decision(self) -> int:
        """Inputs the network runs on at a decision: one for each cost weight of the grid."""
        return GRID if self.conditioned is not None and self.weight is None else 1

    def at(self, weight: float) -> Sb3Policy:
        """The policy for one cost weight, of a conditioned policy.

        Raises:
            ValueError: the policy is not conditioned, or was never trained with such a weight.
        """
        if self.conditioned is None:
            raise ValueError("this policy was trained with one cost weight; train it with `conditioned` to choose one")
        if not self.conditioned.low <= weight <= self.conditioned.high:
            raise ValueError(f"weight {weight} is not in [{self.conditioned.low}, {self.conditioned.high}]")
        return replace(self, weight=weight)

    @torch.no_grad()
    def score(self, observation: Observation) -> Tensor:
        inputs = observation.vector(self.features)[:, None]  # (n, 1, width)
        if self.conditioned is not None:
            weights = self.conditioned.grid() if self.weight is None else np.array([self.weight])
            column = torch.from_numpy(self.conditioned.scaled(weights)).to(inputs)[None, :, None]
            n, count = len(inputs), len(weights)
            inputs = torch.cat([inputs.expand(-1, count, -1), column.expand(n, -1, -1)], dim=-1)
        flat = inputs.flatten(0, 1)  # (n x weights, width)
        stateless = algorithm_named(self.algorithm).probability
        probability = self._recurrent(flat, observation) if stateless is None else stateless(self.network, flat)
        return probability.view(inputs.shape[:2]).mean(-1)

    def forget(self, episodes: IntArray) -> None:
        for episode in episodes.tolist():
            self._states.pop(episode, None)

    def _recurrent(self, inputs: Tensor, observation: Observation) -> Tensor:
        """Probabilities of the SLM, (n x weights,), and one step of the state of every episode."""
        lstm, n = self.network.lstm_actor, len(observation)
        fresh = inputs.new_zeros(2, lstm.num_layers, len(inputs) // max(1, n), lstm.hidden_size)
        # a response forked from another starts without a state: what was read before is not known here
        states = torch.stack(
            [
                fresh if position == 0 else self._states.get(int(episode), fresh)
                for episode, position in zip(observation.host_episodes, observation.host_positions, strict=True)
            ],
            dim=2,
        )  # (2, layers, n, weights, hidden)
        begun = states.flatten(2, 3)
        distribution, after = self.network.get_distribution(inputs, (begun[0], begun[1]), inputs.new_zeros(len(inputs)))
        for episode, state in zip(observation.host_episodes, torch.stack(after).view_as(states).unbind(2), strict=True):
            self._states[int(episode)] = state.clone()
        return cast(Tensor, distribution.distribution.probs[:, 0])

    def tensors(self) -> dict[str, Tensor]:
        return cast(dict[str, Tensor], self.network.state_dict())

    def settings(self) -> dict[str, Any]:
        return {
            "models": self.models,
            "algorithm": self.algorithm,
            "features": self.features,
            "width": self.width,
            "arguments": self.arguments,
            "standardised": self.standardised,
            "conditioned": None if self.conditioned is None else [self.conditioned.low, self.conditioned.high],
            "weight": self.weight,
            **({} if self.judge is None else {"judge": described(self.judge)}),
        }

    @classmethod
    def input_width(cls, settings: Mapping[str, Any], pool: ModelPool) -> int:
        return feature_width(settings["features"], pool.slm.width)

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> Self:
        conditioned = settings["conditioned"] and CostWeights(*settings["conditioned"])
        network = empty_network(
            settings["algorithm"],
            width=settings["width"] + bool(conditioned),
            actions=len(pool),
            arguments=settings["arguments"],
            standardised=settings["standardised"],
        )
        network.load_state_dict(dict(tensors))
        return cls(
            network.to(pool.slm.device),
            settings["algorithm"],
            settings["models"],
            settings["features"],
            arguments=settings["arguments"],
            standardised=settings["standardised"],
            conditioned=conditioned,
            weight=settings["weight"],
            judge=judge_of(settings["judge"]) if "judge" in settings else None,
        )

    @classmethod
    def from_archive(
        cls, path: Path, pool: ModelPool, algorithm: str, features: str, trusted: bool = False
    ) -> Sb3Policy:
        """Wrap an algorithm that Stable-Baselines3 itself has saved.

        Args:
            path: its .zip archive.
            pool: the models it was trained for.
            algorithm: one of ALGORITHMS.
            features: what it saw, one of `envs.decoding.observation.FEATURES`.
            trusted: whether you trust whoever made the archive as you trust code you run.

        Raises:
            ValueError: it is not trusted, or it is of another algorithm, features or pool.
        """
        known = algorithm_named(algorithm)
        width = feature_width(features, pool.slm.width)
        if not trusted:
            raise ValueError(
                f"{path}: to read an archive of Stable-Baselines3 is to run code it holds; give trusted=True if you "
                "made it yourself, and save the policy: its own files hold numbers alone"
            )
        from agents.rl.sb3_extensions import random_state_kept

        with random_state_kept(pool.slm.device):
            # its class of replay buffer follows from n_steps: given both, Stable-Baselines3 warns that it ignores one
            trained = known.kind.load(path, device=pool.slm.device, custom_objects={"replay_buffer_class": None})
        spaces = trained.observation_space.shape, int(getattr(trained.action_space, "n", 0))
        if spaces != ((width,), len(pool)):
            raise ValueError(
                f"{path}: the policy sees {spaces[0]} and chooses among {spaces[1]} models; {features} of this pool "
                f"are {(width,)}, and it has {len(pool)} models"
            )
        return cls.of(trained, algorithm, pool, features)

    @classmethod
    def of(
        cls,
        trained: BaseAlgorithm,
        algorithm: str,
        pool: ModelPool,
        features: str,
        conditioned: CostWeights | None = None,
        judge: Judge | None = None,
    ) -> Sb3Policy:
        """The policy of an algorithm of Stable-Baselines3, with a copy of its network: `trained` can go on learning."""
        from agents.rl.inputs import Standardised

        arguments = {
            name: value
            for name, value in trained.policy_kwargs.items()
            if not name.startswith(("optimizer", "features_extractor"))
        }
        extractor = trained.policy_kwargs.get("features_extractor_class")
        if extractor not in (None, Standardised):
            raise ValueError(f"a policy with the features extractor {extractor.__name__} cannot be wrapped")
        standardised = extractor is not None
        # made anew: a network keeps its last distribution, and with it a graph that cannot be copied
        network = empty_network(
            algorithm,
            width=cast(gym.spaces.Box, trained.observation_space).shape[0],
            actions=int(cast(gym.spaces.Discrete, trained.action_space).n),
            arguments=arguments,
            standardised=standardised,
        )
        network.load_state_dict(trained.policy.state_dict())
        network.to(trained.device)
        return cls(
            network, algorithm, models_manifest(pool), features, arguments, standardised, conditioned, judge=judge
        )


def empty_network(
    algorithm: str, width: int, actions: int, arguments: Mapping[str, Any], standardised: bool
) -> nn.Module:
    """The policy network of an algorithm before its weights are loaded.

    Args:
        algorithm: one of ALGORITHMS.
        width: numbers it sees.
        actions: models it chooses among.
        arguments: further ones of the network's class.
        standardised: whether it standardises what it sees.
    """
    from agents.rl.inputs import Standardised

    extractor = {"features_extractor_class": Standardised} if standardised else {}
    sees = gym.spaces.Box(-HIDDEN_BOUND, HIDDEN_BOUND, (width,), np.float32)
    with torch.random.fork_rng(devices=[]):  # of initial weights, which are not used
        return algorithm_named(algorithm).network(
            sees, gym.spaces.Discrete(actions), lambda _: 0.0, **arguments, **extractor
        )
