"""A model before it is loaded: where its name leads, what it will take in memory, and what is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from envs.models.checks import caps_scores, check_attention, head_size, text_config
from envs.models.gguf_cache import conversion_of, is_whole, keep_conversion
from envs.models.language_model import LanguageModel
from envs.models.linear import NO_LAYERS, can_quantise, quantise, quantised_saving
from envs.models.places import EMBEDDED_MODELS, embedded_folder, why_unreachable
from envs.models.profile import cached_token

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# By how weights are kept, the precisions that their products take.
WEIGHTS = {"int8": (torch.bfloat16, torch.float16), "int4": (torch.bfloat16,)}

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
        weights: `int8` or `int4` keeps the matrices of linear layers but the head as integers of so many bits, see
            `envs.models.linear.quantise`, and multiplies them as they are; as `dtype` says where None.
        compile: passes that append one token to each row run as one graph, by `torch.compile`, see
            `envs.models.compiled`; they do not where None.
    """

    name: str
    dtype: str | None = None
    device: str | None = None
    device_map: str | None = None
    revision: str | None = None
    layers: int | None = None
    trust_remote_code: bool = False
    gguf_cache: str | None = None
    weights: str | None = None
    compile: bool | None = None

    def __post_init__(self) -> None:
        if self.dtype not in (None, "auto", *DTYPES):
            raise ValueError(f"{self.name}: unknown dtype {self.dtype!r}; choose one of auto, {', '.join(DTYPES)}")
        if self.layers is not None and self.layers < 1:
            raise ValueError(f"{self.name}: layers must be at least 1, is {self.layers}")
        if self.weights not in (None, *WEIGHTS):
            raise ValueError(
                f"{self.name}: unknown weights {self.weights!r}; choose one of {', '.join(WEIGHTS)}, or null for those "
                "of dtype"
            )


@dataclass(frozen=True)
class Source:
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

    @property
    def precision(self) -> str:
        """Of weights and activations, in words."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.spec.weights} weights in {dtype}" if self.spec.weights else dtype

    @classmethod
    def find(cls, spec: ModelSpec) -> Source:
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

    @property
    def saved_bytes(self) -> int:
        """Bytes that weights of integers save; 0 where there are none."""
        return quantised_saving(self._outline, self.spec.weights, self.dtype) if self.spec.weights else 0

    def weight_bytes(self) -> int:
        return int(sum(p.numel() for p in self._outline.parameters()) * self.dtype.itemsize) - self.saved_bytes

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
        if self.spec.weights:
            quantise(network, self.spec.weights)
        return LanguageModel(self.name, network, self.tokenizer, compiled=bool(self.spec.compile))


def _check_safetensors(name: str, folder: Path, options: Mapping[str, Any]) -> None:
    """Refuse a folder that holds weights in PyTorch's own format only."""
    if "gguf_file" not in options and any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{name}: its weights are .bin files, which run code when they are read; {CONVERT}")


def check_device(spec: ModelSpec) -> None:
    """Refuse a device that is not there, and what would need a package that is not.

    Raises:
        ValueError: the error names the model and the setting to change.
    """
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
    alone = {"weights": spec.weights, "compile": spec.compile and "true"}
    for setting, value in alone.items():
        if spec.device_map and value:
            raise ValueError(
                f"{spec.name}: {setting}={value} is for models on one device; say device, or {setting}=null"
            )
    if spec.weights and not can_quantise():
        raise ValueError(
            f"{spec.name}: weights={spec.weights} needs the package optimum-quanto; pip install 'citer-gym[quanto]', "
            "or say weights=null"
        )
    if spec.compile and device.type == "cpu":
        _check_compiler(spec.name)


def _check_compiler(name: str) -> None:
    """Refuse a CPU without a compiler, which graphs are made with."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            f"{name}: compile=true needs a C++ compiler on the CPU, and none is found; install g++, or say compile=null"
        ) from error


def check_dtype(source: Source) -> None:
    """Refuse a precision that the device, or weights of integers, cannot be multiplied in.

    Raises:
        ValueError: the error names the model and the setting to change.
    """
    device = torch.device(str(source.spec.device))
    if device.type == "cuda" and source.dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        raise ValueError(f"{source.name}: {source.spec.device} lacks bfloat16; say dtype=float16")
    weights = source.spec.weights
    if weights and source.dtype not in WEIGHTS[weights]:
        raise ValueError(f"{source.name}: weights={weights} are not multiplied with {source.dtype}; say dtype=bfloat16")
    if weights and source.saved_bytes <= 0:
        raise ValueError(f"{source.name} {NO_LAYERS.format(weights=weights)}")
