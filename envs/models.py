"""Language models that decode many sequences at once, and the pool of models a router chooses from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from torch import Tensor

from envs.attention import SLOT_ATTENTION, padded_tokens_per_pass, split_by_length
from envs.cache import IntArray, SlotCache
from envs.costs import ModelProfile
from envs.linear import use_onednn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from envs.loading import ModelSpec

# Architectures that hand their attention what the cache returns as it is, so that a pass needs no padding.
PACKED = ("gpt2", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")


class LanguageModel:
    """One Hugging Face causal language model, decoding rows of a slot cache.

    Args:
        name: what errors and reports call it.
        network: a decoder that takes a `Cache`, position ids and a 4-D boolean mask.
        tokenizer: its tokenizer.

    Raises:
        ValueError: the network's attention cannot take the slot cache.
    """

    def __init__(self, name: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        check_attention(name, network.config, network)
        self.name, self.network, self.tokenizer = name, network.eval().requires_grad_(False), tokenizer
        use_onednn(network)
        self.device: torch.device = network.get_input_embeddings().weight.device
        self.width: int = network.get_output_embeddings().weight.shape[1]
        self._packed = text_config(network.config).model_type in PACKED
        if self._packed:
            network.set_attn_implementation(SLOT_ATTENTION)
        self.pass_tokens = padded_tokens_per_pass(network, self.device.type)
        self._hidden: Tensor
        # The head's input is the last hidden state after the final norm, whatever the architecture calls it.
        network.get_output_embeddings().register_forward_pre_hook(self._keep_hidden)

    def _keep_hidden(self, module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._hidden = inputs[0]

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the output head; may exceed the tokenizer's vocabulary."""
        return int(self.network.get_output_embeddings().weight.shape[0])

    @cached_property
    def max_positions(self) -> int:
        """The longest sequence the model was made for."""
        return int(getattr(text_config(self.network.config), "max_position_embeddings", 2**31))

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Token ids that end a response, as `generate` would take them."""
        ends = self.network.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        if ends is None:
            raise ValueError(f"{self.name} has no end-of-sequence token; name one in its generation_config.json")
        return tuple(ends) if isinstance(ends, list) else (int(ends),)

    @cached_property
    def fingerprint(self) -> str:
        """Tells models with other weights or another precision apart: a digest of a few elements of every tensor."""
        digest = hashlib.sha256()
        for name, parameter in self.network.named_parameters():
            some = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64].float().cpu().numpy()
            digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + some.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def profile(self) -> ModelProfile:
        """The sizes that costs depend on."""
        config = text_config(self.network.config)
        head = self.network.get_output_embeddings().weight
        table = self.network.get_input_embeddings().weight
        tied = head.data_ptr() == table.data_ptr()
        total = sum(p.numel() for p in self.network.parameters())
        return ModelProfile(
            name=self.name,
            body_parameters=total - head.numel() - (0 if tied else table.numel()),
            head_parameters=head.numel(),
            bytes_per_parameter=head.element_size(),
            kv_bytes_per_token=kv_elements_per_token(config) * head.element_size(),
            attention_width=config.num_hidden_layers * config.num_attention_heads * head_size(config),
        )

    def new_cache(self, rows: int, capacity: int) -> SlotCache:
        """An empty cache for `rows` sequences of up to `capacity` tokens."""
        layers = text_config(self.network.config).num_hidden_layers
        token_bytes = self.profile.kv_bytes_per_token // layers
        return SlotCache(layers, rows, capacity, self.device, self._packed, token_bytes)

    @torch.inference_mode()
    def feed(
        self, cache: SlotCache, rows: IntArray, chunks: Sequence[IntArray], every_position: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Append a chunk of tokens to each row, all in one forward pass without padding.

        Models that cannot do that read padded chunks, those of very different lengths in separate passes where padding
        would cost more than a pass does.

        Args:
            cache: made by `new_cache`.
            rows: distinct rows, (n,).
            chunks: n arrays of at least one token id.
            every_position: return all positions of the chunks.

        Returns:
            Hidden states after the final norm (n, width) and logits (n, vocab) at each chunk's last token; with
            `every_position` (tokens, width) and (tokens, vocab), chunk after chunk.

        Raises:
            ValueError: a chunk is empty, or does not fit the cache.
        """
        counts = np.array([len(chunk) for chunk in chunks])
        if counts.min() < 1:
            raise ValueError(f"{self.name}: row {rows[counts.argmin()]} was fed an empty chunk")
        if self._packed:
            return self._packed_pass(cache, rows, chunks, counts, every_position)
        if every_position:
            hidden, logits = self._padded_pass(cache, rows, chunks, counts, keep=0)
            filled = torch.arange(hidden.shape[1]) >= hidden.shape[1] - torch.from_numpy(counts)[:, None]
            return hidden[filled.to(hidden.device)], logits[filled.to(logits.device)]
        groups = split_by_length(counts, self.pass_tokens)
        order = torch.from_numpy(np.argsort(np.concatenate(groups)))
        parts = [self._padded_pass(cache, rows[g], [chunks[i] for i in g], counts[g], keep=1) for g in groups]
        hidden, logits = (torch.cat(part)[order.to(part[0].device), 0] for part in zip(*parts, strict=True))
        return hidden, logits

    def _packed_pass(
        self, cache: SlotCache, rows: IntArray, chunks: Sequence[IntArray], counts: IntArray, every_position: bool
    ) -> tuple[Tensor, Tensor]:
        order = np.argsort(counts, kind="stable")
        positions = cache.pack(rows[order], counts[order])
        wanted = np.cumsum(counts[order])[np.argsort(order)] - 1
        if every_position:
            wanted = np.repeat(wanted - np.cumsum(counts) + 1, counts) + np.arange(counts.sum())
        # attention has its own mask; one of four dimensions keeps transformers from making another
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        keep = torch.from_numpy(wanted).to(self.device)
        ids = np.concatenate([chunks[i] for i in order])[None]
        hidden, logits = self._forward(cache, rows, counts, ids, positions, mask, keep)
        return hidden[0], logits[0]

    def _padded_pass(
        self, cache: SlotCache, rows: IntArray, chunks: Sequence[IntArray], counts: IntArray, keep: int
    ) -> tuple[Tensor, Tensor]:
        # Right-aligned: the last token of every chunk stands in the last column, whatever its length.
        width = int(counts.max())
        ids = np.zeros((len(rows), width), dtype=np.int64)
        for row, chunk in zip(ids, chunks, strict=True):
            row[width - len(chunk) :] = chunk
        positions, visible = cache.pad(rows, counts, width)
        return self._forward(cache, rows, counts, ids, positions, visible, keep)

    def _forward(
        self, cache: SlotCache, rows: IntArray, counts: IntArray, ids: IntArray, positions: Tensor, mask: Tensor,
        keep: int | Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        output = self.network(
            input_ids=torch.from_numpy(ids).to(self.device),
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        cache.lengths[rows] += counts
        hidden, self._hidden = self._hidden, self._hidden[:0]
        return hidden, output.logits


def text_config(config: Any) -> Any:
    """The configuration of the text decoder inside `config`."""
    return config.get_text_config(decoder=True)


def head_size(config: Any) -> int:
    """Elements of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_elements_per_token(config: Any) -> int:
    """Elements one token takes in the key-value cache, all layers."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(kv_heads) * head_size(config)


def check_attention(name: str, config: Any, network: Any) -> None:
    """Refuse a model whose attention cannot take the slot cache.

    Args:
        name: the model's name, for the error.
        config: its configuration.
        network: the model or its class.

    Raises:
        ValueError: recurrent state, windowed attention, or no attention that takes a boolean mask.
    """
    config = text_config(config)
    if getattr(network, "_is_stateful", False) or not hasattr(config, "num_attention_heads"):
        raise ValueError(
            f"{name} keeps a recurrent state, which a key-value cache cannot fork or rewind; choose another model"
        )
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if kinds != {"full_attention"} or (windowed and not getattr(config, "layer_types", None)):
        found = ", ".join(sorted(kinds - {"full_attention"})) or "sliding-window attention"
        raise ValueError(
            f"{name} uses {found}, which the cache does not support; choose a model with full attention in every layer"
        )
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise ValueError(
            f"{name} turns its positions by the longest sequence in a pass (rope_type {rope}), so that rows would "
            "depend on each other; choose a model with another rope_type"
        )
    if not getattr(network, "_supports_sdpa", False):
        raise ValueError(f"{name} has no attention that takes a 4-D boolean mask (sdpa); choose another model")


@dataclass
class ModelPool:
    """The models a router chooses from: the SLM first, then the others, cheapest first; one vocabulary.

    Args:
        models: at least two.
        rows: how many sequences in flight memory was planned for; None where it was not.
        capacity: the longest sequence (prompt and response) a session holds; the models' own limit where None.

    Raises:
        ValueError: fewer than two models, or vocabularies or special tokens that differ.
    """

    models: Sequence[LanguageModel]
    rows: int | None = None
    capacity: int | None = None
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.names = [model.name for model in self.models]
        if len(self.models) < 2:
            raise ValueError(
                f"a pool needs at least two models, the SLM first; it has {', '.join(self.names) or 'none'}"
            )
        for other in self.models[1:]:
            check_same_vocabulary(self.slm, other)

    @staticmethod
    def load(
        names: Sequence[str | ModelSpec],
        device: str = "cpu",
        dtype: str = "auto",
        rows: int = 8,
        capacity: int | None = None,
        verbose: bool = True,
    ) -> ModelPool:
        """Load a pool; see `envs.loading.load_pool`."""
        from envs.loading import load_pool

        return load_pool(names, device=device, dtype=dtype, rows=rows, capacity=capacity, verbose=verbose)

    def __deepcopy__(self, memo: object) -> ModelPool:
        """The pool itself: it holds no sequences, and Gymnasium copies the arguments of environments."""
        return self

    def __len__(self) -> int:
        return len(self.models)

    @property
    def slm(self) -> LanguageModel:
        """The small model, whose hidden state routers read."""
        return self.models[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer all models share."""
        return self.slm.tokenizer

    @cached_property
    def profiles(self) -> list[ModelProfile]:
        """Sizes of the models, SLM first."""
        return [model.profile for model in self.models]

    @cached_property
    def vocab_size(self) -> int:
        """Tokens every model can write: heads may be padded to different sizes."""
        return min(model.vocab_size for model in self.models)

    @cached_property
    def end_tokens(self) -> IntArray:
        """Token ids that end a response, whoever writes it: those of every model of the pool."""
        return np.unique(np.concatenate([np.array(model.end_tokens) for model in self.models]))

    @cached_property
    def end_token(self) -> int:
        """The token that ends a reference: the tokenizer's own, where it is one that ends responses."""
        own = self.tokenizer.eos_token_id
        return int(own if own in self.end_tokens else self.end_tokens[0])

    @cached_property
    def max_positions(self) -> int:
        """The longest sequence every model can hold."""
        return min(model.max_positions for model in self.models)

    def new_caches(self, rows: int, capacity: int) -> list[SlotCache]:
        """A cache for each model, for `rows` sequences of up to `capacity` tokens.

        Raises:
            ValueError: they do not fit the memory that is free.
        """
        needed: dict[torch.device, int] = {}
        for model in self.models:
            needed[model.device] = needed.get(model.device, 0) + model.profile.kv_bytes_per_token * rows * (
                capacity + 1
            )
        for device, size in needed.items():
            check_fits(str(device), size, rows, capacity)
        return [model.new_cache(rows, capacity) for model in self.models]

    def greedy(self, model: int, logits: Tensor) -> IntArray:
        """The most likely tokens under logits (..., vocab) of model number `model`, as (...).

        Raises:
            FloatingPointError: the logits hold NaN.
        """
        best, tokens = logits.max(-1)
        # the maximum of logits that hold a NaN is NaN
        if bool(best.isnan().any()):
            name = self.names[model]
            raise FloatingPointError(f"the logits of {name} are NaN; load it with another dtype or check its weights")
        return np.asarray(tokens.cpu().numpy())

    def encode(self, text: str, special: bool = True) -> IntArray:
        """Token ids of `text`, (n,); `special` adds what the tokenizer puts around a prompt."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=special), dtype=np.int64)

    def encode_response(self, text: str) -> IntArray:
        """Token ids of a whole response, (n,), its end included."""
        return np.append(self.encode(text, special=False), self.end_token)

    def decode(self, tokens: IntArray) -> str:
        """The text of `tokens`, special tokens left out."""
        return str(self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


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


def gigabytes(size: int) -> str:
    """`size` bytes for people: 1.50 GB, or 12.0 MB below a tenth of one."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def check_same_vocabulary(slm: LanguageModel, llm: LanguageModel) -> None:
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
