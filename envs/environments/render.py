"""Responses with each token coloured by the model that wrote it, for terminals and for pages.

Where drafts are checked, what was taken back is shown too, in front of what was written instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from envs.arrays import FloatArray, IntArray
from envs.costs import PASSES
from envs.decoding.observation import TakenBack

Colour = TypeVar("Colour")
PROMPT, STANDS = -1, -2
"""The writers of what no model wrote: of the prompt; of a mark without text, where a model was called and let all stand
that was drafted."""
END = "<end>"
"""What stands for an end-of-sequence token that was taken back."""
# The SLM writes in the terminal's own colour; model k in the k-th of these.
ANSI_COLOURS = ("\033[0m", "\033[1;31m", "\033[1;34m", "\033[1;35m", "\033[1;33m", "\033[1;36m")
ANSI_TAKEN_BACK = "\033[2;9m"
"""Struck through, and faint, which a terminal shows that knows no strike-through."""
ANSI_STANDS = "\033[32m|"
HTML_COLOURS = ("transparent", "#ffb3a7", "#a7c7ff", "#e3b3ff", "#ffe08a", "#a7f0e0")


class Decodes(Protocol):
    """What turns token ids into text: a pool, or a tokenizer alone."""

    @property
    def end_tokens(self) -> IntArray:
        """Those that end a response, (n,)."""
        ...

    def decode(self, tokens: IntArray) -> str:
        """The text of `tokens`, (n,), special tokens left out."""
        ...


class Stretch(NamedTuple):
    """A part of a response by one writer.

    Attributes:
        writer: the number of the model; PROMPT or STANDS where none wrote.
        text: what was written.
        taken_back: it is not part of the response any more.
    """

    writer: int
    text: str
    taken_back: bool = False


class Checked(NamedTuple):
    """What larger models did to a response whose drafts they check.

    Attributes:
        taken_back: what they took back, in order.
        calls: how often they were called.
    """

    taken_back: Sequence[TakenBack]
    calls: int

    @classmethod
    def of(cls, taken_back: Sequence[TakenBack], ledger: FloatArray) -> Self:
        """Of a response by its ledger, (models, COLUMNS): a call is a pass."""
        return cls(taken_back, int(ledger[1:, PASSES].sum()))

    def stands(self, writers: npt.NDArray[np.int8]) -> list[int]:
        """The places of a response, written by `writers`, (n,), at which a call let a whole draft stand.

        A call writes a token, but for one that lets a drafted end stand: no other call ends a response of n tokens.
        """
        called = np.flatnonzero(writers > 0).tolist()
        called += [len(writers)] * (self.calls > len(called))
        refused = {back.position for back in self.taken_back}
        return [place for last, place in pairwise([-1, *called]) if place > last + 1 and place not in refused]


def stretches_of(
    pool: Decodes, tokens: IntArray, writers: npt.NDArray[np.int8], checked: Checked | None = None
) -> Iterator[Stretch]:
    """Stretches of a response, each decoded behind what stands in front of it.

    Without those that were taken back their texts are the text of the response.

    Args:
        pool: the models that wrote it.
        tokens: token ids, (n,).
        writers: of each, (n,).
        checked: what was checked; None where drafts are not.
    """
    marks: dict[int, list[Stretch]] = {}
    for back in checked.taken_back if checked else ():
        text = gained(pool, tokens[: back.position], back.tokens)
        marks.setdefault(back.position, []).append(Stretch(back.writer, text, taken_back=True))
    for place in checked.stands(writers) if checked else ():
        marks.setdefault(place, []).append(Stretch(STANDS, ""))
    changes = np.flatnonzero(np.diff(writers)) + 1
    places = sorted({0, *changes.tolist(), *marks, len(tokens)})
    whole, written = pool.decode(tokens), 0
    yield from marks.get(0, ())
    for begin, end in pairwise(places):
        # what the whole text gains: tokens decoded apart may lose spaces or split a character
        reached = max(written, _shared(whole, pool.decode(tokens[:end])))
        yield Stretch(int(writers[begin]), whole[written:reached])
        written = reached
        yield from marks.get(end, ())


def gained(pool: Decodes, front: IntArray, tokens: IntArray) -> str:
    """The text that tokens, (n,), add behind those in front of them; END for an end of sequence."""
    before, after = pool.decode(front), pool.decode(np.concatenate([front, tokens]))
    ended = len(tokens) > 0 and int(tokens[-1]) in pool.end_tokens
    return after[_shared(before, after) :] + END * ended


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def ansi(stretches: Iterable[Stretch]) -> str:
    """Stretches for a terminal: those of other models than the SLM are coloured, what was taken back is struck through.

    A thin green line stands where a call let all stand that was drafted.
    """
    return "".join(f"{style}{text}{ANSI_COLOURS[0]}" if style else text for style, text in map(_styled, stretches))


def _styled(stretch: Stretch) -> tuple[str, str]:
    writer, text, taken_back = stretch
    if writer == STANDS:
        return ANSI_STANDS, text
    coloured = colour_of(ANSI_COLOURS, writer) if writer > 0 else ""
    return coloured + ANSI_TAKEN_BACK * taken_back, text


def colour_of(colours: tuple[Colour, ...], writer: int) -> Colour:
    """The colour of a writer: the first for the SLM, the others in turn for the models behind it."""
    return colours[1 + (writer - 1) % (len(colours) - 1)] if writer > 0 else colours[0]
