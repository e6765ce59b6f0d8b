"""CITER's rule: which model is preferred at a token of a reference solution (Zheng et al. 2025, arXiv 2502.01976)."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from envs.arrays import NO_ACTION, UNKNOWN, IntArray

CaseArray = npt.NDArray[np.int8]
Case3 = Literal["slm", "llm", "agreement", "drop", "outcome"]
CASE_3: tuple[Case3, ...] = get_args(Case3)
Case2 = Literal["llm", "outcome"]
CASE_2: tuple[Case2, ...] = get_args(Case2)


def cases(target: IntArray, slm_tokens: IntArray, llm_tokens: IntArray) -> CaseArray:
    """The case of each token of a reference solution (Zheng et al. 2025), int8, (n,).

    1: the SLM would write the reference's token. 2: it would not, but the LLM would. 3: neither would.

    Args:
        target: the reference's tokens, (n,).
        slm_tokens: what the SLM would write in their places, (n,).
        llm_tokens: what the LLM would, (n,).
    """
    return np.where(slm_tokens == target, 1, np.where(llm_tokens == target, 2, 3)).astype(np.int8)


def preferred_actions(
    case: npt.NDArray[Any],
    agree: npt.NDArray[np.bool_],
    case_3: str = "llm",
    outcomes: npt.NDArray[Any] | None = None,
    case_2: str = "llm",
) -> npt.NDArray[np.int8]:
    """The action preferred at each token: 0 the SLM, 1 the LLM, NO_ACTION neither; int8, (n,).

    The SLM is preferred in case 1, the LLM in case 2 unless `case_2` is `outcome` too, and in case 3:

        slm, llm    always that model
        agreement   the SLM iff both models would write the same token
        drop        neither
        outcome     the SLM where the answer finished from its token was right, the LLM where it was wrong, neither
                    where that is not known

    Args:
        case: of each token, (n,); see `cases`.
        agree: both models would write the same token, (n,).
        case_3: one of CASE_3.
        outcomes: 1 right, 0 wrong, UNKNOWN, (n,); read for `outcome` alone.
        case_2: one of CASE_2; `llm` as published.

    Raises:
        ValueError: an unknown `case_3` or `case_2`, or `outcome` without outcomes.
    """
    if case_3 not in CASE_3:
        raise ValueError(f"unknown case_3 {case_3!r}; choose one of {', '.join(CASE_3)}")
    if case_2 not in CASE_2:
        raise ValueError(f"unknown case_2 {case_2!r}; choose one of {', '.join(CASE_2)}")
    if "outcome" in (case_2, case_3) and outcomes is None:
        rule = "case_3" if case_3 == "outcome" else "case_2"
        raise ValueError(
            f"{rule} outcome needs outcomes: give one for each token, or references made from collected columns, or "
            f"choose another {rule}"
        )
    neither = np.full(len(case), NO_ACTION)
    of_outcomes = neither if outcomes is None else np.where(outcomes == UNKNOWN, NO_ACTION, outcomes == 0)
    third = {
        "slm": np.zeros_like(neither),
        "llm": np.ones_like(neither),
        "agreement": ~agree,
        "drop": neither,
        "outcome": of_outcomes,
    }
    second = of_outcomes if case_2 == "outcome" else np.ones_like(neither)
    return np.where(case == 3, third[case_3], np.where(case == 2, second, 0)).astype(np.int8)
