"""Progress bars: at a terminal they are redrawn, in a log they are a line now and then."""

from __future__ import annotations

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS = 30.0
"""From one line of a bar in a log to the next; a bar that is done earlier leaves none."""


class ProgressBar(tqdm):  # type: ignore[type-arg]  # tqdm has no type arguments when it runs
    """A bar of tqdm, which takes the same arguments.

    Where standard error is no terminal (a log, a pipe) it writes a line every SECONDS instead, and a last one where the
    bar would be left standing: carriage returns would make a log one long line.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.in_log = not (kwargs.get("file") or sys.stderr).isatty()
        self._said = time.monotonic()
        if self.in_log:
            kwargs |= {"mininterval": SECONDS, "maxinterval": SECONDS, "delay": SECONDS, "ncols": 100, "ascii": True}
        super().__init__(*args, **kwargs)

    # tqdm's types say that it returns nothing, its own code asks whether anything was shown
    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Show the bar, or write its line."""
        if not self.in_log:
            return super().display(msg, pos)
        if msg is not None:
            return False  # nothing is wiped from a log
        self._said = time.monotonic()
        self.fp.write(f"{self}\n")
        self.fp.flush()
        return True

    def refresh(self, nolock: bool = False, lock_args: Any = None) -> Any:
        """Show the bar; in a log when it is time again."""
        if self.in_log and time.monotonic() - self._said < SECONDS:
            return True
        return super().refresh(nolock, lock_args)

    def clear(self, nolock: bool = False) -> None:
        """Wipe the bar from the terminal."""
        if not self.in_log:
            super().clear(nolock)

    def close(self) -> None:
        """End the bar."""
        if self.in_log:
            left, self.leave = self.leave, False
            if left and not self.disable and self.last_print_t >= self.start_t + SECONDS:
                self.display()
        super().close()
