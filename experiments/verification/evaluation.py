"""An evaluation against its traces: every token, verdict, ledger entry, cost and row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agents.common.policy import Policy
from agents.common.rollout import Episode
from envs.arrays import FloatArray
from envs.decoding.judges import FirstDisagreement, described
from envs.models.pool import ModelPool, models_manifest
from envs.progress import ProgressBar
from envs.storage import check_manifest
from envs.tasks.task import Example, Task
from experiments.evaluation.answers import Answers
from experiments.evaluation.kept import CHOSEN, MANIFEST, KeptEvaluation
from experiments.traces.schema import CHECKED
from experiments.traces.trace import Trace, TracedEpisode
from experiments.verification.episodes import (
    episode_faults,
    head_faults,
    number_faults,
    readable,
    reader_faults,
    verdict_faults,
)
from experiments.verification.findings import Fault, Findings
from experiments.verification.forcing import Unlike, unlike_tokens
from experiments.verification.pieces import Piece, check_task, kept_faults, pieces_of, traced_answers
from experiments.verification.policies import Policies
from experiments.verification.replay import on_cpu, replayed, same_machine
from experiments.verification.tables import check_tables

NEAR, ROUGH_NEAR = 1e-4, 0.5
"""Logits that lie no further apart may change places in other passes, in float32 and in half precision: bfloat16 has
eight bits, so that logits of 16 to 32 are multiples of an eighth."""
SCORES, ROUGH_SCORES = 1e-4, 0.1
"""How far a score may differ that is computed from states of another pass, in float32 and in half precision."""


@dataclass(frozen=True)
class Verification:
    """Checks an evaluation.

    Args:
        task: judges the answers.
        pool: writes and reads every token again; where None no model runs, and nothing is read in tokens.
        sample: of how many episodes the tokens and scores are computed again, drawn among all; of all where None.
        seed: of that draw.

    Raises:
        ValueError: the sample is empty.
    """

    task: Task
    pool: ModelPool | None
    sample: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sample is not None and self.sample < 1:
            raise ValueError(f"sample must be at least 1, is {self.sample}; leave it out to check all episodes")

    def check(self, evaluation: KeptEvaluation, findings: Findings | None = None) -> Findings:
        """Check one evaluation.

        Args:
            evaluation: as its folder keeps it.
            findings: that what is found is added to; new ones where None.

        Raises:
            ValueError: it has no traces, or is of other models or another task.
        """
        findings = findings or Findings()
        self.refuse(evaluation)
        traces = _read([piece for piece in pieces_of(evaluation) if _is_there(piece, findings)], findings)
        sound = {path: self._check_episodes(piece, trace, findings) for path, (piece, trace) in traces.items()}
        self._check_kept(traces, evaluation.shipped is not None, findings)
        for name, first in evaluation.manifest["thresholds"].items():
            if evaluation.thresholds.get(name, [])[: len(first)] != first:
                what = f"the thresholds of {name} do not begin with those of {evaluation.runs / MANIFEST}"
                findings.fault(evaluation.runs / CHOSEN, None, what)
        if self.pool is not None:
            self._check_tokens(evaluation, traces, sound, findings)
        if traces:
            check_tables(evaluation, next(iter(traces.values()))[1].head.profiles, findings)
        findings.count("evaluations")
        return findings

    def refuse(self, evaluation: KeptEvaluation) -> None:
        """Refuse an evaluation that cannot be verified.

        Raises:
            ValueError: it has no traces, or is of other models or another task.
        """
        if self.pool is not None:
            models = {"models": models_manifest(self.pool)}
            check_manifest(evaluation.runs, evaluation.manifest, models, ["models"])
        if not any(piece.path.is_file() for piece in pieces_of(evaluation)):
            raise ValueError(
                f"{evaluation.runs} holds no traces; evaluate again in another folder, with traces=true (evaluation."
                "traces=true in training)"
            )
        check_task(evaluation, self.task)

    def _check_episodes(self, piece: Piece, trace: Trace, findings: Findings) -> list[TracedEpisode]:
        """Check all that needs no pass of a model; the episodes whose tokens can be read by one."""
        examples = piece.problems(self.task)
        for what in head_faults(trace.head, piece.wanted, self.pool):
            findings.fault(piece.path, None, what)
        for what in number_faults(trace, examples):
            findings.fault(piece.path, None, what)
        sound, seen = [], set()
        for episode in trace.episodes:
            if not 0 <= episode.episode < len(examples) or episode.episode in seen:
                continue
            seen.add(episode.episode)
            example = examples[episode.episode]
            faults = [*episode_faults(trace.head, episode, example, self.pool)]
            faults += verdict_faults(episode, example, self.task)
            for what in faults:
                findings.fault(piece.path, episode.episode, what)
            if self.pool is not None and readable(trace.head, episode, example, self.pool):
                sound.append(episode)
        findings.count("files")
        findings.count("episodes", len(trace.episodes))
        findings.count("verdicts", len(trace.episodes))
        return sound

    def _check_kept(self, traces: Mapping[Path, tuple[Piece, Trace]], shipped: bool, findings: Findings) -> None:
        slm = next((trace for path, (_, trace) in traces.items() if path.stem == "slm"), None)
        for piece, trace in traces.values():
            try:
                kept, answers = Answers.load(piece.kept).first(piece.count), traced_answers(trace, slm)
                if shipped:  # without seconds
                    answers = answers.in_units(kept.costs)
            except ValueError as error:
                findings.fault(piece.kept, None, f"{error}".removeprefix(f"{piece.kept} "))
                continue
            for number, what in kept_faults(kept, answers):
                findings.fault(piece.kept, number, what)
            findings.count("costs", len(kept.correct) * len(kept.costs))

    def _check_tokens(
        self,
        evaluation: KeptEvaluation,
        traces: Mapping[Path, tuple[Piece, Trace]],
        sound: Mapping[Path, Sequence[TracedEpisode]],
        findings: Findings,
    ) -> None:
        """Let the models read the responses again: what each would have written, and what the policies score."""
        assert self.pool is not None
        drawn = self._drawn(sound)
        policies = Policies(evaluation, self.pool)
        with ProgressBar(total=len(drawn), desc="verify", mininterval=0.5) as progress:
            for path, episodes in drawn.items():
                piece, trace = traces[path]
                examples = piece.problems(self.task)
                policy = policies.of(trace.head)
                if isinstance(policy, str):
                    findings.unchecked.append(f"{path}: scores: {policy}")
                    policy = None
                for what in () if policy is None else reader_faults(trace.head, policy):
                    findings.fault(path, None, what)
                if episodes:
                    repeats = not piece.part and self._repeats(trace, examples)
                    checked = trace.head.decoding == CHECKED
                    unlike, scores = unlike_tokens(self.pool, trace.head, episodes, None if checked else policy)
                    self._sort_out(path, trace, unlike, examples, repeats, findings)
                    if checked and policy is not None:
                        numbers = [one.episode for one in episodes]
                        self._check_decisions(path, trace, policy, numbers, examples, repeats, findings)
                    elif policy is not None:
                        self._check_scores(path, trace, policy, scores, examples, repeats, findings)
                    findings.count("tokens", sum(len(episode.response) for episode in episodes))
                progress.update()

    def _drawn(self, sound: Mapping[Path, Sequence[TracedEpisode]]) -> dict[Path, list[TracedEpisode]]:
        """The episodes whose tokens are computed again."""
        every = [(path, number) for path, episodes in sound.items() for number in range(len(episodes))]
        if self.sample is not None and self.sample < len(every):
            chosen = np.random.default_rng(self.seed).choice(len(every), self.sample, replace=False)
            every = [every[number] for number in sorted(chosen.tolist())]
        drawn: dict[Path, list[TracedEpisode]] = {path: [] for path, _ in every}
        for path, number in every:
            drawn[path].append(sound[path][number])
        return drawn

    def _sort_out(
        self,
        path: Path,
        trace: Trace,
        unlike: Sequence[Unlike],
        examples: Sequence[Example],
        repeats: bool,
        findings: Findings,
    ) -> None:
        """Tell faults from tokens that hang on the last bits of two logits.

        Reading a whole response rounds otherwise than writing it token by token does. So where a token is not the
        greedy choice, the trace is decoded again in the passes that made it, if this machine is of the kind that did:
        then each token must come out. On another machine one may differ where the two logits are nearly equal.
        """
        assert self.pool is not None
        by_episode: dict[int, list[Unlike]] = {}
        for one in sorted(unlike, key=lambda one: (one.episode, one.place)):
            by_episode.setdefault(one.episode, []).append(one)
        if by_episode and repeats:
            again = replayed(self.pool, self.task, examples, trace)
            traced = {episode.episode: episode for episode in trace.episodes}
            alike = [number for number in by_episode if _alike(again[number], traced[number])]
            findings.count("responses decoded again", len(alike))
            by_episode = {number: own for number, own in by_episode.items() if number not in alike}
        exact, near = repeats and on_cpu(trace.head), ROUGH_NEAR if _is_half(trace) else NEAR
        for number, own in by_episode.items():
            wrong = [one for one in own if exact or one.gap > near]
            findings.near_ties += [Fault(path, number, one.what) for one in own if one not in wrong]
            if wrong:
                findings.fault(path, number, wrong[0].what)  # what follows a wrong token is read behind it

    def _repeats(self, trace: Trace, examples: Sequence[Example]) -> bool:
        """Whether a trace can be decoded again in the passes that made it."""
        assert self.pool is not None
        return same_machine(trace.head, self.pool) and len(trace.episodes) == len(examples)

    def _check_decisions(
        self,
        path: Path,
        trace: Trace,
        policy: Policy,
        numbers: Sequence[int],
        examples: Sequence[Example],
        repeats: bool,
        findings: Findings,
    ) -> None:
        """Compare the scores of decisions on drafts with those of the policy, which decides on all of them anew.

        What was taken back was decided on too, so that reading the responses does not do.
        """
        assert self.pool is not None
        # as a file has it: lists for tuples
        judge = json.loads(json.dumps(described(policy.judge or FirstDisagreement())))
        if trace.head.settings["judge"] != judge:
            findings.fault(path, None, f"its judge is {trace.head.settings['judge']}, the policy's is {policy.judge}")
        if not repeats:
            findings.unchecked.append(
                f"{path}: scores: drafts are decided on anew on the kind of machine that did alone"
            )
            return
        again = replayed(self.pool, self.task, examples, trace, policy)
        scores = {n: again[n].scores.astype(np.float64) for n in numbers}
        traced = {one.episode: one.scores for one in trace.episodes}
        for number in numbers:
            if len(scores[number]) != len(traced[number]):
                findings.fault(path, number, f"{len(traced[number])} decisions, the policy takes {len(scores[number])}")
                del scores[number]
        self._check_scores(path, trace, policy, scores, examples, repeats, findings)

    def _check_scores(
        self,
        path: Path,
        trace: Trace,
        policy: Policy,
        scores: Mapping[int, FloatArray],
        examples: Sequence[Example],
        repeats: bool,
        findings: Findings,
    ) -> None:
        """Compare scores with those of the states of another pass; where these differ, of the passes that made them."""
        assert self.pool is not None
        traced = {one.episode: one.scores for one in trace.episodes if one.episode in scores}
        found = dict(scores)
        far = [number for number, own in traced.items() if np.abs(found[number] - own).max() > SCORES]
        tolerance = ROUGH_SCORES if _is_half(trace) else SCORES
        if far and repeats:
            again, tolerance = replayed(self.pool, self.task, examples, trace, policy), SCORES
            found |= {n: again[n].scores.astype(np.float64) for n in far if len(again[n].scores) == len(traced[n])}
        for number, own in traced.items():
            off = np.abs(found[number] - own)
            at = int(off.argmax())
            if off[at] > tolerance:
                said, computed = own[at], found[number][at]
                findings.fault(path, number, f"the score at decision {at} is {said:g}, the policy scores {computed:g}")
            findings.count("scores", len(off))
            findings.largest_score_difference = max(findings.largest_score_difference, float(off[at]))


def _is_half(trace: Trace) -> bool:
    """Whether one of the models computes in less than float32."""
    return any(profile.bytes_per_parameter < 4 for profile in trace.head.profiles)


def _alike(ours: Episode, theirs: TracedEpisode) -> bool:
    """Whether an episode was decoded again as its trace says."""
    back = [(one.position, one.writer, one.tokens.tolist()) for one in ours.taken_back]
    traced = [(one.position, one.writer, one.tokens.tolist()) for one in theirs.taken_back]
    return ours.tokens.tolist() == theirs.response.tolist() and back == traced


def _is_there(piece: Piece, findings: Findings) -> bool:
    """Whether a piece is kept; one that is must have a trace, and one that has a trace must be kept."""
    if piece.kept.is_file() and not piece.path.is_file():
        findings.fault(
            piece.path,
            None,
            "it is missing: nothing says what the answers that are kept come from; evaluate again in another folder",
        )
    return piece.kept.is_file() and piece.path.is_file()


def _read(pieces: Sequence[Piece], findings: Findings) -> dict[Path, tuple[Piece, Trace]]:
    """The traces that can be read, by their paths."""
    traces = {}
    for piece in pieces:
        try:
            traces[piece.path] = (piece, piece.trace)
        except ValueError as error:
            findings.fault(piece.path, None, f"{error}".removeprefix(f"{piece.path} "))
    return traces
