"""The slot cache: keys and values of many sequences, each in a row of its own, at positions of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from envs.attention import Slot, in_place, worth_reading_in_place

IntArray = npt.NDArray[np.int64]


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (rows, capacity + 1, kv_heads, head_dim); padding is written to the last column."""

    is_sliding = False

    def __init__(self, owner: SlotCache) -> None:
        super().__init__()
        self._owner = owner

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
        assert self.keys is not None
        one_by_one = bool(owner.slots) and worth_reading_in_place(self.keys, owner.read_length)
        found = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            assert store is not None
            # layers of a model spread over devices keep their stores where they are
            place = store.device
            store[owner.write_rows.to(place), owner.write_columns.to(place)] = new.transpose(1, 2)
            if one_by_one:
                found.append(in_place(store, owner.slots))
            else:
                read = owner.read_rows if isinstance(owner.read_rows, slice) else owner.read_rows.to(place)
                found.append(store[read, : owner.read_length].transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return self._owner.read_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.read_length, 0

    def get_max_length(self) -> int:
        return self._owner.capacity


class SlotCache(Cache):
    """A key-value cache in which every row is a sequence of its own length.

    `place` says where the next forward pass writes; the pass itself calls `update`, layer by layer.

    Attributes:
        lengths: tokens each row holds, (rows,).

    Args:
        layers: of the model.
        rows: sequences.
        capacity: tokens a row can hold.
        device: where keys and values lie.
        read_in_place: the model attends with `envs.attention.slot_attention`, which needs no copy of scattered rows.
    """

    def __init__(
        self, layers: int, rows: int, capacity: int, device: torch.device, read_in_place: bool = False
    ) -> None:
        self.rows, self.capacity, self.device, self.read_in_place = rows, capacity, device, read_in_place
        self.lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self.read_length = 0
        self.slots: list[Slot] = []
        self.read_rows: slice | Tensor = slice(0, 0)
        self.write_rows: Tensor
        self.write_columns: Tensor
        super().__init__(layers=[_SlotLayer(self) for _ in range(layers)])

    def place(self, rows: IntArray, counts: IntArray, width: int) -> tuple[Tensor, Tensor]:
        """Prepare a pass that appends `counts[i]` tokens to row `rows[i]`, right-aligned in `width` columns.

        Returns:
            The position of each query, (n, width), and which cached columns it may see, (n, 1, width, longest).

        Raises:
            ValueError: a row would grow beyond the capacity.
        """
        before = self.lengths[rows]
        longest = int((before + counts).max())
        if longest > self.capacity:
            raise ValueError(
                f"a sequence of {longest} tokens does not fit the cache of {self.capacity}; raise capacity"
            )
        columns = np.arange(width) + (before + counts - width)[:, None]
        padding = columns < before[:, None]
        positions = torch.from_numpy(np.where(padding, 0, columns)).to(self.device)
        self.write_columns = torch.from_numpy(np.where(padding, self.capacity, columns)).to(self.device)
        self.write_rows = torch.from_numpy(rows).to(self.device)[:, None]
        first, last = int(rows[0]), int(rows[-1])
        consecutive = last - first + 1 == len(rows) and bool((np.diff(rows) == 1).all())
        # consecutive rows are a view; others are copied together, or attended one by one
        self.slots = []
        if self.read_in_place and not consecutive:
            self.slots = list(zip(rows.tolist(), (before + counts).tolist(), counts.tolist(), strict=True))
        self.read_rows = slice(first, last + 1) if consecutive else self.write_rows[:, 0]
        self.read_length = longest
        visible = torch.arange(longest, device=self.device) <= positions[:, :, None]
        return positions, visible[:, None]

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
