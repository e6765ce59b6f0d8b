"""The slot cache: keys and values of many sequences, each in a row of its own, at positions of its own."""

from __future__ import annotations

import weakref
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from envs.arrays import IntArray
from envs.models.attention import COPY_BYTES, Group, plan, with_groups


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, capacity + 1, kv_heads, head_dim); padding is written to the last column."""

    is_sliding = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        # weak, or the stores would stay in memory until the garbage collector comes by
        self._owner = cast("SlotCache", weakref.proxy(owner))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        shape = (self._owner.rows, self._owner.capacity + 1)
        # Zeros, not empty memory: masked columns are multiplied by 0, and 0 x NaN would be NaN.
        self.keys = key_states.new_zeros(*shape, key_states.shape[1], key_states.shape[3])
        self.values = value_states.new_zeros(*shape, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new entries, each (n, kv_heads, t, head_dim), and return all that the n rows hold."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        owner = self._owner
        states = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            assert store is not None
            # layers of a model spread over devices keep their stores where they are
            place = store.device
            entries = new[0].transpose(0, 1) if owner.packed else new.transpose(1, 2)
            store[owner.write_rows.to(place), owner.write_columns.to(place)] = entries
            if owner.packed:
                states.append(with_groups(store, owner.groups))
            else:
                read = owner.read_rows if isinstance(owner.read_rows, slice) else owner.read_rows.to(place)
                states.append(store[read, : owner.read_length].transpose(1, 2))
        return states[0], states[1]

    def get_seq_length(self) -> int:
        return self._owner.read_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.read_length, 0

    def get_max_length(self) -> int:
        return self._owner.capacity


class SlotCache(Cache):
    """A key-value cache in which every row is a sequence of its own length.

    `pack` or `pad` says where the next forward pass writes; the pass itself calls `update`, layer by layer.

    Attributes:
        lengths: tokens each row holds, (rows,).

    Args:
        layers: of the model.
        rows: sequences.
        capacity: tokens a row can hold.
        device: where keys and values lie.
        packed: the model attends with `envs.models.attention.slot_attention`, which takes passes without padding.
        token_bytes: what one token takes in one layer.
    """

    def __init__(
        self, layers: int, rows: int, capacity: int, device: torch.device, packed: bool = False, token_bytes: int = 0
    ) -> None:
        self.rows, self.capacity, self.device = rows, capacity, device
        self.packed, self.token_bytes = packed, token_bytes
        self.lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self.read_length = 0
        self.groups: list[Group] = []
        self.read_rows: slice | Tensor = slice(0, 0)
        self.write_rows: Tensor
        self.write_columns: Tensor
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    def pack(self, rows: IntArray, counts: IntArray) -> Tensor:
        """Prepare a pass that appends `counts[i]` tokens to row `rows[i]`, all tokens one after the other.

        Args:
            rows: (n,), ordered by `counts`.
            counts: (n,).

        Returns:
            The position of each token, (1, tokens).

        Raises:
            ValueError: a row would grow beyond the capacity.
        """
        before = self.room(rows, counts)
        owners = np.repeat(np.arange(len(rows)), counts)
        columns = np.arange(len(owners)) - (np.cumsum(counts) - counts - before)[owners]
        self.write_rows = torch.from_numpy(rows[owners]).to(self.device)
        self.write_columns = torch.from_numpy(columns).to(self.device)
        limit = COPY_BYTES.get(self.device.type)
        one_by_one = limit is not None and self.read_length * self.token_bytes > limit
        self.groups = plan(rows, before, counts, one_by_one, self.device)
        return self.write_columns[None]

    def pad(self, rows: IntArray, counts: IntArray, width: int) -> tuple[Tensor, Tensor]:
        """Prepare a pass that appends `counts[i]` tokens to row `rows[i]`, right-aligned in `width` columns.

        Returns:
            The position of each query, (n, width), and which cached columns it may see, (n, 1, width, longest).

        Raises:
            ValueError: a row would grow beyond the capacity.
        """
        before = self.room(rows, counts)
        columns = np.arange(width) + (before + counts - width)[:, None]
        padding = columns < before[:, None]
        positions = torch.from_numpy(np.where(padding, 0, columns)).to(self.device)
        self.write_columns = torch.from_numpy(np.where(padding, self.capacity, columns)).to(self.device)
        self.write_rows = torch.from_numpy(rows).to(self.device)[:, None]
        # consecutive rows are a view; others are copied together
        neighbours = bool((np.diff(rows) == 1).all())
        self.read_rows = slice(int(rows[0]), int(rows[-1]) + 1) if neighbours else self.write_rows[:, 0]
        visible = torch.arange(self.read_length, device=self.device) <= positions[:, :, None]
        return positions, visible[:, None]

    @property
    def stores(self) -> list[Tensor]:
        """Keys and values of each layer in turn, (rows, capacity + 1, kv_heads, head_dim); None before a first pass."""
        return [store for layer in self.layers for store in (layer.keys, layer.values)]

    def room(self, rows: IntArray, counts: IntArray) -> IntArray:
        """What each row holds before `counts` tokens are appended to it, (n,); how many columns a pass reads then.

        Raises:
            ValueError: a row would grow beyond the capacity.
        """
        before = self.lengths[rows]
        self.read_length = int((before + counts).max())
        if self.read_length > self.capacity:
            raise ValueError(
                f"a sequence of {self.read_length} tokens does not fit the cache of {self.capacity}; raise capacity"
            )
        return before

    @torch.inference_mode()  # the stores were made in it
    def fork(self, sources: IntArray, targets: IntArray, lengths: IntArray) -> None:
        """Copy the first `lengths[i]` tokens (fewer where the source holds fewer) of `sources[i]` to `targets[i]`."""
        lengths = np.minimum(lengths, self.lengths[sources])
        longest = int(lengths.max(initial=0))
        moved = sources != targets
        if longest and moved.any():
            source = torch.from_numpy(sources[moved]).to(self.device)
            target = torch.from_numpy(targets[moved]).to(self.device)
            for layer in self.layers:
                for store in (layer.keys, layer.values):
                    if store is not None:
                        place = store.device
                        store[target.to(place), :longest] = store[source.to(place), :longest]
        self.lengths[targets] = lengths

    def rewind(self, rows: IntArray, lengths: IntArray) -> None:
        """Forget what the rows hold beyond `lengths`, (n,)."""
        self.lengths[rows] = np.minimum(self.lengths[rows], lengths)

    def free(self, rows: IntArray) -> None:
        """Forget all that the rows hold."""
        self.lengths[rows] = 0
