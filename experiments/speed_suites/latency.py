"""Suite latency: milliseconds a token and a response, on a pair large enough for it to mean something.

Random weights decide nothing, so the embedded pair does: it answers problems by policies, by the LLM alone and by
speculative decoding. What it wrote is then written by a large pair, token by token and writer by writer, through the
same session, one response at a time or several that share passes: each pass is made, and so is each decision's
computation, and then the logits and the scores are made to say what is laid down.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from omegaconf import DictConfig

from agents.checking.speculative import Speculative
from agents.common.policy import Policy, checked_agent
from agents.common.rollout import Episode
from agents.common.saving import load_policy
from agents.heuristics import Uncertainty
from envs.arrays import FloatArray
from envs.costs import SECONDS
from envs.models.language_model import LanguageModel
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Task
from experiments.common.config import build
from experiments.common.timing import Numbers, alternated
from experiments.evaluation.answers import Answers
from experiments.evaluation.operating_points import threshold_to_use
from experiments.evaluation.runner import Evaluation
from experiments.evaluation.settings import EvaluationSettings
from experiments.measures.intervals import Estimate, resampled
from experiments.speed_suites.decode import random_network
from experiments.speed_suites.forced import ForcedModel, as_large
from experiments.speed_suites.replay import Replay, Way, check_same

LEVEL = 0.95
"""The share of the LLM's accuracy that thresholds are chosen for."""
SAMPLES = 1000
"""Resamplings behind an interval."""
UNITS = ("bytes", "flops")
PARTS = ("slm", "llm", "decisions")
"""What a response's seconds are spent on; what is left is the program's."""
CONTEXT, READ = 50, (1, 8, 44)
"""Tokens before a pass that is timed by itself, and those that it reads: one, what an LLM has missed, a prompt."""
LLM, ENTROPY, SPECULATIVE, ADAPTIVE = "llm_only", "entropy", "speculative", "speculative_adaptive"
"""Ways to answer that have names of their own; the last one is there if it is among the agents."""


class Measured(NamedTuple):
    """What a way to answer took.

    Attributes:
        seconds: of each batch of problems, each time, (batches, repeats).
        answers: of the timed pair, with what they cost.
        passes: the last time, seconds of each batch's passes of the SLM, of the LLM and of decisions, (batches, 3).
    """

    seconds: FloatArray
    answers: Answers
    passes: FloatArray


def untrained(config: DictConfig, name: str) -> Policy:
    """An agent of `config.agents` of which nothing is trained.

    Raises:
        ValueError: it has to be.
    """
    agent = checked_agent(build(config.agents, name))
    if not isinstance(agent, Policy):
        raise ValueError(f"{name} is to be trained, and this suite times what is there; leave it out")
    return agent


def policies_of(config: DictConfig, pool: ModelPool) -> dict[str, Policy]:
    """The policies to time, by name: a threshold on the entropy, fixed drafts, agents, and what is saved.

    Raises:
        ValueError: two have one name, one cannot be loaded or has to be trained, or a threshold is nobody's.
    """
    found: dict[str, Policy] = {ENTROPY: Uncertainty("entropy"), SPECULATIVE: Speculative(config.latency_draft_tokens)}
    named = {
        **{f"agents.{name}": untrained(config, name) for name in config.agents},
        **{f"latency_policies.{name}": load_policy(Path(path), pool) for name, path in config.latency_policies.items()},
    }
    for place, policy in named.items():
        name = place.partition(".")[2]
        if name in (LLM, *found):
            raise ValueError(f"{place}: another way to answer has this name; choose another one")
        found[name] = policy
    nobodys = [name for name in config.latency_thresholds if name not in found]
    if nobodys:
        raise ValueError(f"latency_thresholds.{nobodys[0]}: there is no such policy; there are {', '.join(found)}")
    return found


def forced_pool(config: DictConfig, decider: ModelPool, rows: int, capacity: int) -> ModelPool:
    """A pair of random weights, of the configured sizes, that writes what is laid down in the decider's tokens."""
    models = []
    for number, name in enumerate(("slm", "llm")):
        network = random_network(config[name], decider.vocab_size, config.seed + number)
        models.append(ForcedModel(f"random/{name}", network, decider.tokenizer, slm=number == 0))
        print(f"{name}: {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters")
    pool = ModelPool(models, rows=rows, capacity=capacity)
    pool.profiles  # noqa: B018 (sizes are read once, by a pass of their own that is none of a decoding)
    return pool


def chosen_thresholds(
    policies: Mapping[str, Policy], pool: ModelPool, task: Task, examples: int, max_new_tokens: int
) -> dict[str, float]:
    """The cheapest threshold of each policy that reaches LEVEL of the LLM's accuracy on the first validation problems.

    Raises:
        ValueError: none of a policy does.
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
    thresholds, tried = evaluation.validate(policies, evaluation.thresholds(policies), baselines)
    assert baselines.validation is not None
    found = {}
    for name in policies:
        number = threshold_to_use(tried[name], baselines.validation[1], settings.cost, LEVEL)
        if number is None:
            raise ValueError(
                f"no threshold of {name} reaches {LEVEL:.0%} of the LLM's accuracy on {examples} validation problems; "
                f"name one, +latency_thresholds.{name}=0.5, or leave the policy out"
            )
        found[name] = thresholds[name][number]
    return found


def measure(found: Mapping[str, Way], replay: Replay, repeats: int) -> dict[str, Measured]:
    """Answer every batch of problems in every way in turn, so many times.

    Raises:
        RuntimeError: a response is not the one decided upon.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in found}
    written: dict[str, list[Episode]] = {name: [] for name in found}
    last: dict[str, list[Episode]] = {}

    def timed(name: str, number: int) -> float:
        begun = time.perf_counter()
        last[name] = found[name].answer(number)
        taken = time.perf_counter() - begun
        for episode, decided in zip(last[name], replay.of(found[name].episodes, number), strict=True):
            check_same(name, episode, decided)
        return taken

    for name in found:
        timed(name, 0)  # what is made once is not timed
    for number in range(replay.batches):
        turns: dict[str, Callable[[], float]] = {name: partial(timed, name, number) for name in found}
        for name, taken in alternated(turns, repeats, f"batch {number + 1}").items():
            seconds[name].append(taken)
            written[name] += last[name]
    passes = {
        name: np.array([[*one.ledger[:, SECONDS], one.decisions[SECONDS]] for one in episodes])
        for name, episodes in written.items()
    }
    return {
        name: Measured(
            np.array(seconds[name]),
            Answers.of(written[name], replay.large, way.policy),
            passes[name].reshape(replay.batches, replay.rows, -1).sum(1),
        )
        for name, way in found.items()
    }


def pass_ms(model: LanguageModel, tokens: int, rows: int = 1, repeats: int = 9) -> float:
    """Milliseconds of a pass that reads so many tokens of each row behind CONTEXT others, the median of some."""
    cache, every, taken = model.new_cache(rows, CONTEXT + tokens), np.arange(rows), []
    model.feed(cache, every, [np.arange(CONTEXT)] * rows)
    for _ in range(repeats):
        cache.rewind(every, np.full(rows, CONTEXT))
        begun = time.perf_counter()
        model.feed(cache, every, [np.arange(tokens)] * rows)
        taken.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(taken))


def over(ours: FloatArray, theirs: FloatArray, seed: int = 0) -> Numbers:
    """The ratio of two ways' seconds, (batches, repeats), and its 95 % interval; a batch may be one problem.

    A batch's seconds are the medians of its repeats. Batches are resampled, the same ones for both; what the machine
    adds to some and not to others is part of what they differ by.
    """
    weights = resampled(len(ours), SAMPLES, seed)
    first, second = (Estimate((weights @ np.median(one, axis=1))[None]) for one in (ours, theirs))
    ratio, (low, high) = first.over(second)
    return {"": ratio, "_low": low or 0.0, "_high": high or 0.0}


def latency_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """Ratios of seconds, memory traffic and FLOPs over LLM-only decoding, and milliseconds a token and a response.

    Where several responses share passes, milliseconds are what a batch takes over its tokens, or its responses.

    Raises:
        ValueError: a policy cannot be loaded, or cannot be timed on another pair, or the problems fill no batches.
        RuntimeError: a response is not the one decided upon.
    """
    pool, task = embedded_pool(), ArithmeticTask()
    rows, new = config.latency_rows, config.latency_new_tokens
    examples = task.examples("validation", config.latency_problems, start=config.latency_start)
    policies = policies_of(config, pool)
    capacity = max(len(pool.encode_prompt(example)) for example in examples) + new
    large = forced_pool(config, pool, rows, capacity)
    replay = Replay(pool, large, task, examples, rows, config.latency_gather, new)
    for policy in policies.values():
        as_large(policy, large)  # refused before anything is decoded
    # speculative decoding scores 0 or 1
    thresholds = {name: 0.5 for name, policy in policies.items() if isinstance(policy, Speculative)}
    thresholds |= {str(name): float(threshold) for name, threshold in config.latency_thresholds.items()}
    left = {name: policy for name, policy in policies.items() if name not in thresholds}
    if left:
        thresholds |= chosen_thresholds(left, pool, task, config.latency_validation, new)
    print(f"latency_thresholds={{{', '.join(f'{name}: {thresholds[name]}' for name in policies)}}}")
    found = {LLM: replay.llm_only()}
    found |= {name: replay.routed(policy, thresholds[name]) for name, policy in policies.items()}
    measured = measure(found, replay, config.latency_repeats)
    rates: Numbers = {f"{m.name.split('/')[1]}_pass_ms_of_{n}": pass_ms(m, n, rows) for m in large.models for n in READ}
    return compared(measured), rates | each(measured)


def compared(measured: Mapping[str, Measured]) -> Numbers:
    """Ratios of what ways took: to LLM-only decoding, and of seconds to each speculative decoding too."""
    ratios: Numbers = {}
    for other in (LLM, SPECULATIVE, ADAPTIVE):
        for name, one in measured.items():
            # speculative decoding is compared with LLM-only decoding alone
            if other not in measured or name == other or (other != LLM and name in (LLM, SPECULATIVE, ADAPTIVE)):
                continue
            for end, value in over(one.seconds, measured[other].seconds).items():
                ratios[f"{name}_seconds_over_{other}{end}"] = value
    for name, one in measured.items():
        for unit in UNITS if name != LLM else ():
            ratios[f"{name}_{unit}_over_{LLM}"] = (
                one.answers.costs[unit].sum() / measured[LLM].answers.costs[unit].sum()
            )
    return ratios


def each(measured: Mapping[str, Measured]) -> Numbers:
    """What each way took by itself: milliseconds, and tokens."""
    rates: Numbers = {}
    for name, one in measured.items():
        taken, responses = 1e3 * np.median(one.seconds, axis=1).sum(), len(one.answers.tokens)
        rates[f"{name}_ms_per_token"] = taken / one.answers.tokens.sum()
        rates[f"{name}_ms_per_response"] = taken / responses
        for part, spent in zip(PARTS, one.passes.sum(0), strict=True):
            if spent > 0:
                rates[f"{name}_{part}_ms_per_response"] = 1e3 * spent / responses
        rates[f"{name}_tokens"] = one.answers.tokens.sum()
        rates[f"{name}_llm_tokens"] = one.answers.llm_tokens.sum()
    return rates
