"""What is refused before weights are read: attention without a cache, other vocabularies, too little memory."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import psutil
import torch

from envs.costs import ModelProfile


def text_config(config: Any) -> Any:
    """The configuration of the text decoder inside `config`."""
    return config.get_text_config(decoder=True)


def head_size(config: Any) -> int:
    """Elements of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_attention(name: str, config: Any, network: Any) -> None:
    """Refuse a model whose attention cannot take the slot cache.

    Args:
        name: the model's name, for the error.
        config: its configuration.
        network: the model or its class.

    Raises:
        ValueError: recurrent state, attention in chunks, positions that cannot be said row by row, or no attention that
            takes a boolean mask.
    """
    config = text_config(config)
    if getattr(network, "_is_stateful", False) or not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"{name} keeps a recurrent state, which a key-value cache cannot fork or rewind; choose another model"
        )
    unsupported = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if unsupported:
        raise ValueError(
            f"{name} uses {', '.join(sorted(unsupported))}, which the cache does not support; choose a model with full "
            "or sliding-window attention in every layer"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"{name} turns its positions by the longest sequence in a pass (rope_type {rope}), so that rows would "
            "depend on each other; choose a model with another rope_type"
        )
    if getattr(config, "alibi", False):
        raise ValueError(
            f"{name} biases attention by distances that it reads off a padded batch (alibi), so that rows cannot have "
            "positions of their own; choose a model with rotary or learned positions"
        )
    if not getattr(network, "_supports_sdpa", False) and not caps_scores(config):
        raise ValueError(f"{name} has no attention that takes a 4-D boolean mask (sdpa); choose another model")


def caps_scores(config: Any) -> bool:
    """Whether attention scores have a cap, which sdpa leaves out, so that attention must be eager."""
    return bool(getattr(text_config(config), "attn_logit_softcapping", None))


def longest_sequence(config: Any) -> int:
    """The longest sequence a model takes: its positions, and no more than a window of its attention.

    Within the window a layer that attends to a window attends to everything, as the cache has it.
    """
    config = text_config(config)
    positions = int(getattr(config, "max_position_embeddings", None) or 2**31)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    return min(positions, int(window)) if window and slides else positions


def check_fits(place: str, size: int, rows: int, capacity: int) -> None:
    """Refuse caches (and weights) of `size` bytes that do not fit the memory free on a device, where it can be told."""
    free: int | None = None
    if place.startswith("cuda"):
        free = int(torch.cuda.mem_get_info(torch.device(place))[0])
    elif place == "cpu":
        free = int(psutil.virtual_memory().available)
    if free is not None and size > free:
        raise ValueError(
            f"{place}: {gigabytes(size)} are needed, {gigabytes(free)} are free; lower rows ({rows}), "
            f"lower capacity ({capacity}), or choose a smaller dtype or model"
        )


def check_places(needed: Mapping[str, int], rows: int, capacity: int) -> None:
    """Refuse what does not fit each place, in bytes; what a device map spreads takes what others leave of all cards.

    Raises:
        ValueError: it does not fit; the error names the place.
    """
    cards = {place: size for place, size in needed.items() if place.startswith("cuda")}
    spread = {place: size for place, size in needed.items() if place not in cards and place not in ("cpu", "mps")}
    for place, size in needed.items():
        if place not in spread:
            check_fits(place, size, rows, capacity)
    count = torch.cuda.device_count()
    if not spread or not count:
        return  # a device map without accelerators goes to the memory of the machine, and its disk
    free = sum(int(torch.cuda.mem_get_info(torch.device("cuda", card))[0]) for card in range(count))
    free -= sum(cards.values())
    size = sum(spread.values())
    if size > free:
        raise ValueError(
            f"device_map={', '.join(spread)}: {gigabytes(size)} are needed, {gigabytes(max(free, 0))} are free on "
            f"{count} CUDA devices beside the other models; take more devices, lower rows ({rows}), lower capacity "
            f"({capacity}), or choose a smaller dtype or model"
        )


def gigabytes(size: int) -> str:
    """`size` bytes for people: 1.50 GB, or 12.0 MB below a tenth of one."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


class Named(Protocol):
    """A model, loaded or not, by its name and its tokenizer."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> Any: ...


def check_same_vocabulary(slm: Named, llm: Named) -> None:
    """Refuse models that do not share one vocabulary and its special tokens."""
    if slm.tokenizer is llm.tokenizer:
        return
    ours, theirs = slm.tokenizer.get_vocab(), llm.tokenizer.get_vocab()
    if ours != theirs:
        differing = sorted(dict(ours.items() ^ theirs.items()), key=str)[:3]
        raise ValueError(
            f"vocabularies differ: {slm.name} has {len(ours)} tokens, {llm.name} {len(theirs)} (such as {differing}); "
            "token-level routing needs models of one family"
        )
    for special in ("bos_token_id", "eos_token_id"):
        a, b = getattr(slm.tokenizer, special), getattr(llm.tokenizer, special)
        if a != b:
            raise ValueError(
                f"special tokens differ: {special} is {a} for {slm.name}, {b} for {llm.name}; make them one"
            )


class ModelOrderWarning(UserWarning):
    """A pool whose models do not stand cheapest first."""


def warn_of_order(models: Sequence[ModelProfile]) -> None:
    """Warn where a model is larger than the one behind it: action 0 would be a larger model than the SLM."""
    for model, behind in pairwise(models):
        if model.parameters > behind.parameters:
            warnings.warn(
                f"{model.name} stands before {behind.name} and is larger ({model.parameters:,} parameters, "
                f"{behind.parameters:,}); a pool goes from the SLM to the largest model: change the order, or where it "
                "is meant, warnings.simplefilter('ignore', envs.ModelOrderWarning)",
                ModelOrderWarning,
                stacklevel=2,
            )
