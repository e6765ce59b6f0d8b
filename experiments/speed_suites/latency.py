"""Suite latency: milliseconds a token and a response at batch 1, on a pair large enough for it to mean something.

Random weights decide nothing, so the embedded pair does: it answers problems by a policy, by the LLM alone and by
speculative decoding. What it wrote is then written by a large pair, token by token and writer by writer, through the
same session, one response at a time: each pass is made, and so is the policy's, and then the logits are made to say
what is laid down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig

from agents.checking.speculative import speculate
from agents.common.policy import Policy
from agents.common.rollout import Episode, Scheduling, decode, decode_alone
from agents.common.saving import load_policy
from agents.heuristics import Uncertainty
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.arrays import FloatArray
from envs.costs import SECONDS
from envs.decoding.observation import feature_width
from envs.models.language_model import LanguageModel
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool, models_manifest
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example, Task
from experiments.common.timing import Numbers, alternated
from experiments.evaluation.answers import Answers
from experiments.evaluation.operating_points import threshold_to_use
from experiments.evaluation.runner import Evaluation
from experiments.evaluation.settings import EvaluationSettings
from experiments.measures.intervals import Estimate, resampled
from experiments.speed_suites.decode import random_network
from experiments.speed_suites.forced import ForcedModel, ForcedPolicy, Script

LEVEL = 0.95
"""The share of the LLM's accuracy that the threshold is chosen for."""
SAMPLES = 1000
"""Resamplings behind an interval."""
UNITS = ("bytes", "flops")
PARTS = ("slm", "llm", "decisions")
"""What a response's seconds are spent on; what is left is the program's."""
CONTEXT, READ = 50, (1, 8, 44)
"""Tokens before a pass that is timed by itself, and those that it reads: one, what an LLM has missed, a prompt."""
LLM, ROUTED, SPECULATIVE = "llm_only", "routed", "speculative"


@dataclass(frozen=True)
class Way:
    """A way to answer.

    Attributes:
        episodes: what the deciding pair wrote, one for each problem.
        answer: lets a pool write one of them again, by its number.
        policy: whose decisions are part of the cost; None where nobody decides.
    """

    episodes: Sequence[Episode]
    answer: Callable[[int], Episode]
    policy: Policy | None = None


class Measured(NamedTuple):
    """What a way to answer took.

    Attributes:
        seconds: of each problem, each time, (problems, repeats).
        answers: of the timed pair, with what they cost.
        passes: the last time, seconds of each problem's passes of the SLM, of the LLM and of decisions, (problems, 3).
    """

    seconds: FloatArray
    answers: Answers
    passes: FloatArray


def forced_pool(config: DictConfig, decider: ModelPool, capacity: int) -> ModelPool:
    """A pair of random weights, of the configured sizes, that writes what is laid down in the decider's tokens."""
    models = []
    for number, name in enumerate(("slm", "llm")):
        network = random_network(config[name], decider.vocab_size, config.seed + number)
        models.append(ForcedModel(f"random/{name}", network, decider.tokenizer, slm=number == 0))
        print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    pool = ModelPool(models, rows=1, capacity=capacity)
    pool.profiles  # noqa: B018 (sizes are read once, by a pass of their own that is none of a decoding)
    return pool


def chosen_threshold(policy: Policy, pool: ModelPool, task: Task, examples: int, max_new_tokens: int) -> float:
    """The cheapest threshold of a policy that reaches LEVEL of the LLM's accuracy on the first validation problems.

    Raises:
        ValueError: none does.
    """
    settings = EvaluationSettings(
        split="validation",
        examples=1,
        threshold_examples=examples,
        max_new_tokens=max_new_tokens,
        draft_tokens=0,
        oracle_budget=0,
        traces=False,
    )
    evaluation = Evaluation(pool, task, settings)
    baselines = evaluation.baselines()
    thresholds, tried = evaluation.validate({"policy": policy}, evaluation.thresholds({"policy": policy}), baselines)
    assert baselines.validation is not None
    number = threshold_to_use(tried["policy"], baselines.validation[1], settings.cost, LEVEL)
    if number is None:
        raise ValueError(
            f"no threshold of the policy reaches {LEVEL:.0%} of the LLM's accuracy on {examples} validation problems; "
            "name one, latency_threshold=0.5, or another policy"
        )
    return thresholds["policy"][number]


def as_large(policy: Policy, pool: ModelPool) -> Policy:
    """A policy that computes for a larger pair what this one does for its own.

    A router's network has random weights and hidden layers of the same widths over the states' width; what has no
    weights computes as it is.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(policy, RouterPolicy):
        width = feature_width(policy.features, pool.slm.width)
        factor = width / policy.network.width
        units = [max(1, round(factor * count)) for count in policy.network.units]
        return RouterPolicy(RouterNetwork(width, units=units).eval(), models_manifest(pool), policy.features)
    if policy.parameters == 0 and not policy.per_response:
        return policy
    raise ValueError(
        f"{type(policy).__name__} cannot be timed on another pair: it is no router network; choose a policy of citer, "
        "expert or the like, or leave latency_policy out"
    )


def ways(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    policy: Policy,
    large: ModelPool,
    threshold: float,
    draft_tokens: int,
    max_new_tokens: int,
) -> dict[str, Way]:
    """The ways to answer that are compared: by the LLM alone, by a policy, by speculative decoding.

    Args:
        pool: decides.
        task: judges.
        examples: what is answered.
        policy: of `pool`.
        large: writes what was decided.
        threshold: of the policy.
        draft_tokens: of speculative decoding.
        max_new_tokens: the longest response.
    """
    one, replayed = Scheduling(rows=1), ForcedPolicy(as_large(policy, large))
    prompts = [len(pool.encode_prompt(example)) for example in examples]
    settings = {"max_new_tokens": max_new_tokens, "scheduling": one}
    decided = {
        LLM: decode_alone(pool.models[-1], task, examples, pool=pool, **settings),  # type: ignore[arg-type]
        ROUTED: decode(pool, task, examples, policy, threshold, **settings),  # type: ignore[arg-type]
        SPECULATIVE: speculate(pool, task, examples, draft_tokens, **settings),  # type: ignore[arg-type]
    }

    def lay_down(episode: Episode, number: int) -> list[Example]:
        script = Script.of(episode, prompts[number])
        for model in large.models:
            assert isinstance(model, ForcedModel)
            model.script = script
        replayed.writers = episode.writers.tolist()
        return [examples[number]]

    def llm_only(number: int) -> Episode:
        some = lay_down(decided[LLM][number], number)
        return decode_alone(large.models[-1], task, some, pool=large, **settings)[0]  # type: ignore[arg-type]

    def routed(number: int) -> Episode:
        some = lay_down(decided[ROUTED][number], number)
        return decode(large, task, some, replayed, **settings)[0]  # type: ignore[arg-type]

    def drafted(number: int) -> Episode:
        some = lay_down(decided[SPECULATIVE][number], number)
        return speculate(large, task, some, draft_tokens, **settings)[0]  # type: ignore[arg-type]

    return {
        LLM: Way(decided[LLM], llm_only),
        ROUTED: Way(decided[ROUTED], routed, replayed),
        SPECULATIVE: Way(decided[SPECULATIVE], drafted),
    }


def check_same(name: str, ours: Episode, decided: Episode) -> None:
    """Refuse a response that is not the one decided upon, or that took other passes.

    Raises:
        RuntimeError: it is not; the error says where.
    """
    passes = np.delete(ours.ledger - decided.ledger, SECONDS, axis=1)
    for what, same in (
        ("tokens", np.array_equal(ours.tokens, decided.tokens)),
        ("writers", np.array_equal(ours.writers, decided.writers)),
        ("passes", not passes.any()),
    ):
        if not same:
            raise RuntimeError(f"{name}: {decided.example.id} has other {what} when it is written again")


def measure(found: Mapping[str, Way], large: ModelPool, repeats: int) -> dict[str, Measured]:
    """Answer every problem in every way in turn, so many times.

    Raises:
        RuntimeError: a response is not the one decided upon.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in found}
    written: dict[str, list[Episode]] = {name: [] for name in found}

    def timed(name: str, number: int) -> float:
        begun = time.perf_counter()
        episode = found[name].answer(number)
        taken = time.perf_counter() - begun
        check_same(name, episode, found[name].episodes[number])
        last[name] = episode
        return taken

    last: dict[str, Episode] = {}
    for name in found:
        timed(name, 0)  # what is made once is not timed
    for number in range(len(found[LLM].episodes)):
        turns: dict[str, Callable[[], float]] = {name: partial(timed, name, number) for name in found}
        for name, taken in alternated(turns, repeats, f"problem {number + 1}").items():
            seconds[name].append(taken)
            written[name].append(last[name])
    passes = {
        name: np.array([[*one.ledger[:, SECONDS], one.decisions[SECONDS]] for one in episodes])
        for name, episodes in written.items()
    }
    return {
        name: Measured(np.array(seconds[name]), Answers.of(written[name], large, way.policy), passes[name])
        for name, way in found.items()
    }


def pass_ms(model: LanguageModel, tokens: int, repeats: int = 9) -> float:
    """Milliseconds of a pass that reads so many tokens behind CONTEXT others, the median of some."""
    cache, row, taken = model.new_cache(1, CONTEXT + tokens), np.array([0]), []
    for _ in range(repeats):
        cache.free(row)
        model.feed(cache, row, [np.arange(CONTEXT)])
        begun = time.perf_counter()
        model.feed(cache, row, [np.arange(tokens)])
        taken.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(taken))


def over(ours: FloatArray, theirs: FloatArray, seed: int = 0) -> Numbers:
    """The ratio of two ways' seconds, (problems, repeats), and its 95 % interval.

    A problem's seconds are the medians of its repeats. Problems are resampled, the same ones for both; what the
    machine adds to some and not to others is part of what they differ by.
    """
    weights = resampled(len(ours), SAMPLES, seed)
    first, second = (Estimate((weights @ np.median(one, axis=1))[None]) for one in (ours, theirs))
    ratio, (low, high) = first.over(second)
    return {"": ratio, "_low": low or 0.0, "_high": high or 0.0}


def latency_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """Ratios of seconds, memory traffic and FLOPs over LLM-only decoding, and milliseconds a token and a response.

    Raises:
        ValueError: the policy cannot be loaded, or cannot be timed on another pair.
        RuntimeError: a response is not the one decided upon.
    """
    pool, task = embedded_pool(), ArithmeticTask()
    new = config.latency_new_tokens
    examples = task.examples("validation", config.latency_problems, start=config.latency_start)
    capacity = max(len(pool.encode_prompt(example)) for example in examples) + new
    policy: Policy = Uncertainty("entropy")
    if config.latency_policy is not None:
        policy = load_policy(Path(config.latency_policy), pool)
    large = forced_pool(config, pool, capacity)
    as_large(policy, large)  # refused before anything is decoded
    threshold = config.latency_threshold
    if threshold is None:
        threshold = chosen_threshold(policy, pool, task, config.latency_validation, new)
    print(f"decided by {type(policy).__name__} at the threshold {threshold}")
    found = ways(pool, task, examples, policy, large, threshold, config.latency_draft_tokens, new)
    measured = measure(found, large, config.latency_repeats)
    ratios: Numbers = {}
    rates: Numbers = {f"{m.name.split('/')[1]}_pass_ms_of_{n}": pass_ms(m, n) for m in large.models for n in READ}
    llm = measured[LLM]
    for name, one in measured.items():
        taken = np.median(one.seconds, axis=1).sum()
        rates[f"{name}_ms_per_token"] = 1e3 * taken / one.answers.tokens.sum()
        rates[f"{name}_ms_per_response"] = 1e3 * taken / len(examples)
        for part, spent in zip(PARTS, one.passes.mean(0), strict=True):
            if spent > 0:
                rates[f"{name}_{part}_ms_per_response"] = 1e3 * spent
        rates[f"{name}_tokens"] = one.answers.tokens.sum()
        rates[f"{name}_llm_tokens"] = one.answers.llm_tokens.sum()
        if name == LLM:
            continue
        for end, value in over(one.seconds, llm.seconds).items():
            ratios[f"{name}_seconds_over_llm_only{end}"] = value
        for unit in UNITS:
            ratios[f"{name}_{unit}_over_llm_only"] = one.answers.costs[unit].sum() / llm.answers.costs[unit].sum()
    for end, value in over(measured[ROUTED].seconds, measured[SPECULATIVE].seconds).items():
        ratios[f"{ROUTED}_seconds_over_{SPECULATIVE}{end}"] = value
    return ratios, rates
