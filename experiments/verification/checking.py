"""A response whose drafts were checked, gone through again from its scores and what was taken back; no model runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from envs.arrays import FloatArray, IntArray
from envs.costs import COLUMNS, WRITTEN, pass_entry
from envs.decoding.judges import GAP, FirstDisagreement, Judge, opinions
from experiments.traces.trace import Head, TracedEpisode


@dataclass(frozen=True)
class Walk:
    """What the decisions of a response come to.

    Attributes:
        entries: its ledger, but for seconds, (models, COLUMNS).
        stood: places of drafted tokens that the LLM has read and let stand, (n,).
        drafts: how many of these were of each draft, (calls,).
    """

    entries: FloatArray
    stood: IntArray
    drafts: IntArray


class _Walker:
    """A response between two of its decisions; see `walk`."""

    def __init__(self, head: Head, episode: TracedEpisode) -> None:
        self.episode, self.models = episode, len(head.models)
        self.observes, self.limit = bool(head.settings["observes"]), int(head.settings["max_new_tokens"])
        self.ends = set(head.settings["end_tokens"])
        self.prompt = len(episode.prompt)
        self.entries: FloatArray = np.zeros((self.models, COLUMNS))
        self.read = [0, 0]  # tokens in the caches of the SLM and the LLM
        self.writers: list[int] = []
        self.pending, self.last, self.over = 0, -1, False
        self.backs = list(episode.taken_back)
        self.stood: list[int] = []
        self.drafts: list[int] = []
        if self.observes:
            self._slm_reads(self.prompt)

    def decide(self, drafts: bool) -> None:
        """Go through one decision."""
        if self.over:
            raise ValueError("decisions go on behind its end")
        length = len(self.writers)
        ended = self.pending > 0 and (self.last in self.ends or length == self.limit)
        if drafts and ended:
            self.over = True
        elif drafts:
            if not self.observes:
                self._slm_reads(self.prompt + length)
            self.last = self._token_at(length)
            self._write(0)
            self.pending += 1
        else:
            self._call(ended)

    def _call(self, ended: bool) -> None:
        length, llm = len(self.writers), self.models - 1
        begun = kept = length - self.pending
        if self.backs and begun <= self.backs[0].position < length:
            back = self.backs.pop(0)
            kept = back.position
            if len(back.tokens) != length - kept or back.writer != 0:
                raise ValueError(
                    f"{len(back.tokens)} tokens were taken back at {kept}, where the draft has another end"
                )
        else:
            kept = length
        self.stood += range(begun, kept)
        self.drafts.append(kept - begun)
        new = self.prompt + length - ended - self.read[1]
        self.entries[llm] += pass_entry(np.array([new]), np.array([self.read[1]]), 0.0)[0]
        self.read = [min(self.read[0], self.prompt + kept), min(self.read[1] + new, self.prompt + kept)]
        if ended and kept == length:
            self.over = True
            return
        del self.writers[kept:]
        self.last = self._token_at(kept)
        self._write(llm)
        self.pending = 0
        self.over = self.last in self.ends or len(self.writers) == self.limit

    def _write(self, writer: int) -> None:
        self.writers.append(writer)
        if self.observes and self.last not in self.ends:
            self._slm_reads(self.prompt + len(self.writers))

    def _slm_reads(self, to: int) -> None:
        self.entries[0] += pass_entry(np.array([to - self.read[0]]), np.array([self.read[0]]), 0.0)[0]
        self.read[0] = to

    def _token_at(self, place: int) -> int:
        """The token written at a place: what was taken back there next, or what stands there in the end."""
        tokens = self.episode.response
        if self.backs and place >= self.backs[0].position:
            place, tokens = place - self.backs[0].position, self.backs[0].tokens
        if place >= len(tokens):
            raise ValueError("its decisions write more tokens than it has")
        return int(tokens[place])


def walk(head: Head, episode: TracedEpisode) -> Walk:
    """Go through the decisions of a response again.

    A score at the threshold or above drafts the next token, or accepts a drafted end; any other calls the LLM, which
    takes back what the trace says was taken back at a place of this draft.

    Raises:
        ValueError: these decisions do not give such a response; the error says where it differs.
    """
    assert head.threshold is not None
    walker = _Walker(head, episode)
    for drafts in (episode.scores >= head.threshold).tolist():
        walker.decide(drafts)
    if not walker.over:
        raise ValueError("its decisions do not come to its end")
    if walker.backs:
        raise ValueError(f"something was taken back at {walker.backs[0].position}, where no draft was refused")
    if walker.writers != episode.writers.tolist():
        said = np.array([*walker.writers[: len(episode.writers)]])
        off = np.flatnonzero(said != episode.writers[: len(said)])
        at = int(off[0]) if len(off) else min(len(walker.writers), len(episode.writers))
        raise ValueError(f"its decisions let another model write token {at}, or another number of tokens")
    walker.entries[:, WRITTEN] = np.bincount(episode.writers, minlength=walker.models)
    return Walk(walker.entries, *(np.array(some, dtype=np.int64) for some in (walker.stood, walker.drafts)))


def wrong_verdicts(
    judge: Judge, head: Head, episode: TracedEpisode, logits: torch.Tensor
) -> Iterator[tuple[int, str, float]]:
    """Drafted tokens that the judge decides on otherwise: the place, what is wrong, and by how much.

    Args:
        judge: whose verdicts they were.
        head: of the trace.
        episode: of it.
        logits: of the LLM before each token of the response, (n, vocab).

    Of a judge of whole drafts those that stand are judged again; of one that was taken back the logits are not known.
    """
    try:
        walked = walk(head, episode)
    except ValueError:
        return  # a fault by itself, which its ledger is reported with
    stood = walked.stood
    if len(stood):
        thought = opinions(logits[torch.from_numpy(stood).to(logits.device)], episode.response[stood]).cpu().numpy()
        drafts = np.split(thought, np.cumsum(walked.drafts)[:-1]) if judge.whole else [thought]
        margins = np.concatenate([judge.margin(draft) for draft in drafts])
        for i in np.flatnonzero(~np.concatenate([judge.stands(draft) for draft in drafts])).tolist():
            place, gap = int(stood[i]), float(margins[i])
            yield place, f"token {place} was let stand, and the judge {judge} takes it back", gap
    for back in () if judge.whole else episode.taken_back:
        thought = opinions(logits[back.position][None], back.tokens[:1]).cpu().numpy()
        if judge.stands(thought)[0]:
            what = f"the draft was taken back at token {back.position}, and the judge {judge} lets that stand"
            margin = float(judge.margin(thought)[0])
            written = episode.response[back.position : back.position + 1]
            if isinstance(judge, FirstDisagreement) and written != back.tokens[:1]:
                # nearly as likely as the likeliest token is that which the LLM wrote in its place
                margin = float(opinions(logits[back.position][None], written)[0, GAP])
            yield back.position, what, margin
