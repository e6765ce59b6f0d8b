"""References that the LLM wrote: its own right answers, kept beside the preferences that are collected on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from agents.common.rollout import Scheduling, decode_alone
from envs.arrays import IntArray
from envs.decoding.decoder import check_fit, sequence_capacity
from envs.models.pool import ModelPool
from envs.storage import write_text
from envs.tasks.task import Example, Task

FILE = "references.json"
Answers = list[IntArray | None]


def llm_references(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    folder: Path,
    max_new_tokens: int = 128,
    scheduling: Scheduling | None = None,
    skip_too_long: bool = False,
    parts: Sequence[range] = (),
    own: Sequence[int] | None = None,
) -> Answers:
    """The LLM's own answer to each example, by greedy decoding, where it is right and comes to an end.

    They are tokens, not text: put into tokens again, a text may become others, which the LLM would not write. They are
    decoded once and kept in `folder`: what is collected on them later needs these very tokens, and another machine
    may round to others. Several processes answer a part each, and keep it apart; who asks for all joins them.

    Args:
        pool: the models; the last one answers.
        task: judges the answers.
        examples: to answer.
        folder: of the preferences.
        max_new_tokens: the longest answer.
        scheduling: how answers share passes.
        skip_too_long: leave prompts out that do not fit, instead of refusing them.
        parts: the examples of each shard of preferences.
        own: numbers of the parts that this process answers alone; all examples at once where None.

    Returns:
        Token ids with the end of sequence, (length,), of each example; None where it has no right answer, and where
        another process answers it.

    Raises:
        ValueError: a prompt does not fit, no answer is right, or what is kept is not of these examples.
    """
    path = folder / FILE

    def answer(some: Sequence[int]) -> Answers:
        return _answers(pool, task, [examples[number] for number in some], max_new_tokens, scheduling, skip_too_long)

    if own is not None and not path.is_file():
        answers: Answers = [None] * len(examples)
        for part in own:
            answers[parts[part].start : parts[part].stop] = _part(folder, part, parts[part], answer)
        return answers
    if not path.is_file():
        if any(folder.glob(_part_name("*"))):  # processes have begun that answer a part each
            answers = [one for part, some in enumerate(parts) for one in _part(folder, part, some, answer)]
        elif any(folder.glob("shard-*.json")):
            raise ValueError(_lacking(folder, FILE))
        else:
            answers = answer(range(len(examples)))
        if not any(one is not None for one in answers):
            raise ValueError(
                f"the LLM {pool.names[-1]} has no right answer to {len(examples)} training problems: there are no "
                "references; use those of the task (references=task), more problems, or a larger max_new_tokens"
            )
        _write(path, answers)
    if own is None:
        for joined in folder.glob(_part_name("*")):
            joined.unlink()
    return _read(path, len(examples))


def _part_name(part: int | str) -> str:
    return f"references-{part:05d}.json" if isinstance(part, int) else f"references-{part}.json"


def _part(folder: Path, part: int, some: range, answer: Callable[[Sequence[int]], Answers]) -> Answers:
    """The answers of one part, made if they are not there."""
    path = folder / _part_name(part)
    if not path.is_file():
        if (folder / f"shard-{part:05d}.json").is_file():
            raise ValueError(_lacking(folder, path.name))
        _write(path, answer(some))
    return _read(path, len(some))


def _lacking(folder: Path, name: str) -> str:
    return f"{folder} holds preferences on the LLM's answers and lacks {name}, the answers; give another folder"


def _write(path: Path, answers: Answers) -> None:
    write_text(path, json.dumps([None if answer is None else answer.tolist() for answer in answers]) + "\n")


def _answers(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    max_new_tokens: int,
    scheduling: Scheduling | None,
    skip_too_long: bool,
) -> Answers:
    """The LLM's right answers to examples that fit."""
    capacity, fitting = sequence_capacity(pool, max_new_tokens, None), []
    for number, example in enumerate(examples):
        try:
            check_fit(f"example {example.id}", pool.encode_prompt(example), (), capacity, max_new_tokens)
        except ValueError:
            if not skip_too_long:
                raise
            continue
        fitting.append(number)
    episodes = decode_alone(
        pool.models[-1],
        task,
        [examples[number] for number in fitting],
        max_new_tokens,
        scheduling,
        label="the LLM's references",
        pool=pool,
    )
    answers: Answers = [None] * len(examples)
    for number, episode in zip(fitting, episodes, strict=True):
        if episode.correct and episode.terminated:
            answers[number] = episode.tokens
    return answers


def _read(path: Path, count: int) -> Answers:
    """Answers that were kept.

    Raises:
        ValueError: they are not those of `count` examples.
    """
    try:
        kept = json.loads(path.read_text())
        answers = [None if answer is None else np.array(answer, dtype=np.int64) for answer in kept]
        if len(answers) != count or any(answer is not None and answer.shape != (len(answer),) for answer in answers):
            raise ValueError(f"it holds {len(answers)} answers, there are {count} problems")
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{path} holds no readable answers ({error}); delete {path.parent}, and its preferences are made again"
        ) from error
    return answers
