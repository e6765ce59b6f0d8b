"""Suite pair: seconds at batch 1 on a pair of your own: policies in turn with LLM-only decoding and its bare passes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np
import torch
from omegaconf import DictConfig
from transformers.cache_utils import DynamicCache

from agents.common.policy import Policy
from agents.common.rollout import Episode, Scheduling, decode, decode_alone
from agents.common.saving import load_policy
from envs.arrays import IntArray
from envs.models.loading import load_model
from envs.models.pool import ModelPool
from envs.models.source import WEIGHTS, ModelSpec
from envs.tasks.task import Example
from experiments.common.config import build
from experiments.common.timing import Numbers, alternated
from experiments.evaluation.answers import Answers
from experiments.speed_suites.latency import LLM, UNITS, over, untrained

COMPILED = "compiled"
BARE = "bare_passes"
"""The passes of LLM-only decoding and nothing else, over the cache of transformers."""


def policies_of(config: DictConfig, pool: ModelPool) -> dict[str, Policy]:
    """The policies to time: agents, and what is saved in the place of an agent of its name.

    Raises:
        ValueError: one has to be trained, cannot be loaded, or has no threshold; the error says which.
    """
    found = {name: untrained(config, name) for name in config.agents if name not in config.pair_policies}
    found |= {name: load_policy(Path(path), pool) for name, path in config.pair_policies.items()}
    for name in found:
        if name not in config.pair_thresholds:
            raise ValueError(f"{name} has no threshold; add pair_thresholds.{name}=0.5")
    return found


def bare_passes(pool: ModelPool, example: Example, response: IntArray) -> None:
    """Let the LLM read a prompt, and then each token of a response in a pass of its own."""
    network, device = pool.models[-1].network, pool.models[-1].device
    read, cache = pool.encode_prompt(example), DynamicCache(config=network.config)
    with torch.inference_mode():
        for tokens in (read, *response[:-1, None]):
            ids = torch.from_numpy(tokens)[None].to(device)
            network(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1).item()


def with_other_llm(pool: ModelPool, way: str) -> ModelPool:
    """The pool with an LLM whose weights are kept otherwise (`int8`, `int4`) or that is `compiled`, see `ModelSpec`.

    Raises:
        ValueError: it is neither.
    """
    if way not in (COMPILED, *WEIGHTS):
        raise ValueError(f"unknown pair_llms {way!r}; choose of {COMPILED}, {', '.join(WEIGHTS)}")
    assert pool.recipe is not None, "pools of names know what they were loaded from"
    spec = cast("tuple[ModelSpec, ...]", pool.recipe[1])[-1]
    spec = replace(spec, compile=True) if way == COMPILED else replace(spec, weights=way)
    return ModelPool([*pool.models[:-1], load_model(spec, rows=1, capacity=pool.capacity)], pool.rows, pool.capacity)


def changed_tokens(pool: ModelPool, other: ModelPool, episodes: Sequence[Episode]) -> int:
    """How many tokens that the LLM of `pool` wrote the one of `other` would write otherwise, behind the same ones."""
    llm, changed = other.models[-1], 0
    for episode in episodes:
        read = np.concatenate([pool.encode_prompt(episode.example), episode.tokens[:-1]])
        _, logits = llm.feed(llm.new_cache(1, len(read)), np.array([0]), [read], every_position=True)
        ours = logits[-len(episode.tokens) :].argmax(-1).cpu().numpy()
        changed += int((ours != episode.tokens).sum())
    return changed


def pair_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """Ratios of seconds, memory traffic and FLOPs over LLM-only decoding, and milliseconds a token.

    `bare_passes_over_llm_only` is the share of LLM-only decoding's seconds that its passes take by themselves. With
    `pair_llms` the LLM alone also answers with weights kept so, or compiled.

    Raises:
        ValueError: a policy cannot be timed.
        RuntimeError: a policy answers otherwise the second time.
    """
    task, pool = build(config, "task"), build(config, "models")
    policies = policies_of(config, pool)
    pool.profiles  # noqa: B018 (sizes are read once, by a pass of their own that is none of a decoding)
    examples = task.examples(config.pair_split, config.pair_problems, start=config.pair_start)
    new, one = config.pair_new_tokens, Scheduling(rows=1)
    last: dict[str, Episode] = {}

    pools = {LLM: pool, **{f"{LLM}_{way}": with_other_llm(pool, way) for way in config.pair_llms}}

    def alone(name: str, example: Example) -> Episode:
        return decode_alone(pools[name].models[-1], task, [example], new, one, pool=pools[name])[0]

    def routed(name: str, example: Example) -> Episode:
        return decode(
            pool, task, [example], policies[name], config.pair_thresholds[name], max_new_tokens=new, scheduling=one
        )[0]

    def timed(name: str, answer: Callable[[Example], Episode], example: Example) -> float:
        begun = time.perf_counter()
        episode = answer(example)
        taken = time.perf_counter() - begun
        before = last.get(name)
        if before is not None and before.example is example and not np.array_equal(before.tokens, episode.tokens):
            raise RuntimeError(f"{name} answers {example.id} otherwise the second time")
        last[name] = episode
        return taken

    def timed_bare(example: Example) -> float:
        begun = time.perf_counter()
        bare_passes(pool, example, last[LLM].tokens)
        return time.perf_counter() - begun

    answers: dict[str, Callable[[Example], Episode]] = {
        **{name: partial(alone, name) for name in pools},
        **{name: partial(routed, name) for name in policies},
    }
    for answer in answers.values():
        answer(examples[0])  # what is made once is not timed
    seconds: dict[str, list[list[float]]] = {name: [] for name in (*answers, BARE)}
    written: dict[str, list[Episode]] = {name: [] for name in answers}
    for number, example in enumerate(examples):
        turns: dict[str, Callable[[], float]] = {
            name: partial(timed, name, answer, example) for name, answer in answers.items()
        }
        turns[BARE] = partial(timed_bare, example)
        for name, measured in alternated(turns, config.pair_repeats, f"problem {number + 1}").items():
            seconds[name].append(measured)
        for name in answers:
            written[name].append(last[name])
    taken = {name: np.array(some) for name, some in seconds.items()}
    found = {name: Answers.of(some, pools.get(name, pool), policies.get(name)) for name, some in written.items()}
    ratios: Numbers = {f"{BARE}_over_llm_only{end}": v for end, v in over(taken[BARE], taken[LLM]).items()}
    others = {name: other for name, other in pools.items() if name != LLM}
    rates: Numbers = {f"{name}_changed_tokens": changed_tokens(pool, of, written[LLM]) for name, of in others.items()}
    for name, one_way in found.items():
        rates[f"{name}_ms_per_token"] = 1e3 * float(np.median(taken[name], axis=1).sum() / one_way.tokens.sum())
        for what, counts in (
            ("tokens", one_way.tokens),
            ("llm_tokens", one_way.llm_tokens),
            ("right", one_way.correct),
        ):
            rates[f"{name}_{what}"] = float(counts.sum())
        if name != LLM:
            ratios |= {f"{name}_seconds_over_llm_only{end}": v for end, v in over(taken[name], taken[LLM]).items()}
            for unit in UNITS:
                ratios[f"{name}_{unit}_over_llm_only"] = one_way.costs[unit].sum() / found[LLM].costs[unit].sum()
    return ratios, rates
