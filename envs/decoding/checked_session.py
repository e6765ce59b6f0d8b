"""A live session in which larger models check what the SLM has drafted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from envs.arrays import UNKNOWN, IntArray
from envs.costs import WRITTEN
from envs.decoding.checking import NO_END, Called, CheckingDecoder, standing
from envs.decoding.judges import OPINION, FirstDisagreement, Judge
from envs.decoding.observation import Observation, Step, entropy
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.pool import ModelPool


class CheckedSession(CheckingDecoder, TeacherSession):
    """Decodes as `CheckingDecoder` says.

    Args:
        pool: the models; an action is an index into them.
        rows: sequences in flight.
        max_new_tokens: the longest response.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.
        sampling: must be greedy, or None.
        judge: says which drafted tokens stand; `FirstDisagreement` where None.

    Raises:
        ValueError: a setting out of range, or tokens are sampled.
    """

    def __init__(
        self,
        pool: ModelPool,
        rows: int,
        max_new_tokens: int,
        capacity: int | None = None,
        sampling: Sampling | None = None,
        judge: Judge | None = None,
    ) -> None:
        if sampling is not None and not sampling.greedy:
            raise ValueError(
                f"drafts are checked under greedy decoding, not at temperature {sampling.temperature}; leave sampling "
                "out"
            )
        super().__init__(pool, rows, max_new_tokens, capacity, sampling)
        self.judge = judge or FirstDisagreement()

    def observe(self, rows: IntArray) -> Observation:
        """What a policy may see of `rows`, (n,), all of them observed or none; copies, as in `Session.observe`."""
        rows = np.asarray(rows, dtype=np.int64)
        if self._observed[rows].all():
            seen = super().observe(rows)
            hidden, logits = seen.hidden, seen.logits
        else:
            hidden, logits = torch.zeros(len(rows), 0, device=self._hidden.device), None
        positions, drafts = self._lengths[rows] - self._prompt_lengths[rows], self.drafts(rows)
        return Observation(hidden, logits, positions, self._episodes[rows], self._since_llm[rows], drafts=drafts)

    def extend(self, rows: IntArray, chunks: Sequence[IntArray], model: int = 0) -> None:
        """Refused: what is given is no draft.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"rows {rows.tolist()} are of a session that checks drafts; teach those of a TeacherSession")

    def _copy(self, sources: IntArray, targets: IntArray, lengths: IntArray, reread: bool) -> None:
        raise ValueError(
            f"rows {sources.tolist()} are of a session that checks drafts, which are not copied; use `state` and "
            "`restore`"
        )

    def _draft(self, rows: IntArray) -> Step:
        self._catch_up(rows)
        index = torch.from_numpy(rows).to(self._logits.device)
        logits = self._logits[index]
        step = Session.step(self, rows, np.zeros_like(rows))
        late = np.flatnonzero(~self._observed[rows])  # those the SLM has read for in this step
        if len(late):
            logits[torch.from_numpy(late).to(index.device)] = self._logits[index[late]]
        distributions = logits.float().log_softmax(-1)
        both = torch.stack([entropy(distributions), -distributions.max(-1).values]).double().cpu().numpy()
        return self._enter_drafts(rows, both[0], both[1], step)

    def _call(self, rows: IntArray, models: IntArray) -> Called:
        self._catch_up(rows)
        tokens, kept = np.full(len(rows), UNKNOWN), np.zeros_like(rows)
        gone: list[IntArray] = [np.zeros(0, dtype=np.int64)] * len(rows)
        for model in np.unique(models).tolist():
            some = np.flatnonzero(models == model)
            tokens[some], kept[some], back = self._call_one(rows[some], model)
            for i, of_row in zip(some, back, strict=True):
                gone[i] = of_row
        full = self._lengths[rows] - self._prompt_lengths[rows] >= self._limits[rows]
        # as in a routed step: what a learner bootstraps from is read
        self._catch_up(rows[full & (tokens != UNKNOWN)])
        return Called(tokens, kept, gone)

    def _call_one(self, rows: IntArray, model: int) -> Called:
        """Let one model read the drafts of rows, and write behind what stands."""
        counts, whole, ended = self._since_llm[rows], self._lengths[rows], self._ends[rows] != NO_END
        drafts = [self._tokens[row, end - count : end] for row, end, count in zip(rows, whole, counts, strict=True)]
        choices, opinions = self.read_with_opinions(rows, model, ~ended, drafts)
        thought = opinions.reshape(-1, OPINION).float().cpu().numpy()
        kept = standing(self.judge, thought, counts)
        # nobody writes behind an end
        behind = [len(own) - count - (not end) for own, count, end in zip(choices, counts, ended, strict=True)]
        whole_stands = ended & (kept == counts)
        tokens = np.array(
            [
                UNKNOWN if stop else own[at + k]
                for own, at, k, stop in zip(choices, behind, kept, whole_stands, strict=True)
            ]
        )
        lengths = whole - counts + kept
        for cache in self._caches:
            cache.rewind(rows, lengths)
        gone = self._cut(rows, lengths)
        writing = np.flatnonzero(~whole_stands)
        self._enter(rows[writing], tokens[writing], np.full(len(writing), model))
        self.ledger[rows[writing], model, WRITTEN] += 1
        self._leave_to_slm(rows[writing[~np.isin(tokens[writing], self.pool.end_tokens)]])
        return Called(tokens, kept, gone)

    def _slm_would_write(self, rows: IntArray) -> IntArray:
        self._catch_up(rows)
        return self._slm_tokens[rows]

    def _longest(self, rows: IntArray) -> IntArray:
        return self._limits[rows]
