"""A language model that decodes many sequences at once."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from envs.arrays import IntArray
from envs.costs import ModelProfile
from envs.models.attention import (
    SLOT_ATTENTION,
    padded_tokens_per_pass,
    register_slot_attention,
    split_by_length,
)
from envs.models.checks import caps_scores, check_attention, longest_sequence, text_config
from envs.models.linear import use_onednn
from envs.models.profile import own_weights, profile_of, stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import Cache

    from envs.models.compiled import CompiledPass
    from envs.models.kv_cache import SlotCache


# Architectures that hand their attention what the cache returns as it is, so that a pass needs no padding.
PACKED = ("gpt2", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3")


class _Pass(threading.local):
    """What a pass leaves behind, for the thread that makes it: threads may share a model."""

    wanted: bool = False
    hidden: Tensor | None = None


_PASS = _Pass()


def _keep_hidden(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """Keep the head's input: the last hidden state after the final norm, whatever the architecture calls it."""
    if _PASS.wanted:
        _PASS.hidden = inputs[0]


class LanguageModel:
    """One Hugging Face causal language model, decoding rows of a slot cache.

    It holds no sequences: threads may share it, each with caches of its own.

    Args:
        name: what errors and reports call it.
        network: a decoder that takes a `Cache`, position ids and a 4-D boolean mask.
        tokenizer: its tokenizer.
        compiled: passes that append one token to each row run as a graph, see `envs.models.compiled`.

    Attributes:
        tokens_read: by all passes since it was loaded, those that were written and read back included.

    Raises:
        ValueError: the network's attention cannot take the slot cache.
    """

    def __init__(
        self, name: str, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, compiled: bool = False
    ) -> None:
        check_attention(name, network.config, network)
        self.name, self.network, self.tokenizer = name, network.eval().requires_grad_(False), tokenizer
        self.tokens_read, self._counting = 0, threading.Lock()
        use_onednn(network)
        self.device: torch.device = network.get_input_embeddings().weight.device
        self.width: int = network.get_output_embeddings().weight.shape[1]
        self._packed = text_config(network.config).model_type in PACKED
        if self._packed:
            register_slot_attention()
            network.set_attn_implementation(SLOT_ATTENTION)
        self._capped = caps_scores(network.config)
        if self._capped:
            network.set_attn_implementation("eager")
        self.pass_tokens = padded_tokens_per_pass(network, self.device.type)
        network.get_output_embeddings().register_forward_pre_hook(_keep_hidden)
        self._compiled: CompiledPass | None = None
        if compiled:
            from envs.models.compiled import CompiledPass

            self._compiled = CompiledPass(self._run, self.device)

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the output head; may exceed the tokenizer's vocabulary."""
        return int(self.network.get_output_embeddings().weight.shape[0])

    @cached_property
    def max_positions(self) -> int:
        """The longest sequence the model takes; see `longest_sequence`."""
        return longest_sequence(self.network.config)

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
        """Tells models with other weights or another precision apart: a digest of a few elements of every tensor.

        These are the parameters, and matrices in buffers, where quantised models keep their weights.
        """
        digest = hashlib.sha256()
        tensors = dict(self.network.named_parameters())
        for path, module in self.network.named_modules():
            for name, tensor in own_weights(module):
                if name in module._buffers and tensor.dim() > 1:
                    tensors[f"{path}.{name}"] = tensor
        parts = [(name, part) for name, tensor in tensors.items() for part in stored(tensor)]
        for name, tensor in parts:
            some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)][:64].float().cpu().numpy()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + some.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def profile(self) -> ModelProfile:
        """The sizes that costs depend on, as `envs.models.profile` counts them."""
        return profile_of(self.name, self.network)

    def new_cache(self, rows: int, capacity: int) -> SlotCache:
        """An empty cache for `rows` sequences of up to `capacity` tokens."""
        from envs.models.kv_cache import SlotCache

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
        with self._counting:
            self.tokens_read += int(counts.sum())
        if self._compiled is not None and self._compiled.takes(cache, counts):
            return self._compiled(cache, rows, np.concatenate(chunks))
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
        found = self._run(torch.from_numpy(ids).to(self.device), positions, mask, cache, keep)
        cache.lengths[rows] += counts
        return found

    def _run(
        self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Cache, keep: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        if self._capped:  # its attention adds the mask
            mask = torch.where(mask, torch.zeros_like(self._masked), self._masked)
        _PASS.wanted = True
        try:
            output = self.network(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=keep,
            )
            hidden = _PASS.hidden
        finally:
            _PASS.wanted, _PASS.hidden = False, None
        assert hidden is not None, f"{self.name} did not run its head"
        return hidden, output.logits

    @cached_property
    def _masked(self) -> Tensor:
        """What attention that adds its mask adds where nothing is to be seen."""
        return torch.tensor(torch.finfo(self.network.dtype).min, dtype=self.network.dtype, device=self.device)
