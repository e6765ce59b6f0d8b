"""Names for models, tasks, costs, rewards and judges, so that the spec of an environment is plain JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, TypeVar

from envs.costs import ALL_COSTS, CostModel
from envs.decoding.judges import JUDGES, Judge
from envs.decoding.references import References
from envs.decoding.sampling import Sampling
from envs.environments.rewards import OutcomeReward, Reward, ShortcutReward
from envs.models.loading import embedded_pool, load_pool
from envs.models.places import EMBEDDED
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Task

Settings = TypeVar("Settings")

REGISTRIES: Mapping[str, Mapping[str, Callable[[], Any]]] = {
    "task": {
        "arithmetic": ArithmeticTask,
        "arithmetic-easy": lambda: ArithmeticTask("easy"),
        "arithmetic-hard": lambda: ArithmeticTask("hard"),
    },
    "cost": {cost.name: type(cost) for cost in ALL_COSTS},
    "reward": {"outcome": OutcomeReward, "shortcut": ShortcutReward},
    "judge": JUDGES,
}
"""What a string stands for, by the setting it is given for."""

KINDS: Mapping[str, type] = {
    "pool": ModelPool,
    "task": Task,
    "cost": CostModel,
    "reward": Reward,
    "judge": Judge,
    "sampling": Sampling,
    "tree": PrefixTree,
    "references": References,
    "max_new_tokens": Integral,
    "capacity": Integral,
    "examples": Integral,
    "start": Integral,
    "memory": Integral,
    "cost_weight": Real,
}
"""What settings must be instances of, where they are not None."""


def settings_of(kind: type[Settings], given: Mapping[str, Any]) -> Settings:
    """A dataclass of settings out of keywords, names among them.

    Raises:
        TypeError: keywords it has not, or values of another type; the error names them and those there are.
        ValueError: a name that stands for nothing; the error says which there are.
    """
    known = [field.name for field in fields(kind) if field.init]  # type: ignore[arg-type]
    unknown = [name for name in given if name not in (*known, "models")]
    if unknown:
        raise TypeError(f"unknown settings {', '.join(unknown)}; {kind.__name__} has {', '.join(known)}, models")
    return kind(**resolved(given))


def resolved(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which names gave way to what they stand for, and `models` to their pool; see `settings_of`."""
    settings = dict(given)
    models = settings.pop("models", None)
    if models is not None:
        if settings.get("pool") is not None:
            raise ValueError("models are named beside a pool; give one or the other")
        if isinstance(models, str) or not isinstance(models, Sequence):
            raise TypeError(f"models must hold names of models, SLM first, is {models!r}; say {list(EMBEDDED)}")
        settings["pool"] = pool_named(json.dumps(list(models)))
    for name, names in REGISTRIES.items():
        value = settings.get(name)
        if isinstance(value, str):
            if value not in names:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(names)}")
            settings[name] = names[value]()
    for name, kind in KINDS.items():
        value = settings.get(name)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            also = f" or one of {', '.join(REGISTRIES[name])}" if name in REGISTRIES else ""
            also = ", or give models=[names]" if name == "pool" else also
            article = "an" if kind is Integral else "a"
            raise TypeError(
                f"{name} must be {article} {kind.__name__}{also}; it is {value!r}, a {type(value).__name__}"
            )
    return settings


@lru_cache(maxsize=4)
def pool_named(names: str) -> ModelPool:
    """The pool of a JSON list of names (or of specs, see `envs.models.source.ModelSpec`), loaded once."""
    models = json.loads(names)
    return embedded_pool() if models == list(EMBEDDED) else load_pool(models, verbose=False)
