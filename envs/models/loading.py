"""Loading pools of models: they are found, checked and planned for before any weights are read."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import WeakValueDictionary

import torch

from envs.models.checks import check_places, check_same_vocabulary, gigabytes, longest_sequence
from envs.models.language_model import LanguageModel
from envs.models.places import EMBEDDED
from envs.models.pool import ModelPool
from envs.models.source import ModelSpec, Source, check_device, check_dtype


def load_pool(
    names: Sequence[str | ModelSpec | Mapping[str, Any]],
    device: str = "cpu",
    dtype: str = "auto",
    rows: int = 8,
    capacity: int | None = None,
    verbose: bool = True,
    stop: Sequence[str] = (),
    gguf_cache: str | None = None,
    weights: str | None = None,
    compile: bool | None = None,
) -> ModelPool:
    """Load a pool of models, SLM first.

    Everything that can be known from configurations and tokenizers is checked before any weights are read: that the
    models exist, share a vocabulary, have attention that takes the cache, and that weights and caches fit in memory.

    Args:
        names: names or specs of at least two models.
        device: for every model whose spec leaves it open.
        dtype: for every model whose spec leaves it open.
        rows: sequences in flight that memory is planned for.
        capacity: longest sequence (prompt and response) the caches are planned for; the shortest limit of the models,
            at most 4,096, where None.
        verbose: print the memory plan.
        stop: texts; every token whose own text holds one of them ends a response too, as for `ModelPool`.
        gguf_cache: for every model whose spec leaves it open.
        weights: for every model whose spec leaves it open.
        compile: for every model whose spec leaves it open.

    Raises:
        ValueError: any of the above fails; the error names the model and the setting to change.
    """
    specs = [
        replace(
            s,
            gguf_cache=s.gguf_cache or gguf_cache,
            weights=s.weights or weights,
            compile=compile if s.compile is None else s.compile,
        )
        for s in map(_spec_of, names)
    ]
    if len(specs) < 2 and rows >= 1:
        raise ValueError(f"a pool needs at least two models, the SLM first; names holds {[s.name for s in specs]}")
    loaded, capacity, complete = _load(specs, device, dtype, rows, capacity, verbose)
    pool = ModelPool(loaded, rows=rows, capacity=capacity, stop=stop)
    pool.recipe = (pool_of, complete)
    _ALIVE[complete, rows, capacity, tuple(stop)] = pool
    return pool


def load_model(
    name: str | ModelSpec | Mapping[str, Any],
    device: str = "cpu",
    dtype: str = "auto",
    rows: int = 8,
    capacity: int | None = None,
    verbose: bool = True,
) -> LanguageModel:
    """Load one model, with the checks of `load_pool`, whose arguments these are.

    Raises:
        ValueError: it is not there or cannot be used, or does not fit in memory with a cache of `rows` sequences.
    """
    [model], _, _ = _load([_spec_of(name)], device, dtype, rows, capacity, verbose)
    return model


def _spec_of(name: str | ModelSpec | Mapping[str, Any]) -> ModelSpec:
    if isinstance(name, ModelSpec):
        return name
    return ModelSpec(name) if isinstance(name, str) else ModelSpec(**name)


def _load(
    specs: Sequence[ModelSpec], device: str, dtype: str, rows: int, capacity: int | None, verbose: bool
) -> tuple[list[LanguageModel], int, tuple[ModelSpec, ...]]:
    """Check and load models, each once; they, the capacity their caches were planned for, and the complete specs."""
    if rows < 1:
        raise ValueError(f"rows must be at least 1, is {rows}")
    specs = [replace(s, device=s.device or device, dtype=s.dtype or dtype) for s in specs]
    for spec in specs:
        check_device(spec)
    sources = [Source.find(spec) for spec in specs]
    for source in sources[1:]:
        check_same_vocabulary(sources[0], source)
    limits = {s.name: longest_sequence(s.config) for s in sources}
    shortest = min(limits, key=lambda name: limits[name])
    limit = limits[shortest]
    if capacity is None:
        capacity = min(limit, 4096)
    if not 1 <= capacity <= limit:
        raise ValueError(
            f"capacity must be in 1..{limit}, the positions of {shortest} or the window that it attends to; it is "
            f"{capacity}"
        )
    for source in sources:
        check_dtype(source)
    _plan_memory(sources, rows, capacity, verbose)
    loaded: dict[ModelSpec, LanguageModel] = {}
    for source in sources:
        if source.spec not in loaded:
            loaded[source.spec] = source.load()
    return [loaded[spec] for spec in specs], capacity, tuple(specs)


# Pools of this process by specs, rows and capacity: those somebody holds, and those that came from other processes.
_ALIVE: WeakValueDictionary[tuple[object, ...], ModelPool] = WeakValueDictionary()
_KEPT: dict[tuple[object, ...], ModelPool] = {}
_LOADING = threading.Lock()


def pool_of(
    specs: tuple[ModelSpec, ...],
    rows: int,
    capacity: int,
    fingerprints: tuple[str, ...] | None = None,
    stop: tuple[str, ...] = (),
) -> ModelPool:
    """The pool of such models, loaded unless this process has it: what a pool sent from another process arrives as.

    Args:
        specs: complete ones, with device and dtype, SLM first.
        rows: sequences in flight that memory is planned for.
        capacity: the longest sequence.
        fingerprints: of the models that were sent; any where None.
        stop: texts that end responses.

    Raises:
        ValueError: a model cannot be loaded here, or its weights have changed.
    """
    key = (specs, rows, capacity, stop)
    with _LOADING:
        pool = _KEPT.get(key) or _ALIVE.get(key)
        if pool is None or fingerprints not in (None, pool.fingerprints):
            pool = _KEPT[key] = load_pool(specs, rows=rows, capacity=capacity, verbose=False, stop=stop)
    if fingerprints not in (None, pool.fingerprints):
        raise ValueError(
            f"the weights of {', '.join(pool.names)} are others than those of the pool that was sent "
            f"({', '.join(pool.fingerprints)} for {', '.join(fingerprints or ())}); were they replaced since?"
        )
    return pool


def _plan_memory(sources: Sequence[Source], rows: int, capacity: int, verbose: bool) -> None:
    """Print what weights and caches will take, and refuse what cannot fit."""
    weights_of = {source.spec: source.weight_bytes() for source in sources}
    lines: list[str] = []
    needed: dict[str, int] = {}
    for source in sources:
        cache = source.cache_bytes(rows, capacity)
        # a model that stands twice in the pool is loaded once
        weights = weights_of.pop(source.spec, 0)
        place = source.spec.device_map or str(torch.device(str(source.spec.device)))
        needed[place] = needed.get(place, 0) + weights + cache
        lines.append(
            f"{source.name}: weights {gigabytes(weights)}, cache {gigabytes(cache)} "
            f"({rows} rows x {capacity} tokens), {source.precision} on {place}"
        )
    if verbose:
        print("\n".join(lines))
    check_places(needed, rows, capacity)


@cache
def embedded_pool() -> ModelPool:
    """The embedded pair on the CPU in float32; the same object at every call, since pools hold no sequences."""
    return pool_of(tuple(ModelSpec(name, dtype="float32", device="cpu") for name in EMBEDDED), rows=64, capacity=512)
