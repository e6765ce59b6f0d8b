"""What decides which model is preferred at a token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from agents.preferences.store import Columns
from envs.arrays import NO_ACTION, UNKNOWN, BoolArray, IntArray
from envs.decoding.preference_rule import preferred_actions

DROPPED = -1
"""A label: the token is left out of training."""
CASE_2 = ("llm", "rollout")
CASE_3 = ("rollout", "slm", "llm", "agreement", "drop")


class Rollouts(Protocol):
    """Says what is rolled out."""

    @property
    def branches(self) -> Literal["slm", "both"]:
        """Whether the SLM's token is rolled out, or the LLM's too."""

    def rolled_out(self, columns: Columns) -> BoolArray:
        """Which tokens need a rollout, (n,), by their `case`, `slm_token` and `llm_token`."""


@dataclass(frozen=True)
class Labels:
    """What decides a token's label where the SLM would not write the reference's token.

    Args:
        case_2: where the LLM alone would write it: `llm` as published, or `rollout`: finish the answer from the SLM's
            token and see, as in case 3.
        case_3: where neither model would: `rollout` (CITER): finish the answer and see. Or without rollouts: `slm`,
            `llm`, `agreement` (SLM iff both models would write the same token), `drop` (left out of training).
        on_agreement: in case 3 where both models would write the same token: `rollout` as published, or `slm`.
        branches: `slm` as published: roll out the SLM's token, prefer the SLM iff the answer is right. `both`: roll out
            the LLM's token too, prefer the SLM unless its answer is worse.
        rollout_every: roll out one in so many of the tokens that need it, spread evenly over each example's. It counts
            for as many in training, and the others are left out; 1 as published. For answers so long that not all of
            them can be finished.
    """

    case_2: Literal["llm", "rollout"] = "llm"
    case_3: Literal["rollout", "slm", "llm", "agreement", "drop"] = "rollout"
    on_agreement: Literal["rollout", "slm"] = "rollout"
    branches: Literal["slm", "both"] = "slm"
    rollout_every: int = 1

    def __post_init__(self) -> None:
        for key, known in (
            ("case_2", CASE_2),
            ("case_3", CASE_3),
            ("on_agreement", ("rollout", "slm")),
            ("branches", ("slm", "both")),
        ):
            if getattr(self, key) not in known:
                raise ValueError(f"unknown {key} {getattr(self, key)!r}; choose one of {', '.join(known)}")
        if self.rollout_every < 1 or (self.rollout_every > 1 and not self.rolls):
            raise ValueError(
                f"rollout_every is {self.rollout_every}: it must be at least 1, and 1 where neither case_2 "
                f"({self.case_2}) nor case_3 ({self.case_3}) is rollout"
            )

    @property
    def rolls(self) -> bool:
        """Whether any token is rolled out."""
        return "rollout" in (self.case_2, self.case_3)

    def manifest(self) -> dict[str, str | int]:
        """These settings as manifests hold them; of later ones the published value is not named, as before them."""
        later = {"case_2": "llm", "rollout_every": 1}
        return {key: value for key, value in asdict(self).items() if later.get(key) != value}

    def rolled_out(self, columns: Columns) -> BoolArray:
        """Which tokens need a rollout and get one, (n,).

        Args:
            columns: `case`, `slm_token` and `llm_token` of whole examples; with `rollout_every`, `example` too.
        """
        needed = self._need_rollout(columns)
        if self.rollout_every == 1:
            return needed
        examples = columns["example"]
        before: IntArray = np.cumsum(needed) - needed
        _, first, group = np.unique(examples, return_index=True, return_inverse=True)
        place: IntArray = before - before[first][group]
        # each example begins elsewhere: else its first token would always be in the sample
        return np.asarray(needed & ((place + examples) % self.rollout_every == 0))

    def counts(self, columns: Columns) -> IntArray | None:
        """How many tokens each stands for in training, (n,); None where each stands for itself."""
        return None if self.rollout_every == 1 else np.where(self.rolled_out(columns), self.rollout_every, 1)

    def _need_rollout(self, columns: Columns) -> BoolArray:
        """Tokens decided by rollouts, (n,): with both branches or by setting, none where the models agree."""
        second, third = (columns["case"] == 2) & (self.case_2 == "rollout"), columns["case"] == 3
        if self.case_3 != "rollout":
            third = np.zeros_like(third)
        elif self.branches == "both" or self.on_agreement == "slm":
            third = third & (columns["slm_token"] != columns["llm_token"])
        return np.asarray(second | third)

    def of(self, columns: Columns) -> npt.NDArray[np.int8]:
        """1 where the SLM is preferred, 0 where the LLM is, DROPPED where the token is left out; int8, (n,).

        Left out is what settings drop, and what needs a rollout and got none.

        Args:
            columns: `case`, `slm_token`, `llm_token`, `slm_outcome`, `llm_outcome`.
        """
        agree = columns["slm_token"] == columns["llm_token"]
        slm, llm = columns["slm_outcome"], columns["llm_outcome"]
        right = slm >= llm if self.branches == "both" else slm == 1
        needed = self._need_rollout(columns)
        # where models agree and nothing is rolled out, there is nothing to pay for
        outcomes = np.where(needed, np.where(slm == UNKNOWN, UNKNOWN, right), agree)
        case_3 = "outcome" if self.case_3 == "rollout" else self.case_3
        case_2 = "outcome" if self.case_2 == "rollout" else "llm"
        actions = preferred_actions(columns["case"], agree, case_3, outcomes, case_2)
        return np.where(actions == NO_ACTION, DROPPED, actions == 0).astype(np.int8)


def shares(columns: Columns) -> dict[str, float]:
    """Shares of the cases, of agreement within case 3, of right outcomes among rollouts, and of SLM labels."""
    third = columns["case"] == 3
    agree = columns["slm_token"] == columns["llm_token"]
    report = {f"case_{case}": float((columns["case"] == case).mean()) for case in (1, 2, 3)}
    report["agree_in_case_3"] = float(agree[third].mean()) if third.any() else 0.0
    for model in ("slm", "llm"):
        outcomes = columns[f"{model}_outcome"]
        rolled = outcomes != UNKNOWN
        report[f"{model}_rollouts"] = int(rolled.sum())
        report[f"{model}_rollouts_right"] = float(outcomes[rolled].mean()) if rolled.any() else 0.0
    kept = columns["label"] != DROPPED
    report["prefers_slm"] = float(columns["label"][kept].mean()) if kept.any() else 0.0
    return report
