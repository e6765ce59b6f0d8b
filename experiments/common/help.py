"""What `--help` prints: what a program does, its settings and its choices, read from where they are written down."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CONF = Path(__file__).parents[2] / "conf"
"""The folder of yaml files."""
WIDTH = 100
FLAGS = """\
-m, with several values (NAME=A,B), runs all combinations; hydra.run.dir=FOLDER names the run's folder, where a run
that was interrupted goes on; --cfg job prints every setting and runs nothing; --hydra-help tells of Hydra's own.
"""


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for help."""
    return any(argument in ("--help", "-h") for argument in arguments)


def write_help(name: str, about: str, conf: Path = CONF) -> str:
    """The help of a program.

    Args:
        name: of the program, and of its yaml.
        about: what it does; the docstring of its module.
        conf: the folder of yaml files.
    """
    import yaml

    text = (conf / f"{name}.yaml").read_text()
    choices: dict[str, Any] = {}
    settings = settings_of(text)
    for entry in yaml.safe_load(text).get("defaults", []):
        group, chosen = next(iter(entry.items())) if isinstance(entry, dict) else (entry, None)
        if group.endswith("@_here_"):
            settings += settings_of((conf / group.removesuffix("@_here_") / f"{chosen}.yaml").read_text())
        elif (conf / group.partition("@")[0]).is_dir():
            # one that is placed elsewhere is one of several: none is the default
            choices[group.partition("@")[0]] = None if "@" in group else chosen
    parts = [f"python -m experiments.{name} [NAME=VALUE ...]", about.strip()]
    if settings:
        parts.append("Settings (NAME=VALUE):\n" + textwrap.indent("\n".join(settings), "  "))
    if choices:
        lines = "\n".join(line for group, chosen in choices.items() for line in _options(conf, group, chosen))
        parts.append(f"Choices (GROUP=NAME; then GROUP.SETTING=VALUE for what it sets):\n{lines}")
    return "\n\n".join([*parts, FLAGS.strip()])


def settings_of(text: str) -> list[str]:
    """The lines of a yaml that state settings, with their comments; not the defaults list, nor what is Hydra's."""
    kept, skipped = [], False
    for line in text.splitlines():
        if line[:1] not in (" ", "#", ""):
            skipped = line.startswith(("defaults:", "hydra:"))
        if not skipped and line.strip() and not line.startswith("#"):
            kept.append(line)
    return kept


def _options(conf: Path, group: str, chosen: str | None) -> Iterator[str]:
    names = ", ".join(sorted(path.stem for path in (conf / group).glob("*.yaml")))
    default = f" ({chosen})" if chosen else ""
    yield from textwrap.wrap(
        f"{group}{default}: {names}",
        WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_on_hyphens=False,
        break_long_words=False,
    )
