"""Co-LLM: who writes a token as a latent variable, read off the SLM's state (Shen et al., ACL 2024, arXiv 2403.03870).

Nobody labels the choice. It is summed out, and the head learns whatever makes the reference solutions likely: at each
of their tokens, P(y) = (1 - d) P_slm(y) + d P_llm(y), where d is the probability of deferring to the LLM. Both models
stay as they are here, as for every router; the paper trains the SLM along.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agents.common.policy import Learner, TrainingRun
from agents.common.rollout import Scheduling, decode
from agents.common.selection import validation_problems
from agents.router.dataset import LabelledTokens
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router, predict
from envs.arrays import FloatArray, IntArray
from envs.costs import WRITTEN
from envs.decoding.preference_rule import cases
from envs.decoding.reference_reader import ReferenceReader
from envs.decoding.references import shape_that_fits
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.pool import ModelPool, models_manifest
from envs.storage import write_text
from envs.tasks.task import Example

VALIDATION_START = 1000
"""The first validation problem for eta where problems are generated: evaluations set thresholds on earlier ones."""
DEFERRED = (0.01, 0.03, 0.06, 0.1, 0.2, 0.4)
"""Shares of the reference tokens that the etas tried would defer, beside the eta of 0.5."""


def marginal_likelihood_loss(logits: Tensor, slm_log_probability: Tensor, llm_log_probability: Tensor) -> Tensor:
    """Co-LLM's negative log-marginal likelihood (Shen et al. 2024): mean of -log[(1 - d) P_slm(y) + d P_llm(y)].

    It is computed from log-probabilities throughout, so that it stays finite where both models find y unlikely.

    Args:
        logits: log-odds that the SLM should write, (n,): d = sigmoid(-logits).
        slm_log_probability: log P_slm(y) of the reference's token y, (n,).
        llm_log_probability: log P_llm(y), (n,).
    """
    by_slm = nn.functional.logsigmoid(logits) + slm_log_probability
    by_llm = nn.functional.logsigmoid(-logits) + llm_log_probability
    return -torch.logaddexp(by_slm, by_llm).mean()


@dataclass(frozen=True)
class ReferenceTokens(LabelledTokens):
    """Tokens of reference solutions, which are to be made likely; their labels are the weak ones.

    Attributes:
        slm_log_probability: of the reference's token under the SLM, (n,).
        llm_log_probability: under the LLM, (n,).
    """

    slm_log_probability: FloatArray
    llm_log_probability: FloatArray

    def loss(self, logits: Tensor, rows: IntArray, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """The marginal likelihood loss, which has no labels to weigh."""
        given = (
            torch.from_numpy(part[rows]).to(logits) for part in (self.slm_log_probability, self.llm_log_probability)
        )
        return marginal_likelihood_loss(logits, *given)

    def weakly_labelled(self) -> LabelledTokens:
        """The same tokens, whose loss is that of the labels."""
        return LabelledTokens(self.features, self.sizes, self.prefers_slm, self.examples, self.kept, self.width)

    @classmethod
    def read(
        cls, pool: ModelPool, examples: Sequence[Example], max_new_tokens: int, scheduling: Scheduling
    ) -> ReferenceTokens:
        """Let the SLM and the LLM read the reference solutions, each in one teacher-forced pass.

        A token's weak label is the LLM where it would write the reference's token and the SLM would not.

        Raises:
            ValueError: a reference that does not fit or that ends early (the error names the example), or more tokens
                than the memory that is free holds.
            FloatingPointError: a model finds a reference impossible.
        """
        session = TeacherSession(pool, min(scheduling.rows_for(pool), len(examples)), max_new_tokens)
        reader = ReferenceReader(session, examples)
        starts = reader.starts
        # a bound: training copies what it shuffles, at half the bytes a number
        count, _ = shape_that_fits(int(starts[-1]), pool)
        features = torch.empty(count, pool.slm.width, dtype=torch.float16)
        tokens: IntArray = np.empty((count, len(pool)), dtype=np.int64)
        likely: FloatArray = np.empty((count, len(pool)))
        for batch in reader.read(log_probabilities=True, label="references"):
            read = zip(batch.examples, batch.views, batch.tokens, batch.log_probabilities, strict=True)
            for e, state, chosen, log_probabilities in read:
                if not np.isfinite(log_probabilities).all():
                    raise FloatingPointError(
                        f"example {examples[e].id}: a model gives a token of its reference no probability; drop the "
                        "example, or load the models with another dtype"
                    )
                part = slice(starts[e], starts[e + 1])
                features[part], tokens[part], likely[part] = state.half().cpu(), chosen, log_probabilities
        prefers_slm = cases(np.concatenate(reader.solutions), tokens[:, 0], tokens[:, -1]) != 2
        owners = np.repeat(np.arange(len(examples)), np.diff(starts))
        plain = LabelledTokens.in_memory(features, prefers_slm, owners)
        return cls(**vars(plain), slm_log_probability=likely[:, 0], llm_log_probability=likely[:, -1])


@dataclass(frozen=True)
class CoLlm(Learner[RouterPolicy]):
    """Co-LLM with a frozen SLM.

    The LLM writes where d > eta. The policy's score is sigmoid(logit eta - logit d): at the threshold 0.5 that is the
    published rule, and other thresholds draw the same curve whatever eta is.

    Args:
        examples: training problems; all of the train split where None.
        weak_start: train the head on weak labels first, as published: the LLM where it would write the reference's
            token and the SLM would not.
        weak_epochs: of that; `training` says the rest.
        validation_examples: validation problems that choose eta: of a few values the one with the most right answers,
            and of these the one with the fewest LLM tokens. 0 leaves it at 0.5.
        max_new_tokens: the longest response.
        training: how the head is trained; linear as published. `balanced` weighs the weak labels alone.
        scheduling: how responses share passes.
    """

    examples: int | None = 1500
    weak_start: bool = True
    weak_epochs: int = 4
    validation_examples: int = 200
    max_new_tokens: int = 128
    training: RouterTraining = field(default_factory=lambda: RouterTraining(units=[]))
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        if (self.examples is not None and self.examples < 2) or self.weak_epochs < 1 or self.max_new_tokens < 1:
            raise ValueError(
                f"examples ({self.examples}) must be at least 2, weak_epochs ({self.weak_epochs}; without any, "
                f"weak_start=false) and max_new_tokens ({self.max_new_tokens}) at least 1"
            )
        if self.validation_examples < 0:
            raise ValueError(f"validation_examples must be at least 0, is {self.validation_examples}")
        if self.training.balanced and not self.weak_start:
            raise ValueError("training.balanced weighs the weak labels, which weak_start=false leaves out; unset one")

    def train(self, run: TrainingRun) -> RouterPolicy:
        pool, task = run.pool, run.task
        examples = task.examples("train", self.examples, start=task.training_start(run.seed))
        problems = validation_problems(
            pool,
            task,
            self.validation_examples,
            VALIDATION_START,
            self.max_new_tokens,
            "validation_examples",
            "leave eta at 0.5 with 0",
        )
        data = ReferenceTokens.read(pool, examples, self.max_new_tokens, self.scheduling)
        run.track(
            {
                "run": "references",
                "tokens": len(data.examples),
                "weak_llm_share": float(1 - data.prefers_slm.mean()),
                "slm_loss": float(-data.slm_log_probability.mean()),
                "llm_loss": float(-data.llm_log_probability.mean()),
            }
        )
        device, start = pool.slm.device, None
        if self.weak_start:
            start, _ = fit_router(
                data.weakly_labelled(),
                replace(self.training, epochs=self.weak_epochs),
                run.seed,
                run.track,
                device=device,
                label="weak",
                checkpoint=run.file("weak.safetensors"),
            )
        network, report = fit_router(
            data,
            self.training,
            run.seed,
            run.track,
            device=device,
            label="marginal",
            checkpoint=run.file("marginal.safetensors"),
            start=start,
        )
        policy = RouterPolicy(network, models_manifest(pool), calibration=report)
        eta = 0.5
        if problems:
            logits, _ = predict(network, data, data.kept, device)
            tried = self._try(run, problems, policy, candidate_etas(logits))
            eta = max(tried, key=lambda row: (row["accuracy"], -row["llm_tokens"]))["eta"]
        run.track({"run": "marginal", "eta": eta, **report})
        return RouterPolicy(shifted(network, eta), policy.models, calibration={"eta": eta, **report})

    def _try(
        self, run: TrainingRun, problems: Sequence[Example], policy: RouterPolicy, etas: Sequence[float]
    ) -> list[dict[str, Any]]:
        """What each eta comes to on validation problems; kept, so that an interruption costs one of them at most."""
        file = run.file("eta.json")
        made_by = {
            "router": policy.fingerprint,
            "problems": [problem.id for problem in problems],
            "max_new_tokens": self.max_new_tokens,
        }
        kept = json.loads(file.read_text()) if file and file.is_file() else {}
        rows = [row for row in kept.get("rows", []) if row["eta"] in etas] if kept.get("made_by") == made_by else []
        for eta in etas:
            if eta not in [row["eta"] for row in rows]:
                tried = RouterPolicy(shifted(policy.network, eta), policy.models)
                episodes = decode(
                    run.pool,
                    run.task,
                    problems,
                    tried,
                    max_new_tokens=self.max_new_tokens,
                    scheduling=self.scheduling,
                    label=f"eta {eta:.3g}",
                )
                tokens = int(sum(episode.ledger[-1, WRITTEN] for episode in episodes))
                right = float(np.mean([episode.correct for episode in episodes]))
                rows.append({"eta": eta, "accuracy": right, "llm_tokens": tokens})
                if file:
                    write_text(file, json.dumps({"made_by": made_by, "rows": rows}) + "\n")
        for row in rows:
            run.track({"run": "eta", **row})
        return rows


def candidate_etas(logits: Tensor) -> list[float]:
    """Etas to try, given log-odds that the SLM should write at reference tokens, (n,): 0.5 and quantiles of d."""
    quantiles = np.quantile(torch.sigmoid(-logits).numpy(), 1 - np.array(DEFERRED))
    return [0.5, *(float(eta) for eta in np.unique(quantiles.clip(1e-9, 1 - 1e-9)) if eta != 0.5)]


def shifted(network: RouterNetwork, eta: float) -> RouterNetwork:
    """A copy of a network whose logits are those of the published rule at `eta`: 0 or more where d <= eta."""
    moved = copy.deepcopy(network)
    head = moved.layers[-1]
    assert isinstance(head, nn.Linear)
    head.bias.data += float(np.log(eta) - np.log1p(-eta))
    return moved
