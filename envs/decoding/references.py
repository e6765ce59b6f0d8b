"""Reference solutions as both models see them: the state and the case at every token, read once and kept as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from envs.arrays import UNKNOWN, IntArray
from envs.costs import ModelProfile
from envs.decoding.observation import LOGIT_FEATURES, all_features, feature_width
from envs.decoding.preference_rule import CaseArray, cases, preferred_actions
from envs.decoding.reference_reader import ReferenceReader, encode, offsets
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.checks import gigabytes
from envs.models.pool import ModelPool
from envs.tasks.task import Example


@dataclass(frozen=True, eq=False)
class References:
    """The reference solutions of some examples, teacher-forced through both models; n tokens in all.

    Attributes:
        examples: the m examples.
        starts: where the tokens of each begin, and n, (m + 1,).
        prompt_lengths: tokens of their prompts, (m,).
        features: the SLM's hidden state before each token, then its logit features, float32, (n, width +
            LOGIT_FEATURES).
        target: the reference's tokens, the end of sequence included, (n,).
        slm_token: what the SLM would write there, (n,).
        llm_token: what the LLM would write there, (n,).
        profiles: the sizes of both models, which costs depend on.
        outcomes: where the SLM's token was taken and the answer finished: 1 it was right, 0 it was wrong,
            UNKNOWN elsewhere; int8, (n,). None where nothing was rolled out.

    Raises:
        ValueError: arrays that do not belong together, features that are not finite, or more than two models.
    """

    examples: Sequence[Example]
    starts: IntArray
    prompt_lengths: IntArray
    features: npt.NDArray[np.float32]
    target: IntArray
    slm_token: IntArray
    llm_token: IntArray
    profiles: Sequence[ModelProfile]
    outcomes: npt.NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        check_pair([profile.name for profile in self.profiles])
        count = len(self.target)
        expected = {"starts": len(self.examples) + 1, "prompt_lengths": len(self.examples)}
        expected |= dict.fromkeys(("features", "slm_token", "llm_token"), count)
        for name, length in expected.items():
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"references: {name} has length {len(getattr(self, name))}, it must be {length} for "
                    f"{len(self.examples)} examples of {count} tokens"
                )
        if not self.examples or self.starts[0] != 0 or self.starts[-1] != count or (self.lengths < 1).any():
            raise ValueError(
                f"references: starts {self.starts.tolist()} must begin with 0, grow and end with {count}; give at "
                "least one example, and a token or more of each"
            )
        if self.outcomes is not None:
            object.__setattr__(self, "outcomes", check_outcomes(self.outcomes, count))
        for number, example in enumerate(self.examples):
            if not np.isfinite(self.features[self.starts[number] : self.starts[number + 1]]).all():
                raise ValueError(
                    f"example {example.id}: its features are not finite; load {self.profiles[0].name} with another "
                    "dtype, or collect the columns anew"
                )
        for name, value in list(vars(self).items()):
            if isinstance(value, np.ndarray):
                shared = value.view()  # among environments
                shared.flags.writeable = False
                object.__setattr__(self, name, shared)

    def __deepcopy__(self, memo: object) -> References:
        """The references themselves: they never change, and Gymnasium copies the arguments of environments."""
        return self

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def width(self) -> int:
        """Width of the SLM's hidden state."""
        return int(self.features.shape[1]) - LOGIT_FEATURES

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens of each solution, the end of sequence included, (m,)."""
        return np.diff(self.starts)

    @cached_property
    def case(self) -> CaseArray:
        """The case of each token, int8, (n,); see `cases`."""
        return cases(self.target, self.slm_token, self.llm_token)

    def preferred_actions(self, case_3: str = "llm", outcomes: npt.NDArray[Any] | None = None) -> npt.NDArray[np.int8]:
        """The action preferred at each token, int8, (n,); see `envs.decoding.preference_rule.preferred_actions`.

        Args:
            case_3: what decides where neither model would write the reference's token.
            outcomes: of rollouts from the SLM's token, (n,): 1 the answer was right, 0 wrong, UNKNOWN not rolled out;
                those of the references where None.

        Raises:
            ValueError: an unknown `case_3`, or outcomes that are missing or do not match the references.
        """
        outcomes = self.outcomes if outcomes is None else check_outcomes(outcomes, len(self.target))
        return preferred_actions(self.case, self.slm_token == self.llm_token, case_3, outcomes)

    @classmethod
    def read(cls, pool: ModelPool, examples: Sequence[Example], max_new_tokens: int = 128) -> References:
        """Let both models read the reference solutions, many in each pass.

        Args:
            pool: the SLM and the LLM.
            examples: problems with their reference solutions.
            max_new_tokens: the longest reference, end of sequence included.

        Raises:
            ValueError: a reference that does not fit or that ends early (the error names the example), a pool of more
                than two models, or features that do not fit the memory that is free.
        """
        if not examples:
            raise ValueError("there are no examples to read; give at least one")
        check_pair(pool.names)
        session = TeacherSession(pool, min(len(examples), pool.rows or 64), max_new_tokens)
        reader = ReferenceReader(session, examples)
        starts = reader.starts
        features = np.empty(shape_that_fits(int(starts[-1]), pool), dtype=np.float32)
        tokens: IntArray = np.empty((starts[-1], 2), dtype=np.int64)
        for part in reader.read(view=all_features, label="references"):
            for e, view, chosen in zip(part.examples, part.views, part.tokens, strict=True):
                features[starts[e] : starts[e + 1]] = view.cpu().numpy()
                tokens[starts[e] : starts[e + 1]] = chosen
        return cls(
            examples=tuple(examples),
            starts=starts,
            prompt_lengths=np.array([len(prompt) for prompt in reader.prompts]),
            features=features,
            target=np.concatenate(reader.solutions),
            slm_token=tokens[:, 0],
            llm_token=tokens[:, 1],
            profiles=pool.profiles,
        )

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, npt.NDArray[Any]], pool: ModelPool, examples: Sequence[Example]
    ) -> References:
        """References out of collected preferences, with the outcomes of their rollouts; no model runs.

        Args:
            columns: arrays with a row per token: `example` (an index into `examples`), `position`, `slm_token`,
                `llm_token`, `features` (hidden states, then logit features) and, where there are, `slm_outcome`. Of
                each example they name they must hold every token, in any order.
            pool: the models they were collected with.
            examples: the examples they were collected on; those the columns do not name are left out.

        Raises:
            ValueError: a column is missing, or the tokens are not those of the examples' references.
        """
        missing = {"example", "position", "slm_token", "llm_token", "features"} - set(columns)
        if missing:
            raise ValueError(f"columns lack {', '.join(sorted(missing))}; give those of collected preferences")
        order = np.lexsort((columns["position"], columns["example"]))
        positions = columns["position"][order]
        numbers, counts = np.unique(columns["example"], return_counts=True)
        if len(numbers) and not 0 <= numbers[0] <= numbers[-1] < len(examples):
            raise ValueError(
                f"columns name examples {numbers[0]} to {numbers[-1]}, {len(examples)} were given; give the examples "
                "they were collected on"
            )
        chosen = [examples[number] for number in numbers]
        prompts, solutions = encode(pool, chosen)
        ends = np.cumsum(counts)
        for example, solution, begin, end in zip(chosen, solutions, ends - counts, ends, strict=True):
            held = positions[begin:end]
            if not np.array_equal(held, np.arange(len(solution))):
                raise ValueError(
                    f"example {example.id} has a reference of {len(solution)} tokens, the columns hold {len(held)} of "
                    "it; give columns of every token (those of the first round), and the examples they were "
                    "collected on"
                )
        return cls(
            examples=chosen,
            starts=offsets(solutions),
            prompt_lengths=np.array([len(prompt) for prompt in prompts]),
            features=columns["features"][order].astype(np.float32),
            target=np.concatenate([np.zeros(0, dtype=np.int64), *solutions]),
            slm_token=columns["slm_token"][order].astype(np.int64),
            llm_token=columns["llm_token"][order].astype(np.int64),
            profiles=pool.profiles,
            outcomes=columns["slm_outcome"][order].astype(np.int8) if "slm_outcome" in columns else None,
        )


def check_pair(names: Sequence[str]) -> None:
    """Refuse anything but an SLM and an LLM: the three cases compare two models."""
    if len(names) != 2:
        raise ValueError(f"the shortcut compares two models, the pool has {', '.join(names)}; choose two of them")


def check_outcomes(outcomes: npt.NDArray[Any], count: int) -> npt.NDArray[np.int8]:
    """Outcomes of rollouts as int8, (count,), if that is what they are."""
    outcomes = np.asarray(outcomes)
    if outcomes.shape != (count,) or not np.isin(outcomes, (0, 1, UNKNOWN)).all():
        raise ValueError(
            f"outcomes must be {count} numbers, one for each token: 1 right, 0 wrong, {UNKNOWN} not rolled "
            f"out; they have shape {outcomes.shape} and values {np.unique(outcomes)[:5].tolist()}"
        )
    return outcomes.astype(np.int8)


def shape_that_fits(tokens: int, pool: ModelPool) -> tuple[int, int]:
    """The shape of the features of `tokens`, if float32 numbers of it fit the memory that is free."""
    width = feature_width("hidden_logits", pool.slm.width)
    size, free = 4 * tokens * width, int(psutil.virtual_memory().available)
    if size > free:
        raise ValueError(
            f"the features of {tokens} tokens take {gigabytes(size)}, {gigabytes(free)} are free; use fewer examples"
        )
    return tokens, width
