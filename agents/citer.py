"""CITER: a router trained on token-level preferences (Zheng et al., COLM 2025, arXiv 2502.01976), and its ablations.

Preferences are decided by the shortcut and by rollouts (`Citer`), and the router is trained on them by Bradley-Terry's
likelihood (eq. 5: binary cross-entropy), again and again with rollouts that it finishes itself. What differs from the
released code: rollouts keep the LLM's cache, end at the end of sequence, and are split by example, never by token.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from agents.common.policy import Learner, Policy, Track, TrainingRun, untracked
from agents.common.rollout import Scheduling
from agents.heuristics import Always
from agents.preferences.collector import PreferenceCollector
from agents.preferences.composition import CaseTwoSample, composition, right_by_kind, token_kinds
from agents.preferences.labels import DROPPED, Labels, shares
from agents.preferences.llm_references import Answers, llm_references
from agents.preferences.store import COLUMNS, Columns, PreferenceStore, Share, shard_ranges
from agents.router.dataset import LabelledTokens
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router
from envs.arrays import UNKNOWN, IntArray
from envs.decoding.observation import feature_width
from envs.models.pool import ModelPool, models_manifest
from envs.storage import check_manifest
from envs.tasks.task import Task


@dataclass(frozen=True)
class Citer(Learner[RouterPolicy]):
    """CITER, and what it becomes when the labels are decided otherwise.

    A reference solution is walked token by token. Where the SLM would write the reference's token the SLM is preferred
    (case 1); else, where the LLM would, the LLM (case 2). Where neither would (case 3) the SLM's token is taken and the
    answer finished: by the SLM in round 1, by the router of the round before in later ones. The SLM is preferred iff
    the answer is right. Cases 1 and 2 need no rollout: the shortcut. CITER-S is CITER without rollouts.

    Where references are worded otherwise than the models would, case 2 labels the LLM for words that change no answer.
    Two ways out: roll case 2 out as well (`labels.case_2`), or walk the LLM's own answers (`references`).

    Args:
        examples: training problems to collect preferences on; all of the train split where None.
        references: what is walked: the `task`'s solutions, or the answers of the `llm` (greedy) where they are right
            and end; the other problems are left out, and rows say how many remain.
        rounds: of collecting and training; later rounds redo rollouts alone, and only where the router continues.
        continuation: who finishes rollouts: `router` as published (the SLM in round 1), or always `slm` or `llm`.
        threshold: the SLM threshold of the router that finishes rollouts after round 1 (0.5 in the paper's
            pseudo-code, 0.95 in its released code).
        labels: what decides the label in cases 2 and 3.
        end_labels: whether the end of a sequence has a label; it has none in the released code.
        features: what the router sees: `hidden` as published (the SLM's last hidden state), or `hidden_logits` (also
            the entropy and the top log-probabilities of the SLM's next token).
        max_new_tokens: the longest response.
        on_too_long: `error`, or `skip` examples that do not fit; they are counted.
        shard_examples: examples whose preferences are written at once; an interruption costs at most these.
        preferences: a folder written by `experiments.collect` to take round 1 from.
        training: how the router is trained.
        sample: tokens in case 2 to roll out for the report alone.
        scheduling: how rollouts share passes.
    """

    needs_folder: ClassVar[bool] = True

    examples: int | None = 1500
    references: Literal["task", "llm"] = "task"
    rounds: int = 2
    continuation: Literal["router", "slm", "llm"] = "router"
    threshold: float = 0.5
    labels: Labels = field(default_factory=Labels)
    end_labels: bool = True
    features: Literal["hidden", "hidden_logits"] = "hidden"
    max_new_tokens: int = 128
    on_too_long: Literal["error", "skip"] = "error"
    shard_examples: int = 256
    preferences: str | None = None
    training: RouterTraining = field(default_factory=RouterTraining)
    sample: CaseTwoSample = field(default_factory=CaseTwoSample)
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        if (self.examples is not None and self.examples < 2) or self.rounds < 1 or self.shard_examples < 1:
            raise ValueError(
                f"examples ({self.examples}) must be at least 2, rounds ({self.rounds}) and shard_examples "
                f"({self.shard_examples}) at least 1"
            )
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], is {self.threshold}")
        known = {
            "references": ("task", "llm"),
            "continuation": ("router", "slm", "llm"),
            "on_too_long": ("error", "skip"),
            "features": ("hidden", "hidden_logits"),
        }
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise ValueError(f"unknown {key} {getattr(self, key)!r}; choose one of {', '.join(values)}")

    def train(self, run: TrainingRun) -> RouterPolicy:
        collection = CiterRounds(self, run.pool, run.task, run.seed)
        first = collection.given() if self.preferences else collection.collect(run.workspace / "round-1", None)
        columns = {name: first.column(name) for name in COLUMNS}
        # preferences that were given may hold rollouts that these labels do not ask for
        unasked = ~self.labels.rolled_out(columns)
        columns["slm_outcome"][unasked] = columns["llm_outcome"][unasked] = UNKNOWN
        kinds = collection.kinds(columns)
        policy: RouterPolicy | None = None
        for number in range(1, (self.rounds if self.labels.rolls and self.continuation == "router" else 1) + 1):
            if policy is not None:
                redone = self.labels.rolled_out(columns)
                if not redone.any():
                    break  # nothing to redo: no token is rolled out
                store = collection.collect(run.workspace / f"round-{number}", policy, first, number)
                for name in ("slm_outcome", "llm_outcome"):
                    columns[name][redone] = store.column(name)
            before, columns["label"] = columns["label"], self._labels(columns)
            more = collection.sampled(columns, kinds) if policy is None else self._relabelled(number, before, columns)
            run.track({"run": f"round {number}", "skipped": first.skipped(), **more, **_made_of(columns, kinds)})
            policy = self._train_router(run, first, columns, number)
        assert policy is not None
        return policy

    def collect(
        self, pool: ModelPool, task: Task, seed: int, folder: Path, track: Track = untracked
    ) -> PreferenceStore:
        """Collect the preferences of round 1 into `folder`, going on where an earlier run was interrupted."""
        collection = CiterRounds(self, pool, task, seed)
        store = collection.collect(folder, None)
        columns = {name: store.column(name) for name in COLUMNS}
        columns["label"], kinds = self._labels(columns), collection.kinds(columns)
        more = {"skipped": store.skipped(), **collection.sampled(columns, kinds)}
        track({"run": "round 1", "tokens": len(columns["case"]), **more, **_made_of(columns, kinds)})
        return store

    def collect_share(self, pool: ModelPool, task: Task, seed: int, folder: Path, share: Share) -> PreferenceStore:
        """Make one share of what `collect` makes, beside other processes; the bytes are the same."""
        return CiterRounds(self, pool, task, seed).collect(folder, None, share=share)

    def _labels(self, columns: Columns) -> npt.NDArray[np.int8]:
        """The labels of all tokens, by example and position, int8, (n,)."""
        labels = self.labels.of(columns)
        if not self.end_labels:
            labels[np.append(columns["example"][1:] != columns["example"][:-1], True)] = DROPPED
        return labels

    @staticmethod
    def _relabelled(number: int, before: npt.NDArray[np.int8], columns: Columns) -> dict[str, int]:
        """How many tokens have another label than in the round before, said aloud where none has."""
        relabelled = int((before != columns["label"]).sum())
        if not relabelled:
            logging.getLogger(__name__).info(
                "round %d relabelled no token: its rollouts agree with round %d's, so that it trains the same router",
                number,
                number - 1,
            )
        return {"relabelled": relabelled}

    def _train_router(self, run: TrainingRun, store: PreferenceStore, columns: Columns, number: int) -> RouterPolicy:
        data = LabelledTokens(
            features=store.features,
            sizes=store.rows(),
            prefers_slm=columns["label"] == 1,
            examples=columns["example"],
            kept=columns["label"] != DROPPED,
            width=feature_width(self.features, run.pool.slm.width),
            counts=self.labels.counts(columns),
        )
        name = f"round {number}"
        network, report = fit_router(
            data,
            self.training,
            run.seed,
            run.track,
            device=run.pool.slm.device,
            label=name,
            checkpoint=run.file(f"round-{number}.safetensors"),
        )
        run.track({"run": name, **report})
        return RouterPolicy(network, models_manifest(run.pool), self.features, report)


class CiterRounds:
    """The preferences of one learner: which examples, in which shards, and what made them.

    Args:
        settings: the learner.
        pool: the models.
        task: where examples come from.
        seed: another seed collects on other problems where the task generates them without end.
    """

    def __init__(self, settings: Citer, pool: ModelPool, task: Task, seed: int) -> None:
        self.settings, self.pool, self.task, self.seed = settings, pool, task, seed
        self.start = task.training_start(seed)
        self.examples = task.examples("train", settings.examples, start=self.start)
        self.parts = shard_ranges(len(self.examples), settings.shard_examples)
        self._collector: PreferenceCollector | None = None
        self._answers: Answers | None = None

    @property
    def collector(self) -> PreferenceCollector:
        """Made when it is first needed: it opens the models' caches."""
        if self._collector is None:
            settings = self.settings
            self._collector = PreferenceCollector(
                self.pool,
                self.task,
                self.examples,
                max_new_tokens=settings.max_new_tokens,
                scheduling=settings.scheduling,
                skip_too_long=settings.on_too_long == "skip",
                responses=self._answers,
            )
        return self._collector

    def _answer(self, folder: Path, share: Share | None = None) -> None:
        """Let the LLM write the references where that is asked for, or read those it wrote for round 1 in `folder`."""
        settings = self.settings
        if settings.references == "llm" and self._answers is None:
            self._answers = llm_references(
                self.pool,
                self.task,
                self.examples,
                folder,
                settings.max_new_tokens,
                settings.scheduling,
                skip_too_long=settings.on_too_long == "skip",
                parts=self.parts,
                own=None if share is None else share.of(len(self.parts)),
            )

    def kinds(self, columns: Columns) -> npt.NDArray[np.str_]:
        """The kind of the reference's token at each row, (n,), of columns that hold all tokens of their examples.

        Raises:
            ValueError: they are not those of the references.
        """
        walked = np.unique(columns["example"]).tolist()
        tokens = np.concatenate([self._reference(number) for number in walked])
        if len(tokens) != len(columns["example"]):
            raise ValueError(
                f"the preferences hold {len(columns['example'])} tokens, the references of their {len(walked)} "
                f"examples of task {self.task.name} have {len(tokens)}: they were collected on others; collect again"
            )
        return token_kinds(tokens, self.pool, self.task)

    def _reference(self, number: int) -> IntArray:
        """What was walked of an example, (length,)."""
        answer = None if self._answers is None else self._answers[number]
        return self.pool.encode_reference(self.examples[number]) if answer is None else answer

    def sampled(self, columns: Columns, kinds: npt.NDArray[np.str_]) -> dict[str, Any]:
        """What rollouts say of a sample of case 2, drawn of all tokens of round 1; empty where none is asked for."""
        sample = self.settings.sample
        if not sample.positions:
            return {}
        drawn = sample.draw(columns, self.seed)
        part = {name: values[drawn] for name, values in columns.items()}
        if len(drawn):
            self.collector.redo(part, Labels(), Always(slm=sample.finisher == "slm"), 0.5)
        return {"case_2_sample": right_by_kind(part["slm_outcome"], kinds[drawn])}

    def manifest(self, policy: RouterPolicy | None, number: int) -> dict[str, Any]:
        """What makes the preferences of a round."""
        settings = self.settings
        # what is as published is not named, as before there was a choice: what was collected then still serves
        answers = {"references": "llm"} if settings.references == "llm" else {}
        return {
            "models": models_manifest(self.pool),
            "task": {"name": self.task.name, "start": self.start, "examples": len(self.examples)},
            "seed": self.seed,
            "shared": {
                "max_new_tokens": settings.max_new_tokens,
                "on_too_long": settings.on_too_long,
                "shard_examples": settings.shard_examples,
                **answers,
            },
            "labels": settings.labels.manifest(),
            # the SLM finishes round 1 of `router` too
            "continuation": (settings.continuation if number > 1 else settings.continuation.replace("router", "slm"))
            if settings.labels.rolls
            else None,
            "round": number,
            "router": policy.fingerprint if policy else None,
            "threshold": settings.threshold if policy else None,
        }

    def given(self) -> PreferenceStore:
        """The store the user named, once it is known to serve.

        Raises:
            ValueError: other models, examples or settings made it; it lacks rollouts; or shards are missing or damaged.
        """
        assert self.settings.preferences is not None
        store = PreferenceStore.open(Path(self.settings.preferences))
        wanted = self.manifest(None, 1)
        only = ["models", "task", "shared"]
        if self.settings.labels.rolls:
            only += ["labels", "continuation"]
        check_manifest(store.folder, store.manifest, wanted, only)
        store.require()
        self._answer(store.folder)
        return store

    def collect(
        self,
        folder: Path,
        policy: RouterPolicy | None,
        first: PreferenceStore | None = None,
        number: int = 1,
        share: Share | None = None,
    ) -> PreferenceStore:
        """Make the shards of a round that are not there yet.

        Args:
            folder: of the round.
            policy: the router that finishes rollouts.
            first: the store of round 1, whose rollouts a later round redoes.
            number: of the round.
            share: make these shards alone, beside other processes; all where None.
        """
        store = PreferenceStore(folder, self.manifest(policy, number), len(self.parts))
        if first is None:
            self._answer(folder, share)

        def make(shard: int) -> tuple[Columns, dict[str, Any]]:
            columns = self._make(shard, first, policy)
            columns["label"] = self.settings.labels.of(columns)
            columns["round"] = np.full(len(columns["label"]), number, dtype=np.int8)
            skipped = [self.examples[e].id for e in self.parts[shard] if not self.collector.fits[e]]
            return columns, {"skipped": skipped}

        store.complete(self.parts, make, f"preferences, round {number}", share)
        return store

    def _make(self, shard: int, first: PreferenceStore | None, policy: Policy | None) -> Columns:
        labels, threshold = self.settings.labels, self.settings.threshold
        finisher = continuation_policy(self.settings.continuation, policy)
        if first is None:
            return self.collector.collect(self.parts[shard], labels, finisher, threshold)
        columns = first.shard(shard)
        where = labels.rolled_out(columns)
        columns = {name: values[where] for name, values in columns.items()}
        self.collector.redo(columns, labels, finisher, threshold)
        return columns


def _made_of(columns: Columns, kinds: npt.NDArray[np.str_]) -> dict[str, Any]:
    """What a row says of the labels of a round: on how many problems, their shares, and what they are made of."""
    problems = len(np.unique(columns["example"]))
    return {"problems": problems, **shares(columns), "composition": composition(columns, kinds)}


def continuation_policy(continuation: str, previous: Policy | None) -> Policy:
    """Who finishes rollouts: the SLM or the LLM alone, or the router of the round before (the SLM in round 1)."""
    if continuation == "router" and previous is not None:
        return previous
    return Always(slm=continuation != "llm")
