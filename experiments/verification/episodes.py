"""What holds inside an episode, and between it and its problem, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from agents.common.policy import Policy
from envs.costs import COLUMNS, PASSES, SECONDS
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task
from experiments.traces.recorder import prompt_readers
from experiments.traces.schema import CHECKED, LEDGER, PROMPT_READERS, SEARCH, example_hash
from experiments.traces.trace import Head, Trace, TracedEpisode
from experiments.verification.ledgers import expected_decisions, expected_ledger

COUNTED = [column for column in range(COLUMNS) if column != SECONDS]
NAMES = {column: name for name, column in LEDGER.items()}


def head_faults(head: Head, wanted: Mapping[str, Any], pool: ModelPool | None) -> Iterator[str]:
    """What the head of a trace says otherwise than the manifest of its evaluation, or than the models that are there.

    Args:
        head: of the trace.
        wanted: columns and settings, and their values.
        pool: the models; sizes are not compared where None.
    """
    for key, value in wanted.items():
        said = head.settings.get(key) if key in head.settings else getattr(head, key)
        said = list(said) if isinstance(said, (list, tuple)) else said
        if said != value and not (isinstance(value, tuple) and said in value):
            yield f"{key} is {said}, the evaluation's is {value}"
    if pool is not None:
        here = [asdict(profile) for profile in pool.profiles]
        if [asdict(profile) for profile in head.profiles] != here:
            yield "the sizes of the models are not those of the models that are there"
        if head.settings["end_tokens"] != pool.end_tokens.tolist():
            yield f"end_tokens are {head.settings['end_tokens']}, those of the models are {pool.end_tokens.tolist()}"


def reader_faults(head: Head, policy: Policy) -> Iterator[str]:
    """Where a trace has other models read the prompt for its policy's sake than the policy asks for."""
    said, wanted = head.settings.get(PROMPT_READERS, []), prompt_readers(policy, len(head.models))
    if said != wanted:
        yield f"models {said} read prompts for the policy, which sees what {wanted} make of them"


def number_faults(trace: Trace, examples: Sequence[Example]) -> Iterator[str]:
    """Episodes that are missing, that are there twice, or that are not in the order of the problems."""
    numbers = [episode.episode for episode in trace.episodes]
    if numbers != list(range(len(examples))):
        missing = sorted({*range(len(examples))} - {*numbers})
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        yield (
            f"it holds {len(numbers)} episodes for {len(examples)} problems"
            + (f"; missing: {_some(missing)}" if missing else "")
            + (f"; there twice: {_some(twice)}" if twice else "")
            + ("" if missing or twice else ", not in their order")
        )


def episode_faults(head: Head, episode: TracedEpisode, example: Example, pool: ModelPool | None) -> Iterator[str]:
    """What does not hold of an episode by itself.

    Args:
        head: of its trace.
        episode: it.
        example: the problem of its number.
        pool: whose tokenizer reads its tokens; they are not read where None.
    """
    if episode.example != example.id:
        yield f"it answers {episode.example}, the problem of its number is {example.id}"
    if episode.example_hash != example_hash(example):
        yield f"the problem {example.id} is not the one that was answered: its hash is {example_hash(example)}"
    if pool is not None and episode.prompt.tolist() != pool.encode_prompt(example).tolist():
        yield "its prompt ids are not those of the problem"
    length = len(episode.response)
    misshapen = [*_misshapen(head, episode, length, pool)]
    yield from misshapen
    if misshapen:
        return
    yield from _ending(head, episode, length)
    if pool is not None and pool.decode(episode.response) != episode.text:
        yield "its text is not that of its tokens"
    if head.decoding == SEARCH and not episode.correct and episode.writers.any():
        yield "a model other than the SLM wrote, though no right answer was found"
    yield from _decisions(head, episode)
    yield from _ledger(head, episode)


def readable(head: Head, episode: TracedEpisode, example: Example, pool: ModelPool) -> bool:
    """Whether models can read an episode: it has the shapes that it should, and the prompt of its problem."""
    misshapen = [*_misshapen(head, episode, len(episode.response), pool)]
    return not misshapen and episode.prompt.tolist() == pool.encode_prompt(example).tolist()


def verdict_faults(episode: TracedEpisode, example: Example, task: Task) -> Iterator[str]:
    """Where the task judges otherwise."""
    right = task.is_correct(example, episode.text)
    if right != episode.correct:
        yield f"its verdict is {_verdict(episode.correct)}, the task says {_verdict(right)}"


def _misshapen(head: Head, episode: TracedEpisode, length: int, pool: ModelPool | None) -> Iterator[str]:
    models = len(head.models)
    if not 1 <= length <= head.settings["max_new_tokens"]:
        yield f"it has {length} tokens, where there may be 1 to {head.settings['max_new_tokens']}"
    if len(episode.writers) != length:
        yield f"it has {length} tokens and {len(episode.writers)} writers"
    elif length and not 0 <= int(episode.writers.min()) <= int(episode.writers.max()) < models:
        yield f"its writers are not among the {models} models"
    ids = np.concatenate([episode.response, *(back.tokens for back in episode.taken_back)])
    if (ids < 0).any() or (pool is not None and (ids >= pool.vocab_size).any()):
        yield "it holds ids that no model writes"
    scores = length if head.policy_fingerprint is not None else 0
    if head.decoding != CHECKED and len(episode.scores) != scores:
        yield f"it has {len(episode.scores)} scores for {scores} decided tokens"
    if episode.ledger.shape != (models, COLUMNS):
        yield f"its ledger has {len(episode.ledger)} entries for {models} models"


def _ending(head: Head, episode: TracedEpisode, length: int) -> Iterator[str]:
    ends = np.isin(episode.response, head.settings["end_tokens"])
    if ends[:-1].any():
        yield f"it goes on behind the end of sequence at token {int(ends.argmax())}"
    if bool(ends[-1]) != episode.terminated:
        said = "ended by itself" if episode.terminated else "did not end by itself"
        yield f"it says that it {said}, its last token is {'an' if ends[-1] else 'no'} end of sequence"
    elif not episode.terminated and length != head.settings["max_new_tokens"]:
        yield f"it was cut at {length} tokens, the longest response has {head.settings['max_new_tokens']}"


def _decisions(head: Head, episode: TracedEpisode) -> Iterator[str]:
    passes, wanted = episode.decisions[PASSES], expected_decisions(head, episode)
    rest = [NAMES[column] for column in COUNTED if column != PASSES and episode.decisions[column]]
    if passes != wanted or rest or episode.decisions[SECONDS] < 0:
        more = f", with {', '.join(rest)}" if rest else ""
        yield f"its policy decided {passes:g} times{more}; by its tokens {wanted} times"
    if head.policy_fingerprint is None or head.threshold is None or head.decoding == CHECKED:
        return  # the ledger follows from the decisions on drafts, and is compared below
    # as the decoding loop compares them: in float32
    chosen = np.where(episode.scores >= head.threshold, 0, len(head.models) - 1)
    wrong = np.flatnonzero(chosen != episode.writers)
    if len(wrong):
        at = int(wrong[0])
        yield (
            f"token {at} was written by model {episode.writers[at]}, its score {episode.scores[at]:g} at threshold "
            f"{head.threshold:g} chooses {chosen[at]}"
        )
    if head.per_response and len(np.unique(episode.scores)) > 1:
        yield "its policy decided once, and its scores differ"


def _ledger(head: Head, episode: TracedEpisode) -> Iterator[str]:
    try:
        wanted = expected_ledger(head, episode)
    except ValueError as error:
        yield f"{error}"
        return
    for model, column in np.argwhere((episode.ledger != wanted)[:, COUNTED]).tolist():
        column = COUNTED[column]
        yield (
            f"{head.models[model]}: {NAMES[column]} are {episode.ledger[model, column]:g} in the ledger, "
            f"{wanted[model, column]:g} by its writers"
        )
    if (episode.ledger[:, SECONDS] < 0).any():
        yield "its ledger holds negative seconds"


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")


def _verdict(right: bool) -> str:
    return "right" if right else "wrong"
