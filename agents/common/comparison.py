"""A policy beside each model alone: how many answers are right, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agents.common.policy import Policy, decision_profile
from agents.common.rollout import Episode, Scheduling, decode, decode_alone
from envs.arrays import FloatArray
from envs.costs import CostModel, MemoryTraffic, Price
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task

POLICY = "policy"
"""What a policy without a name is called."""


@dataclass(frozen=True)
class Row:
    """What a model alone, or a policy, came to.

    Attributes:
        accuracy: the share of right answers, in [0, 1].
        llm_share: the share of tokens that other models than the SLM wrote, in [0, 1].
        cost: relative to the last model alone, the policy's own decisions included.
    """

    accuracy: float
    llm_share: float
    cost: float


class Comparison(dict[str, Row]):
    """Rows by name: each model alone, then the policies; printed, a table."""

    def __str__(self) -> str:
        width = max(len(name) for name in self)
        lines = [f"{'':{width}}   right  LLM tokens   cost"]
        lines += [
            f"{name:{width}}  {row.accuracy:6.1%}  {row.llm_share:10.1%}  {row.cost:5.3f}" for name, row in self.items()
        ]
        return "\n".join(lines)


def compare(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    policies: Policy | Mapping[str, Policy],
    threshold: float = 0.5,
    max_new_tokens: int = 128,
    cost: CostModel | None = None,
    scheduling: Scheduling | None = None,
) -> Comparison:
    """Let each model alone and each policy answer all examples.

    Args:
        pool: the models, SLM first; the last one alone costs 1.
        task: judges the answers.
        examples: what to answer.
        policies: one, or several by name.
        threshold: the SLM writes where a score is at least this.
        max_new_tokens: the longest response.
        cost: the unit of cost; memory traffic where None.
        scheduling: how responses share passes.

    Returns:
        A row for each model alone, by its name, and for each policy.

    Raises:
        ValueError: there are no examples, or a policy has the name of a model.
    """
    named = {POLICY: policies} if isinstance(policies, Policy) else dict(policies)
    for name in named:
        if name in pool.names:
            raise ValueError(f"a policy is called {name}, as a model of the pool; give it another name")
    unit, settings = cost or MemoryTraffic(), {"max_new_tokens": max_new_tokens, "scheduling": scheduling}
    answers: dict[str, tuple[Sequence[Episode], Policy | None]] = {}
    for name, model in zip(pool.names, pool.models, strict=True):
        answers[name] = decode_alone(model, task, examples, pool=pool, **settings), None  # type: ignore[arg-type]
    for name, policy in named.items():
        answers[name] = decode(pool, task, examples, policy, threshold, **settings), policy  # type: ignore[arg-type]
    totals = {
        name: float(answer_costs(episodes, policy, pool, unit).sum()) for name, (episodes, policy) in answers.items()
    }
    whole = totals[pool.names[-1]]
    return Comparison(
        {
            name: Row(
                accuracy=float(np.mean([episode.correct for episode in episodes])),
                llm_share=float(np.concatenate([episode.writers > 0 for episode in episodes]).mean()),
                cost=totals[name] / whole,
            )
            for name, (episodes, _) in answers.items()
        }
    )


def answer_costs(
    episodes: Sequence[Episode], policy: Policy | None, pool: ModelPool, unit: CostModel, llm_alone: bool = False
) -> FloatArray:
    """What each of n answers cost, (n,).

    Args:
        episodes: the answers.
        policy: whose decisions are priced too; nobody's where None.
        pool: the models that wrote them.
        unit: of cost.
        llm_alone: leave the other models out, who read along where the LLM wrote everything: by itself it needs none.
    """
    ledgers = np.stack([episode.ledger for episode in episodes])
    if llm_alone:
        ledgers[:, :-1] = 0
    costs = Price(pool.profiles, [unit]).of(ledgers)[unit.name]
    if policy is not None:
        decisions = np.stack([episode.decisions for episode in episodes])[:, None]
        costs = costs + Price([decision_profile(policy)], [unit]).of(decisions)[unit.name]
    return costs
