"""Suite collect: how fast preferences are collected, against the algorithm written plainly with `generate`."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig

from agents.citer import Citer
from agents.common.rollout import Scheduling
from agents.preferences.store import Share
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example, Task
from experiments.common.timing import Numbers, alternate


def plain_preferences(pool: ModelPool, task: Task, examples: list[Example], max_new_tokens: int) -> list[list[int]]:
    """Round 1 of CITER: `generate` one token with each model at every position, and one answer with the SLM in case 3.

    Returns:
        Labels of each example: 1 where the SLM is preferred.
    """

    def written(model: int, tokens: list[int], count: int) -> list[int]:
        ids = torch.tensor([tokens])
        network = pool.models[model].network
        output = network.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=pool.end_token
        )
        written: list[int] = output[0, len(tokens) :].tolist()
        return written

    labels: list[list[int]] = []
    for example in examples:
        prompt, reference = pool.encode_prompt(example).tolist(), pool.encode_reference(example).tolist()
        labels.append([])
        for position, target in enumerate(reference):
            prefix = prompt + reference[:position]
            slm, llm = (written(model, prefix, 1)[0] for model in (0, len(pool) - 1))
            label = slm == target
            if not label and llm != target:
                answer = [slm]
                if slm not in pool.end_tokens and position + 1 < max_new_tokens:
                    answer += written(0, [*prefix, slm], max_new_tokens - position - 1)
                text = pool.tokenizer.decode(reference[:position] + answer, skip_special_tokens=True)
                label = task.is_correct(example, str(text))
            labels[-1].append(int(label))
    return labels


def collect_seconds(pool: ModelPool, task: Task, settings: Citer, seed: int) -> tuple[float, list[int], float]:
    """Seconds of collecting round 1, shards on disk included; its labels, and how many tokens they are of."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        store = settings.collect(pool, task, seed, Path(folder) / "preferences")
        seconds = time.perf_counter() - begun
        return seconds, store.column("label").tolist(), float(sum(store.rows()))


def side_by_side(config: DictConfig) -> float:
    """How much faster two processes collect the same shards than one, one thread in each; models are loaded before."""
    from joblib import Parallel, delayed

    settings = Citer(
        examples=config.collect_examples,
        shard_examples=max(1, config.collect_examples // 8),
        scheduling=Scheduling(rows=config.collect_rows),
    )

    def seconds(processes: int) -> float:
        with tempfile.TemporaryDirectory() as folder, Parallel(n_jobs=processes, batch_size=1) as parallel:
            few = replace(settings, examples=2, shard_examples=1)
            parallel(delayed(_share)(few, Path(folder) / f"{number}", 0, 1) for number in range(processes))
            begun = time.perf_counter()
            parallel(delayed(_share)(settings, Path(folder) / "all", number, processes) for number in range(processes))
            return time.perf_counter() - begun

    threads = torch.get_num_threads()
    medians = alternate({"one": lambda: seconds(1), "two": lambda: seconds(2)}, config.collect_repeats, "processes")
    torch.set_num_threads(threads)  # one process is this one
    return medians["one"] / medians["two"]


def _share(settings: Citer, folder: Path, number: int, processes: int) -> None:
    """Collect one share, in a process of its own."""
    torch.set_num_threads(1)
    settings.collect_share(_pool(), ArithmeticTask(), 0, folder, Share(number, processes))


@cache
def _pool() -> ModelPool:
    """Of this process."""
    return embedded_pool()


def collect_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """Speed of collection on the embedded pair, where it can be compared as ratios on the same examples.

    Ratios: `plain_over_ours`, and `two_processes_over_one`. Rate: `reference_tokens_per_second`.

    Raises:
        RuntimeError: the two disagree on a label.
    """
    pool, task = embedded_pool(), ArithmeticTask()
    scheduling = Scheduling(rows=config.collect_rows)
    few = Citer(examples=config.plain_examples, scheduling=scheduling)
    many = Citer(examples=config.collect_examples, scheduling=scheduling)
    collect_seconds(pool, task, few, seed=1)  # what is loaded once is not timed
    labels: dict[str, list[int]] = {}

    def ours() -> float:
        seconds, labels["ours"], _ = collect_seconds(pool, task, few, seed=0)
        return seconds

    def plain() -> float:
        examples = task.examples("train", config.plain_examples, start=1_000_000)
        begun = time.perf_counter()
        by_example = plain_preferences(pool, task, examples, few.max_new_tokens)
        labels["plain"] = [label for of_one in by_example for label in of_one]
        return time.perf_counter() - begun

    seconds = alternate({"plain": plain, "ours": ours}, config.collect_repeats, "collect")
    if labels["plain"] != labels["ours"]:
        raise RuntimeError("the plain implementation gives other labels")

    def rate() -> float:
        seconds, _, tokens = collect_seconds(pool, task, many, seed=0)
        return tokens / seconds

    rates = alternate({"rate": rate}, config.collect_repeats, "collect")
    ratios = {"plain_over_ours": seconds["plain"] / seconds["ours"], "two_processes_over_one": side_by_side(config)}
    return ratios, {"reference_tokens_per_second": rates["rate"]}
