"""A session whose rows can also be taught: given tokens that models read as if they had been written."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from envs.arrays import UNKNOWN, BoolArray, FloatArray, IntArray
from envs.costs import COLUMNS, WRITTEN, pass_entry
from envs.decoding.judges import opinions
from envs.decoding.session import Session

# Logits held at once while references are read, in elements (256 MB in float32).
LOGITS_AT_ONCE = 2**26
View = Callable[[Tensor, Tensor], Tensor]


def log_probability(logits: Tensor, tokens: IntArray) -> FloatArray:
    """Log-probabilities of given tokens, (n,), under next-token logits (n, vocab): (n,)."""
    logits = logits.float()
    chosen = logits.gather(-1, torch.from_numpy(tokens).to(logits.device)[:, None])[:, 0]
    return np.asarray((chosen - logits.logsumexp(-1)).double().cpu().numpy())


def _final_states(states: Tensor, logits: Tensor) -> Tensor:
    """A view: the hidden states after the last layer."""
    return states.float()


class TeacherSession(Session):
    """A `Session` for teacher forcing; see there for its arguments."""

    def resume(
        self,
        rows: IntArray,
        prompts: Sequence[IntArray],
        responses: Sequence[IntArray],
        unread: IntArray | None = None,
        afresh: BoolArray | None = None,
    ) -> None:
        """`start` with responses that are given; what models have read of the same beginnings, they do not read again.

        Args:
            rows: distinct rows, (n,).
            prompts: n arrays of token ids.
            responses: n arrays of token ids.
            unread: how much of each response may have been read at most by models that will be asked what they think
                of the rest, (n,); the whole where None.
            afresh: rows that go on from nothing they have read, (n,); none where None.
        """
        rows = self._checked(rows)
        kept = np.array(
            [self._shared(*row) for row in zip(rows.tolist(), prompts, responses, strict=True)], dtype=np.int64
        )
        if afresh is not None:
            kept[afresh] = UNKNOWN
        if unread is not None:
            # what was read of a row that stands there already is read
            at_end = self._lengths[rows] - self._prompt_lengths[rows] <= np.minimum(kept, unread)
            kept = np.where(kept < 0, kept, np.minimum(kept, unread) - at_end)
        anew, again = np.flatnonzero(kept < 0), np.flatnonzero(kept >= 0)
        if len(anew):
            self.start(rows[anew], [prompts[i] for i in anew.tolist()], responses=[responses[i] for i in anew.tolist()])
        if len(again):
            resumed = rows[again]
            self.rewind(resumed, self._prompt_lengths[resumed] + kept[again])
            longer = again[[len(responses[i]) > kept[i] for i in again.tolist()]]
            if len(longer):
                self.extend(rows[longer], [responses[i][int(kept[i]) :] for i in longer.tolist()])
            for row in resumed.tolist():
                self._writers[row, self._prompt_lengths[row] : self._lengths[row]] = 0
            self._since_llm[resumed] = self._lengths[resumed] - self._prompt_lengths[resumed]

    def _shared(self, row: int, prompt: IntArray, response: IntArray) -> int:
        """Tokens of a response that a row begins with too, where it has the prompt and can go on; UNKNOWN elsewhere."""
        begun, whole = int(self._prompt_lengths[row]), int(self._lengths[row])
        same_prompt = begun == len(prompt) and np.array_equal(self._tokens[row, :begun], prompt)
        if not same_prompt or not self._followed[row] or len(response) >= self._limits[row]:
            return UNKNOWN
        held = min(whole - begun, len(response))
        differ = np.flatnonzero(self._tokens[row, begun : begun + held] != response[:held])
        shared = int(differ[0]) if len(differ) else held
        # a row that is out of flight goes on from before its end alone
        return shared if self._active[row] or shared < whole - begun else UNKNOWN

    def extend(self, rows: IntArray, chunks: Sequence[IntArray], model: int = 0) -> None:
        """Append given tokens to the responses (teacher forcing), as if a model had written them.

        The SLM reads them when the rows are next looked at, in one pass with what it had left unread before.

        Args:
            rows: distinct rows in flight, (n,).
            chunks: n arrays of at least one token id.
            model: who is said to have written them.

        Raises:
            ValueError: there is no such model, a chunk is empty, a response would reach its limit, or a row is not in
                flight.
        """
        rows = self._checked(rows)
        if not 0 <= model < len(self.pool):
            raise ValueError(f"model must be in 0..{len(self.pool) - 1}, is {model}")
        counts = np.array([len(chunk) for chunk in chunks])
        if counts.min() < 1:
            raise ValueError(f"rows {rows[counts < 1].tolist()} are given no tokens; leave them out")
        ends = self._lengths[rows] + counts
        if not self._active[rows].all() or (ends - self._prompt_lengths[rows] >= self._limits[rows]).any():
            raise ValueError(f"rows {rows.tolist()} cannot take {counts.tolist()} more tokens and stay in flight")
        self._withdraw(rows)
        self._append(rows, chunks, model)
        self._leave_to_slm(rows)

    def start_references(
        self,
        rows: IntArray,
        prompts: Sequence[IntArray],
        responses: Sequence[IntArray],
        view: View | None = None,
        log_probabilities: list[FloatArray] | None = None,
    ) -> tuple[list[Tensor], list[IntArray]]:
        """Start rows that hold whole reference responses, read by every model in one teacher-forced pass.

        The rows can be forked at any length; they are not in flight themselves.

        Args:
            rows: distinct rows, (n,).
            prompts: n arrays of token ids.
            responses: n arrays of token ids, the end-of-sequence token included.
            view: what to make of the SLM's hidden states (tokens, width) and logits (tokens, vocab); the hidden states
                in float32 where None.
            log_probabilities: gains, for each row, each model's log-probabilities of the response's own tokens
                (length, models); they are not computed where None.

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
            self._prompt_lengths[row], self._lengths[row] = len(prompt), len(whole)
        self._active[rows], self._unread[rows], self._episodes[rows], self.ledger[rows] = False, False, rows, 0
        self._followed[rows] = True
        self._prompt_states.forget(rows)
        self._limits[rows] = self.max_new_tokens
        views: list[Tensor] = []
        choices = [np.empty((len(response), len(self.pool)), dtype=np.int64) for response in responses]
        likely = [np.empty(chosen.shape) for chosen in choices]
        for model, cache in enumerate(self._caches):
            cache.free(rows)
            own: list[FloatArray] | None = None if log_probabilities is None else []
            # the SLM alone is looked at
            wanted = (view or _final_states) if model == 0 else None
            viewed, tokens = self._read_every(model, rows, wanted, own=own)
            views += [states[-len(response) :] for states, response in zip(viewed, responses, strict=False)]
            for i, response in enumerate(responses):
                choices[i][:, model] = tokens[i][-len(response) :]
                if own is not None:
                    likely[i][:, model] = own[i][-len(response) :]
        if log_probabilities is not None:
            log_probabilities += likely
        return views, choices

    def read_along(self, rows: IntArray, model: int, whole: bool | BoolArray = False) -> list[IntArray]:
        """Let a model other than the SLM read all but the last token of each row, as far as it has not yet.

        Args:
            rows: distinct rows, (n,).
            model: who reads.
            whole: read the last token as well; for all rows or for each, (n,).

        Returns:
            For each row the tokens the model would write after each token it has now read, (tokens,): the last one is
            what it would write in the place of the row's last token, or with `whole` what it would write next.
        """
        return self._read_every(model, self._checked(rows), None, whole)[1]

    def read_with_opinions(
        self, rows: IntArray, model: int, whole: BoolArray, asked: Sequence[IntArray]
    ) -> tuple[list[IntArray], Tensor]:
        """`read_along`, and what the model thinks of given tokens in the places of the last ones of each row.

        Args:
            rows: as in `read_along`.
            model: who reads.
            whole: as in `read_along`, for each row, (n,).
            asked: the tokens that are thought about, n arrays; the last one in the place of the row's last token. The
                model must not have read what stands before the first one.

        Returns:
            What `read_along` returns, and opinions on all of them, row after row, (tokens, OPINION).
        """
        wanted = iter(zip(np.broadcast_to(whole, len(rows)).tolist(), asked, strict=True))

        def view(_: Tensor, logits: Tensor) -> Tensor:
            behind, tokens = next(wanted)  # rows are viewed in their order
            end = len(logits) - behind
            return opinions(logits[end - len(tokens) : end], tokens)

        thought, choices = self._read_every(model, self._checked(rows), view, whole)
        return choices, torch.cat(thought)

    def _read_every(
        self,
        model: int,
        rows: IntArray,
        view: View | None,
        whole: bool | BoolArray = False,
        own: list[FloatArray] | None = None,
    ) -> tuple[list[Tensor], list[IntArray]]:
        """Let a model read all but the last tokens, or all; views and greedy tokens at each token read, a row each.

        `own` gains, for each row, the log-probability of the row's own token behind each token read (all but the last).
        """
        cache = self._caches[model]
        before, after = cache.lengths[rows], self._lengths[rows] - np.where(whole, 0, 1)
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
            if own is not None:
                # row by row: a distribution of every token at once would be a second copy of all logits
                behind = [
                    self._tokens[row, b + 1 : a + 1]
                    for row, b, a in zip(rows[part], before[part], after[part], strict=True)
                ]
                own += [log_probability(*piece) for piece in zip(logits.split(read.tolist()), behind, strict=True)]
        return views, greedy

    def _withdraw(self, rows: IntArray) -> None:
        """Take out of the ledger what the SLM has been left to read: other tokens will be, or more of them at once."""
        rows = rows[self._unread[rows]]
        before = self._caches[0].lengths[rows]
        self.ledger[rows, 0] -= pass_entry(self._lengths[rows] - before, before, 0.0)
        self._unread[rows] = False

    def _append(self, rows: IntArray, chunks: Sequence[IntArray] | IntArray, model: int) -> None:
        """Write given tokens, as a model's."""
        counts = np.array([len(chunk) for chunk in chunks], dtype=np.int64)
        ends = self._lengths[rows] + counts
        for row, chunk, end in zip(rows, chunks, ends, strict=True):
            self._tokens[row, end - len(chunk) : end] = chunk
            self._writers[row, end - len(chunk) : end] = model
        self._lengths[rows] = ends
        self._since_llm[rows] = 0 if model > 0 else self._since_llm[rows] + counts
        self.ledger[rows, model, WRITTEN] += counts

    def _leave_to_slm(self, rows: IntArray) -> None:
        """Leave what the SLM has not read of rows for when they are next looked at."""
        ledger = np.zeros((len(rows), len(self.pool), COLUMNS))
        self._leave_unread(rows, ledger, np.arange(len(rows)))
        self.ledger[rows] += ledger
