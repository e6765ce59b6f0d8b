"""What environments that decode are made with."""

from __future__ import annotations

from dataclasses import dataclass

from envs.costs import CostModel
from envs.decoding.observation import CheckedFeatures, check_features
from envs.decoding.sampling import Sampling
from envs.environments.prompts import Order, TooLong, check_choices
from envs.environments.rewards import Reward
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.task import Split, Task, check_split


@dataclass(frozen=True, kw_only=True)
class RoutingSettings:
    """What `RoutingEnv` is made with; all have defaults: the embedded pair on the generated arithmetic task.

    Args:
        pool: the models, SLM first; the embedded pair where None.
        task: where prompts come from and how answers are judged; the generated arithmetic task where None.
        cost: the cost model behind the reward; LLM tokens where None.
        reward: the reward; `OutcomeReward()` where None.
        split: `train`, `validation` or `test`.
        max_new_tokens: the longest response.
        capacity: the longest sequence, prompt included; the pool's where None.
        sampling: how tokens are drawn; greedy where None.
        features: what is observed: `hidden`, `hidden_logits` or `hidden_logits_history` (`envs.decoding.observation`).
        on_too_long: what becomes of a prompt that leaves no room for `max_new_tokens`: `error`, when the environment is
            built where the split is finite; `skip`, another example in its place; `truncate`, its last tokens.
        order: `random`, or `sequential`: a pass over the split, and the next, which all rows share.
        tree: a prefix tree to walk instead of decoding; see `envs.environments.tree_routing`.

    Raises:
        ValueError: an unknown split, features, order or treatment of long prompts.
    """

    pool: ModelPool | None = None
    task: Task | None = None
    cost: CostModel | None = None
    reward: Reward | None = None
    split: Split = "train"
    max_new_tokens: int = 128
    capacity: int | None = None
    sampling: Sampling | None = None
    features: CheckedFeatures = "hidden"
    on_too_long: TooLong = "error"
    order: Order = "random"
    tree: PrefixTree | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        self._check_features()
        check_choices(on_too_long=(self.on_too_long, TooLong), order=(self.order, Order))

    def _check_features(self) -> None:
        """Refuse features that nothing is observed by."""
        check_features(self.features)
