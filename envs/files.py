"""Files that are whole or absent: written beside their place, then moved there."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, and move it to `path` when it is done; nothing is left behind where it fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write text."""
    write_whole(path, lambda partial: partial.write_text(text))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, and words about them, as safetensors."""
    write_whole(path, lambda partial: save_file(dict(tensors), partial, metadata=dict(metadata or {})))
