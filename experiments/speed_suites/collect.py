"""Suite collect: how fast preferences are collected, against the algorithm written plainly with `generate`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from agents.citer import Citer
from agents.common.rollout import Scheduling
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


def collect_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """Ratio `plain_over_ours` on the same examples, and rate `reference_tokens_per_second`, on the embedded pair.

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
    return {"plain_over_ours": seconds["plain"] / seconds["ours"]}, {"reference_tokens_per_second": rates["rate"]}
