"""Attention that reads scattered rows of a slot cache where they lie.

Rows that step together are seldom neighbours in the cache. Copying them together moves every key and value once more
than attention itself does; attending row by row moves none, at the price of a call per row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SLOT_ATTENTION = "slot_sdpa"
# Rows are attended one by one where copying a row's keys and values of one layer would move more bytes than this: about
# what a call costs on a CPU. An accelerator's memory is so much faster than its launches that it always copies.
COPY_BYTES = {"cpu": 64 * 1024}

Slot = tuple[int, int, int]
"""A row of the cache, the tokens it holds, and how many of them are new."""


def worth_reading_in_place(store: Tensor, length: int) -> bool:
    """Whether rows of a store (rows, columns, kv_heads, head_dim) had better be read where they lie."""
    row_bytes = 2 * length * store.shape[2] * store.shape[3] * store.element_size()
    limit = COPY_BYTES.get(store.device.type)
    return limit is not None and row_bytes > limit


def in_place(store: Tensor, slots: list[Slot]) -> Tensor:
    """A whole store, (rows, kv_heads, columns, head_dim), marked with the rows that attention is to read."""
    marked = store.transpose(1, 2)
    marked.slots = slots  # type: ignore[attr-defined]
    return marked


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention; row by row where `key` is a marked store, as transformers does it elsewhere.

    Args:
        module: the attention layer.
        query: right-aligned queries, (n, heads, width, head_dim).
        key: (n, kv_heads, length, head_dim), or a marked store.
        value: as `key`.
        attention_mask: which columns each query may see, (n, 1, width, longest).
        dropout: unused: models are in evaluation mode.
        scaling: of the products.
        kwargs: passed on.

    Returns:
        (n, width, heads, head_dim), and None for the weights.
    """
    slots: list[Slot] | None = getattr(key, "slots", None)
    if slots is None:
        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    assert attention_mask is not None
    heads, width = query.shape[1], query.shape[2]
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    result = torch.zeros(query.shape[0], width, heads, value.shape[3], dtype=query.dtype, device=query.device)
    for i, (row, length, new) in enumerate(slots):
        q = query[i : i + 1, :, width - new :]
        k, v = key[row : row + 1, :, :length], value[row : row + 1, :, :length]
        mask = None if new in (1, length) else attention_mask[i : i + 1, :, width - new :, :length]
        if groups > 1 and new == 1:
            q = q.reshape(1, kv_heads, groups, q.shape[3])
        elif groups > 1:
            k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scaling, is_causal=new > 1 and mask is None
        )
        result[i, width - new :] = attended.reshape(heads, new, -1).transpose(0, 1)
    return result, None


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
