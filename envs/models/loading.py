"""Loading models: where a name leads, what it will take in memory, and what is refused before anything is loaded."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from envs.models.checks import (
    caps_scores,
    check_attention,
    check_places,
    check_same_vocabulary,
    gigabytes,
    head_size,
    longest_sequence,
    text_config,
)
from envs.models.embedded import EMBEDDED, EMBEDDED_MODELS, embedded_folder
from envs.models.gguf_cache import conversion_of, is_whole, keep_conversion
from envs.models.hub import why_unreachable
from envs.models.language_model import LanguageModel
from envs.models.pool import ModelPool
from envs.models.profile import cached_token

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CONVERT = (
    "weights must be safetensors or GGUF; where you trust the model, convert it with transformers: "
    "AutoModelForCausalLM.from_pretrained(name).save_pretrained(folder), likewise AutoTokenizer"
)


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how to load it. None leaves a setting to the pool.

    Args:
        name: `embedded/slm`, `embedded/llm`, a local folder, a local GGUF file, or a Hugging Face hub id.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` (as stored).
        device: `cpu`, `cuda`, `cuda:1`, ...
        device_map: passed to transformers, to spread a large model over devices (needs accelerate).
        revision: branch, tag or commit of a hub id.
        layers: keep only the first layers of the model; all where None.
        trust_remote_code: run code from the hub; never on unless you set it.
        gguf_cache: a folder where a GGUF file is kept as ordinary weights once it was read; nothing is kept where None.
    """

    name: str
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    layers: int | None = None
    trust_remote_code: bool = False
    gguf_cache: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "auto", *DTYPES):
            raise ValueError(f"{self.name}: unknown dtype {self.dtype!r}; choose one of auto, {', '.join(DTYPES)}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"{self.name}: layers must be at least 1, is {self.layers}")


def load_pool(
    names: Sequence[str | ModelSpec | Mapping[str, Any]],
    device: str = "cpu",
    dtype: str = "auto",
    rows: int = 8,
    capacity: int | None = None,
    verbose: bool = True,
    stop: Sequence[str] = (),
    gguf_cache: str | None = None,
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

    Raises:
        ValueError: any of the above fails; the error names the model and the setting to change.
    """
    specs = [replace(s, gguf_cache=s.gguf_cache or gguf_cache) for s in map(_spec_of, names)]
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
        _check_device(spec)
    sources = [_Source.find(spec) for spec in specs]
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
        _check_dtype(source)
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


@dataclass(frozen=True)
class _Source:
    """A model found but not loaded."""

    spec: ModelSpec
    location: str
    options: dict[str, Any]
    config: Any
    tokenizer: Any
    conversion: Path | None = None
    """The folder that a GGUF file is to be kept in as ordinary weights."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def dtype(self) -> torch.dtype:
        if self.spec.dtype != "auto":
            return DTYPES[str(self.spec.dtype)]
        stored = getattr(self.config, "dtype", None)
        return stored if isinstance(stored, torch.dtype) else torch.float32

    @classmethod
    def find(cls, spec: ModelSpec) -> _Source:
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

        location = spec.name
        options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
        path, conversion = Path(spec.name), None
        if spec.name.startswith("embedded/"):
            location = str(embedded_folder(spec.name))
        elif path.suffix == ".gguf":
            if not path.is_file():
                raise ValueError(f"unknown model {spec.name!r}: there is no such GGUF file")
            from transformers.utils import is_accelerate_available, is_gguf_available

            if not (is_gguf_available() and is_accelerate_available()):
                raise ValueError(f"{spec.name}: GGUF files need two packages; pip install gguf accelerate")
            if spec.gguf_cache:
                conversion = conversion_of(path, Path(spec.gguf_cache), str(spec.dtype))
            if conversion is not None and is_whole(conversion):
                location = str(conversion)
            else:
                location, options["gguf_file"] = str(path.parent), path.name
        elif not path.is_dir() and (path.is_absolute() or spec.name.startswith(".") or spec.name.count("/") > 1):
            raise ValueError(f"unknown model {spec.name!r}: there is no such folder")
        unreachable = None
        if Path(location).is_dir():
            _check_safetensors(spec.name, Path(location), options)
        else:
            if spec.revision:
                options["revision"] = spec.revision
            unreachable = why_unreachable()
            if unreachable:
                # what was downloaded before still loads
                options["local_files_only"] = True
        try:
            config = AutoConfig.from_pretrained(location, **options)
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
        except (OSError, ValueError, ImportError) as error:
            reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            if unreachable:
                reason = f"{unreachable}; nor was it downloaded before: check the network, or name a local folder"
            raise ValueError(
                f"unknown model {spec.name!r}: neither an embedded model ({', '.join(EMBEDDED_MODELS)}), nor a local "
                f"folder or GGUF file, nor a hub id that can be reached ({reason})"
            ) from error
        if spec.layers is not None:
            text = text_config(config)
            if spec.layers > text.num_hidden_layers:
                raise ValueError(f"{spec.name} has {text.num_hidden_layers} layers; layers={spec.layers} asks for more")
            text.num_hidden_layers = spec.layers
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: spec.layers]
        # encoders, and decoders that need an encoder, stand in the causal mapping too
        encoder = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.is_encoder_decoder
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not encoder:
            check_attention(spec.name, config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
        elif not spec.trust_remote_code:
            raise ValueError(f"{spec.name} ({config.model_type}) is not a causal language model; choose a decoder")
        return cls(spec, location, options, config, tokenizer, conversion)

    @cached_property
    def _outline(self) -> Any:
        """The network without memory."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=self.spec.trust_remote_code)
        # of the ways to multiply by experts, the one that works without memory in every precision
        network.set_experts_implementation("batched_mm")
        return network.eval()

    def weight_bytes(self) -> int:
        return int(sum(p.numel() for p in self._outline.parameters()) * self.dtype.itemsize)

    def cache_bytes(self, rows: int, capacity: int) -> int:
        try:
            elements = sum(store.numel() for store in cached_token(self._outline))
        except (RuntimeError, ValueError) as error:
            config = text_config(self.config)
            elements = 2 * config.num_hidden_layers * config.num_attention_heads * head_size(config)
            warnings.warn(
                f"{self.name}: what its cache keeps of a token cannot be told before it is loaded ({error}); memory is "
                "planned for keys and values of all its heads",
                stacklevel=2,
            )
        return int(elements * self.dtype.itemsize * rows * (capacity + 1))

    def load(self) -> LanguageModel:
        from transformers import AutoModelForCausalLM

        placed = {"device_map": self.spec.device_map} if self.spec.device_map else {}
        # other checkpoints hold code, which reading them would run
        safely = {} if "gguf_file" in self.options else {"use_safetensors": True}
        try:
            network = AutoModelForCausalLM.from_pretrained(
                self.location,
                config=self.config,
                dtype=self.dtype,
                attn_implementation="eager" if caps_scores(self.config) else "sdpa",
                **placed,
                **safely,
                **self.options,
            )
        except OSError as error:
            reason = next(iter(str(error).splitlines()), "")
            raise ValueError(f"{self.name}: its weights cannot be read ({reason}); {CONVERT}") from error
        if self.conversion is not None and "gguf_file" in self.options and self.spec.layers is None:
            keep_conversion(network, self.tokenizer, Path(self.spec.name), self.conversion)
        if not placed:
            network = network.to(self.spec.device)
        return LanguageModel(self.name, network, self.tokenizer)


def _check_safetensors(name: str, folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse a folder that holds weights in PyTorch's own format only."""
    if "gguf_file" not in options and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name}: its weights are .bin files, which run code when they are read; {CONVERT}")


def _check_device(spec: ModelSpec) -> None:
    try:
        device = torch.device(str(spec.device))
    except RuntimeError as error:
        raise ValueError(f"{spec.name}: unknown device {spec.device!r}; say cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"{spec.name}: device {spec.device} is not there ({torch.cuda.device_count()} CUDA devices); say device=cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"{spec.name}: device mps is not there; say device=cpu")
    from transformers.utils import is_accelerate_available

    if spec.device_map and not is_accelerate_available():
        raise ValueError(f"{spec.name}: device_map needs the package accelerate; install it, or say device_map=null")


def _check_dtype(source: _Source) -> None:
    device = torch.device(str(source.spec.device))
    if device.type == "cuda" and source.dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{source.name}: {source.spec.device} lacks bfloat16; say dtype=float16")


def _plan_memory(sources: Sequence[_Source], rows: int, capacity: int, verbose: bool) -> None:
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
            f"({rows} rows x {capacity} tokens), {str(source.dtype).removeprefix('torch.')} on {place}"
        )
    if verbose:
        print("\n".join(lines))
    check_places(needed, rows, capacity)


@cache
def embedded_pool() -> ModelPool:
    """The embedded pair on the CPU in float32; the same object at every call, since pools hold no sequences."""
    return pool_of(tuple(ModelSpec(name, dtype="float32", device="cpu") for name in EMBEDDED), rows=64, capacity=512)
