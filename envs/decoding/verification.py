"""A session in which one model checks what another has drafted."""

from __future__ import annotations

import numpy as np

from envs.arrays import BoolArray, IntArray
from envs.costs import WRITTEN
from envs.decoding.teacher_forcing import TeacherSession


class VerifyingSession(TeacherSession):
    """A session for speculative decoding: drafted tokens are checked in one pass; see `Session` for its arguments."""

    def verify(self, rows: IntArray, drafted: IntArray, model: int) -> tuple[BoolArray, BoolArray]:
        """Let a model check the last tokens of each row, all in one pass, and write the first it would not have.

        The longest beginning of a draft that the model would have written itself stays, the rest was never written. The
        model's own token follows: a correction, or one more than was drafted. No model reads twice what stays. The SLM
        does not read what is forgotten, if it has not yet, nor a token that ends a response: a row that has ended here
        has nothing to observe.

        Args:
            rows: distinct rows, (n,), in flight, or ended by a drafted end-of-sequence token.
            drafted: tokens to check at the end of each row, (n,); where 0, the model writes and checks nothing.
            model: another one than the SLM.

        Returns:
            Whether each response ends with an end-of-sequence token, (n,), and whether it has reached its limit without
            one, (n,).

        Raises:
            ValueError: a session that samples, a model out of range, tokens that are not of the response or that the
                model has read already, or a row that is not in flight.
        """
        rows, drafted = self._checked(rows), np.asarray(drafted, dtype=np.int64)
        self._check_drafts(rows, drafted, model)
        whole = self._lengths[rows]
        begun = whole - drafted
        ended = self._drafted_ends(rows, drafted)
        written = self.read_along(rows, model, whole=~ended)
        kept, own = begun.copy(), np.zeros_like(begun)
        for i, (row, tokens) in enumerate(zip(rows, written, strict=True)):
            # what the model writes in the place of each drafted token and, unless that is an end, behind them
            choices = tokens[len(tokens) - drafted[i] - (not ended[i]) :]
            wrong = choices[: drafted[i]] != self._tokens[row, begun[i] : whole[i]]
            agreed = int(wrong.argmax()) if wrong.any() else int(drafted[i])
            kept[i] += agreed
            own[i] = choices[min(agreed, len(choices) - 1)]
        self._withdraw(rows)
        writing = ~(ended & (kept == whole))
        self._cut(rows[writing], kept[writing])
        self._append(rows[writing], own[writing, None], model)
        terminated = ~writing | np.isin(own, self.pool.end_tokens)
        truncated = ~terminated & (self._lengths[rows] - self._prompt_lengths[rows] >= self._limits[rows])
        self._active[rows] = going_on = ~(terminated | truncated)
        self._leave_to_slm(rows[going_on])
        return terminated, truncated

    def _check_drafts(self, rows: IntArray, drafted: IntArray, model: int) -> None:
        """Refuse what `verify` cannot check."""
        if not self.sampling.greedy:
            raise ValueError("drafts are checked under greedy decoding; open the session without sampling")
        if not 1 <= model < len(self.pool):
            raise ValueError(f"the model that checks drafts must be in 1..{len(self.pool) - 1}, is {model}")
        written = self._lengths[rows] - self._prompt_lengths[rows]
        if drafted.shape != rows.shape or (drafted < 0).any() or (drafted > written).any():
            raise ValueError(
                f"drafted must lie between 0 and the {written.tolist()} tokens written, it is {drafted.tolist()}"
            )
        in_flight = self._active[rows] | self._drafted_ends(rows, drafted)
        if not in_flight.all():
            raise ValueError(f"rows {rows[~in_flight].tolist()} are not in flight; start them first")
        read = self._caches[model].lengths[rows] >= self._lengths[rows] - drafted
        if read.any():
            raise ValueError(
                f"{self.pool.names[model]} has read what was drafted in rows {rows[read].tolist()} already; it can "
                "check tokens once"
            )

    def _drafted_ends(self, rows: IntArray, drafted: IntArray) -> BoolArray:
        """Whether the last token of each row was drafted and ends it, (n,)."""
        last = self._tokens[rows, self._lengths[rows] - 1]
        return np.asarray((drafted > 0) & np.isin(last, self.pool.end_tokens))

    def _cut(self, rows: IntArray, lengths: IntArray) -> None:
        """Forget tokens beyond `lengths`, (n,), of rows another model writes in next; what stays is not read again."""
        for cache in self._caches:
            cache.rewind(rows, lengths)
        self._lengths[rows] = lengths
        for row in rows:
            # tokens that are gone were not written
            self.ledger[row, :, WRITTEN] = np.bincount(self.writers(row), minlength=len(self.pool))
