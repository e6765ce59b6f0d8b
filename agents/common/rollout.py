"""Decode with a policy: whole tasks, or continuations of forked rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from agents.common.policy import Policy, decides_once
from envs.arrays import FloatArray, IntArray
from envs.costs import COLUMNS, PASSES, SECONDS
from envs.decoding.decoder import Decoder
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree, check_tree
from envs.prefix_tree.tree_session import TreeSession
from envs.tasks.task import Example, Task

UNDECIDED = -1


@dataclass(frozen=True)
class Episode:
    """One response.

    Attributes:
        example: what was answered.
        tokens: token ids of the response, (n,).
        writers: the model that wrote each, (n,).
        text: the response.
        correct: whether it answers the example.
        terminated: whether it came to an end by itself.
        ledger: what the models did for it, (models, COLUMNS).
        decisions: what the policy did for it: its scores as passes, and their seconds, (COLUMNS,).
        scores: the policy's score at each decision, (n,).
    """

    example: Example
    tokens: IntArray
    writers: npt.NDArray[np.int8]
    text: str
    correct: bool
    terminated: bool
    ledger: FloatArray
    decisions: FloatArray
    scores: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Scheduling:
    """How rows share passes; it changes speed alone, never a token.

    Args:
        rows: sequences in flight; those memory was planned for (`models.rows`) where None.
        gather: rows that wait for the LLM step once they are this share of the rows in flight, so that one LLM pass
            serves many while the others go on; 0 makes none wait.
    """

    rows: int | None = None
    gather: float = 0.5

    def __post_init__(self) -> None:
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows must be at least 1, is {self.rows}")
        if not 0 <= self.gather <= 1:
            raise ValueError(f"gather must be in [0, 1], is {self.gather}")

    def rows_for(self, pool: ModelPool) -> int:
        """The rows to open over `pool`."""
        return self.rows or pool.rows or 64


def decode(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    policy: Policy,
    threshold: float = 0.5,
    max_new_tokens: int = 128,
    scheduling: Scheduling | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    label: str | None = None,
    tree: PrefixTree | None = None,
) -> list[Episode]:
    """Answer every example, the policy choosing the writer of each token.

    Args:
        pool: the models; the last one is the LLM.
        task: judges the answers.
        examples: what to answer; their positions number the episodes.
        policy: scores decisions.
        threshold: the SLM writes where the score is at least this.
        max_new_tokens: the longest response.
        scheduling: how rows share passes.
        sampling: greedy where None.
        seed: of sampled decoding.
        label: of the progress bar; none is shown without.
        tree: a replay tree of this pool and task to walk instead of decoding; nothing is timed then.

    Returns:
        Episodes in the order of `examples`.

    Raises:
        ValueError: there are no examples, a prompt does not fit the cache, or tokens are sampled with a tree.
    """
    if not examples:
        raise ValueError("there are no examples to decode")
    scheduling = scheduling or Scheduling()
    rows = min(scheduling.rows_for(pool), len(examples))
    session: Decoder
    if tree is None:
        session = Session(pool, rows, max_new_tokens, sampling=sampling)
    else:
        check_tree(tree, pool, task, max_new_tokens, sampling)
        session = TreeSession(tree, rows)
    prompts = [pool.encode(example.prompt) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        session.check_fit(f"example {example.id}", prompt)
    episodes: list[Episode | None] = [None] * len(examples)
    serving = np.zeros(session.rows, dtype=np.int64)
    scores = np.zeros((session.rows, max_new_tokens), dtype=np.float32)
    decisions = np.zeros((session.rows, COLUMNS))
    started = 0

    def refill(free: IntArray) -> tuple[IntArray, IntArray]:
        nonlocal started
        rows = free[: len(examples) - started]
        if len(rows):
            numbers = np.arange(started, started + len(rows))
            generators = None if sampling is None else [np.random.default_rng([seed, int(n)]) for n in numbers]
            session.start(rows, [prompts[n] for n in numbers], numbers, generators)
            serving[rows], decisions[rows] = numbers, 0
            started += len(rows)
        return rows, np.full(len(rows), UNDECIDED)

    def finish(row: int, terminated: bool) -> None:
        example, tokens = examples[serving[row]], session.response(row)
        text = pool.decode(tokens)
        episodes[serving[row]] = Episode(
            example, tokens, session.writers(row), text, session.correct(row, task, example), terminated,
            session.ledger[row].copy(), decisions[row].copy(), scores[row, : len(tokens)].copy(),
        )  # fmt: skip
        progress.update()

    with tqdm(total=len(examples), desc=label, disable=label is None, leave=False, mininterval=0.5) as progress:
        decode_loop(
            session, np.arange(session.rows), policy, threshold, scheduling.gather, refill, finish, scores, decisions
        )
    session.free(np.arange(session.rows))
    return [episode for episode in episodes if episode is not None]


def decode_loop(
    session: Decoder,
    rows: IntArray,
    policy: Policy,
    threshold: float,
    gather: float,
    refill: Callable[[IntArray], tuple[IntArray, IntArray]],
    finish: Callable[[int, bool], None],
    scores: npt.NDArray[np.float32] | None = None,
    decisions: FloatArray | None = None,
) -> None:
    """Keep `rows` of a session busy until `refill` starts no more of them.

    Args:
        session: where the rows live.
        rows: the rows to use.
        policy: scores decisions.
        threshold: the SLM writes where the score is at least this.
        gather: see `Scheduling`.
        refill: given free rows, starts some and returns them with the action each must take first, or UNDECIDED.
        finish: called with a row that has ended, and whether it terminated.
        scores: filled with each row's scores by position, (session.rows, max_new_tokens).
        decisions: gains what the policy did for each row, (session.rows, COLUMNS).

    Raises:
        FloatingPointError: a score is not a number.
    """
    llm = len(session.pool) - 1
    once = decides_once(policy)
    actions = np.full(session.rows, UNDECIDED)
    lasting = np.full(session.rows, UNDECIDED)  # the action of a whole response, once it is decided
    free, busy = np.asarray(rows), np.zeros(0, dtype=np.int64)
    while True:
        if len(free):
            started, first = refill(free)
            actions[started], lasting[started] = first, UNDECIDED
            free = np.setdiff1d(free, started)
            busy = np.sort(np.concatenate([busy, started]))
        if not len(busy):
            return
        undecided = busy[actions[busy] == UNDECIDED]
        if len(undecided):
            observation = session.observe(undecided)
            begun = time.perf_counter()
            with torch.no_grad():
                score = policy.score(observation).float().cpu().numpy()
            if np.isnan(score).any():
                raise FloatingPointError(f"{type(policy).__name__} scored NaN; check its weights and its inputs")
            if decisions is not None:
                decisions[undecided, PASSES] += 1
                decisions[undecided, SECONDS] += (time.perf_counter() - begun) / len(undecided)
            actions[undecided] = np.where(score >= threshold, 0, llm)
            if scores is not None:
                scores[undecided, observation.positions] = score
            if once:
                lasting[undecided] = actions[undecided]
                if scores is not None:
                    scores[undecided] = score[:, None]
                given = undecided[actions[undecided] > 0]
                if len(given):
                    session.release_slm(given)
        waiting = actions[busy] > 0
        go = busy if waiting.sum() >= max(1.0, gather * len(busy)) or waiting.all() else busy[~waiting]
        step = session.step(go, actions[go])
        actions[go] = lasting[go]
        ended = step.terminated | step.truncated
        if ended.any():
            for row, terminated in zip(go[ended], step.terminated[ended], strict=True):
                finish(int(row), bool(terminated))
            free = np.concatenate([free, go[ended]])
            busy = np.setdiff1d(busy, go[ended])
