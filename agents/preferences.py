"""Preferences over the two models, token by token: the shortcut, and rollouts where it is silent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from agents.policy import Policy
from agents.rollout import Scheduling, drive
from envs.cache import IntArray
from envs.models import ModelPool
from envs.session import BoolArray, Session
from envs.tasks.task import Example, Task

NOT_ROLLED_OUT = -1


@dataclass
class Preferences:
    """One row per token of the reference solutions (Zheng et al. 2025, section 3).

    Attributes:
        hidden: the SLM's hidden state before the token, float16, (n, width).
        cases: 1 the SLM would write the reference's token; 2 it would not, the LLM would; 3 neither would, (n,).
        agree: both models would write the same token, (n,).
        examples: index of the example, (n,).
        positions: index of the token in its solution, (n,).
        slm_tokens: what the SLM would write, (n,).
        outcomes: after the SLM's token the continued answer was right (1) or wrong (0), NOT_ROLLED_OUT elsewhere, (n,).
    """

    hidden: Tensor
    cases: npt.NDArray[np.int8]
    agree: BoolArray
    examples: IntArray
    positions: IntArray
    slm_tokens: IntArray
    outcomes: npt.NDArray[np.int8]

    def shares(self) -> dict[str, float]:
        """Shares of the cases, of agreement within case 3, and of right outcomes among rollouts."""
        third = self.cases == 3
        rolled = self.outcomes != NOT_ROLLED_OUT
        shares = {f"case_{case}": float((self.cases == case).mean()) for case in (1, 2, 3)}
        shares["agree_in_case_3"] = float(self.agree[third].mean()) if third.any() else 0.0
        shares["right_rollouts"] = float(self.outcomes[rolled].mean()) if rolled.any() else 0.0
        return shares


class Collector:
    """Collects preferences on reference solutions.

    Args:
        pool: the models; the last one is the LLM.
        task: judges the answers of rollouts.
        examples: problems with their reference solutions.
        max_new_tokens: the longest response; references must fit.
        scheduling: how rollouts share passes.

    Raises:
        ValueError: a reference that does not fit; the error names it.
    """

    def __init__(
        self,
        pool: ModelPool,
        task: Task,
        examples: Sequence[Example],
        max_new_tokens: int = 128,
        scheduling: Scheduling | None = None,
    ) -> None:
        if not examples:
            raise ValueError("there are no examples to collect preferences on")
        self.pool, self.task, self.examples = pool, task, examples
        self.scheduling = scheduling or Scheduling()
        self._prompts = [pool.encode(example.prompt) for example in examples]
        self._references = [pool.encode_response(example.reference) for example in examples]
        # half of the rows hold references, the others are forked from them
        self._rows = max(1, self.scheduling.rows_for(pool) // 2)
        self._session = Session(pool, 2 * self._rows, max_new_tokens)
        for example, prompt, reference in zip(examples, self._prompts, self._references, strict=True):
            self._session.check_fit(f"example {example.id}", prompt, reference)

    def shortcut(self) -> Preferences:
        """Cases 1, 2 and 3 of every token, from one teacher-forced pass of each model over each solution."""
        hidden: dict[int, Tensor] = {}
        choices: dict[int, IntArray] = {}
        everything = range(len(self.examples))
        with tqdm(total=len(self.examples), desc="shortcut", leave=False, mininterval=0.5) as progress:
            for batch in self._batches(everything):
                states, tokens = self._load(batch)
                hidden |= {e: state.to(torch.float16).cpu() for e, state in zip(batch, states, strict=True)}
                choices |= dict(zip(batch, tokens, strict=True))
                progress.update(len(batch))
        counts = [len(reference) for reference in self._references]
        target, chosen = np.concatenate(self._references), np.concatenate([choices[e] for e in everything])
        slm, llm = chosen[:, 0], chosen[:, -1]
        cases = np.where(slm == target, 1, np.where(llm == target, 2, 3)).astype(np.int8)
        return Preferences(
            hidden=torch.cat([hidden[e] for e in everything]),
            cases=cases,
            agree=slm == llm,
            examples=np.repeat(np.arange(len(counts)), counts),
            positions=np.concatenate([np.arange(count) for count in counts]),
            slm_tokens=slm,
            outcomes=np.full(len(cases), NOT_ROLLED_OUT, dtype=np.int8),
        )

    def rollouts(self, preferences: Preferences, where: BoolArray, policy: Policy, threshold: float) -> None:
        """Fill in outcomes: take the SLM's token, let the policy finish the answer, and judge it.

        The prefix a rollout shares with its reference is forked from the models' caches, never read again.

        Args:
            preferences: whose `outcomes` are written.
            where: the tokens to roll out, (n,).
            policy: finishes the answers.
            threshold: the policy's SLM threshold.
        """
        wanted = [np.flatnonzero(where & (preferences.examples == e)) for e in range(len(self.examples))]
        forks = np.arange(self._rows, 2 * self._rows)
        with tqdm(total=int(where.sum()), desc="rollouts", leave=False, mininterval=0.5) as progress:
            for batch in self._batches([e for e, tokens in enumerate(wanted) if len(tokens)]):
                self._load(batch)
                queue = [(slot, int(token)) for slot, e in enumerate(batch) for token in wanted[e]]
                self._roll(preferences, batch, queue, forks, policy, threshold, progress)

    def _roll(
        self,
        preferences: Preferences,
        batch: Sequence[int],
        queue: list[tuple[int, int]],
        forks: IntArray,
        policy: Policy,
        threshold: float,
        progress: tqdm[Any],
    ) -> None:
        serving = np.zeros(self._session.rows, dtype=np.int64)

        def refill(free: IntArray) -> tuple[IntArray, IntArray]:
            taken = [queue.pop() for _ in range(min(len(free), len(queue)))]
            rows = free[: len(taken)]
            if taken:
                sources, tokens = (np.array(part) for part in zip(*taken, strict=True))
                prompts = np.array([len(self._prompts[batch[slot]]) for slot in sources])
                lengths = prompts + preferences.positions[tokens]
                self._session.fork(sources, rows, lengths, preferences.slm_tokens[tokens])
                serving[rows] = tokens
            return rows, np.zeros(len(rows), dtype=np.int64)  # the SLM's token comes first

        def finish(row: int, terminated: bool) -> None:
            token = serving[row]
            text = self.pool.decode(self._session.response(row))
            example = self.examples[preferences.examples[token]]
            preferences.outcomes[token] = self.task.is_correct(example, text)
            progress.update()

        drive(self._session, forks, policy, threshold, self.scheduling.gather, refill, finish)

    def _batches(self, chosen: Sequence[int]) -> list[list[int]]:
        """Examples in groups that fit the rows for references, of like length so that little is padded."""
        ordered = sorted(chosen, key=lambda e: len(self._prompts[e]) + len(self._references[e]))
        return [ordered[first : first + self._rows] for first in range(0, len(ordered), self._rows)]

    def _load(self, batch: Sequence[int]) -> tuple[list[Tensor], list[IntArray]]:
        rows = np.arange(len(batch))
        return self._session.start_references(
            rows, [self._prompts[e] for e in batch], [self._references[e] for e in batch]
        )
