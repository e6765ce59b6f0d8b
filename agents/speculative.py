"""Greedy speculative decoding: what the LLM would write, for less than it takes alone; the price to beat.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", the greedy case: the SLM drafts a
few tokens, the LLM reads them all in one pass, which tells what it would have written in the place of each, and the
first that it would not have written is replaced by its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from agents.common.episode_queue import EpisodeQueue
from agents.common.rollout import EndedRow, Episode, Scheduling, TakenBack, episode_of
from envs.arrays import IntArray
from envs.decoding.session import Session
from envs.decoding.verification import VerifyingSession
from envs.models.pool import ModelPool
from envs.progress import ProgressBar
from envs.tasks.task import Example, Task


def speculate(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    draft_tokens: int = 16,
    max_new_tokens: int = 128,
    scheduling: Scheduling | None = None,
    label: str | None = None,
) -> list[Episode]:
    """Answer every example with the tokens the LLM alone would write, most of them drafted by the SLM.

    Drafts that are right count as the SLM's tokens. The ledger has each pass that was made, those for drafts that were
    forgotten too: that is the price of speculation. An LLM pass that checks needs its output head at every drafted
    position, where the ledger counts it once, as for any pass.

    Args:
        pool: the models; the first drafts, the last one checks.
        task: judges the answers.
        examples: what to answer; their positions number the episodes.
        draft_tokens: how many tokens the SLM drafts before the LLM checks them; fewer where it ends the response or
            nears its limit.
        max_new_tokens: the longest response.
        scheduling: how many rows share passes; they draft together, and none is gathered for.
        label: of the progress bar; none is shown without.

    Returns:
        Episodes in the order of `examples`, with the drafts that were refused as what was taken back; nobody decides,
        so that decisions and scores are zeros.

    Raises:
        ValueError: there are no examples or draft tokens, or a prompt does not fit the cache.
    """
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens must be at least 1, is {draft_tokens}")
    if not examples:
        raise ValueError("there are no examples to decode")
    rows = min((scheduling or Scheduling()).rows_for(pool), len(examples))
    session = VerifyingSession(pool, rows, max_new_tokens)
    prompts = [pool.encode(example.prompt) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        session.check_fit(f"example {example.id}", prompt)
    limits = np.zeros(rows, dtype=np.int64)
    refused: list[list[TakenBack]] = [[] for _ in range(rows)]

    def start(rows: IntArray, numbers: IntArray) -> None:
        session.start(rows, [prompts[n] for n in numbers], numbers)
        limits[rows] = session.lengths(rows) + max_new_tokens
        for row in rows:
            refused[row] = []

    episodes: list[Episode | None] = [None] * len(examples)
    queue = EpisodeQueue(np.arange(rows), len(examples), start)
    with ProgressBar(total=len(examples), desc=label, disable=label is None, leave=False, mininterval=0.5) as progress:
        while len(queue.fill()) or len(queue.busy):
            busy = queue.busy
            begun = session.lengths(busy)
            # the LLM writes a token of its own behind a draft: the last one of a response need not be drafted
            draft(session, busy, np.minimum(begun + draft_tokens, limits[busy] - 1))
            drafts = [session.response(row) for row in busy]
            terminated, truncated = session.verify(busy, session.lengths(busy) - begun, len(pool) - 1)
            for row, drafted in zip(busy, drafts, strict=True):
                writers = session.writers(row)
                kept = int(len(writers) - (writers[-1] > 0))  # behind it the LLM's own token
                if kept < len(drafted):
                    refused[row].append(TakenBack(kept, 0, drafted[kept:]))
            ended = terminated | truncated
            for row, by_itself in zip(busy[ended], terminated[ended], strict=True):
                done = EndedRow(int(row), queue.item(row), bool(by_itself))
                episode = episode_of(session, task, examples[done.item], done)
                episodes[done.item] = replace(episode, taken_back=tuple(refused[row]))
                progress.update()
            queue.end(busy[ended])
    return [episode for episode in episodes if episode is not None]


def draft(session: Session, rows: IntArray, lengths: IntArray) -> None:
    """Let the SLM write in each row, (n,), until it has ended or holds so many tokens, (n,), prompt included."""
    while True:
        short = session.lengths(rows) < lengths
        rows, lengths = rows[short], lengths[short]
        if not len(rows):
            return
        ended = session.step(rows, np.zeros_like(rows)).terminated
        rows, lengths = rows[~ended], lengths[~ended]
