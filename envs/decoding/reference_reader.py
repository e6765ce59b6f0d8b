"""Reading reference solutions: checks, passes of like length, and what the models make of every token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.decoding.teacher_forcing import TeacherSession, View
from envs.models.pool import ModelPool
from envs.progress import ProgressBar
from envs.tasks.task import Example


@dataclass(frozen=True)
class ReadReferences:
    """References that were read together; number i of them is in row i of the session.

    Attributes:
        examples: which examples they are of, by number, (m,).
        views: of each what was kept of the SLM before each of its tokens, (length, ...).
        tokens: of each what every model would write there, (length, models).
        log_probabilities: of each those of its own tokens under every model, (length, models); none where they were
            not asked for.
    """

    examples: Sequence[int]
    views: Sequence[Tensor]
    tokens: Sequence[IntArray]
    log_probabilities: Sequence[FloatArray]


class ReferenceReader:
    """Lets all models of a session read the reference solutions of examples, many in each pass.

    Args:
        session: its first rows hold the references.
        examples: problems with their reference solutions.
        rows: how many references are read at a time; all rows of the session where None.
        responses: tokens to read in place of each example's reference, the end of sequence included.
        skip_too_long: leave examples out that do not fit, instead of refusing them.

    Attributes:
        prompts: tokens of the examples' prompts.
        solutions: tokens of their references, the end of sequence included.
        fits: which examples fit, (examples,).

    Raises:
        ValueError: a reference that does not fit or that ends early; the error names the example.
    """

    def __init__(
        self,
        session: TeacherSession,
        examples: Sequence[Example],
        rows: int | None = None,
        responses: Sequence[IntArray] | None = None,
        skip_too_long: bool = False,
    ) -> None:
        self.session, self.rows = session, rows or session.rows
        self.prompts, self.solutions = encode(session.pool, examples, responses)
        self.fits: BoolArray = np.ones(len(examples), dtype=bool)
        for number, example in enumerate(examples):
            check_end(example, self.solutions[number], session.pool)
            try:
                session.check_fit(f"example {example.id}", self.prompts[number], self.solutions[number])
            except ValueError:
                if not skip_too_long:
                    raise
                self.fits[number] = False

    @property
    def starts(self) -> IntArray:
        """Where each of m solutions begins when they stand one after another, and where the last ends, (m + 1,)."""
        return offsets(self.solutions)

    def read(
        self,
        chosen: Sequence[int] | None = None,
        view: View | None = None,
        log_probabilities: bool = False,
        label: str | None = None,
    ) -> Iterator[ReadReferences]:
        """Read references; the session holds those of each part until the next one is asked for.

        Args:
            chosen: numbers of examples; all where None.
            view: what to keep of the SLM, as in `TeacherSession.start_references`.
            log_probabilities: whether to compute them.
            label: of the progress bar; none is shown without.
        """
        chosen = range(len(self.prompts)) if chosen is None else chosen
        # alike lengths together, so that passes are even
        order = sorted(chosen, key=lambda e: len(self.prompts[e]) + len(self.solutions[e]))
        with ProgressBar(total=len(order), desc=label, disable=label is None, leave=False) as progress:
            for first in range(0, len(order), self.rows):
                part = order[first : first + self.rows]
                likely: list[FloatArray] | None = [] if log_probabilities else None
                views, tokens = self.session.start_references(
                    rows=np.arange(len(part)),
                    prompts=[self.prompts[e] for e in part],
                    responses=[self.solutions[e] for e in part],
                    view=view,
                    log_probabilities=likely,
                )
                yield ReadReferences(part, views, tokens, likely or [])
                progress.update(len(part))


def encode(
    pool: ModelPool, examples: Sequence[Example], responses: Sequence[IntArray] | None = None
) -> tuple[list[IntArray], list[IntArray]]:
    """Tokens of the examples' prompts, and of their references with their ends, unless `responses` stand for them."""
    prompts = [pool.encode_prompt(example) for example in examples]
    if responses is not None:
        return prompts, list(responses)
    return prompts, [pool.encode_reference(example) for example in examples]


def check_end(example: Example, solution: IntArray, pool: ModelPool) -> None:
    """Refuse a reference, (tokens,), that ends before its last token."""
    if np.isin(solution[:-1], pool.end_tokens).any():
        raise ValueError(
            f"example {example.id}: its reference holds an end-of-sequence token before its end; mend the task's "
            "source, take what it holds out of the pool's stop, or drop the example"
        )


def offsets(solutions: Sequence[IntArray]) -> IntArray:
    """Where each of m solutions begins when they stand one after another, and where the last one ends, (m + 1,)."""
    return np.cumsum([0, *(len(solution) for solution in solutions)])
