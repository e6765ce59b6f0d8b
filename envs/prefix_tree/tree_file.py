"""The file of a prefix tree: read by memory map, and refused where what it holds is no tree."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from envs.arrays import UNKNOWN, BoolArray
from envs.decoding.judges import OPINION
from envs.storage import check_manifest

Arrays = Mapping[str, npt.NDArray[Any]]
COLUMNS = {
    "features": "float32",
    "tokens": "int32",
    "children": "int32",
    "parents": "int32",
    "depths": "int32",
    "prompt_numbers": "int32",
    "ends": "int8",
    "verdicts": "int8",
}
"""One entry for each state, and its type."""
JUDGED_FOR = "judged_for"
"""A column that trees saved before verdicts were bound to their examples do not have."""
OPINIONS = "opinions"
"""Likewise of trees saved before drafts were checked."""
_NO_TEXT = (json.JSONDecodeError, UnicodeDecodeError)
PROMPTS = {"roots": "int32", "prompt_tokens": "int64", "prompt_offsets": "int64"}


def read_tree(path: Path, manifest: Mapping[str, Any], width: int, models: int, vocabulary: int) -> Arrays:
    """The arrays of a saved tree; nothing of `features` is read until it is looked at.

    A tree that does not say which examples its verdicts are for keeps none of them.

    Args:
        path: of a file that `PrefixTree.save` has written.
        manifest: what makes the tree that is wanted.
        width: of the features.
        models: of the pool.
        vocabulary: how many token ids there are.

    Raises:
        ValueError: the file was made by other models, another task or other settings, cannot be read, or is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            check_manifest(path, json.loads(file.metadata()["manifest"]), manifest)
            # tensors of a safetensors file are mapped: nothing is read until it is looked at
            arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        problem = next(_problems(arrays, width, models, vocabulary, int(manifest["max_new_tokens"])), None)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, RuntimeError, *_NO_TEXT) as error:
        raise ValueError(f"{path} holds no readable tree; give a file that PrefixTree.save has written") from error
    if problem is not None:
        raise ValueError(f"{path} is damaged ({problem}); delete it, and it is made anew")
    if JUDGED_FOR not in arrays:
        count = len(arrays["parents"])
        arrays |= {
            "verdicts": np.full(count, UNKNOWN, dtype=np.int8),
            JUDGED_FOR: np.zeros(count, dtype=np.int64),
        }
    if OPINIONS not in arrays:
        arrays |= {OPINIONS: np.full((len(arrays["parents"]), models - 1, OPINION), UNKNOWN, dtype=np.float32)}
    return arrays


def _problems(arrays: Arrays, width: int, models: int, vocabulary: int, longest: int) -> Iterator[str]:
    """What makes the arrays no tree; each check relies on those before it."""
    count = len(arrays["parents"])
    shapes: dict[str, tuple[int, ...]] = {OPINIONS: (count, models - 1, OPINION), "features": (count, width)}
    shapes |= {"tokens": (count, models), "children": (count, models)}
    later = {JUDGED_FOR: "int64", OPINIONS: "float32"}
    kinds = {**COLUMNS, **{name: kind for name, kind in later.items() if name in arrays}}
    for name, kind in kinds.items():
        if arrays[name].shape != shapes.get(name, (count,)) or arrays[name].dtype != kind:
            yield f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}"
    for name, kind in PROMPTS.items():
        if arrays[name].ndim != 1 or arrays[name].dtype != kind:
            yield f"{name} is {arrays[name].dtype} of shape {arrays[name].shape}"
    roots, offsets, words = arrays["roots"], arrays["prompt_offsets"], arrays["prompt_tokens"]
    parents, depths, children, tokens = (arrays[name] for name in ("parents", "depths", "children", "tokens"))
    if len(offsets) != len(roots) + 1 or offsets[0] != 0 or offsets[-1] != len(words) or (np.diff(offsets) < 1).any():
        yield "prompt_offsets do not divide prompt_tokens"
    for name, low, end in (
        ("roots", 0, count),
        ("parents", UNKNOWN, count),
        ("children", UNKNOWN, count),
        ("prompt_numbers", 0, len(roots)),
        ("prompt_tokens", 0, vocabulary),
        ("tokens", UNKNOWN, vocabulary),
        ("depths", 0, longest + 1),
        ("ends", 0, 3),
        ("verdicts", UNKNOWN, 2),
    ):
        if not _within(arrays[name], low, end):
            yield f"{name} reach from {arrays[name].min()} to {arrays[name].max()}"
    prompts = [words[first:last].tobytes() for first, last in pairwise(offsets)]
    if len(set(prompts)) < len(prompts):
        yield "a prompt stands twice"
    is_root = parents == UNKNOWN
    if not np.array_equal(np.flatnonzero(is_root), np.sort(roots)):
        yield "roots are not the states without a parent"
    if (arrays["prompt_numbers"][roots] != np.arange(len(roots))).any():
        yield "roots stand behind other prompts"
    # depths that grow by one at each child leave no way back: a path upwards ends
    if (depths != np.where(is_root, 0, depths[parents] + 1)).any():
        yield "depths do not follow the parents"
    if (~is_root & (arrays["prompt_numbers"] != arrays["prompt_numbers"][parents])).any():
        yield "a state stands behind another prompt than its parent"
    known = children != UNKNOWN
    if (known & (parents[children] != np.arange(count)[:, None])).any() or (known & (tokens == UNKNOWN)).any():
        yield "children are not those of their parents"


def _within(values: npt.NDArray[Any], low: int, end: int) -> bool:
    inside: BoolArray = (values >= low) & (values < end)
    return bool(inside.all())
