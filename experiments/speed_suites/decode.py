"""Suite decode: the engine against bare passes, a re-reading loop, LLM-only decoding and `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from agents.common.episode_queue import EpisodeQueue
from agents.common.policy import Policy
from agents.common.rollout import decode_loop
from agents.heuristics import Random
from envs.arrays import IntArray
from envs.decoding.session import Session
from envs.models.attention import Group, with_groups
from envs.models.language_model import LanguageModel
from envs.models.pool import ModelPool
from experiments.common.timing import Numbers, alternate


class _NoTokenizer:
    """Stands in for a tokenizer of so many ids: random weights have no text. No token ends a response."""

    eos_token_id = -1

    def __init__(self, ids: int) -> None:
        self.ids = ids

    def get_vocab(self) -> dict[str, int]:
        return {str(token): token for token in range(self.ids)}


def random_network(shape: DictConfig, vocab_size: int, seed: int = 0) -> LlamaForCausalLM:
    """A Llama of random weights in float32, of a shape: `hidden_size`, `mlp_size`, `layers`, `heads`, `kv_heads`."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.mlp_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
        )
    )


def random_pool(config: DictConfig) -> ModelPool:
    """A pair of random-weight Llamas of the configured sizes."""
    tokenizer: Any = _NoTokenizer(config.vocab_size)
    models = []
    for name in ("slm", "llm"):
        network = random_network(config[name], config.vocab_size)
        size = sum(p.numel() for p in network.parameters())
        print(f"{name}: {size / 1e6:.1f} M parameters")
        models.append(LanguageModel(name, network, tokenizer))
    pool = ModelPool(models)
    pool.profiles  # noqa: B018 (sizes are read once, by a pass of their own that is none of a decoding)
    return pool


def random_prompts(count: int, config: DictConfig) -> list[IntArray]:
    """Prompts of random tokens, of ragged lengths."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3 * config.prompt_tokens // 4, 5 * config.prompt_tokens // 4 + 1, size=count)
    return [rng.integers(0, config.vocab_size, size=length) for length in lengths]


def routed_seconds(
    pool: ModelPool,
    prompts: list[IntArray],
    limits: IntArray,
    rows: int,
    policy: Policy,
    threshold: float,
    gather: float,
    prompts_read: bool = False,
) -> float:
    """Seconds to decode `limits[i]` tokens for each prompt through a session, finished rows refilled at once.

    With `prompts_read` there is a row for every prompt, and time runs from when both models have read it.
    """
    begun = time.perf_counter()
    session = Session(pool, rows, int(limits.max()), capacity=int(limits.max()) + max(map(len, prompts)))

    def start(rows: IntArray, numbers: IntArray) -> None:
        if not prompts_read:
            session.start(rows, [prompts[n] for n in numbers], numbers, limits=limits[numbers])

    if prompts_read:
        everything = np.arange(rows)
        session.start(everything, prompts, limits=limits)
        session.step(everything, np.full(rows, len(pool) - 1))
        session.observe(everything)
        begun = time.perf_counter()
    queue = EpisodeQueue(np.arange(rows), len(prompts), start)
    for _ in decode_loop(session, queue, policy, threshold, gather):
        pass
    return time.perf_counter() - begun


class _ReadyLayer(CacheLayerMixin):
    """Keys and values that are there already: what attention costs without any cache to keep."""

    is_sliding = False

    def __init__(self, owner: _ReadyCache) -> None:
        super().__init__()
        self._owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, length = self._owner.rows, self._owner.longest
        self.keys = torch.randn(rows, length, key_states.shape[1], key_states.shape[3])
        self.values = torch.randn(rows, length, value_states.shape[1], value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        return with_groups(self.keys, self._owner.groups), with_groups(self.values, self._owner.groups)

    def get_seq_length(self) -> int:
        return self._owner.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._owner.longest, 0

    def get_max_length(self) -> int:
        return self._owner.longest


class _ReadyCache(Cache):
    def __init__(self, layers: int, rows: int, longest: int) -> None:
        self.rows, self.longest = rows, longest
        self.groups: list[Group] = []
        super().__init__(layers=[_ReadyLayer(self) for _ in range(layers)])


@dataclass(frozen=True)
class _Pass:
    """One forward pass: the model, its arguments without the cache, and the rows that attended together."""

    model: LanguageModel
    arguments: dict[str, Any]
    groups: list[Group]


@contextmanager
def recorded_passes(pool: ModelPool) -> Iterator[list[_Pass]]:
    """Every forward pass made inside."""
    passes: list[_Pass] = []

    def recorder(model: LanguageModel) -> Callable[..., None]:
        def record(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cache = kwargs["past_key_values"]
            passes.append(_Pass(model, {k: v for k, v in kwargs.items() if v is not cache}, cache.groups))

        return record

    hooks = [m.network.register_forward_pre_hook(recorder(m), with_kwargs=True) for m in pool.models]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def bare_seconds(passes: list[_Pass], caches: dict[str, _ReadyCache]) -> float:
    """Seconds of the same forward passes with nothing around them."""
    begun = time.perf_counter()
    with torch.inference_mode():
        for one in passes:
            cache = caches[one.model.name]
            cache.groups = one.groups
            one.model.network(past_key_values=cache, **one.arguments)
    return time.perf_counter() - begun


def reread_seconds(pool: ModelPool, prompts: list[IntArray], limits: IntArray, llm_share: float, samples: int) -> float:
    """Seconds of a loop that re-reads the whole prefix at every LLM call and keeps finished rows going.

    The rows of a batch start together and go on until the last has ended. The SLM keeps its cache. Steps are timed at
    `samples` evenly spaced lengths and weighted by their spacing, since all of them would take a quarter of an hour.
    """
    batch, length = len(prompts), int(limits.max())
    prompt = max(map(len, prompts))
    rng = np.random.default_rng(1)
    slm, llm = (model.network for model in (pool.models[0], pool.models[-1]))
    total = 0.0
    edges = np.linspace(0, length, samples + 1)
    for position in ((edges[1:] + edges[:-1]) / 2).astype(int):
        ids = torch.from_numpy(rng.integers(0, slm.config.vocab_size, size=(batch, prompt + position)))
        cache = DynamicCache(config=slm.config)
        with torch.inference_mode():
            slm(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            to_llm = np.flatnonzero(rng.random(batch) < llm_share)
            begun = time.perf_counter()
            slm(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
            if len(to_llm):
                llm(input_ids=ids[to_llm], use_cache=False, logits_to_keep=1).logits.argmax(-1)
            total += (time.perf_counter() - begun) * length / samples
    return total


def decode_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """How the engine compares with the bare passes, with published code, with LLM-only decoding and with `generate`."""
    pool = random_pool(config)
    share, repeats, policy = config.llm_share, config.repeats, Random(seed=0)
    ratios: Numbers = {}
    rates: Numbers = {}
    batch = config.batch

    prompts = random_prompts(batch, config)
    limits = np.full(batch, config.new_tokens)
    with recorded_passes(pool) as passes:
        routed_seconds(pool, prompts, limits, batch, policy, share, config.gather)
    longest = int(limits.max()) + max(map(len, prompts))
    caches = {m.name: _ReadyCache(m.network.config.num_hidden_layers, batch, longest) for m in pool.models}
    seconds = alternate(
        {
            "bare": lambda: bare_seconds(passes, caches),
            "wall": lambda: routed_seconds(pool, prompts, limits, batch, policy, share, config.gather),
        },
        repeats,
        "bare passes",
    )
    ratios["bare_forward_over_wall"] = seconds["bare"] / seconds["wall"]

    # Rates of decoding: prompts, which both sides read alike, are read before time runs.
    for rows in config.rows_in_flight:
        some = random_prompts(rows, config)
        ends = np.full(rows, config.rate_tokens)
        seconds = alternate(
            {
                "routed": lambda: routed_seconds(pool, some, ends, rows, policy, share, config.gather, True),  # noqa: B023
                "llm": lambda: llm_only_seconds(pool, some, config.rate_tokens, True),  # noqa: B023
            },
            repeats,
            f"{rows} rows",
        )
        ratios[f"routed_over_llm_only_{rows}"] = seconds["llm"] / seconds["routed"]
        rates[f"routed_tokens_per_second_{rows}"] = rows * (config.rate_tokens - 1) / seconds["routed"]
        rates[f"llm_only_tokens_per_second_{rows}"] = rows * (config.rate_tokens - 1) / seconds["llm"]

    same = [prompt[: min(map(len, prompts))] for prompt in prompts]
    seconds = alternate(
        {
            "ours": lambda: llm_only_seconds(pool, same, config.rate_tokens),
            "generate": lambda: generate_seconds(pool, same, config.rate_tokens),
        },
        repeats,
        "generate",
    )
    ratios["llm_only_over_generate"] = seconds["generate"] / seconds["ours"]

    # twice as many problems as rows, of which most end early
    many = random_prompts(2 * batch, config)
    rng = np.random.default_rng(2)
    ends = rng.integers(config.long_tokens // 8, config.long_tokens + 1, size=2 * batch)
    ends[0] = ends[batch] = config.long_tokens

    def reread() -> float:
        halves = (slice(0, batch), slice(batch, 2 * batch))
        return sum(reread_seconds(pool, many[h], ends[h], share, config.samples) for h in halves)

    seconds = alternate(
        {"reread": reread, "ours": lambda: routed_seconds(pool, many, ends, batch, policy, share, config.gather)},
        config.reread_repeats,
        "re-reading loop",
    )
    ratios["reread_loop_over_ours"] = seconds["reread"] / seconds["ours"]
    return ratios, rates


def llm_only_seconds(pool: ModelPool, prompts: list[IntArray], new_tokens: int, prompts_read: bool = False) -> float:
    """Seconds to decode with the LLM alone through the same engine, rows together; see `routed_seconds`."""
    llm = pool.models[-1]
    rows = np.arange(len(prompts))
    begun = time.perf_counter()
    cache = llm.new_cache(len(rows), max(map(len, prompts)) + new_tokens)
    chunks = list(prompts)
    for step in range(new_tokens):
        _, logits = llm.feed(cache, rows, chunks)
        chunks = list(logits.argmax(-1)[:, None].numpy())
        if prompts_read and step == 0:
            begun = time.perf_counter()
    return time.perf_counter() - begun


def generate_seconds(pool: ModelPool, prompts: list[IntArray], new_tokens: int) -> float:
    """Seconds of Hugging Face `generate` on prompts of one length."""
    network = pool.models[-1].network
    ours = network.config._attn_implementation
    network.set_attn_implementation("sdpa")  # as users of `generate` have it
    ids = torch.from_numpy(np.stack(prompts))
    begun = time.perf_counter()
    network.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    seconds = time.perf_counter() - begun
    network.set_attn_implementation(ours)
    return seconds
