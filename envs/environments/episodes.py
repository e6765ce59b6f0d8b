"""Rows of episodes: what an environment is made of, whichever shell it is played through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.environments.prompts import Pass
from envs.environments.render import Stretch

Info = dict[str, Any]
State = dict[str, Any]
"""Numbers alone: arrays, lists of arrays, and dictionaries of such."""
Observations = npt.NDArray[np.float32]

# Far beyond what a normalised hidden state takes; finite, since an unbounded box cannot be sampled sensibly.
HIDDEN_BOUND = 1e6


@dataclass(frozen=True)
class RowSteps:
    """What a step did to n rows, m of which ended with it.

    Attributes:
        rewards: (n,).
        terminated: the episode came to its end, (n,).
        truncated: it was cut short, (n,); never both.
        infos: of the step, arrays of n.
        finals: what the infos of the rows that ended gain, arrays of m in the order of these rows.
    """

    rewards: FloatArray
    terminated: BoolArray
    truncated: BoolArray
    infos: Info
    finals: Info


class EpisodeRows(ABC):
    """Rows, each in an episode of its own: all that a new environment writes.

    `envs.environments.vector` makes a single environment (one row) and a vector environment out of it. Rows come as
    ascending arrays of distinct numbers, (n,). All of them are `all_rows`, that very array: `selection` makes a slice
    of it, with which arrays are read and written without copies.

    Args:
        rows: episodes at a time.

    Attributes:
        rendered: whether somebody will ask for `stretches`; set before the first episode.
        observation_space: of one row; set by the subclass.
        action_space: of one row; set by the subclass.

    Raises:
        ValueError: there are no rows.
    """

    options: ClassVar[tuple[str, ...]]
    """Options of `reset`, one of which may say what a single environment begins with."""
    row_options: ClassVar[tuple[str, ...]]
    """Those of a vector environment: a sequence with such a value, or None, for each row."""
    numbers: Pass
    """Of the examples that are drawn; a reset with a seed begins its pass anew."""
    observation_space: gym.spaces.Box
    action_space: gym.spaces.Discrete

    def __init__(self, rows: int) -> None:
        if rows < 1:
            raise ValueError(f"num_envs must be at least 1, is {rows}")
        self.rows, self.rendered = rows, False
        self.all_rows: IntArray = np.arange(rows)

    @abstractmethod
    def start(self, rows: IntArray, generators: Sequence[np.random.Generator], given: Sequence[Any]) -> Info:
        """Begin an episode in each row.

        Args:
            rows: (n,).
            generators: the source of chance of each row.
            given: what each row was asked to begin with; drawn where None.

        Returns:
            The reset infos, arrays of n.
        """

    @abstractmethod
    def step(self, rows: IntArray, actions: npt.NDArray[Any]) -> RowSteps:
        """Take the actions, (n,), in `rows`, (n,), whose episodes have not ended."""

    @abstractmethod
    def observe(self, rows: IntArray) -> Observations:
        """What is seen of `rows`, (n, width); zeros where an episode has terminated."""

    @abstractmethod
    def arguments(self) -> dict[str, Any]:
        """Keywords with which the same environment is built again."""

    @abstractmethod
    def state(self, rows: IntArray) -> State:
        """Where `rows`, (n,), stand, in numbers."""

    @abstractmethod
    def restore(self, rows: IntArray, state: State, generators: Sequence[np.random.Generator]) -> None:
        """Let `rows`, (n,), stand where others stood when `state` was taken; `generators` as in `start`."""

    @abstractmethod
    def stretches(self, row: int) -> list[Stretch]:
        """A row as text, in stretches by one writer."""

    def selection(self, rows: IntArray) -> IntArray | slice:
        """What indexes arrays over all rows at `rows`."""
        return slice(None) if rows is self.all_rows else rows


def observation_box(width: int) -> gym.spaces.Box:
    """The space of observations of `width` numbers."""
    return gym.spaces.Box(-HIDDEN_BOUND, HIDDEN_BOUND, (width,), np.float32)


def chosen_start(options: Mapping[str, Any] | None, known: tuple[str, ...], *others: str) -> Any:
    """What an episode was asked to begin with, by one of the `known` options; None where by none.

    Raises:
        ValueError: options are unknown, or two of them choose an episode.
    """
    given = options or {}
    unknown = set(given) - {*known, *others}
    choice = " or ".join(repr(name) for name in known)
    if unknown:
        also = "".join(f", rows by {name!r}" for name in others)
        raise ValueError(f"unknown options {', '.join(sorted(unknown))}; an episode is chosen by {choice}{also}")
    chosen = [given[name] for name in known if given.get(name) is not None]
    if len(chosen) > 1:
        raise ValueError(f"an episode is chosen by {choice}, not by both")
    return chosen[0] if chosen else None


def chosen_starts(options: Mapping[str, Any] | None, known: tuple[str, ...], rows: int) -> Sequence[Any]:
    """What each row was asked to begin with, (rows,); None where nothing.

    Raises:
        ValueError: options are unknown, or hold another number of values than there are rows.
    """
    given = chosen_start(options, known, "reset_mask")
    if given is None or not len(given):
        return [None] * rows
    if len(given) != rows:
        name = next(name for name in known if (options or {}).get(name) is not None)
        raise ValueError(f"options[{name!r}] holds {len(given)} {name} for {rows} environments")
    return list(given)


def reset_mask(options: Mapping[str, Any] | None, rows: int) -> BoolArray | None:
    """Which rows to reset, (rows,); None for all.

    Raises:
        ValueError: it is no array of so many booleans, or none of them is true.
    """
    mask = (options or {}).get("reset_mask")
    if mask is None:
        return None
    mask = np.asarray(mask)
    if mask.shape != (rows,) or mask.dtype != np.bool_ or not mask.any():
        raise ValueError(f"options['reset_mask'] must hold {rows} booleans, one of them true; it is {mask.tolist()}")
    return mask


def generator_numbers(generator: np.random.Generator) -> npt.NDArray[np.uint64]:
    """The state of a PCG64 generator, (6,).

    Raises:
        TypeError: it is of another kind.
    """
    kept = generator.bit_generator.state
    if kept["bit_generator"] != "PCG64":
        raise TypeError(
            f"states are kept of PCG64 generators, as Gymnasium makes them; this is {kept['bit_generator']}"
        )
    low = 2**64 - 1
    wide = [kept["state"]["state"], kept["state"]["inc"]]
    halves = [half for number in wide for half in (number >> 64, number & low)]
    return np.array([*halves, kept["has_uint32"], kept["uinteger"]], dtype=np.uint64)


def generator_of(numbers: npt.NDArray[np.uint64]) -> np.random.Generator:
    """A generator that draws on as the one whose numbers these are, (6,)."""
    a, b, c, d, has_uint32, uinteger = (int(number) for number in numbers)
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": a << 64 | b, "inc": c << 64 | d},
        "has_uint32": has_uint32,
        "uinteger": uinteger,
    }
    return np.random.Generator(bits)


def scalars(info: Info) -> Info:
    """The infos of one row out of arrays of one."""
    return {key: value[0].item() if isinstance(value[0], np.generic) else value[0] for key, value in info.items()}


def part(info: Mapping[str, Any], rows: IntArray) -> Info:
    """The infos of some rows out of those of all."""
    return {key: value[rows] for key, value in info.items()}


def all_masked(info: Info) -> Info:
    """Vector infos in which every row has a value."""
    masks = {f"_{key}": np.ones(len(value), dtype=bool) for key, value in info.items()}
    return info | masks


def without(info: Mapping[str, Any], rows: IntArray) -> Info:
    """Vector infos in which all rows but these have a value."""
    infos = all_masked({key: value.copy() for key, value in info.items()})
    for key in info:
        infos[key][rows], infos[f"_{key}"][rows] = None if infos[key].dtype == object else 0, False
    return infos


def masked(info: Info, rows: IntArray, num_envs: int, infos: Info | None = None) -> Info:
    """Vector infos, added to `infos`: values of `rows`, each key with its mask, as Gymnasium has them."""
    infos = {} if infos is None else infos
    for key, value in info.items() if len(rows) else ():
        empty = np.full(num_envs, None if value.dtype == object else 0, dtype=value.dtype)
        whole = infos.setdefault(key, empty)
        mask = infos.setdefault(f"_{key}", np.zeros(num_envs, dtype=bool))
        whole[rows], mask[rows] = value, True
    return infos
