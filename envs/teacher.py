"""A session whose rows can also be taught: given tokens, read by the models as if they had been written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from envs.cache import IntArray
from envs.costs import COLUMNS, WRITTEN, pass_entry
from envs.session import Session

# Logits held at once while references are read, in elements (256 MB in float32).
LOGITS_AT_ONCE = 2**26
View = Callable[[Tensor, Tensor], Tensor]


class TeacherSession(Session):
    """A `Session` for teacher forcing; see there for its arguments."""

    def extend(self, rows: IntArray, chunks: Sequence[IntArray]) -> None:
        """Append given tokens to the responses (teacher forcing), as if the SLM had written them.

        Raises:
            ValueError: a response would pass `max_new_tokens`, or a row is not in flight.
        """
        rows = self._checked(rows)
        counts = np.array([len(chunk) for chunk in chunks])
        ends = self._lengths[rows] + counts
        if not self._active[rows].all() or (ends - self._prompts[rows] >= self._limits[rows]).any():
            raise ValueError(f"rows {rows.tolist()} cannot take {counts.tolist()} more tokens and stay in flight")
        self._catch_up(rows)
        for row, chunk, end in zip(rows, chunks, ends, strict=True):
            self._tokens[row, end - len(chunk) : end] = chunk
            self._writers[row, end - len(chunk) : end] = 0
        self._lengths[rows] = ends
        self._since_llm[rows] += counts
        work = np.zeros((len(rows), len(self.pool), COLUMNS))
        work[:, 0, WRITTEN] = counts
        self._leave_unread(rows, work, np.arange(len(rows)))
        self.ledger[rows] += work

    def start_references(
        self,
        rows: IntArray,
        prompts: Sequence[IntArray],
        responses: Sequence[IntArray],
        view: View | None = None,
    ) -> tuple[list[Tensor], list[IntArray]]:
        """Start rows that hold whole reference responses, read by every model in one teacher-forced pass.

        The rows can be forked at any length; they are not in flight themselves.

        Args:
            rows: distinct rows, (n,).
            prompts: n arrays of token ids.
            responses: n arrays of token ids, the end-of-sequence token included.
            view: what to make of the SLM's hidden states (tokens, width) and logits (tokens, vocab); the hidden states
                in float32 where None.

        Returns:
            For each row the view before each token of the response (length, ...), and the tokens each model would write
            there (length, models).

        Raises:
            ValueError: a prompt or a response does not fit.
        """
        rows = self._checked(rows)
        for row, prompt, response in zip(rows, prompts, responses, strict=True):
            self.check_fit(f"row {row}", prompt, response)
            whole = np.concatenate([prompt, response])
            self._tokens[row, : len(whole)], self._writers[row, : len(whole)] = whole, 0
            self._prompts[row], self._lengths[row] = len(prompt), len(whole)
        self._active[rows], self._unread[rows], self._episodes[rows], self.ledger[rows] = False, False, rows, 0
        self._limits[rows] = self.max_new_tokens
        views: list[Tensor] = []
        choices = [np.empty((len(response), len(self.pool)), dtype=np.int64) for response in responses]
        for model, cache in enumerate(self._caches):
            cache.free(rows)
            seen = view or (lambda states, logits: states.float())
            found, tokens = self._read_every(model, rows, seen if model == 0 else None)
            views += [states[-len(response) :] for states, response in zip(found, responses, strict=False)]
            for i, response in enumerate(responses):
                choices[i][:, model] = tokens[i][-len(response) :]
        return views, choices

    def read_along(self, rows: IntArray, model: int) -> list[IntArray]:
        """Let a model other than the SLM read all but the last token of each row, as far as it has not yet.

        Returns:
            For each row the tokens the model would write after each token it has now read, (tokens,): the last one is
            what it would write in the place of the row's last token.
        """
        return self._read_every(model, self._checked(rows), None)[1]

    def _read_every(self, model: int, rows: IntArray, view: View | None) -> tuple[list[Tensor], list[IntArray]]:
        """Let a model read all but the last tokens; views and greedy tokens at each token read, a row each."""
        cache = self._caches[model]
        before, after = cache.lengths[rows], self._lengths[rows] - 1
        # logits of every position are large: few rows at a time where the vocabulary is
        longest = int((after - before).max())
        together = max(1, LOGITS_AT_ONCE // (max(1, longest) * self.pool.models[model].vocab_size))
        views: list[Tensor] = []
        greedy: list[IntArray] = []
        for first in range(0, len(rows), together):
            part = slice(first, first + together)
            chunks = [self._tokens[row, b:a] for row, b, a in zip(rows[part], before[part], after[part], strict=True)]
            started = time.perf_counter()
            states, logits = self.pool.models[model].feed(cache, rows[part], chunks, every_position=True)
            logits = logits[:, : self.pool.vocab_size]
            tokens = self.pool.greedy(model, logits)
            read = after[part] - before[part]
            self.ledger[rows[part], model] += pass_entry(read, before[part], time.perf_counter() - started)
            greedy += np.split(tokens, np.cumsum(read)[:-1])
            if view:
                pieces = zip(states.split(read.tolist()), logits.split(read.tolist()), strict=True)
                views += [view(*piece) for piece in pieces]
        return views, greedy
