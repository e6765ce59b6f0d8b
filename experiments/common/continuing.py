"""Whether a run may go on in the folder of an earlier start: where the settings are those that made it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SETTINGS = "config.yaml"
"""In a run's folder: the settings that made it."""
ALWAYS_MAY_DIFFER = ("threads", "track", "models.device", "models.rows", "models.capacity", "agent.scheduling")
"""Where and how fast a run works, which no result depends on."""
_ABSENT = object()


class OtherSettingsError(ValueError):
    """A folder holds what other settings have made."""


@dataclass(frozen=True)
class Continuing:
    """Which settings of a program may be other ones when a run goes on.

    Attributes:
        may_differ: names of settings that change nothing of what is kept in the folder, nor does what is below them.
        unless_off: parts of the settings that have made nothing so long as a switch was off, and that switch.
        anything_differs: nothing is kept, so that all may.
    """

    may_differ: tuple[str, ...] = ()
    unless_off: Mapping[str, str] = field(default_factory=dict)
    anything_differs: bool = False

    def check(self, text: str, folder: Path) -> None:
        """Refuse settings other than those that made a folder.

        Args:
            text: the settings of a run, as `config.yaml` has them.
            folder: where `config.yaml` says what made it, if anything did.

        Raises:
            OtherSettingsError: they differ; the error names each that does, with both values.
            ValueError: `config.yaml` cannot be read.
        """
        import yaml

        place = folder / SETTINGS
        if self.anything_differs or not place.is_file():
            return
        try:
            there = yaml.safe_load(place.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{place} cannot be read; give this run another folder, or delete that file") from error
        others = self.others(there, yaml.safe_load(text))
        if others:
            raise OtherSettingsError(
                f"{folder} was made with {'; '.join(others)}: give this run another folder (hydra.run.dir=...), or the "
                "settings that made it"
            )

    def others(self, there: Any, here: Any) -> list[str]:
        """In words, the settings that must be the same and are not, both values of each.

        Args:
            there: settings that made something, as plain data.
            here: those of a run that would go on with it.
        """
        passed = [*ALWAYS_MAY_DIFFER, *self.may_differ]
        for part, switch in self.unless_off.items():
            if isinstance(there, Mapping) and not there.get(switch):
                passed += [part, switch]
        return [
            f"{name} {_shown(old)}, not {_shown(new)}"
            for name, old, new in differences(there, here)
            if not any(name == one or name.startswith(f"{one}.") for one in passed)
        ]


def differences(there: Any, here: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The settings in which two trees of them differ, by their full names, with both values.

    One that is not there is as one that is null or empty: settings that are new since a folder was made stop no run.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in [*there, *(key for key in here if key not in there)]:
            inner = f"{name}.{key}" if name else f"{key}"
            yield from differences(there.get(key, _ABSENT), here.get(key, _ABSENT), inner)
    elif there != here and not (_nothing(there) and _nothing(here)):
        yield name, there, here


def _nothing(value: Any) -> bool:
    return value is _ABSENT or value in (None, [], {})


def _shown(value: Any) -> str:
    return "unset" if value is _ABSENT else json.dumps(value, default=str)


_REPORTED = (
    "bootstrap",
    "transcripts",
    "transcripts_of",
    "columns",
    "cost",
    "scheduling",
    "tree_memory",
    "tree",
    "traces",
    "shared",
    "oracle",
    "oracle_budget",
)
EVALUATING = Continuing(may_differ=(*_REPORTED, "shards", "shard"))
"""How an evaluation is reported may change, how its answers share passes, and where states and baselines are kept; what
was measured stays, which the manifests of its pieces look after."""
TRAINING = Continuing(
    may_differ=tuple(f"evaluation.{name}" for name in _REPORTED), unless_off={"evaluation": "evaluate"}
)
"""A run that was trained may be evaluated later."""
