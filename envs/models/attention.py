"""Attention over rows of a slot cache, each with new tokens of its own number.

A pass holds the new tokens of all its rows one after the other, without padding: all layers but attention work on
single tokens. Attention goes group by group. Rows of one group share a call; those close together in the cache are read
where they lie, others are copied together, or form a group each where copying would take longer than calls do.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from envs.arrays import IntArray


SLOT_ATTENTION = "slot_sdpa"
# Rows are attended one by one where copying a row's keys and values of one layer would move more bytes than this: about
# what a call costs on a CPU. An accelerator's memory is so much faster than its launches that it always copies.
COPY_BYTES = {"cpu": 256 * 1024}
# Padded queries of one layer that cost as much as one more call.
CALL_QUERIES = 32
# Rows are read as a view where they are at least 1 in so many of the rows from the first to the last of them.
SPARSE = 1.5
# What a forward pass costs, roughly: seconds of Python and launches, bytes of weights read a second, and operations a
# second. Only how ragged chunks are split into padded passes depends on it.
MACHINES = {"cpu": (1e-3, 2e10, 1e11), "cuda": (1e-3, 1e12, 1e14)}


@dataclass(frozen=True)
class Group:
    """Rows of a pass that attend in one call.

    Attributes:
        rows: of the cache: a slice where they lie close together, with rows between them, else their indices, (n,).
        count: of these rows, n.
        tokens: where their new tokens stand in the pass.
        width: new tokens of the row that has most.
        length: columns of the cache that are read.
        mask: columns each query may see, (n, 1, width, length); None for all of them, or with `causal`.
        causal: query i sees the columns up to i.
        ragged: row and column in (n, width) of each new token; None where they fill it in order.
    """

    rows: slice | Tensor
    count: int
    tokens: slice
    width: int
    length: int
    mask: Tensor | None
    causal: bool
    ragged: tuple[Tensor, Tensor] | None


def plan(rows: IntArray, before: IntArray, counts: IntArray, one_by_one: bool, device: torch.device) -> list[Group]:
    """Groups in which rows attend.

    Args:
        rows: of the cache, (n,), ordered by `counts`.
        before: tokens each row holds already, (n,).
        counts: new tokens of each, (n,).
        one_by_one: rows that lie apart are read where they lie, not copied together.
        device: where masks and indices lie.
    """
    ends = np.cumsum(counts).tolist()
    groups = []
    for part in split_by_length(counts, 0 if one_by_one else CALL_QUERIES):
        for p in part[:, None] if one_by_one and not close_together(rows[part]) else [part]:
            tokens = slice(ends[p[0]] - int(counts[p[0]]), ends[p[-1]])
            make = _single if len(p) == 1 else _group
            groups.append(make(rows[p], before[p], counts[p], tokens, device))
    return groups


def close_together(rows: IntArray) -> bool:
    """Whether a view from the first to the last of `rows` holds few others."""
    return bool(np.ptp(rows) + 1 <= SPARSE * len(rows))


def _single(rows: IntArray, before: IntArray, counts: IntArray, tokens: slice, device: torch.device) -> Group:
    row, width, length = int(rows[0]), int(counts[0]), int(before[0] + counts[0])
    mask = None
    if 1 < width < length:
        mask = torch.ones(1, 1, width, length, dtype=torch.bool, device=device).tril_(length - width)
    return Group(slice(row, row + 1), 1, tokens, width, length, mask, width == length > 1, None)


def _group(rows: IntArray, before: IntArray, counts: IntArray, tokens: slice, device: torch.device) -> Group:
    """Several rows, each with new tokens of its own number, in one padded call.

    Example: rows 3 and 5 of the cache hold 5 and 2 tokens (`before`) and get 1 and 2 (`counts`). They are read as the
    view 3..5, in which they stand at the offsets 0 and 2, with row 4 between them: `count` is 3, `width` 2, `length` 6.
    The queries, (3, 2), see columns up to [[5, 5], [0, 0], [2, 3]]: padding sees what the row's last token sees, row 4
    one column. Of what comes out, `ragged` keeps rows [0, 2, 2] at columns [0, 0, 1]: the 3 new tokens in their order.
    """
    read, offsets, count = _where(rows, device)
    width, length = int(counts[-1]), int((before + counts).max())
    alike = bool((before == before[0]).all() and counts[0] == width)
    causal = alike and length == width > 1
    mask = ragged = None
    if not causal and not (alike and width == 1):
        mask = _visible(offsets, before, counts, (count, width, length)).to(device)
    in_order = bool((np.diff(offsets) == 1).all())
    if counts[0] < width or count > len(rows) or not in_order:
        owner, column = np.nonzero(np.arange(width) < counts[:, None])
        ragged = (torch.from_numpy(offsets[owner]).to(device), torch.from_numpy(column).to(device))
    return Group(read, count, tokens, width, length, mask, causal, ragged)


def _where(rows: IntArray, device: torch.device) -> tuple[slice | Tensor, IntArray, int]:
    """What to read of the cache: a view where `rows`, (n,), are close together; their offsets in it, and its rows."""
    if close_together(rows):
        first, span = int(rows.min()), int(np.ptp(rows)) + 1
        return slice(first, first + span), rows - first, span
    return torch.from_numpy(rows).to(device), np.arange(len(rows)), len(rows)


def _visible(offsets: IntArray, before: IntArray, counts: IntArray, shape: tuple[int, int, int]) -> Tensor:
    """The mask of a group, (count, 1, width, length); rows between its own see one column, and are dropped."""
    count, width, length = shape
    last = np.zeros((count, width), dtype=np.int64)  # the last column each query sees
    last[offsets] = before[:, None] + np.minimum(np.arange(width), counts[:, None] - 1)
    return torch.from_numpy(np.arange(length) <= last[:, :, None])[:, None]


def split_by_length(counts: IntArray, pass_tokens: int) -> list[IntArray]:
    """Partition chunks so that the padding saved outweighs the parts added.

    Args:
        counts: chunk lengths, (n,).
        pass_tokens: padded tokens that one more part is worth.

    Returns:
        Index arrays that together hold each of 0..n-1 once, each ascending.
    """
    order = np.argsort(counts, kind="stable")
    ordered = counts[order]
    n = len(counts)
    cuts = np.arange(1, n)
    saved = cuts * (ordered[-1] - ordered[:-1])
    if n == 1 or saved.max() <= pass_tokens:
        return [np.arange(n)]
    cut = int(saved.argmax()) + 1
    parts = (np.sort(order[:cut]), np.sort(order[cut:]))
    return [part[group] for part in parts for group in split_by_length(counts[part], pass_tokens)]


def padded_tokens_per_pass(network: PreTrainedModel, device_type: str) -> int:
    """How many padded tokens cost as much as one more forward pass."""
    host_seconds, bytes_per_second, flops = MACHINES.get(device_type, MACHINES["cuda"])
    parameters = sum(p.numel() for p in network.parameters())
    stored = sum(p.numel() * p.element_size() for p in network.parameters())
    return int((host_seconds + stored / bytes_per_second) / (2 * parameters / flops))


def with_groups(store: Tensor, groups: list[Group]) -> Tensor:
    """A whole store, (rows, kv_heads, columns, head_dim), marked with what of it attention is to read."""
    marked = store.transpose(1, 2)
    marked.groups = groups  # type: ignore[attr-defined]
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
    """Scaled dot-product attention; group by group where `key` is a marked store, as transformers does it elsewhere.

    Args:
        module: the attention layer.
        query: the queries of all new tokens of a pass, (1, heads, tokens, head_dim).
        key: a marked store; or (n, kv_heads, length, head_dim).
        value: as `key`.
        attention_mask: unused with a marked store.
        dropout: unused: models are in evaluation mode.
        scaling: of the products.
        kwargs: passed on.

    Returns:
        (1, tokens, heads, head_dim), and None for the weights.
    """
    groups: list[Group] | None = getattr(key, "groups", None)
    if groups is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output
    queries = query[0].transpose(0, 1)
    if len(groups) == 1:
        return _attend(queries, key, value, groups[0], scaling)[None], None
    attended = torch.empty(*queries.shape[:2], value.shape[3], dtype=query.dtype, device=query.device)
    for group in groups:
        attended[group.tokens] = _attend(queries[group.tokens], key, value, group, scaling)
    return attended[None], None


def _attend(queries: Tensor, key: Tensor, value: Tensor, group: Group, scaling: float | None) -> Tensor:
    """Attention of one group: queries (tokens, heads, head_dim) to what (tokens, heads, head_dim) comes out."""
    tokens, heads, size = queries.shape
    rows = group.rows if isinstance(group.rows, slice) else group.rows.to(key.device)
    k, v = key[rows, :, : group.length], value[rows, :, : group.length]
    if group.ragged is None and group.count == tokens and group.mask is None and k.shape[1] == heads:
        return torch.nn.functional.scaled_dot_product_attention(queries[:, :, None], k, v, scale=scaling)[:, :, 0]
    if group.ragged is None:
        q = queries.reshape(-1, group.width, heads, size)
    else:
        row, column = (index.to(queries.device) for index in group.ragged)
        q = queries.new_zeros(group.count, group.width, heads, size)
        q[row, column] = queries
    q = q.transpose(1, 2)
    mask, causal = group.mask, group.causal
    mask = None if mask is None else mask.to(queries.device)
    shared = heads // k.shape[1]
    if shared > 1:
        # heads that share keys attend as if they were more queries, so that no key is copied
        if causal:
            mask = torch.ones(group.width, group.length, dtype=torch.bool, device=q.device).tril()[None, None]
            causal = False
        mask = None if mask is None else mask.repeat(1, 1, shared, 1)
        q = q.reshape(len(q), k.shape[1], shared * group.width, size)
    attended = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=scaling, is_causal=causal
    )
    attended = attended.reshape(len(q), heads, group.width, -1).transpose(1, 2)
    return attended.reshape(tokens, heads, -1) if group.ragged is None else attended[row, column]


@cache
def register_slot_attention() -> None:
    """Make the attention known to transformers, as SLOT_ATTENTION; what imports it all is put off until then."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(SLOT_ATTENTION, slot_attention)
    AttentionMaskInterface.register(SLOT_ATTENTION, sdpa_mask)
