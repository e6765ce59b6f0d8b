"""What every decoder is: rows of sequences, the books kept of them, and what is checked before they are decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.costs import COLUMNS
from envs.decoding.observation import Observation, Step, TakenBack
from envs.decoding.sampling import Sampling
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task

BOOKS = (
    "ledger", "_tokens", "_writers", "_prompt_lengths", "_lengths", "_since_llm", "_episodes", "_active", "_followed",
    "_observed",
)  # fmt: skip
"""What is kept of all rows, whatever the decoder."""


class Decoder(ABC):
    """Up to `rows` sequences in flight over a pool of models, each written token by token by the models chosen.

    A row is started with a prompt, observed, stepped until it ends, and may then be started anew. `Session` decodes;
    `TreeSession` walks a prefix tree to the same tokens, endings, observations and ledgers.

    Args:
        pool: the models; an action is an index into them.
        rows: sequences in flight.
        max_new_tokens: the longest response.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.
        sampling: how tokens are drawn; greedy where None.

    Attributes:
        ledger: what each row took since it started, (rows, models, COLUMNS).

    Raises:
        ValueError: a setting out of range.
    """

    def __init__(
        self,
        pool: ModelPool,
        rows: int,
        max_new_tokens: int,
        capacity: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, is {rows}")
        self.pool, self.rows, self.max_new_tokens = pool, rows, max_new_tokens
        self.capacity = sequence_capacity(pool, max_new_tokens, capacity)
        self.sampling = (sampling or Sampling()).check_models(len(pool))
        self._texts: dict[bytes, str] = {}  # of prompts, which policies may ask for at every step

    @abstractmethod
    def start(
        self,
        rows: IntArray,
        prompts: Sequence[IntArray],
        episodes: IntArray | None = None,
        generators: Sequence[np.random.Generator] | None = None,
        *,
        observed: bool = True,
    ) -> FloatArray:
        """Start a new sequence in each row.

        Args:
            rows: distinct rows, (n,); what they held is forgotten.
            prompts: n arrays of token ids.
            episodes: a number for each row's episode, (n,); the rows' own numbers where None.
            generators: the source of chance of each row, needed where tokens are sampled.
            observed: whether somebody may look at the rows' states. Where nobody does, the SLM too reads what it has
                missed when it is chosen, and nothing else; `Step.slm_tokens` are of no use where others write.

        Returns:
            Ledger entries of the SLM's reading of the prompts, (n, models, COLUMNS).

        Raises:
            ValueError: a prompt is empty or leaves no room for `max_new_tokens`.
        """

    @abstractmethod
    def step(self, rows: IntArray, actions: IntArray) -> Step:
        """Write one token in each row, by the model its action names.

        Args:
            rows: distinct rows in flight, (n,).
            actions: 0 for the SLM, k for model k of the pool, (n,).

        Raises:
            ValueError: an action out of range, a row that is not in flight, or one for the SLM that was released.
        """

    @abstractmethod
    def observe(self, rows: IntArray) -> Observation:
        """What a router may see of `rows`, (n,); copies, which later steps leave as they are."""

    @abstractmethod
    def read_prompts(self, rows: IntArray, model: int) -> Tensor:
        """The states of a model other than the SLM behind the prompts of `rows`, (n,): float32, (n, width).

        Where it has not read a prompt it does so, in a pass that is entered in the ledger; if it then writes the first
        token, it knows that already, and makes no other pass for it.

        Raises:
            ValueError: a model out of range, or a prompt it has not read behind which something is written already.
        """

    @abstractmethod
    def release_slm(self, rows: IntArray) -> None:
        """Let the SLM read no more of `rows`, (n,), which other models write to their ends and nobody observes."""

    @abstractmethod
    def free(self, rows: IntArray) -> None:
        """Take rows out of flight."""

    @abstractmethod
    def state(self, rows: IntArray) -> dict[str, npt.NDArray[Any]]:
        """Where `rows`, (n,), stand, in numbers: arrays of n, from which `restore` goes on in a decoder like this."""

    @abstractmethod
    def restore(
        self,
        rows: IntArray,
        state: Mapping[str, npt.NDArray[Any]],
        generators: Sequence[np.random.Generator] | None = None,
    ) -> None:
        """Let `rows`, (n,), stand where others stood when `state` was taken; models read again what they had read.

        Nothing is entered in the ledger for that: what a row took stands in its state.

        Raises:
            ValueError: the state is of other numbers of rows, models or tokens.
        """

    @abstractmethod
    def correct(self, row: int, task: Task, example: Example) -> bool:
        """Whether the response of a row answers `example`."""

    def taken_back(self, row: int) -> tuple[TakenBack, ...]:
        """What was written in a row since it was started and taken back, in order: nothing, as a rule."""
        return ()

    def check_fit(self, name: str, prompt: IntArray, response: Sequence[int] | IntArray = ()) -> None:
        """Refuse a prompt that leaves no room for `max_new_tokens`, or a reference response longer than these.

        Raises:
            ValueError: it does not fit; the error says what `name` is.
        """
        check_fit(name, prompt, response, self.capacity, self.max_new_tokens)

    def response(self, row: int) -> IntArray:
        """Tokens of the response so far, (n,), an end-of-sequence token included."""
        return self._tokens[row, self._prompt_lengths[row] : self._lengths[row]].copy()

    def writers(self, row: int) -> npt.NDArray[np.int8]:
        """Which model wrote each token of the response, (n,)."""
        return self._writers[row, self._prompt_lengths[row] : self._lengths[row]].copy()

    def prompts(self, rows: IntArray) -> list[str]:
        """The texts of the prompts of `rows`, (n,)."""
        texts = []
        for row in rows:
            prompt = self._tokens[row, : self._prompt_lengths[row]]
            text = self._texts.get(prompt.tobytes())
            if text is None:
                if len(self._texts) >= 4 * self.rows:
                    self._texts.clear()
                text = self._texts[prompt.tobytes()] = self.pool.decode(prompt)
            texts.append(text)
        return texts

    def lengths(self, rows: IntArray) -> IntArray:
        """Tokens of each row, prompt included, (n,)."""
        return self._lengths[rows].copy()

    def _open_books(self) -> None:
        """Make room for what is kept of all rows; subclasses do so once they know that the rows fit."""
        rows = self.rows
        self.ledger: FloatArray = np.zeros((rows, len(self.pool), COLUMNS))
        self._tokens: IntArray = np.zeros((rows, self.capacity), dtype=np.int64)  # prompts, then responses
        self._writers = np.zeros((rows, self.capacity), dtype=np.int8)
        self._prompt_lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self._lengths: IntArray = np.zeros(rows, dtype=np.int64)  # prompt included
        self._since_llm: IntArray = np.zeros(rows, dtype=np.int64)
        self._episodes: IntArray = np.zeros(rows, dtype=np.int64)
        self._active: BoolArray = np.zeros(rows, dtype=bool)
        self._followed: BoolArray = np.ones(rows, dtype=bool)  # the SLM reads what is written
        self._observed: BoolArray = np.ones(rows, dtype=bool)  # somebody may look at the SLM's state

    def _begin(self, rows: IntArray, prompts: Sequence[IntArray], episodes: IntArray | None) -> None:
        """Enter new sequences, of which nothing is written yet, in the books."""
        for row, prompt in zip(rows, prompts, strict=True):
            self._tokens[row, : len(prompt)] = prompt
        self._prompt_lengths[rows] = self._lengths[rows] = [len(prompt) for prompt in prompts]
        self._episodes[rows] = rows if episodes is None else episodes
        self._since_llm[rows] = 0
        self._active[rows] = self._followed[rows] = True
        self.ledger[rows] = 0

    def _enter(self, rows: IntArray, tokens: IntArray, actions: IntArray) -> None:
        """Enter a token, (n,), that the model `actions` wrote in each row."""
        self._tokens[rows, self._lengths[rows]] = tokens
        self._writers[rows, self._lengths[rows]] = actions
        self._lengths[rows] += 1
        self._since_llm[rows] = np.where(actions > 0, 0, self._since_llm[rows] + 1)

    def _books_of(self, rows: IntArray, *more: str) -> dict[str, npt.NDArray[Any]]:
        return {name.strip("_"): getattr(self, name)[rows] for name in (*BOOKS, *more)}

    def _set_books(self, rows: IntArray, state: Mapping[str, npt.NDArray[Any]], *more: str) -> None:
        for name in (*BOOKS, *more):
            book, kept = getattr(self, name), state[name.strip("_")]
            if kept.shape != (len(rows), *book.shape[1:]):
                raise ValueError(
                    f"the state's {name.strip('_')} have shape {kept.shape}, here {(len(rows), *book.shape[1:])}; "
                    "restore it in an environment of the same models and capacity, in as many rows"
                )
            book[rows] = kept

    def _checked(self, rows: IntArray) -> IntArray:
        """Rows as integers, (n,); refused where there are none, or they are not distinct rows."""
        rows = np.asarray(rows, dtype=np.int64)
        if not len(rows) or rows.min() < 0 or rows.max() >= self.rows or np.bincount(rows).max() > 1:
            raise ValueError(f"rows must be distinct and in 0..{self.rows - 1}; they are {rows.tolist()}")
        return rows

    def _checked_step(self, rows: IntArray, actions: IntArray) -> tuple[IntArray, IntArray]:
        """Rows and actions as integers, (n,); refused where a step cannot take them."""
        rows, actions = self._checked(rows), checked_actions(actions, len(rows), len(self.pool))
        if not self._active[rows].all():
            raise ValueError(f"rows {rows[~self._active[rows]].tolist()} are not in flight; start them first")
        self._check_followed(rows[self._observed[rows] & (actions == 0)])
        return rows, actions

    def _check_reader(self, model: int) -> None:
        """Refuse a model that `read_prompts` cannot ask."""
        if not 1 <= model < len(self.pool):
            raise ValueError(f"the model that reads prompts must be in 1..{len(self.pool) - 1}, is {model}")

    def _check_unwritten(self, rows: IntArray, model: int) -> None:
        """Refuse rows, (n,), whose prompts a model can no longer read by themselves."""
        begun = rows[self._lengths[rows] > self._prompt_lengths[rows]]
        if len(begun):
            raise ValueError(
                f"{self.pool.names[model]} has not read the prompts of rows {begun.tolist()}, and their responses have "
                "begun; let it read prompts before the first step"
            )

    def _check_followed(self, rows: IntArray) -> None:
        """Refuse rows, (n,), that the SLM was released from."""
        followed = self._followed[rows]
        if not followed.all():
            raise ValueError(
                f"the SLM was released from rows {rows[~followed].tolist()}; other models write them to their ends"
            )


def sequence_capacity(pool: ModelPool, max_new_tokens: int, capacity: int | None) -> int:
    """The longest sequence, the pool's where None; refused where responses or the models' positions do not fit."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, is {max_new_tokens}")
    if capacity is None:
        capacity = pool.capacity or pool.max_positions
    if not max_new_tokens < capacity <= pool.max_positions:
        raise ValueError(
            f"capacity {capacity} must exceed max_new_tokens {max_new_tokens} and stay within the models' "
            f"{pool.max_positions} positions; change capacity or lower max_new_tokens"
        )
    return capacity


def check_fit(name: str, prompt: IntArray, response: Sequence[int] | IntArray, capacity: int, new: int) -> None:
    """Refuse a prompt that leaves no room for `new` tokens within `capacity`, or a response longer than these."""
    room = capacity - new
    if not 1 <= len(prompt) <= room:
        raise ValueError(
            f"{name} has a prompt of {len(prompt)} tokens; the cache of {capacity} leaves room for 1 to {room} beside "
            f"{new} new: raise capacity, lower max_new_tokens or drop the example"
        )
    if len(response) > new:
        raise ValueError(
            f"{name} has a reference of {len(response)} tokens, max_new_tokens is {new}; raise it or drop the example"
        )


def checked_actions(actions: IntArray, count: int, models: int) -> IntArray:
    """Actions as integers, (count,); refused where they are not, or name no model."""
    actions = np.asarray(actions)
    whole = actions.shape == (count,) and actions.dtype.kind in "biu"
    if not whole or actions.min() < 0 or actions.max() >= models:
        raise ValueError(f"actions must be {count} integers in 0..{models - 1}; they are {actions.tolist()}")
    return actions.astype(np.int64)  # booleans would index as a mask


def since_at_each(writers: npt.NDArray[np.int8]) -> IntArray:
    """Tokens since another model than the SLM last wrote, or since the response began, before each token: (n,)."""
    positions = np.arange(len(writers))
    last = np.maximum.accumulate(np.where(writers > 0, positions, -1))
    return np.asarray(positions - np.concatenate([[-1], last])[: len(writers)] - 1)


def since_llm(writers: npt.NDArray[np.int8]) -> int:
    """Tokens since another model than the SLM last wrote, or since the response began; writers (n,)."""
    return int(since_at_each(np.append(writers, 0))[-1])
