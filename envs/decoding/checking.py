"""The checking step: the SLM drafts, a larger model reads all that was drafted, a judge says what stands.

A larger model that is called reads every token it has missed anyway, for one reading of its weights. So a call tells,
for nothing more, what it thinks of each token the SLM wrote since the last call, and a bad one can be taken back.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from envs.arrays import UNKNOWN, BoolArray, FloatArray, IntArray
from envs.costs import COLUMNS, WRITTEN
from envs.decoding.decoder import Decoder
from envs.decoding.judges import Judge, Opinions
from envs.decoding.observation import Checks, Drafts, Observation, Step, TakenBack

NO_END, END, FULL = 0, 1, 2
"""What the last drafted token is: no end, an end-of-sequence token, or the last one that there is room for."""
DRAFT_BOOKS = ("_draft_entropies", "_draft_surprisals", "_last_surprisals", "_ends", "_gone", "_runs", "_corrected")
"""What is kept of all rows beside the books of every decoder."""


class Called(NamedTuple):
    """What calls came to in n rows.

    Attributes:
        tokens: that the models wrote, (n,); UNKNOWN where a drafted end stands.
        kept: how many drafted tokens stand, (n,).
        taken_back: the others, by the place of the row among the n.
    """

    tokens: IntArray
    kept: IntArray
    taken_back: Mapping[int, IntArray]


class CheckingDecoder(Decoder):
    """What live and replayed checking share: the step, and the books of what was drafted since the last call.

    Action 0 lets the SLM draft the next token. Where it has drafted an end, which is an end-of-sequence token or the
    last token that there is room for, action 0 accepts it, and the response is over. Action k calls model k: it reads
    all that was drafted since a larger model was called last, `judge` says which beginning of that stands, the rest was
    never written, and model k writes the next token, unless a drafted end stands. Where tokens are sampled, what the
    judge does not spare stands with the probability of speculative sampling; see `Sampling.speculative`.

    A call writes a token that nobody takes back, or ends the response, so that every response ends.

    Of a row that was started unobserved nothing is seen but `Drafts`, and the SLM reads what it has missed when it
    drafts the next token, in the same pass: as in speculative decoding.
    """

    judge: Judge

    def taken_back(self, row: int) -> tuple[TakenBack, ...]:
        """What was taken back of a row since it was started, in order."""
        return tuple(self._taken_back[row])

    def taken_back_tokens(self, row: int) -> int:
        """How many tokens of a row were taken back since it was started."""
        return int(self._gone[row])

    def read_prompts(self, rows: IntArray, model: int) -> Tensor:
        """Refused: a model that is called reads the prompt with the first draft.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"rows {np.asarray(rows).tolist()} are of a session that checks drafts, where no model reads prompts by "
            "itself; a policy with a judge sees the SLM's states and the text"
        )

    def drafts(self, rows: IntArray) -> Drafts:
        """What was drafted in `rows`, (n,), since a larger model read them last."""
        written = self._lengths[rows] - self._prompt_lengths[rows]
        return Drafts(
            counts=self._since_llm[rows],
            entropies=self._draft_entropies[rows],
            surprisals=self._draft_surprisals[rows],
            last_surprisals=self._last_surprisals[rows],
            ended=self._ends[rows] != NO_END,
            room=self._longest(rows) - written,
            runs=self._runs[rows],
            corrected=self._corrected[rows],
            last_tokens=np.where(written > 0, self._tokens[rows, self._lengths[rows] - 1], UNKNOWN),
            text_of=self._text_of,
        )

    def step(self, rows: IntArray, actions: IntArray) -> Step:
        """Draft a token in each row, accept a drafted end, or call a model; see the class, and `Decoder.step`."""
        rows, actions = self._checked_step(rows, actions)
        ends, calls = self._ends[rows], actions > 0
        accepts = ~calls & (ends != NO_END)
        if not (calls | accepts).any():
            return self._draft(rows)
        n = len(rows)
        # of an unobserved row it is known where it was drafted
        tokens, slm_tokens = np.full(n, UNKNOWN), np.where(self._observed[rows], self._slm_would_write(rows), UNKNOWN)
        terminated, truncated = accepts & (ends == END), accepts & (ends == FULL)
        ledger, kept = np.zeros((n, len(self.pool), COLUMNS)), np.zeros(n, dtype=np.int64)
        self._active[rows[accepts]] = False
        some = np.flatnonzero(~calls & ~accepts)
        if len(some):
            step = self._draft(rows[some])
            tokens[some], slm_tokens[some], ledger[some] = step.tokens, step.slm_tokens, step.ledger
        taken_back: dict[int, TakenBack] = {}
        some = np.flatnonzero(calls)
        if len(some):
            called = rows[some]
            begun = self._lengths[called] - self._since_llm[called] - self._prompt_lengths[called]
            before, alone = self.ledger[called], self._since_llm[called] == 0
            tokens[some], kept[some], gone = self._call(called, actions[some])
            ledger[some] = self.ledger[called] - before
            for i in gone:
                taken_back[some[i]] = back = TakenBack(int(begun[i] + kept[some[i]]), 0, gone[i])
                self._taken_back[called[i]].append(back)
                self._gone[called[i]] += len(back.tokens)
            stands = tokens[some] == UNKNOWN
            terminated[some] = np.where(stands, ends[some] == END, np.isin(tokens[some], self.pool.end_tokens))
            full = self._lengths[called] - self._prompt_lengths[called] >= self._longest(called)
            truncated[some] = ~terminated[some] & full
            self._active[called] = ~(terminated | truncated)[some]
            self._runs[called] = np.where(alone, self._runs[called], 0) + ~stands
            corrected = np.zeros(len(called), dtype=bool)
            corrected[list(gone)] = True
            self._corrected[called] = np.where(alone, self._corrected[called], corrected)
            self._forget_drafts(called)
        return Step(tokens, slm_tokens, terminated, truncated, ledger, Checks(kept, taken_back))

    def state(self, rows: IntArray) -> dict[str, npt.NDArray[Any]]:
        """Where `rows`, (n,), stand, in numbers; see `Decoder.state`."""
        gone = {"taken_back": packed([self._taken_back[row] for row in rows])}
        return super().state(rows) | self._books_of(rows, *DRAFT_BOOKS) | gone  # type: ignore[safe-super]

    def restore(
        self,
        rows: IntArray,
        state: Mapping[str, npt.NDArray[Any]],
        generators: Sequence[np.random.Generator] | None = None,
    ) -> None:
        """Let `rows`, (n,), stand where others stood; see `Decoder.restore`."""
        self._set_books(self._checked(rows), state, *DRAFT_BOOKS)
        for row, kept in zip(rows, unpacked(state["taken_back"]), strict=True):
            self._taken_back[row] = kept
        super().restore(rows, state, generators)  # type: ignore[safe-super]

    def _open_books(self) -> None:
        super()._open_books()
        self._draft_entropies: FloatArray = np.zeros(self.rows)  # these sums and the last are of the time since a call
        self._draft_surprisals: FloatArray = np.zeros(self.rows)
        self._last_surprisals: FloatArray = np.zeros(self.rows)
        self._ends: npt.NDArray[np.int8] = np.zeros(self.rows, dtype=np.int8)
        self._gone: IntArray = np.zeros(self.rows, dtype=np.int64)  # tokens that were taken back
        self._runs: IntArray = np.zeros(self.rows, dtype=np.int64)  # these two are as `Drafts` has them
        self._corrected: BoolArray = np.zeros(self.rows, dtype=bool)
        self._token_texts: dict[int, str] = {}
        self._taken_back: list[list[TakenBack]] = [[] for _ in range(self.rows)]

    def _begin(self, rows: IntArray, prompts: Sequence[IntArray], episodes: IntArray | None) -> None:
        super()._begin(rows, prompts, episodes)
        self._forget_drafts(rows)
        self._gone[rows] = self._runs[rows] = 0
        self._corrected[rows] = False
        for row in rows:
            self._taken_back[row] = []

    def _forget_drafts(self, rows: IntArray) -> None:
        self._ends[rows] = NO_END
        self._draft_entropies[rows] = self._draft_surprisals[rows] = self._last_surprisals[rows] = 0.0

    def _enter_drafts(
        self, rows: IntArray, entropies: FloatArray, surprisals: FloatArray, step: Step, slm_tokens: IntArray
    ) -> Step:
        """Enter what a step of the SLM has drafted; its ends await a decision. `slm_tokens` are its greedy choices."""
        self._draft_entropies[rows] += entropies
        self._draft_surprisals[rows] += surprisals
        self._last_surprisals[rows] = surprisals
        self._ends[rows] = step.terminated * END + step.truncated * FULL
        self._runs[rows], self._corrected[rows] = 0, False
        self._active[rows] = True
        never = np.zeros((2, len(rows)), dtype=bool)
        nothing = Checks(np.zeros(len(rows), dtype=np.int64), {})
        return Step(step.tokens, slm_tokens, never[0], never[1], step.ledger, nothing)

    def _text_of(self, token: int) -> str:
        text = self._token_texts.get(token)
        if text is None:
            text = self._token_texts[token] = self.pool.decode(np.array([token]))
        return text

    def _cut(self, rows: IntArray, lengths: IntArray) -> dict[int, IntArray]:
        """Forget tokens of rows beyond `lengths`, (n,), which were not written then; what they were, by place in n."""
        whole = self._lengths[rows]
        cut = np.flatnonzero(lengths < whole).tolist()
        gone = {i: self._tokens[rows[i], lengths[i] : whole[i]].copy() for i in cut}
        self.ledger[rows, 0, WRITTEN] -= whole - lengths
        self._lengths[rows] = lengths
        return gone

    @abstractmethod
    def look_back(self, rows: IntArray, observation: Observation) -> Observation:
        """What was seen of unobserved rows, (n,), with the SLM's states that their last tokens were drafted by.

        The pass that drafted a token has made its state, so that nobody reads anything for it. Where nothing is drafted
        the state has no meaning.
        """

    @abstractmethod
    def _draft(self, rows: IntArray) -> Step:
        """Let the SLM write a token in each row."""

    @abstractmethod
    def _call(self, rows: IntArray, models: IntArray) -> Called:
        """Let models, (n,), read the drafts of rows, and write behind what stands."""

    @abstractmethod
    def _slm_would_write(self, rows: IntArray) -> IntArray:
        """The SLM's next tokens by greedy decoding, (n,); of a row in which it has drafted an end of sequence, this."""

    @abstractmethod
    def _longest(self, rows: IntArray) -> IntArray:
        """The longest response of each row, (n,)."""


def packed(rows: Sequence[Sequence[TakenBack]]) -> IntArray:
    """What was taken back of n rows as numbers, (n, longest): of each its place, writer, length and tokens."""
    numbers = [
        [number for back in row for number in (back.position, back.writer, len(back.tokens), *back.tokens)]
        for row in rows
    ]
    array = np.full((len(rows), max(map(len, numbers), default=0)), UNKNOWN)
    for line, some in zip(array, numbers, strict=True):
        line[: len(some)] = some
    return array


def unpacked(numbers: IntArray) -> list[list[TakenBack]]:
    """What was `packed`."""
    rows: list[list[TakenBack]] = []
    for line in numbers:
        backs, at = [], 0
        while at < len(line) and line[at] != UNKNOWN:
            begin, end = at + 3, at + 3 + int(line[at + 2])
            backs.append(TakenBack(int(line[at]), int(line[at + 1]), line[begin:end].copy()))
            at = end
        rows.append(backs)
    return rows


def standing(judge: Judge, opinions: Opinions, counts: IntArray) -> IntArray:
    """How long the beginning of each draft is that a judge lets stand, (n,).

    Args:
        judge: decides.
        opinions: on the tokens of all drafts, one draft after the other.
        counts: tokens of each draft, (n,).
    """
    if not judge.whole:
        return agreed(judge.stands(opinions), counts)
    drafts = np.split(opinions, np.cumsum(counts)[:-1])
    return agreed(np.concatenate([judge.stands(draft) for draft in drafts]), counts)


def agreed(stands: BoolArray, counts: IntArray) -> IntArray:
    """How long the longest beginning of each draft is that stands, (n,).

    Args:
        stands: of the tokens of all drafts, one after the other.
        counts: tokens of each draft, (n,).
    """
    kept, ends = counts.copy(), np.cumsum(counts)
    refused = np.flatnonzero(~stands)[::-1]  # of one draft the last that is entered, which is its first, remains
    drafts = ends.searchsorted(refused, side="right")
    kept[drafts] = refused - (ends - counts)[drafts]
    return kept
