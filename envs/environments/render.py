"""Responses with each token coloured by the model that wrote it, for terminals and for pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from envs.arrays import IntArray

if TYPE_CHECKING:
    from envs.models.pool import ModelPool

Colour = TypeVar("Colour")
PROMPT = -1
"""The writer of what no model wrote."""
# The SLM writes in the terminal's own colour; model k in the k-th of these.
ANSI_COLOURS = ("\033[0m", "\033[1;31m", "\033[1;34m", "\033[1;35m", "\033[1;33m", "\033[1;36m")
HTML_COLOURS = ("transparent", "#ffb3a7", "#a7c7ff", "#e3b3ff", "#ffe08a", "#a7f0e0")


def runs(pool: ModelPool, tokens: IntArray, writers: npt.NDArray[np.int8]) -> Iterator[tuple[int, str]]:
    """Stretches of a response by one writer, each decoded as a whole: (model, text)."""
    end, written = 0, ""
    for writer, group in groupby(writers.tolist()):
        end += len(list(group))
        # what the whole text gains: tokens decoded apart may lose spaces or split a character
        text = pool.decode(tokens[:end])
        yield writer, text[len(written) :]
        written = text


def ansi(stretches: Iterable[tuple[int, str]]) -> str:
    """Stretches of text with their writers for a terminal; those of other models than the SLM are coloured."""
    return "".join(
        text if writer <= 0 else f"{colour_of(ANSI_COLOURS, writer)}{text}{ANSI_COLOURS[0]}"
        for writer, text in stretches
    )


def colour_of(colours: tuple[Colour, ...], writer: int) -> Colour:
    """The colour of a writer: the first for the SLM, the others in turn for the models behind it."""
    return colours[1 + (writer - 1) % (len(colours) - 1)] if writer > 0 else colours[0]
