"""A live session in which larger models check what the SLM has drafted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.arrays import UNKNOWN, BoolArray, IntArray
from envs.costs import WRITTEN
from envs.decoding.checking import END, NO_END, Called, CheckingDecoder, standing
from envs.decoding.judges import OPINION, FirstDisagreement, Judge, opinions
from envs.decoding.observation import Observation, Step, entropy
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.pool import ModelPool


class CheckedSession(CheckingDecoder, TeacherSession):
    """Decodes as `CheckingDecoder` says.

    Where tokens are sampled, the logits that each draft was drawn from are kept until it is checked: for each drafted
    token 4 bytes a token of the vocabulary.

    Args:
        pool: the models; an action is an index into them.
        rows: sequences in flight.
        max_new_tokens: the longest response.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.
        sampling: how tokens are drawn; greedy where None.
        judge: says which drafted tokens stand; `FirstDisagreement` where None.

    Raises:
        ValueError: a setting out of range, or sampling with a judge of whole drafts.
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
        super().__init__(pool, rows, max_new_tokens, capacity, sampling)
        self.judge = judge or FirstDisagreement()
        if self.judge.whole and not self.sampling.greedy:
            raise ValueError(
                f"the judge {self.judge} is of whole drafts, and sampled tokens stand one by one; choose another "
                "judge, or greedy decoding"
            )
        # what each token was drawn from that was drafted since the last call; nothing where decoding is greedy
        self._draft_logits: list[list[Tensor]] = [[] for _ in range(rows)]

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

    def look_back(self, rows: IntArray, observation: Observation) -> Observation:
        """See `CheckingDecoder`."""
        index = torch.from_numpy(rows).to(self._hidden.device)
        return replace(observation, hidden=self._hidden[index], logits=self._logits[index])

    def extend(self, rows: IntArray, chunks: Sequence[IntArray], model: int = 0) -> None:
        """Refused: what is given is no draft.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"rows {rows.tolist()} are of a session that checks drafts; teach those of a TeacherSession")

    def restore(
        self,
        rows: IntArray,
        state: Mapping[str, npt.NDArray[Any]],
        generators: Sequence[np.random.Generator] | None = None,
    ) -> None:
        """Let `rows`, (n,), stand where others stood; see `Decoder.restore`."""
        super().restore(rows, state, generators)
        rows = self._checked(rows)
        self._forget_draft_logits(rows)
        if self.sampling.greedy:
            return
        for row in rows[self._active[rows] & (self._since_llm[rows] > 0)]:
            # the SLM reads its drafts again, which tells what they were drawn from
            cache, begun = self._caches[0], int(self._lengths[row] - self._since_llm[row] - 1)
            chunk = self._tokens[row, begun : cache.lengths[row]]
            one = np.array([row])
            cache.rewind(one, np.array([begun]))
            _, logits = self.pool.slm.feed(cache, one, [chunk], every_position=True)
            self._draft_logits[row] = list(logits[: self._since_llm[row], : self.pool.vocab_size].to(self._logits))

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
        drafted = torch.from_numpy(step.tokens).to(logits.device)[:, None]
        both = torch.stack([entropy(distributions), -distributions.gather(-1, drafted)[:, 0]]).double().cpu().numpy()
        if self.sampling.greedy:
            return self._enter_drafts(rows, both[0], both[1], step, step.tokens.copy())
        for row, own in zip(rows, logits, strict=True):
            self._draft_logits[row].append(own.clone())  # a view would keep the logits of all rows
        return self._enter_drafts(rows, both[0], both[1], step, self.pool.greedy(0, logits))

    def _call(self, rows: IntArray, models: IntArray) -> Called:
        self._catch_up(rows)
        tokens, kept = np.full(len(rows), UNKNOWN), np.zeros_like(rows)
        gone: dict[int, IntArray] = {}
        for model in np.unique(models).tolist():
            some = np.flatnonzero(models == model)
            tokens[some], kept[some], back = self._call_one(rows[some], model)
            gone |= {int(some[i]): tokens_of for i, tokens_of in back.items()}
        full = self._lengths[rows] - self._prompt_lengths[rows] >= self._limits[rows]
        # as in a routed step: what a learner bootstraps from is read
        self._catch_up(rows[full & (tokens != UNKNOWN)])
        return Called(tokens, kept, gone)

    def _call_one(self, rows: IntArray, model: int) -> Called:
        """Let one model read the drafts of rows, and write behind what stands."""
        counts, whole, ended = self._since_llm[rows], self._lengths[rows], self._ends[rows] != NO_END
        drafts = [self._tokens[row, end - count : end] for row, end, count in zip(rows, whole, counts, strict=True)]
        check = self._compared if self.sampling.greedy else self._sampled
        tokens, kept = check(rows, model, drafts, ended)
        lengths = whole - counts + kept
        for cache in self._caches:
            cache.rewind(rows, lengths)
        gone = self._cut(rows, lengths)
        writing = np.flatnonzero(tokens != UNKNOWN)  # nobody writes behind an end that stands
        self._enter(rows[writing], tokens[writing], np.full(len(writing), model))
        self.ledger[rows[writing], model, WRITTEN] += 1
        self._leave_to_slm(rows[writing[~np.isin(tokens[writing], self.pool.end_tokens)]])
        return Called(tokens, kept, gone)

    def _compared(
        self, rows: IntArray, model: int, drafts: Sequence[IntArray], ended: BoolArray
    ) -> tuple[IntArray, IntArray]:
        """What the model writes behind drafts, greedily, and how much of these stands, (n,) both.

        Nobody writes behind an end that stands: UNKNOWN.
        """
        choices, opinions = self.read_with_opinions(rows, model, ~ended, drafts)
        counts = np.array([len(draft) for draft in drafts])
        kept = standing(self.judge, opinions.reshape(-1, OPINION).float().cpu().numpy(), counts)
        behind = [len(own) - count - (not end) for own, count, end in zip(choices, counts, ended, strict=True)]
        whole_stands = ended & (kept == counts)
        tokens = np.array(
            [
                UNKNOWN if stop else own[at + k]
                for own, at, k, stop in zip(choices, behind, kept, whole_stands, strict=True)
            ]
        )
        return tokens, kept

    def _sampled(
        self, rows: IntArray, model: int, drafts: Sequence[IntArray], ended: BoolArray
    ) -> tuple[IntArray, IntArray]:
        """`_compared` where tokens are sampled; each row draws from a stream of its own, in the same order always."""
        kept = np.array([len(self._draft_logits[row]) for row in rows])
        given = rows[kept != [len(draft) for draft in drafts]].tolist()
        if given:
            raise ValueError(
                f"rows {given} began with responses that were given, of which it is not known what they were drawn "
                "from; start them without, or check drafts under greedy decoding"
            )
        wanted = iter(zip(rows, drafts, ended, strict=True))

        def view(_: Tensor, logits: Tensor) -> Tensor:
            row, draft, end = next(wanted)  # rows are viewed in their order
            generator, places = self._generators[row], logits[len(logits) - len(draft) - (not end) :]
            assert generator is not None
            spared = self.judge.spares(opinions(places[: len(draft)], draft).cpu().numpy())
            sample = self.sampling.speculative(draft, self._draft_logits[row], places, spared, generator, model)
            return torch.tensor(sample)

        found = torch.stack(self._read_every(model, rows, view, ~ended)[0]).numpy()
        return found[:, 1], found[:, 0]

    def _forget_drafts(self, rows: IntArray) -> None:
        super()._forget_drafts(rows)
        self._forget_draft_logits(rows)

    def _forget_draft_logits(self, rows: IntArray) -> None:
        for row in rows:
            self._draft_logits[row] = []

    def _slm_would_write(self, rows: IntArray) -> IntArray:
        self._catch_up(rows)
        return np.where(self._ends[rows] == END, self._tokens[rows, self._lengths[rows] - 1], self._slm_tokens[rows])

    def _longest(self, rows: IntArray) -> IntArray:
        return self._limits[rows]
