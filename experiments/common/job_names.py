"""What the jobs of a multirun are called: after what differs between them.

Importing this file registers the resolver `job_name`, which `hydra.sweep.subdir` names folders with:

    ${job_name:${hydra:runtime.choices.agent},${seed}}    ppo-seed0, ppo-cost_weight-0.02-seed0
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

LONGEST = 100
"""Characters a name has at most."""
NAMED = ("agent", "seed", "shard")
"""What a name holds in words of its own, and what is no part of it: the shards of a run share its folder."""
# what stands in a path, and unquoted on Hydra's command line too; "-" parts what a name is made of, and is inside of
# numbers alone
_PLAIN = re.compile(r"[\w.]+|[+-]?[\d.]+(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_ELSE = re.compile(r"[^\w.-]+", re.ASCII)


def folder_name(head: str, differing: Mapping[str, str], seed: int | str) -> str:
    """The name of a job's folder, at most LONGEST characters that need no quotes anywhere.

    Jobs of one sweep differ in the same settings, and have different names if any is different: what does not fit, or
    is no plain word or number, is told apart by a digest.

    Args:
        head: the name begins with it.
        differing: settings in which jobs differ, by key.
        seed: the name ends with it.
    """
    parts = [f"{key.lstrip('+').removeprefix('agent.')}-{value}" for key, value in sorted(differing.items())]
    name = "-".join([head, *parts, f"seed{seed}"])
    plain = all(_PLAIN.fullmatch(value) for value in differing.values())
    if plain and len(name) <= LONGEST and not _ELSE.search(name):
        return name
    words = json.dumps([head, sorted(differing.items())])
    end = f"-{hashlib.sha256(words.encode()).hexdigest()[:10]}-seed{seed}"
    return _ELSE.sub("_", "-".join([head, *parts]))[: LONGEST - len(end)].rstrip("-_") + end


def swept_keys(multirun: Path) -> set[str] | None:
    """The settings a multirun goes over, by what Hydra wrote down of it; None where there is no such file."""
    if not multirun.is_file():
        return None
    hydra = OmegaConf.load(multirun).hydra
    given = [f"{key}={value}" for key, value in (OmegaConf.select(hydra, "sweeper.params") or {}).items()]
    overrides = OverridesParser.create().parse_overrides([*given, *hydra.overrides.task])
    return {override.get_key_element() for override in overrides if override.is_sweep_override()}


def job_name(head: str, seed: int | str, *, _root_: Any) -> str:
    """The resolver: `head`, what the multirun goes over and what it is in this job, and the seed.

    Where a sweeper writes nothing down, everything that was given counts.
    """
    hydra = _root_.hydra
    swept = swept_keys(Path(hydra.sweep.dir) / "multirun.yaml")
    overrides = OverridesParser.create().parse_overrides(list(hydra.overrides.task))
    given = {override.get_key_element(): override.get_value_element_as_str() for override in overrides}
    differing = {key: value for key, value in given.items() if swept is None or key in swept}
    return folder_name(f"{head}", {key: value for key, value in differing.items() if key not in NAMED}, seed)


OmegaConf.register_new_resolver("job_name", job_name, replace=True)
