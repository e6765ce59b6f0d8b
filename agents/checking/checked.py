"""Checking by risk: the LLM is called where a draft of the SLM is too likely not to stand.

A router learns whether the judge would take back the SLM's next token, and so the probability that it stands. The
product over what was drafted since the last call is the probability that all of that stands, and it is compared with a
threshold behind each token. Labels are what the LLM thinks of the SLM's tokens on training problems: no search, no
rollouts, and two passes over each answer. The answers are the policy's own, round after round, as in DAgger (Ross et
al., AISTATS 2011, algorithm 3.1) with the judge as the expert; in the first round the SLM's entropies decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from agents.checking.entropy import CheckedEntropy
from agents.checking.judged_states import JudgedStates, judged_states
from agents.checking.span import ONE, Span, Tokens, described_span, drafts_of, span_of
from agents.common.policy import DRAFTED, Learner, Observation, Policy, TrainingRun, as_tensor
from agents.common.rollout import Scheduling, decode
from agents.common.saving import saved_as
from agents.router.dataset import LabelledTokens
from agents.router.policy import RouterPolicy, restored_network
from agents.router.training import RouterTraining, fit_router
from envs.arrays import FloatArray, IntArray
from envs.decoding.decoder import check_fit, sequence_capacity
from envs.decoding.judges import Gap, Judge, described, judge_of
from envs.decoding.observation import check_features
from envs.models.pool import ModelPool, models_manifest
from envs.progress import ProgressBar
from envs.tasks.task import Example


@saved_as("checked")
@dataclass
class CheckedPolicy(RouterPolicy):
    """Calls the LLM by the probability that all stands that was drafted since the last call.

    The network gives the probability that a token of the SLM stands, by the state that it is drafted by. The score is
    the product of these over the tokens drafted since the last call: exp(-sum of -log(1 - risk)). At a drafted end it
    is raised to the power of `end_weight`: what is let go there nobody checks later.

    The SLM has not read the last token then. So a call costs no pass of it: it reads that token with the LLM's.

    Attributes:
        judge: which drafted tokens stand; the network was trained for it.
        end_weight: of the sum at a drafted end.
        span: how long the LLM writes once it is called.
        looks_ahead: the product is also over the token that would be drafted next, so that the SLM reads every token as
            it is written. Policies that were saved before there was this setting do.
    """

    features: str = "hidden_logits_history"
    judge: Judge = field(default_factory=Gap, kw_only=True)
    end_weight: float = field(default=1.0, kw_only=True)
    span: Span = field(default_factory=Tokens, kw_only=True)
    looks_ahead: bool = field(default=False, kw_only=True)
    # by episode: log-probabilities that the first 1, 2, ... tokens since the last call all stand
    _standing: dict[int, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def score(self, observation: Observation) -> Tensor:
        """See `Policy`.

        Raises:
            ValueError: the policy was not asked at each token of a draft.
        """
        drafts = drafts_of(observation)
        asked, before = ~drafts.ended, drafts.counts
        if not self.looks_ahead:
            # the state is that of a token ago
            asked, before = drafts.counts > 0, np.maximum(drafts.counts - 1, 0)
            places, since = (np.maximum(n - 1, 0) for n in (observation.host_positions, observation.host_since_llm))
            observation = replace(observation, host_positions=places, host_since_llm=since)
        logits = self.network(observation.vector(self.features))
        own = np.where(asked, torch.nn.functional.logsigmoid(logits.double()).cpu().numpy(), 0.0)
        total = self._before(observation.host_episodes, before) + own
        for episode, count, known, value in zip(
            observation.host_episodes.tolist(), before.tolist(), asked.tolist(), total.tolist(), strict=True
        ):
            if known:
                self._standing[episode][count:] = [value]
        scores = np.exp(np.where(drafts.ended, self.end_weight, 1.0) * total)
        return as_tensor(self.span.hold(scores, drafts))

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return self.looks_ahead

    @property
    def sees(self) -> Sequence[str]:
        return ("slm",) if self.looks_ahead else ("slm", DRAFTED)

    def _before(self, episodes: IntArray, counts: IntArray) -> FloatArray:
        """Log-probabilities that the first `counts` drafted tokens stand, (n,): the network was asked before."""
        found = []
        for episode, count in zip(episodes.tolist(), counts.tolist(), strict=True):
            known = self._standing.setdefault(episode, [])
            if count > len(known):
                raise ValueError(
                    f"episode {episode}: {count} tokens are drafted, and the policy was asked at {len(known)} of them; "
                    "ask it at each, from the beginning of the response or the last call on"
                )
            found.append(known[count - 1] if count else 0.0)
        return np.array(found)

    def forget(self, episodes: IntArray) -> None:
        for episode in episodes.tolist():
            self._standing.pop(episode, None)

    def about(self) -> str:
        span = "" if self.span == ONE else f" {self.span}"  # what was saved before there were spans keeps its name
        behind = "" if self.looks_ahead else " behind"  # so does what was saved before there were others
        return f"{super().about()} {described(self.judge)} {self.end_weight}{span}{behind}"

    def settings(self) -> dict[str, Any]:
        own = {"judge": described(self.judge), "end_weight": self.end_weight, "span": described_span(self.span)}
        return {**super().settings(), **own, "looks_ahead": self.looks_ahead}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> Self:
        return cls(
            restored_network(settings, tensors, pool),
            settings["models"],
            settings["features"],
            settings["calibration"],
            judge=judge_of(settings["judge"]),
            end_weight=settings["end_weight"],
            span=span_of(settings["span"]) if "span" in settings else ONE,
            looks_ahead=settings.get("looks_ahead", True),
        )


@dataclass(frozen=True)
class Checked(Learner[CheckedPolicy]):
    """Learns the risk that the judge takes the SLM's next token back.

    Args:
        examples: training problems; all of the train split where None.
        rounds: of answering and training; in the first the SLM's entropies decide when the LLM is called, in later ones
            the policy so far, whose states are added.
        threshold: of the answers that states are taken from.
        judge: which drafted tokens stand.
        end_weight: of the sum of -log(1 - risk) at a drafted end, which the threshold is compared with too.
        span: how long the LLM writes once it is called.
        looks_ahead: whether the risk of the token that would be drafted next counts too, see `CheckedPolicy`.
        features: what the network sees, one of `envs.decoding.observation.FEATURES`.
        max_new_tokens: the longest response.
        training: how the network is trained.
        scheduling: how responses share passes.

    Raises:
        ValueError: a setting is out of range.
    """

    examples: int | None = 4000
    rounds: int = 3
    threshold: float = 0.5
    judge: Judge = field(default_factory=Gap)
    end_weight: float = 16.0
    span: Span = field(default_factory=Tokens)
    looks_ahead: bool = False
    features: Literal["hidden", "hidden_logits", "hidden_logits_history"] = "hidden_logits_history"
    max_new_tokens: int = 128
    training: RouterTraining = field(default_factory=RouterTraining)
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        check_features(self.features)
        if self.judge.whole:
            raise ValueError(
                f"the judge {self.judge} is of whole drafts, and a risk is of a token; choose another judge"
            )
        if (self.examples is not None and self.examples < 2) or self.rounds < 1:
            raise ValueError(f"examples ({self.examples}) must be at least 2 and rounds ({self.rounds}) at least 1")
        if not 0 < self.threshold < 1 or self.end_weight < 0:
            raise ValueError(
                f"threshold must be in (0, 1), is {self.threshold}; end_weight must be at least 0, is {self.end_weight}"
            )

    def train(self, run: TrainingRun) -> CheckedPolicy:
        pool = run.pool
        examples = run.task.examples("train", self.examples, start=run.task.training_start(run.seed))
        capacity = sequence_capacity(pool, self.max_new_tokens, None)
        for example in examples:
            check_fit(f"example {example.id}", pool.encode_prompt(example), (), capacity, self.max_new_tokens)
        policy: Policy = CheckedEntropy(self.judge, self.span)
        rounds: list[JudgedStates] = []
        for number in ProgressBar(range(1, self.rounds + 1), desc="rounds"):
            # what was decoded is kept when a run is interrupted; the policy is, by its checkpoint
            file = run.file(f"states-{number}.safetensors")
            found = JudgedStates.saved(file)
            if found is None:
                found = self._visited(run, examples, policy)
                if file is not None:
                    found.save(file)
            rounds.append(found)
            run.track({"run": f"round {number}", **found.row()})
            policy = self._trained(run, rounds, number)
        assert isinstance(policy, CheckedPolicy)
        return policy

    def _visited(self, run: TrainingRun, examples: Sequence[Example], policy: Policy) -> JudgedStates:
        """The states that a policy comes to, judged."""
        episodes = decode(
            run.pool,
            run.task,
            examples,
            policy,
            self.threshold,
            max_new_tokens=self.max_new_tokens,
            scheduling=self.scheduling,
            label="answers",
        )
        rows = min(len(episodes), self.scheduling.rows_for(run.pool))
        return judged_states(run.pool, episodes, self.judge, self.features, rows)

    def _trained(self, run: TrainingRun, rounds: Sequence[JudgedStates], number: int) -> CheckedPolicy:
        name = f"round {number}"
        seen, stands, examples, _ = zip(*rounds, strict=True)
        data = LabelledTokens.in_memory(torch.cat(seen), np.concatenate(stands), np.concatenate(examples))
        checkpoint = run.file(f"round-{number}.safetensors")
        network, report = fit_router(
            data, self.training, run.seed, run.track, device=run.pool.slm.device, label=name, checkpoint=checkpoint
        )
        run.track({"run": name, **report})
        return CheckedPolicy(
            network,
            models_manifest(run.pool),
            self.features,
            report,
            judge=self.judge,
            end_weight=self.end_weight,
            span=self.span,
            looks_ahead=self.looks_ahead,
        )
