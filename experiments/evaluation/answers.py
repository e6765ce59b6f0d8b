"""What one decoding of all examples came to, kept on disk example by example."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from agents.common.curves import Sweep
from agents.common.policy import Policy, decision_profile
from agents.common.rollout import Episode
from envs.arrays import BoolArray, FloatArray
from envs.costs import ALL_COSTS, WRITTEN, ModelProfile, Price
from envs.models.pool import ModelPool
from envs.storage import write_whole


class Counted(Protocol):
    """An episode, decoded or traced, as far as it counts: see `Episode`."""

    @property
    def correct(self) -> bool: ...
    @property
    def terminated(self) -> bool: ...
    @property
    def ledger(self) -> FloatArray: ...
    @property
    def decisions(self) -> FloatArray: ...


@dataclass(frozen=True)
class Answers:
    """One policy's answers at one threshold.

    Attributes:
        correct: (examples,).
        terminated: (examples,).
        llm_tokens: tokens the LLM wrote, (examples,).
        tokens: tokens written, (examples,).
        costs: in every unit, the policy's own decisions included, (examples,) each.
    """

    correct: npt.NDArray[np.bool_]
    terminated: npt.NDArray[np.bool_]
    llm_tokens: FloatArray
    tokens: FloatArray
    costs: Mapping[str, FloatArray]

    @classmethod
    def of(
        cls, episodes: Sequence[Episode], pool: ModelPool, policy: Policy | None = None, timed: bool = True
    ) -> Answers:
        """Of decoded episodes; decisions are priced where `policy` is given, seconds where passes were `timed`."""
        return cls.priced(episodes, pool.profiles, None if policy is None else decision_profile(policy), timed)

    @classmethod
    def priced(
        cls, episodes: Sequence[Counted], models: Sequence[ModelProfile], policy: ModelProfile | None, timed: bool
    ) -> Answers:
        """The same by the sizes of models and policy alone; decisions are not priced where `policy` is None."""
        ledgers = np.stack([episode.ledger for episode in episodes])
        units = [cost for cost in ALL_COSTS if timed or cost.reproducible]
        costs = dict(Price(models, units).of(ledgers))
        if policy is not None:
            own = Price([policy], units).of(np.stack([episode.decisions for episode in episodes])[:, None])
            costs = {unit: costs[unit] + own[unit] for unit in costs}
        return cls(
            np.array([episode.correct for episode in episodes]),
            np.array([episode.terminated for episode in episodes]),
            ledgers[:, 1:, WRITTEN].sum(1),
            ledgers[:, :, WRITTEN].sum(1),
            costs,
        )

    @classmethod
    def kept(cls, path: Path | None, make: Callable[[], Answers]) -> Answers:
        """Those at `path` if they are there; else what `make` gives, kept there; nothing is kept where it is None."""
        if path and path.is_file():
            return cls.load(path)
        made = make()
        if path:
            made.save(path)
        return made

    def row(self, llm: Answers) -> dict[str, Any]:
        """Accuracy, cost relative to `llm` in every unit, and token shares."""
        costs = {
            f"cost_{unit}": round(float(cost.sum() / llm.costs[unit].sum()), 6) for unit, cost in self.costs.items()
        }
        return {
            "accuracy": float(self.correct.mean()),
            "llm_share": round(float(self.llm_tokens.sum() / self.tokens.sum()), 6),
            "terminated": float(self.terminated.mean()),
            **costs,
        }

    def in_units(self, units: Collection[str]) -> Answers:
        """The same with costs in some units alone."""
        return replace(self, costs={unit: cost for unit, cost in self.costs.items() if unit in units})

    def first(self, count: int) -> Answers:
        """Those to the first problems alone."""
        plain = {name: getattr(self, name)[:count] for name in _PLAIN}
        return Answers(**plain, costs={unit: cost[:count] for unit, cost in self.costs.items()})

    def where(self, chosen: BoolArray, other: Answers) -> Answers:
        """These for the examples `chosen`, (examples,); those of `other` for the rest."""
        return Answers(
            **{name: np.where(chosen, getattr(self, name), getattr(other, name)) for name in _PLAIN},
            costs={unit: np.where(chosen, cost, other.costs[unit]) for unit, cost in self.costs.items()},
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _PLAIN}
        arrays |= {f"cost_{unit}": cost for unit, cost in self.costs.items()}
        content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        write_whole(path, lambda partial: partial.write_bytes(content))

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Read what `save` wrote, into memory of its own.

        Raises:
            ValueError: the file is damaged; the error names it.
        """
        try:
            # copies: arrays of a file lie where it has them, those that were measured where NumPy puts them
            arrays = {name: array.copy() for name, array in load_file(path).items()}
            plain = {name: arrays[name] for name in _PLAIN}
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no readable answers; delete it, and they are made again") from error
        costs = {key.removeprefix("cost_"): array for key, array in arrays.items() if key.startswith("cost_")}
        # in the order in which they are measured, not that of the file: rows of results are the same at a second start
        costs = {unit: costs[unit] for unit in sorted(costs, key=_UNITS.index)} if costs.keys() <= {*_UNITS} else costs
        measured = [plain["llm_tokens"], plain["tokens"], *costs.values()]
        shapes = {array.shape for array in arrays.values()}
        right = all(plain[name].dtype == bool for name in ("correct", "terminated"))
        numbers = all(array.dtype == np.float64 and np.isfinite(array).all() for array in measured)
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not (right and numbers and costs):
            raise ValueError(f"{path} is damaged; delete it, and the answers are made again")
        return cls(costs=costs, **plain)


Answered = Sequence[Sequence[Answers]]
"""Of one policy: for each training seed, the answers at each threshold."""
_PLAIN = ("correct", "terminated", "llm_tokens", "tokens")
_UNITS = [cost.name for cost in ALL_COSTS]


def sweep(runs: Sequence[Answers], slm: Answers, llm: Answers, unit: str) -> Sweep:
    """Runs of one policy, between the two ends every policy has: the SLM alone, and LLM-only decoding."""
    everything = (slm, *runs, llm)
    return Sweep(np.stack([run.correct for run in everything]), np.stack([run.costs[unit] for run in everything]))
