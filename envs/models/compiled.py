"""Passes that append one token to each row, as one compiled graph over the stores of a slot cache.

Such a pass of a small model is bound by its launches, not by its memory: hundreds of small operations, each started
from Python. A graph of fixed shapes starts them at once; on CUDA `torch.compile` captures it and replays it. So rows
are filled up, and the columns that are read, to powers of two: few shapes, each compiled when it first comes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from envs.arrays import IntArray

if TYPE_CHECKING:
    from envs.models.kv_cache import SlotCache

MOST_ROWS = 64
"""Passes of more rows are bound by their products, and go without a graph."""
FEWEST_COLUMNS = 128
SHAPES = 1024
"""Graphs that are kept, of all models: what `torch.compile` calls recompilations, of which it allows 8 by itself."""

Pass = Callable[[Tensor, Tensor, Tensor, Cache, int], tuple[Tensor, Tensor]]
"""Token ids, positions, boolean mask, cache and how many last positions to keep, to hidden states and logits."""


class _FixedLayer(CacheLayerMixin):
    """One layer's stores, of which a fixed number of columns is read."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, columns: Tensor, length: int) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self._rows, self._columns, self._length = rows, columns, length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("the stores are there")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store one new entry a row, (n, kv_heads, 1, head_dim); return what the rows hold."""
        read = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            assert store is not None
            store.index_put_((self._rows, self._columns), new[:, :, 0])
            read.append(store[self._rows, : self._length].transpose(1, 2))
        return read[0], read[1]

    def get_seq_length(self) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._length, 0

    def get_max_length(self) -> int:
        return self._length


class CompiledPass:
    """A pass of a model over one token of each row.

    Args:
        run: the model's own pass.
        device: of the model and its caches.
    """

    def __init__(self, run: Pass, device: torch.device) -> None:
        self._run = run
        self._captured = device.type == "cuda"
        # between the parts of a graph that breaks, what the head has read would be lost
        mode = "reduce-overhead" if self._captured else None
        self._graph = torch.compile(self._step, dynamic=False, mode=mode, fullgraph=True)

    @staticmethod
    def takes(cache: SlotCache, counts: IntArray) -> bool:
        """Whether a pass that appends `counts` tokens to rows, (n,), is one of these."""
        return int(counts.max()) == 1 and len(counts) <= MOST_ROWS and cache.layers[0].is_initialized

    def __call__(self, cache: SlotCache, rows: IntArray, tokens: IntArray) -> tuple[Tensor, Tensor]:
        """Append `tokens[i]` to row `rows[i]`; hidden states (n, width) and logits (n, vocab).

        Raises:
            ValueError: a row is full, or the network cannot be one graph.
        """
        from torch._dynamo import config, mark_static_address
        from torch._dynamo.exc import TorchDynamoException

        before = cache.room(rows, np.ones(len(rows), dtype=np.int64))
        size = 1 << (len(rows) - 1).bit_length()
        # what fills the pass up writes to the column for padding
        inputs = np.empty((3, size), dtype=np.int64)
        inputs[:, : len(rows)] = tokens, rows, before
        inputs[:, len(rows) :] = np.array([tokens[0], rows[0], cache.capacity])[:, None]
        length = min(max(FEWEST_COLUMNS, 1 << (cache.read_length - 1).bit_length()), cache.capacity + 1)
        stores = cache.stores
        if self._captured:
            for store in stores:
                mark_static_address(store)
            torch.compiler.cudagraph_mark_step_begin()
        with config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=SHAPES):
            try:
                hidden, logits = self._graph(torch.from_numpy(inputs).to(cache.device), stores, length)
            except TorchDynamoException as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"passes of this network cannot be one graph ({reason}); say compile=null") from error
        if self._captured:  # the next replay writes where these lie
            hidden, logits = hidden.clone(), logits.clone()
        cache.lengths[rows] += 1
        return hidden[: len(rows)], logits[: len(rows)]

    def _step(self, inputs: Tensor, stores: Sequence[Tensor], length: int) -> tuple[Tensor, Tensor]:
        ids, rows, columns = inputs
        capacity = stores[0].shape[1] - 1
        positions = torch.where(columns < capacity, columns, 0)[:, None]
        mask = (torch.arange(length, device=inputs.device) <= positions)[:, None, None]
        pairs = zip(stores[::2], stores[1::2], strict=True)
        cache = Cache(layers=[_FixedLayer(keys, values, rows, columns, length) for keys, values in pairs])
        hidden, logits = self._run(ids[:, None], positions, mask, cache, 1)
        return hidden[:, 0], logits[:, 0]
