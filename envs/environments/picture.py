"""A response as a picture of fixed size, each token in the colour of the model that wrote it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from envs.environments.render import PROMPT, STANDS, Stretch, colour_of

WIDTH, HEIGHT = 640, 360
"""Pixels of every picture."""
MARGIN, FONT_SIZE = 8, 14
BACKGROUND = (255, 255, 255)
PROMPT_COLOUR, SLM_COLOUR = (110, 110, 110), (0, 0, 0)
STRIKE_COLOUR, STANDS_COLOUR = (235, 120, 120), (60, 170, 90)
COLOURS = (SLM_COLOUR, (200, 30, 30), (30, 70, 200), (150, 30, 170), (160, 110, 0), (0, 130, 130))


@cache
def _font() -> tuple[object, float, int]:
    """A font of one width, and the width and height of a cell, in pixels."""
    from matplotlib import get_data_path
    from PIL import ImageFont

    font = ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf"), FONT_SIZE)
    ascent, descent = font.getmetrics()
    return font, font.getlength("M"), ascent + descent


def wrapped(stretches: Iterable[Stretch], columns: int) -> list[list[Stretch]]:
    """Lines of at most so many characters, each a stretch by itself; marks without text take no room."""
    lines: list[list[Stretch]] = [[]]
    for stretch in stretches:
        for character in stretch.text:
            if character == "\n" or sum(len(cell.text) for cell in lines[-1]) == columns:
                lines.append([])
            if character != "\n":
                lines[-1].append(stretch._replace(text=character if character.isprintable() else " "))
        if stretch.writer == STANDS:
            lines[-1].append(stretch)
    return lines


def picture(stretches: Iterable[Stretch]) -> npt.NDArray[np.uint8]:
    """Stretches of text as an image, uint8, (HEIGHT, WIDTH, 3).

    What was taken back is struck through; a thin green line stands where a call let all stand that was drafted. Text
    that is too long loses its beginning.
    """
    from PIL import Image, ImageDraw

    font, width, height = _font()
    lines = wrapped(stretches, int((WIDTH - 2 * MARGIN) / width))[-((HEIGHT - 2 * MARGIN) // height) :]
    image = Image.new("RGB", (WIDTH, HEIGHT), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(lines):
        for column, piece in _pieces(line):
            left, top = MARGIN + column * width, MARGIN + number * height
            right = left + len(piece.text) * width
            if piece.writer == STANDS:
                draw.line((left, top, left, top + height - 1), fill=STANDS_COLOUR, width=2)
                continue
            colour = PROMPT_COLOUR if piece.writer == PROMPT else colour_of(COLOURS, piece.writer)
            if piece.taken_back and piece.writer == 0:
                colour = PROMPT_COLOUR
            draw.text((left, top), piece.text, fill=colour, font=font)  # type: ignore[arg-type]
            if piece.taken_back:
                draw.line((left, top + height // 2, right, top + height // 2), fill=STRIKE_COLOUR)
    return np.array(image)


def _pieces(line: list[Stretch]) -> Iterator[tuple[int, Stretch]]:
    """What one writer wrote in a row of a line, with the column where it begins."""
    column = 0
    for (writer, taken_back), group in groupby(line, key=lambda cell: (cell.writer, cell.taken_back)):
        text = "".join(cell.text for cell in group)
        yield column, Stretch(writer, text, taken_back)
        column += len(text)
