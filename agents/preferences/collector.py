"""Preferences over the two models, token by token: the shortcut, and rollouts where it is silent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from agents.common.episode_queue import EpisodeQueue
from agents.common.policy import Policy
from agents.common.rollout import Scheduling, decode_loop
from agents.preferences.labels import Rollouts
from agents.preferences.store import FEATURES, Columns
from envs.arrays import UNKNOWN, BoolArray, IntArray
from envs.decoding.observation import all_features
from envs.decoding.preference_rule import cases
from envs.decoding.reference_reader import ReferenceReader
from envs.decoding.teacher_forcing import TeacherSession, View
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task


class PreferenceCollector:
    """Collects preferences on reference solutions.

    Args:
        pool: the models; the last one is the LLM.
        task: judges the answers of rollouts.
        examples: problems with their reference solutions.
        max_new_tokens: the longest response; references must fit.
        scheduling: how rollouts share passes.
        skip_too_long: leave examples out that do not fit, instead of refusing them.
        responses: tokens to walk in place of each example's reference, the end of sequence included; an example is
            left out where its are None.
        view: what to keep of the SLM's hidden state and logits at each token, one row of numbers.

    Attributes:
        fits: which examples fit, (examples,).
        walked: those of them that have a response, which are used, (examples,).

    Raises:
        ValueError: a reference that does not fit or that ends early; the error names it.
    """

    def __init__(
        self,
        pool: ModelPool,
        task: Task,
        examples: Sequence[Example],
        max_new_tokens: int = 128,
        scheduling: Scheduling | None = None,
        skip_too_long: bool = False,
        responses: Sequence[IntArray | None] | None = None,
        view: View = all_features,
    ) -> None:
        if not examples:
            raise ValueError("there are no examples to collect preferences on")
        self.pool, self.task, self.examples = pool, task, examples
        self.scheduling = scheduling or Scheduling()
        # half of the rows hold references, the others are forked from them
        self._rows = max(1, self.scheduling.rows_for(pool) // 2)
        self._session = TeacherSession(pool, 2 * self._rows, max_new_tokens)
        self._view = view
        self._no_features = view(torch.zeros(0, pool.slm.width), torch.zeros(0, pool.vocab_size)).half()
        none = np.array([pool.end_token])
        walked = None if responses is None else [none if response is None else response for response in responses]
        self._reader = ReferenceReader(self._session, examples, self._rows, walked, skip_too_long)
        self.fits = self._reader.fits
        self.walked: BoolArray = self.fits.copy()
        if responses is not None:
            self.walked &= [response is not None for response in responses]
        if not self.fits.any():  # a share of the examples may have no response that is walked
            raise ValueError(f"none of the {len(examples)} examples fits; raise max_new_tokens or capacity")

    def collect(self, chosen: Sequence[int], labels: Rollouts, policy: Policy, threshold: float) -> Columns:
        """Cases of every token of some examples, and the outcomes of those that `labels` rolls out.

        One teacher-forced pass of each model over a solution gives its cases (the shortcut); rollouts are forked from
        the caches it leaves, so that the prefix they share with it is never read again.

        Args:
            chosen: indices of examples; those that do not fit are left out.
            labels: which tokens to roll out, and which branches.
            policy: finishes the answers.
            threshold: the policy's SLM threshold.

        Returns:
            A row per token, by example and position: `example`, `position`, `case`, `slm_token`, `llm_token`,
            `slm_outcome` and `llm_outcome` (1 the answer was right, 0 wrong, UNKNOWN), `features` (float16).
        """
        parts = [self._columns([], [], [])]
        for batch in self._reader.read([e for e in chosen if self.walked[e]], self._view):
            columns = self._columns(batch.examples, batch.views, batch.tokens)
            self._roll(columns, labels.rolled_out(columns), labels, batch.examples, policy, threshold)
            parts.append(columns)
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        order = np.lexsort((columns["position"], columns["example"]))
        return {name: values[order] for name, values in columns.items()}

    def redo(self, columns: Columns, labels: Rollouts, policy: Policy, threshold: float) -> None:
        """Roll out again, by another policy, all tokens of `columns`, whose outcomes are written; see `collect`."""
        for batch in self._reader.read(np.unique(columns["example"]).tolist(), self._view):
            where = np.isin(columns["example"], batch.examples)
            self._roll(columns, where, labels, batch.examples, policy, threshold)

    def _columns(self, batch: Sequence[int], views: Sequence[Tensor], tokens: Sequence[IntArray]) -> Columns:
        references = [self._reader.solutions[e] for e in batch]
        counts = [len(reference) for reference in references]
        nothing: IntArray = np.zeros(0, dtype=np.int64)
        target = np.concatenate([nothing, *references])
        choices = np.concatenate([np.zeros((0, len(self.pool)), dtype=np.int64), *tokens])
        slm, llm = choices[:, 0], choices[:, -1]
        return {
            "example": np.repeat(np.array(batch, dtype=np.int64), counts),
            "position": np.concatenate([nothing, *(np.arange(count) for count in counts)]),
            "case": cases(target, slm, llm),
            "slm_token": slm,
            "llm_token": llm,
            "slm_outcome": np.full(len(target), UNKNOWN, dtype=np.int8),
            "llm_outcome": np.full(len(target), UNKNOWN, dtype=np.int8),
            FEATURES: torch.cat([self._no_features, *(view.half().cpu() for view in views)]).numpy(),
        }

    def _roll(
        self,
        columns: Columns,
        where: BoolArray,
        labels: Rollouts,
        batch: Sequence[int],
        policy: Policy,
        threshold: float,
    ) -> None:
        """Roll out the tokens `where`, all of examples in `batch`, which the session holds."""
        branches = (0, len(self.pool) - 1) if labels.branches == "both" else (0,)
        slot_of = {e: slot for slot, e in enumerate(batch)}
        rollouts = [
            (slot_of[int(columns["example"][token])], int(token), branch)
            for token in np.flatnonzero(where)
            for branch in branches
        ]
        # the longest first, so that none is left to finish alone
        rollouts.sort(key=lambda rollout: (-columns["position"][rollout[1]], rollout), reverse=True)

        def start(rows: IntArray, numbers: IntArray) -> None:
            slots, tokens, models = (np.array(part) for part in zip(*(rollouts[n] for n in numbers), strict=True))
            prompts = np.array([len(self._reader.prompts[batch[slot]]) for slot in slots])
            # the first token is known: where it is the LLM's, the row is taught it instead of asking the LLM again
            first = np.where(models == 0, columns["slm_token"][tokens], columns["llm_token"][tokens])
            self._session.fork_with_next(slots, rows, prompts + columns["position"][tokens], first)

        queue = EpisodeQueue(np.arange(self._rows, 2 * self._rows), len(rollouts), start)
        loop = decode_loop(
            self._session, queue, policy, threshold, gather=self.scheduling.gather, first_action=0
        )  # the SLM's turn, in which the known token is written
        for ended in loop:
            _, token, model = rollouts[ended.item]
            text = self.pool.decode(self._session.response(ended.row))
            example = self.examples[columns["example"][token]]
            outcome = columns["llm_outcome" if model else "slm_outcome"]
            outcome[token] = self.task.is_correct(example, text)
