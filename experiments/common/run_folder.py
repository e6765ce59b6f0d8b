"""The folder of a run: one run at a time, with the settings that made it; what is refused changes nothing there.

with run_folder(config, folder, Continuing(may_differ=("bootstrap",))) as begin:
...  # build and check everything
begin()
...  # from here on files are written
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from envs.storage import write_text
from experiments.common.continuing import SETTINGS, Continuing
from experiments.common.locks import only_writer


@contextmanager
def run_folder(
    config: DictConfig, folder: Path, continuing: Continuing, log: str | None = None
) -> Iterator[Callable[[], None]]:
    """Hold a folder for one run, refused where other settings made what is there.

    Gives a function to call when all else was checked, before the first file is written: it writes `config.yaml`, and
    opens the log.

    Args:
        config: of the run.
        folder: made where it is not there.
        continuing: which settings may be other ones when a run goes on.
        log: name of a file for what is logged; none where None.

    Raises:
        InUseError: another run is at work there.
        OtherSettingsError: other settings made what is there; the error names each of them, both values.
        OSError: the folder cannot be written.
    """
    text, root = OmegaConf.to_yaml(config, resolve=True), logging.getLogger()
    handlers: list[logging.Handler] = []

    def begin() -> None:
        write_text(folder / SETTINGS, text)
        if log is not None:
            handlers.append(logging.FileHandler(folder / log))
            handlers[-1].setFormatter(logging.Formatter("[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"))
            root.addHandler(handlers[-1])

    with only_writer(folder):
        continuing.check(text, folder)
        try:
            yield begin
        finally:
            for handler in handlers:
                root.removeHandler(handler)
                handler.close()
