"""The algorithms of Stable-Baselines3 and sb3-contrib: where they lie, and the arguments they are run with."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm


TEMPERATURE = 1.0
"""What an advantage in value, in right answers, is divided by before the sigmoid: any value gives the same order."""


def action_probability(network: Any, inputs: Tensor) -> Tensor:
    """The probability of action 0 by an actor: inputs (n, width), (n,)."""
    return cast(Tensor, network.get_distribution(inputs).distribution.probs[:, 0])


def value_probability(values: Tensor) -> Tensor:
    """Sigmoid of the advantage of action 0 over the best other one: values (n, actions), (n,).

    Monotone in that advantage, and at least 0.5 where action 0 is the greedy one.
    """
    return torch.sigmoid((values[:, 0] - values[:, 1:].amax(-1)) / TEMPERATURE)


@dataclass(frozen=True)
class Algorithm:
    """What there is to know of an algorithm of Stable-Baselines3.

    Attributes:
        place: module and class, imported when it is used.
        policy: its name for a policy of flat observations.
        head: the modules a decision reads.
        probability: the probability of the SLM by its policy; None where that needs a recurrent state.
    """

    place: str
    policy: str
    head: Callable[[Any], Sequence[nn.Module]]
    probability: Callable[[Any, Tensor], Tensor] | None

    @property
    def kind(self) -> type[BaseAlgorithm]:
        """The algorithm's class."""
        module, _, name = self.place.partition(":")
        return cast("type[BaseAlgorithm]", getattr(importlib.import_module(module), name))

    @property
    def network(self) -> Callable[..., nn.Module]:
        """The class of its policy."""
        return cast("Callable[..., nn.Module]", self.kind.policy_aliases[self.policy])


def _actor(network: Any) -> Sequence[nn.Module]:
    return network.mlp_extractor.policy_net, network.action_net


ALGORITHMS = {
    "ppo": Algorithm("stable_baselines3:PPO", "MlpPolicy", _actor, action_probability),
    "a2c": Algorithm("stable_baselines3:A2C", "MlpPolicy", _actor, action_probability),
    "dqn": Algorithm(
        "agents.rl.sb3_extensions:RowwiseDQN",
        "MlpPolicy",
        lambda network: (network.q_net.q_net,),
        lambda network, inputs: value_probability(network.q_net(inputs)),
    ),
    "qrdqn": Algorithm(
        "agents.rl.sb3_extensions:RowwiseQRDQN",
        "MlpPolicy",
        lambda network: (network.quantile_net.quantile_net,),
        lambda network, inputs: value_probability(network.quantile_net(inputs).mean(1)),
    ),
    "recurrent_ppo": Algorithm(
        "sb3_contrib:RecurrentPPO", "MlpLstmPolicy", lambda network: (network.lstm_actor, *_actor(network)), None
    ),
}


def algorithm_named(name: str) -> Algorithm:
    """An algorithm of the table; an error that names them all otherwise."""
    if name not in ALGORITHMS:
        raise ValueError(f"unknown algorithm {name!r}; choose one of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[name]


def _ppo(rows: int) -> dict[str, Any]:
    # two minibatches an epoch: rewards at the end of an answer are noisy, and many small steps fit the noise
    return {"n_steps": 32, "batch_size": 16 * rows, "n_epochs": 4, "gae_lambda": 0.99, "ent_coef": 0.001}


def _a2c(rows: int) -> dict[str, Any]:
    return {"n_steps": 16, "gae_lambda": 0.99, "normalize_advantage": True, "ent_coef": 0.001}


def _dqn(rows: int) -> dict[str, Any]:
    return {
        "buffer_size": 100_000, "learning_starts": 16 * rows, "batch_size": 512, "train_freq": 1, "gradient_steps": 4,
        "n_steps": 32, "tau": 0.05, "target_update_interval": rows, "exploration_fraction": 0.3,
        "exploration_final_eps": 0.02,
    }  # fmt: skip


def _qrdqn(rows: int) -> dict[str, Any]:
    return _dqn(rows) | {"policy_kwargs": {"n_quantiles": 25}}


def _recurrent_ppo(rows: int) -> dict[str, Any]:
    return _ppo(rows) | {"policy_kwargs": {"lstm_hidden_size": 64}}


DEFAULTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "ppo": _ppo, "a2c": _a2c, "dqn": _dqn, "qrdqn": _qrdqn, "recurrent_ppo": _recurrent_ppo
}  # fmt: skip
"""Arguments that suit many rows: Stable-Baselines3's own defaults are meant for one or eight."""
OWN = {
    "learning_rate": "lr", "gamma": "gamma", "net_arch": "net_arch", "seed": "the run's seed",
    "env": "environment", "device": "the models' device",
}  # fmt: skip
"""Arguments that are settings of their own."""
WITHHELD = {
    "self", "policy", "verbose", "tensorboard_log", "_init_setup_model", "observation_space", "action_space",
    "lr_schedule", "features_extractor_class", "features_extractor_kwargs",
}  # fmt: skip
"""Arguments that are the learner's business."""


def check_arguments(given: Mapping[str, Any], kind: Callable[..., object], where: str) -> None:
    """Refuse arguments that a class does not take, or that are settings of their own.

    Raises:
        ValueError: the error names them, and those there are.
    """
    known = [name for name in inspect.signature(kind).parameters if name not in WITHHELD | set(OWN)]
    for name in given:
        if name in OWN:
            raise ValueError(f"{where}: {name} has a place of its own: {OWN[name]}")
        if name not in known:
            raise ValueError(f"{where}: {kind.__name__} takes no {name!r} here; it takes {', '.join(known)}")
