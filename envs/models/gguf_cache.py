"""GGUF files as ordinary weights, converted once: a second start reads safetensors, which takes far less time."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

ABOUT = "source.json"
"""In a folder of a conversion: what it was made of. It is written last."""


def conversion_of(file: Path, cache: Path, dtype: str) -> Path:
    """The folder in `cache` for the ordinary weights of a GGUF file in a precision, there or not.

    It is named by a digest of all bytes of the file, so that a file that was replaced is converted anew.
    """
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return cache.expanduser() / f"{file.stem}-{dtype}-{digest[:32]}"


def is_whole(folder: Path) -> bool:
    """Whether a conversion lies in `folder`."""
    return (folder / ABOUT).is_file()


def keep_conversion(network: Any, tokenizer: Any, file: Path, folder: Path) -> None:
    """Write a network read from a GGUF file, and its tokenizer, as `save_pretrained` does: wholly or not at all.

    Raises:
        OSError: `folder` cannot be written.
    """
    from transformers import __version__

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        # the weights are ordinary ones now, and no longer what the file says of its own
        network.hf_quantizer, network.is_quantized = None, False
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        digest = folder.name.rpartition("-")[2]
        about = {"file": file.name, "bytes": file.stat().st_size, "sha256_begins": digest, "transformers": __version__}
        (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
        try:
            os.rename(partial, folder)
        except OSError:
            if not is_whole(folder):  # another process was quicker otherwise
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
