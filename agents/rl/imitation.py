"""An actor that begins with the decisions of another policy: behavioural cloning (Pomerleau, NeurIPS 1988)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from gymnasium.spaces import Discrete
from torch import Tensor

from agents.common.policy import Policy
from agents.common.rollout import decode
from envs.arrays import IntArray
from envs.decoding.judges import Judge
from envs.decoding.observation import Observation
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.task import Example

if TYPE_CHECKING:
    from stable_baselines3.common.policies import ActorCriticPolicy


class Decisions(NamedTuple):
    """What a policy decided.

    Attributes:
        seen: the states, as the actor sees them: float32, (n, width).
        calls: whether it called the last model in each, (n,).
    """

    seen: Tensor
    calls: Tensor


@dataclass
class Watched(Policy):
    """Decides as another policy, and keeps what an actor would have seen of each decision.

    Attributes:
        policy: that decides.
        threshold: it calls the last model below it.
        features: what the actor sees.
    """

    policy: Policy
    threshold: float
    features: str
    _seen: list[Tensor] = field(default_factory=list, init=False, repr=False)
    _calls: list[Tensor] = field(default_factory=list, init=False, repr=False)

    def score(self, observation: Observation) -> Tensor:
        scores = torch.as_tensor(self.policy.score(observation))
        self._seen.append(observation.vector(self.features).cpu())
        self._calls.append((scores < self.threshold).cpu())
        return scores

    @property
    def judge(self) -> Judge | None:  # type: ignore[override]
        return self.policy.judge

    @property
    def sees(self) -> Sequence[str]:
        return self.policy.sees

    def forget(self, episodes: IntArray) -> None:
        self.policy.forget(episodes)

    def decisions(self) -> Decisions:
        """All of them so far."""
        return Decisions(torch.cat(self._seen), torch.cat(self._calls))


def decisions_of(
    policy: Policy, threshold: float, features: str, examples: Sequence[Example], tree: PrefixTree
) -> Decisions:
    """What a policy decides while it answers problems on a replay tree.

    Args:
        policy: that observes every state, as the actor does.
        threshold: it calls the last model below it.
        features: what the actor sees, one of `envs.decoding.observation.CHECKED_FEATURES`.
        examples: problems of the tree's task.
        tree: whose models write.

    Raises:
        ValueError: the policy does not look at the states that it decides in.
    """
    if not policy.observes:
        raise ValueError(f"{type(policy).__name__} decides before the SLM has read a state; an actor sees each")
    watched = Watched(policy, threshold, features)
    decode(tree.pool, tree.task, examples, watched, threshold, tree.max_new_tokens, label="imitated", tree=tree)
    return watched.decisions()


def clone(
    actor: ActorCriticPolicy, decisions: Decisions, epochs: int, smoothing: float, lr: float, batch_size: int, seed: int
) -> dict[str, float]:
    """Train an actor to decide likewise; its critic stays as it is.

    Args:
        actor: a network of Stable-Baselines3 of which action 0 is the SLM and the last one calls the last model.
        decisions: what to imitate.
        epochs: passes over them.
        smoothing: share of the probability that goes to all actions evenly, so that the actor goes on exploring.
        lr: of Adam.
        batch_size: decisions a step.
        seed: of their order.

    Returns:
        A row: the decisions, the share of calls among them, and the last epoch's mean loss in nats.
    """
    called = int(cast(Discrete, actor.action_space).n) - 1
    targets = decisions.calls.long() * called
    weights = [*actor.mlp_extractor.policy_net.parameters(), *actor.action_net.parameters()]
    optimizer, order = torch.optim.Adam(weights, lr), torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(epochs):
        total = 0.0
        for batch in torch.randperm(len(targets), generator=order).split(batch_size):
            logits = actor.get_distribution(decisions.seen[batch].to(actor.device)).distribution.logits  # type: ignore[union-attr]
            loss = torch.nn.functional.cross_entropy(logits, targets[batch].to(actor.device), label_smoothing=smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
    calls = decisions.calls.float().mean().item()
    return {"decisions": len(targets), "calls": calls, "loss": total / len(targets)}
