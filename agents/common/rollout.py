"""Decode with a policy: whole tasks, or continuations of forked rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from agents.common.episode_queue import EpisodeQueue
from agents.common.policy import DRAFTED, Policy, as_tensor, check_scores
from envs.arrays import NO_ACTION, FloatArray, IntArray
from envs.costs import COLUMNS, PASSES, SECONDS
from envs.decoding.checked_session import CheckedSession
from envs.decoding.checking import CheckingDecoder
from envs.decoding.decoder import Decoder
from envs.decoding.observation import Observation, TakenBack
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.models.language_model import LanguageModel
from envs.models.pool import ModelPool
from envs.prefix_tree.checked_tree_session import CheckedTreeSession
from envs.prefix_tree.tree import PrefixTree
from envs.prefix_tree.tree_session import TreeSession, check_tree
from envs.progress import ProgressBar
from envs.tasks.task import Example, Task


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
        scores: the policy's score at each decision, in order: one a token, and more where tokens are taken back or ends
            are decided on.
        taken_back: tokens that are not part of the response any more, in the order in which they were taken back.
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
    taken_back: Sequence[TakenBack] = ()


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
    first: int = 0,
) -> list[Episode]:
    """Answer every example, the policy choosing the writer of each token.

    Args:
        pool: the models; the last one is the LLM.
        task: judges the answers.
        examples: what to answer; their positions number the episodes, from `first` on.
        policy: scores decisions.
        threshold: the SLM writes where the score is at least this.
        max_new_tokens: the longest response.
        scheduling: how rows share passes.
        sampling: greedy where None.
        seed: of sampled decoding.
        label: of the progress bar; none is shown without.
        tree: a replay tree of this pool and task to walk instead of decoding; nothing is timed then.
        first: the number of the first example, where others are answered elsewhere.

    Returns:
        Episodes in the order of `examples`.

    Raises:
        ValueError: there are no examples, a prompt does not fit the cache, or tokens are sampled with a tree.
    """
    scheduling = scheduling or Scheduling()
    rows = _rows(scheduling, pool, examples)
    if tree is not None:
        check_tree(tree, pool, task, max_new_tokens, sampling)
    session = decoder_for(policy, pool, rows, max_new_tokens, sampling, tree)
    queue = _queue(session, examples, sampling, seed, partial(session.start, observed=policy.observes), first)
    record = DecisionRecord(rows, max_new_tokens)
    episodes: list[Episode | None] = [None] * len(examples)
    with ProgressBar(total=len(examples), desc=label, disable=label is None, leave=False, mininterval=0.5) as progress:
        for ended in decode_loop(session, queue, policy, threshold, gather=scheduling.gather, record=record):
            decisions, scores = record.of(ended.row)
            episodes[ended.item] = episode_of(session, task, examples[ended.item], ended, decisions, scores)
            progress.update()
    session.free(np.arange(rows))
    return [episode for episode in episodes if episode is not None]


def decoder_for(
    policy: Policy, pool: ModelPool, rows: int, max_new_tokens: int, sampling: Sampling | None, tree: PrefixTree | None
) -> Decoder:
    """What a policy decodes by: live or along a tree, with drafts checked where it has a judge."""
    if policy.judge is not None:
        if tree is not None:
            return CheckedTreeSession(tree, rows, judge=policy.judge)
        return CheckedSession(pool, rows, max_new_tokens, sampling=sampling, judge=policy.judge)
    if tree is not None:
        return TreeSession(tree, rows)
    return Session(pool, rows, max_new_tokens, sampling=sampling)


def decode_alone(
    model: LanguageModel,
    task: Task,
    examples: Sequence[Example],
    max_new_tokens: int = 128,
    scheduling: Scheduling | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
    label: str | None = None,
    pool: ModelPool | None = None,
) -> list[Episode]:
    """Let one model answer every example, and do no work but its own.

    Args:
        model: writes every token, and reads what it must for that.
        task: judges the answers.
        examples: what to answer; their positions number the episodes.
        max_new_tokens: the longest response.
        scheduling: how many rows share passes.
        sampling: greedy where None.
        seed: of sampled decoding.
        label: of the progress bar; none is shown without.
        pool: one that the model is of: its tokenizer, its end tokens and its limits hold, and ledgers are (models,
            COLUMNS), zeros but for this model's. A pool of this model alone where None.

    Returns:
        Episodes in the order of `examples`; nobody decides, so that decisions and scores are zeros.

    Raises:
        ValueError: there are no examples, a prompt does not fit the cache, or the model is not of the pool.
    """
    pool = pool or ModelPool([model])
    numbers = [number for number, other in enumerate(pool.models) if other is model]
    if not numbers:
        raise ValueError(
            f"{model.name} is not of the pool {', '.join(pool.names)}; leave the pool out, or name its own"
        )
    rows = _rows(scheduling, pool, examples)
    session = Session(pool, rows, max_new_tokens, sampling=sampling)
    queue = _queue(session, examples, sampling, seed, partial(session.start, observed=False))
    episodes: list[Episode | None] = [None] * len(examples)
    with ProgressBar(total=len(examples), desc=label, disable=label is None, leave=False, mininterval=0.5) as progress:
        for ended in decode_loop(session, queue, policy=None, first_action=numbers[0]):
            episodes[ended.item] = episode_of(session, task, examples[ended.item], ended)
            progress.update()
    return [episode for episode in episodes if episode is not None]


def _rows(scheduling: Scheduling | None, pool: ModelPool, examples: Sequence[Example]) -> int:
    """The rows to open for some examples."""
    if not examples:
        raise ValueError("there are no examples to decode")
    return min((scheduling or Scheduling()).rows_for(pool), len(examples))


def _queue(
    session: Decoder,
    examples: Sequence[Example],
    sampling: Sampling | None,
    seed: int,
    begin: Callable[..., object],
    first: int = 0,
) -> EpisodeQueue:
    """A queue of examples, whose prompts fit, for all rows of a session; `begin` is its `start`.

    Episodes are numbered from `first` on.
    """
    prompts = [session.pool.encode_prompt(example) for example in examples]
    for example, prompt in zip(examples, prompts, strict=True):
        session.check_fit(f"example {example.id}", prompt)

    def start(rows: IntArray, numbers: IntArray) -> None:
        generators = None if sampling is None else [np.random.default_rng([seed, first + int(n)]) for n in numbers]
        begin(rows, [prompts[n] for n in numbers], first + numbers, generators)

    return EpisodeQueue(np.arange(session.rows), len(examples), start)


def look(session: Decoder, rows: IntArray, sees: Sequence[str]) -> Observation:
    """What a policy that `sees` so much, of VIEWS and DRAFTED, may see of rows, (n,); see `Decoder.observe`."""
    observation = session.observe(rows)
    if DRAFTED in sees:
        assert isinstance(session, CheckingDecoder), "drafts are those of a policy with a judge"
        return session.look_back(rows, observation)
    if "llm" in sees:
        states = session.read_prompts(rows, len(session.pool) - 1).to(observation.hidden.device)
        observation = replace(observation, llm_prompt_states=states)
    return replace(observation, prompts=session.prompts(rows)) if "text" in sees else observation


class EndedRow(NamedTuple):
    """A row whose response has ended, which holds it until the next row is asked for.

    Attributes:
        row: of the session.
        item: its number in the queue.
        terminated: whether the response came to an end by itself.
    """

    row: int
    item: int
    terminated: bool


def episode_of(
    session: Decoder,
    task: Task,
    example: Example,
    ended: EndedRow,
    decisions: FloatArray | None = None,
    scores: npt.NDArray[np.float32] | None = None,
) -> Episode:
    """The response to `example` that a row holds; decisions and scores are zeros where nobody decided."""
    row, tokens = ended.row, session.response(ended.row)
    # one decision holds for all tokens, or there is one for each of these scores
    decided = len(tokens) if decisions is None else max(len(tokens), int(decisions[PASSES]))
    return Episode(
        example=example,
        tokens=tokens,
        writers=session.writers(row),
        text=session.pool.decode(tokens),
        correct=session.correct(row, task, example),
        terminated=ended.terminated,
        ledger=session.ledger[row].copy(),
        decisions=np.zeros(COLUMNS) if decisions is None else decisions,
        scores=np.zeros(len(tokens), dtype=np.float32) if scores is None else scores[:decided],
        taken_back=session.taken_back(row),
    )


class DecisionRecord:
    """What a policy did for the response each row of a session holds.

    Args:
        rows: of the session.
        max_new_tokens: the longest response.
    """

    def __init__(self, rows: int, max_new_tokens: int) -> None:
        self._scores = np.zeros((rows, max_new_tokens), dtype=np.float32)
        self._decisions: FloatArray = np.zeros((rows, COLUMNS))

    def begin(self, rows: IntArray) -> None:
        """Forget what was done for `rows`, (n,), which begin anew."""
        self._decisions[rows] = 0

    def add(self, rows: IntArray, scores: npt.NDArray[np.float32], seconds: float) -> None:
        """Note the next `scores` of `rows`, (n,) each, which took so many seconds together."""
        numbers = self._decisions[rows, PASSES].astype(np.int64)
        if numbers.max() >= self._scores.shape[1]:  # tokens were taken back, and decided on again
            self._scores = np.concatenate([self._scores, np.zeros_like(self._scores)], axis=1)
        self._scores[rows, numbers] = scores
        self._decisions[rows, PASSES] += 1
        self._decisions[rows, SECONDS] += seconds / len(rows)

    def add_whole(self, rows: IntArray, scores: npt.NDArray[np.float32]) -> None:
        """Let the scores of `rows`, (n,) each, stand for all positions of their responses."""
        self._scores[rows] = scores[:, None]

    def of(self, row: int) -> tuple[FloatArray, npt.NDArray[np.float32]]:
        """Copies of a row's decisions, (COLUMNS,), and of its scores, in order, and behind them whatever is there."""
        return self._decisions[row].copy(), self._scores[row].copy()


def decode_loop(
    session: Decoder,
    queue: EpisodeQueue,
    policy: Policy | None,
    threshold: float = 0.5,
    gather: float = 0.0,
    record: DecisionRecord | None = None,
    first_action: int = NO_ACTION,
) -> Iterator[EndedRow]:
    """Answer all that waits in a queue, and yield each row when its response has ended.

    Args:
        session: where the rows live.
        queue: the rows to use, and what waits for them.
        policy: scores decisions; where None, `first_action` is every action, and no row is observed.
        threshold: the SLM writes where the score is at least this.
        gather: see `Scheduling`.
        record: notes what the policy does.
        first_action: of every response; the policy's where NO_ACTION.

    Raises:
        FloatingPointError: a score is not a number.
        TypeError, ValueError: the first scores are not what `Policy.score` promises.
    """
    checked = False  # the policy's scores, once, before minutes of work
    llm = len(session.pool) - 1
    actions = np.full(session.rows, NO_ACTION)
    lasting = np.full(session.rows, NO_ACTION)  # the action of a whole response, once it is decided
    asked, episodes = np.zeros(session.rows, dtype=bool), np.zeros(session.rows, dtype=np.int64)
    while True:
        started = queue.fill()
        if len(started):
            asked[started] = False
            actions[started], lasting[started] = first_action, first_action if policy is None else NO_ACTION
            if record is not None:
                record.begin(started)
        busy = queue.busy
        if not len(busy):
            return
        undecided = busy[actions[busy] == NO_ACTION]
        if policy is not None and len(undecided):
            observation = look(session, undecided, policy.sees)
            asked[undecided], episodes[undecided] = True, observation.host_episodes
            begun = time.perf_counter()
            with torch.no_grad():
                scored = policy.score(observation)
                if not checked:
                    scored, checked = check_scores(policy, scored, len(undecided)), True
                score = as_tensor(scored).float().cpu().numpy()
            if np.isnan(score).any():
                raise FloatingPointError(f"{type(policy).__name__} scored NaN; check its weights and its inputs")
            if record is not None:
                record.add(undecided, score, time.perf_counter() - begun)
            actions[undecided] = np.where(score >= threshold, 0, llm)
            if policy.per_response:
                lasting[undecided] = actions[undecided]
                if record is not None:
                    record.add_whole(undecided, score)
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
                yield EndedRow(int(row), queue.item(row), bool(terminated))
            queue.end(go[ended])
            known = go[ended & asked[go]]
            if policy is not None and len(known):
                policy.forget(episodes[known])
