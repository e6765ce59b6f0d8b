"""A response as a picture of fixed size, each token in the colour of the model that wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from envs.environments.render import PROMPT, colour_of

WIDTH, HEIGHT = 640, 360
"""Pixels of every picture."""
MARGIN, FONT_SIZE = 8, 14
BACKGROUND = (255, 255, 255)
PROMPT_COLOUR, SLM_COLOUR = (110, 110, 110), (0, 0, 0)
COLOURS = (SLM_COLOUR, (200, 30, 30), (30, 70, 200), (150, 30, 170), (160, 110, 0), (0, 130, 130))


@cache
def _font() -> tuple[object, float, int]:
    """A font of one width, and the width and height of a cell, in pixels."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"), FONT_SIZE)
    ascent, descent = font.getmetrics()
    return font, font.getlength("M"), ascent + descent


def wrapped(stretches: Iterable[tuple[int, str]], columns: int) -> list[list[tuple[int, str]]]:
    """Lines of at most so many characters: (writer, character) each."""
    lines: list[list[tuple[int, str]]] = [[]]
    for writer, text in stretches:
        for character in text:
            if character == "\n" or len(lines[-1]) == columns:
                lines.append([])
            if character != "\n":
                lines[-1].append((writer, character if character.isprintable() else " "))
    return lines


def picture(stretches: Iterable[tuple[int, str]]) -> npt.NDArray[np.uint8]:
    """Stretches of text with their writers (PROMPT for what nobody wrote) as an image, uint8, (HEIGHT, WIDTH, 3).

    Text that is too long loses its beginning.
    """
    from PIL import Image, ImageDraw

    font, width, height = _font()
    lines = wrapped(stretches, int((WIDTH - 2 * MARGIN) / width))[-((HEIGHT - 2 * MARGIN) // height) :]
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        for column, writer, text in _pieces(line):
            colour = PROMPT_COLOUR if writer == PROMPT else colour_of(COLOURS, writer)
            place = (MARGIN + column * width, MARGIN + number * height)
            draw.text(place, text, fill=colour, font=font)  # type: ignore[arg-type]
    return np.array(image)


def _pieces(line: list[tuple[int, str]]) -> Iterator[tuple[int, int, str]]:
    """What one writer wrote in a row of a line: (column, writer, text)."""
    column = 0
    for writer, group in groupby(line, key=lambda cell: cell[0]):
        text = "".join(character for _, character in group)
        yield column, writer, text
        column += len(text)
