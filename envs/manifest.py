"""What made a file that is kept, so that it is not mistaken for another."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.models import ModelPool


def check_manifest(place: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], only: Sequence[str] = ()) -> None:
    """Refuse what was made by other models, another task or other settings than wanted.

    Args:
        place: named in the error.
        found: the manifest that is there.
        wanted: the manifest it should be.
        only: compare these keys; all where empty.

    Raises:
        ValueError: they differ; the error names what differs, both ways.
    """
    for key in only or sorted({*found, *wanted}):
        there, here = found.get(key), json.loads(json.dumps(wanted.get(key)))
        if there == here:
            continue
        if isinstance(there, dict) and isinstance(here, dict):
            inner = [k for k in sorted({*there, *here}) if there.get(k) != here.get(k)]
            there, here = ({k: part.get(k) for k in inner} for part in (there, here))
        raise ValueError(
            f"{place} was made with {key} {there}, this run has {here}; give this run another folder, or the settings "
            "that made it"
        )


def models_manifest(pool: ModelPool) -> list[dict[str, str]]:
    """Names and fingerprints of the models of a pool."""
    return [{"name": model.name, "fingerprint": model.fingerprint} for model in pool.models]
