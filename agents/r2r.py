"""R2R: a router trained on which of the tokens the models disagree about lead the LLM's answer elsewhere.

Fu et al., 2025, "R2R: Efficiently Navigating Divergent Reasoning Paths with Small-Large Model Token Routing". The SLM's
token is divergent where the LLM, going on from it, comes to another answer than from its own (`Divergence`); a router
that sees the SLM's state, logits and token learns that by binary cross-entropy. The paper lets a further model judge
whether two continuations mean the same; here the task's verdict on the whole answers does.
Its router is six residual blocks, some 4 % of its SLM's weights; here it is a plain network of `training.units`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agents.common.policy import Learner, TrainingRun
from agents.common.rollout import Scheduling, decode
from agents.common.saving import saved_as
from agents.heuristics import Always
from agents.preferences.collector import PreferenceCollector
from agents.preferences.store import COLUMNS, Columns, PreferenceStore, shard_ranges
from agents.router.dataset import LabelledTokens
from agents.router.policy import RouterPolicy, restored_network
from agents.router.training import RouterTraining, fit_router
from envs.arrays import BoolArray
from envs.decoding.decoder import check_fit, sequence_capacity
from envs.decoding.observation import Observation
from envs.models.pool import ModelPool, models_manifest
from envs.tasks.task import Example, Task

SEEN = "hidden_top_logits_token"
"""What its policies see: the SLM's hidden state, its largest logits, and the embedding of the token it would write."""


@dataclass(frozen=True)
class Divergence:
    """R2R's labels along the LLM's own responses: the LLM writes where the SLM's token leads the answer elsewhere.

    Where both models would write the same token the SLM is preferred. Elsewhere the SLM's token is taken and the LLM
    finishes the answer. The token is divergent where that answer is right and the LLM's own is wrong, or the other way
    round; otherwise it is neutral, and the SLM is preferred.
    """

    branches: Literal["slm"] = "slm"

    def rolled_out(self, columns: Columns) -> BoolArray:
        """Which tokens need a rollout, (n,): those where the models differ."""
        return np.asarray(columns["slm_token"] != columns["llm_token"])

    def of(self, columns: Columns) -> npt.NDArray[np.int8]:
        """1 where the SLM is preferred, 0 where the LLM is; int8, (n,).

        Args:
            columns: `slm_token`, `llm_token`, `slm_outcome`, and `llm_outcome`, the verdict on the LLM's own response.
        """
        neutral = columns["slm_outcome"] == columns["llm_outcome"]
        return np.where(self.rolled_out(columns), neutral, True).astype(np.int8)


def hidden_and_top_logits(hidden: Tensor, logits: Tensor, count: int) -> Tensor:
    """Hidden states (n, width), then the `count` largest logits, or all, in falling order: float32, (n, width + count).

    Args:
        hidden: hidden states, (n, width).
        logits: next-token logits, (n, vocab).
        count: how many logits.
    """
    return torch.cat([hidden.float(), logits.float().topk(min(count, logits.shape[-1]), dim=-1).values], dim=-1)


def token_embeddings(pool: ModelPool) -> Tensor:
    """What the SLM reads in the place of each token, its own weights, (vocab, embedding width)."""
    table: Tensor = pool.slm.network.get_input_embeddings().weight
    return table


@saved_as("r2r")
@dataclass
class R2RPolicy(RouterPolicy):
    """Scores a decision by the SLM's hidden state, its largest logits and the embedding of the token it would write.

    Attributes:
        top_logits: how many of the largest logits it sees, all where there are fewer.
        embeddings: of the SLM, (vocab, embedding width).
    """

    features: str = SEEN
    top_logits: int = field(default=100, kw_only=True)
    embeddings: Tensor = field(kw_only=True, repr=False)

    @property
    def parameters(self) -> int:
        """Parameters read at every decision: the network, and one token's embedding."""
        return super().parameters + self.embeddings.shape[1]

    def score(self, observation: Observation) -> Tensor:
        """See `Policy`.

        Raises:
            ValueError: the observation is a replay tree's, which keeps no logits.
        """
        if observation.logits is None:
            raise ValueError(
                f"R2R sees the {self.top_logits} largest logits of the SLM, a replay tree keeps fewer; decode live, "
                "without evaluation.tree"
            )
        inputs = hidden_and_top_logits(observation.hidden, observation.logits, self.top_logits)
        embedded = self.embeddings[observation.logits.argmax(-1)]
        return torch.sigmoid(self.network(torch.cat([inputs, embedded.float()], dim=-1)))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "top_logits": self.top_logits}

    @classmethod
    def input_width(cls, settings: Mapping[str, Any], pool: ModelPool) -> int:
        logits = min(int(settings["top_logits"]), pool.vocab_size)
        return pool.slm.width + logits + int(token_embeddings(pool).shape[1])

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> Self:
        return cls(
            restored_network(settings, tensors, pool),
            settings["models"],
            calibration=settings["calibration"],
            top_logits=settings["top_logits"],
            embeddings=token_embeddings(pool),
        )


@dataclass(frozen=True)
class R2R(Learner[R2RPolicy]):
    """Routes to the LLM the tokens of the SLM that would change how the LLM's own answer ends.

    The LLM answers training problems by itself, and these answers are walked token by token; see `Divergence` for the
    labels. Those that did not end by themselves, or are blank, are left out and counted; wrong ones stay.

    Args:
        examples: training problems the LLM answers; all of the train split where None.
        max_new_tokens: the longest response.
        top_logits: how many of the SLM's largest logits the router sees, all where there are fewer.
        training: how the router is trained; its units make it about as large as published in conf/agent/r2r.yaml, and
            larger than a small SLM where they are None.
        shard_examples: examples whose labels are written at once; an interruption costs at most these.
        scheduling: how responses and rollouts share passes.
    """

    needs_folder: ClassVar[bool] = True

    examples: int | None = 1500
    max_new_tokens: int = 128
    top_logits: int = 100
    training: RouterTraining = field(default_factory=RouterTraining)
    shard_examples: int = 256
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        if self.examples is not None and self.examples < 2:
            raise ValueError(f"examples must be at least 2, is {self.examples}")
        for key in ("max_new_tokens", "top_logits", "shard_examples"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, is {getattr(self, key)}")

    def train(self, run: TrainingRun) -> R2RPolicy:
        pool = run.pool
        store = self.collect(pool, run.task, run.seed, run.workspace / "paths")
        columns = {name: store.column(name) for name in COLUMNS}
        answers = len(np.unique(columns["example"]))
        if answers < 2:
            raise ValueError(
                f"the LLM's responses to {answers} of {answers + store.skipped()} training problems ended by "
                f"themselves, 2 are needed; raise max_new_tokens ({self.max_new_tokens}) or examples"
            )
        run.track({"run": "r2r", "walked": answers, "skipped": store.skipped(), **shares(columns)})
        embeddings, sizes = token_embeddings(pool), store.rows()
        written = np.split(columns["slm_token"].astype(np.int64), np.cumsum(sizes)[:-1])

        def features(shard: int) -> Tensor:
            tokens = torch.from_numpy(written[shard]).to(embeddings.device)
            return torch.cat([store.features(shard), embeddings[tokens].half().cpu()], dim=-1)

        width = R2RPolicy.input_width({"top_logits": self.top_logits}, pool)
        everywhere = np.ones(len(columns["label"]), dtype=bool)
        data = LabelledTokens(
            features=features,
            sizes=sizes,
            prefers_slm=columns["label"] == 1,
            examples=columns["example"],
            kept=everywhere,
            width=width,
        )
        network, report = fit_router(
            data,
            self.training,
            run.seed,
            run.track,
            device=pool.slm.device,
            label="r2r",
            checkpoint=run.file("r2r.safetensors"),
        )
        run.track({"run": "r2r", **report})
        return R2RPolicy(
            network, models_manifest(pool), calibration=report, top_logits=self.top_logits, embeddings=embeddings
        )

    def collect(self, pool: ModelPool, task: Task, seed: int, folder: Path) -> PreferenceStore:
        """Walk and label the LLM's responses into `folder`, going on where an earlier run was interrupted.

        The columns are those of `PreferenceCollector.collect` with `label` and `round`; `llm_outcome` is the verdict on
        the LLM's own response where the models differ. `features` are `hidden_and_top_logits`; the embeddings are
        looked up by `slm_token`.

        Raises:
            ValueError: a prompt does not fit, or `folder` holds what other models or settings made.
        """
        start = task.training_start(seed)
        examples = task.examples("train", self.examples, start=start)
        capacity = sequence_capacity(pool, self.max_new_tokens, None)
        for example in examples:
            check_fit(f"example {example.id}", pool.encode_prompt(example), (), capacity, self.max_new_tokens)
        parts = shard_ranges(len(examples), self.shard_examples)
        manifest = {
            "models": models_manifest(pool),
            "task": {"name": task.name, "start": start, "examples": len(examples)},
            "seed": seed,
            "walked": "the LLM's own responses",
            "max_new_tokens": self.max_new_tokens,
            "shard_examples": self.shard_examples,
            "top_logits": self.top_logits,
        }
        store = PreferenceStore(folder, manifest, len(parts))

        def make(shard: int) -> tuple[Columns, dict[str, Any]]:
            part = parts[shard]
            columns, skipped = self._walk(pool, task, examples[part.start : part.stop])
            columns["example"] += part.start
            return columns, {"skipped": skipped}

        store.complete(parts, make, "the LLM's responses")
        return store

    def _walk(self, pool: ModelPool, task: Task, examples: Sequence[Example]) -> tuple[Columns, list[str]]:
        """Columns of the LLM's responses to some examples, which they number, and the ids of those left out."""
        llm, labels = Always(slm=False), Divergence()
        episodes = decode(pool, task, examples, llm, max_new_tokens=self.max_new_tokens, scheduling=self.scheduling)
        serving = [n for n, episode in enumerate(episodes) if episode.terminated and episode.text.strip()]
        # The tokens the LLM wrote, not its text: put into tokens again, the same text may become others, which the LLM
        # would not write. What is left is rounding: where two of its logits are all but the same, the pass over the
        # whole response may prefer the other token. Then the SLM's is compared with that one, and the verdict stays
        # that on the response as it was written.
        collector = PreferenceCollector(
            pool,
            task,
            examples,
            max_new_tokens=self.max_new_tokens,
            scheduling=self.scheduling,
            responses=[episode.tokens for episode in episodes],
            view=partial(hidden_and_top_logits, count=self.top_logits),
        )
        columns = collector.collect(serving, labels, llm, 0.5)
        # the LLM's token and what it writes after it are its own response, so that nothing is decoded for this
        differ = labels.rolled_out(columns)
        right = np.array([episode.correct for episode in episodes])
        columns["llm_outcome"][differ] = right[columns["example"][differ]]
        columns["label"] = labels.of(columns)
        columns["round"] = np.ones(len(columns["label"]), dtype=np.int8)
        return columns, [examples[n].id for n in range(len(examples)) if n not in serving]


def shares(columns: Columns) -> dict[str, float]:
    """Tokens, the shares of them at which the models differ and that are divergent, and of right rollouts."""
    differ = Divergence().rolled_out(columns)
    return {
        "tokens": len(differ),
        "differ": float(differ.mean()),
        "divergent": float((columns["label"] == 0).mean()),
        "llm_right_where_they_differ": float(columns["llm_outcome"][differ].mean()) if differ.any() else 0.0,
        "slm_rollouts_right": float(columns["slm_outcome"][differ].mean()) if differ.any() else 0.0,
    }
