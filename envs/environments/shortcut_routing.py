"""CITER's shortcut as Gymnasium environments: decisions along reference solutions, with no model at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.costs import CostModel, LlmTokens, step_entries
from envs.decoding.decoder import checked_actions
from envs.decoding.observation import HISTORY_FEATURES, Features, check_features, feature_width, history_features
from envs.decoding.references import NOT_ROLLED_OUT, References, check_outcomes
from envs.environments.token_routing import HIDDEN_BOUND
from envs.environments.vector import Info, all_masked, masked, row_generators, scalars
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Split, Task, check_split

Case3 = Literal["slm", "llm", "agreement", "drop", "outcome"]
CASE_3: tuple[Case3, ...] = get_args(Case3)
NONE = -1


def preferred_actions(
    references: References, case_3: str = "llm", outcomes: npt.NDArray[Any] | None = None
) -> npt.NDArray[np.int8]:
    """The action preferred at each token: 0 the SLM, 1 the LLM, NONE neither; int8, (n,).

    Args:
        references: n tokens.
        case_3: what decides where neither model would write the reference's token: `slm`, `llm`, `agreement` (the SLM
            iff both models would write the same token), `drop` (no preference), `outcome` (that of a rollout).
        outcomes: outcomes of rollouts from the SLM's token, (n,): 1 the answer was right, 0 wrong, -1 not rolled out.
            Those of the references where None; read for `outcome` alone.

    Raises:
        ValueError: an unknown `case_3`, or outcomes that are missing or do not match the references.
    """
    if case_3 not in CASE_3:
        raise ValueError(f"unknown case_3 {case_3!r}; choose one of {', '.join(CASE_3)}")
    outcomes = references.outcomes if outcomes is None else check_outcomes(outcomes, len(references.target))
    if case_3 == "outcome" and outcomes is None:
        raise ValueError(
            "case_3 outcome needs outcomes: give one for each token, or references made from collected columns, or "
            "choose another case_3"
        )
    undecided = np.full(len(references.target), NONE)
    third = {
        "slm": np.zeros_like(undecided),
        "llm": np.ones_like(undecided),
        "agreement": references.slm_token != references.llm_token,
        "drop": undecided,
        "outcome": undecided if outcomes is None else np.where(outcomes == NOT_ROLLED_OUT, NONE, outcomes == 0),
    }
    preferred = np.where(references.case == 3, third[case_3], references.case == 2)
    return np.asarray(preferred, dtype=np.int8)


class _Shortcut:
    """What both environments share: rows that walk along references, in arrays; no Python per row but for its draws."""

    def __init__(
        self,
        rows: int,
        references: References,
        cost: CostModel | None,
        cost_weight: float,
        features: Features,
        case_3: Case3,
        outcomes: npt.NDArray[Any] | None,
    ) -> None:
        if not (math.isfinite(cost_weight) and cost_weight >= 0):
            raise ValueError(f"cost_weight must be a finite number >= 0, is {cost_weight}")
        cost = cost or LlmTokens()
        if not cost.reproducible:
            raise ValueError(f"cost {cost.name} is measured, and no model runs here; choose another cost")
        unit = cost.per_llm_token(references.profiles)
        if unit <= 0:
            raise ValueError(f"cost {cost.name}: an LLM token costs {unit}; rewards need a price above 0")
        self._rates = (cost.rates(references.profiles) / unit).ravel()
        self.references, self.cost, self.cost_weight = references, cost, cost_weight
        self._ids = np.array([example.id for example in references.examples], dtype=object)
        self.preferred = preferred_actions(references, case_3, outcomes)
        met = self.preferred[:, None] == np.arange(2)
        self._earned = met / np.repeat(references.lengths, references.lengths)[:, None]
        self._decided = np.add.reduceat(self.preferred != NONE, references.starts[:-1], dtype=np.int64)
        width = feature_width(check_features(features), references.width)
        self._history = width > references.features.shape[1]
        self._seen = references.features[:, : width - HISTORY_FEATURES * self._history]
        counts = np.arange(references.lengths.max() + 1)
        self._counts_seen = history_features(counts, counts)[:, 0].numpy()
        self.observation_space = gym.spaces.Box(-HIDDEN_BOUND, HIDDEN_BOUND, (width,), np.float32)
        self.action_space: gym.spaces.Discrete = gym.spaces.Discrete(len(references.profiles))
        self._in_flight: BoolArray = np.zeros(rows, dtype=bool)
        self._example, self._positions, self._since_llm, self._llm_tokens, self._met = np.zeros((5, rows), np.int64)
        self._read: IntArray = np.zeros((rows, len(references.profiles)), dtype=np.int64)
        self._costs: FloatArray = np.zeros(rows)

    def start(self, rows: IntArray, generators: Sequence[np.random.Generator], given: Sequence[int | None]) -> Info:
        """Begin an episode in each row; returns the reset infos as arrays of n."""
        count = len(self.references)
        numbers = [
            int(rng.integers(count)) if index is None else check_index(index, count)
            for index, rng in zip(given, generators, strict=True)
        ]
        self._in_flight[rows], self._example[rows] = True, numbers
        for counts in (self._positions, self._since_llm, self._llm_tokens, self._met, self._costs):
            counts[rows] = 0
        # the SLM has read the prompt; the LLM reads it when it is first chosen
        self._read[rows, 0], self._read[rows, 1:] = self.references.prompt_lengths[numbers], 0
        prompts = self.references.prompt_lengths[numbers]
        return {"example": self._ids[numbers], "index": np.array(numbers), "prompt_tokens": prompts}

    def step(self, actions: IntArray) -> tuple[FloatArray, BoolArray, Info, Info]:
        """Step all rows; returns rewards (rows,), which ended (rows,), step infos, and the infos of ended rows."""
        rows = len(self._example)
        if not self._in_flight.all():
            raise ValueError(f"rows {np.flatnonzero(~self._in_flight).tolist()} have no episode; reset first")
        actions = checked_actions(actions, rows, len(self.references.profiles))
        references = self.references
        at = references.starts[self._example] + self._positions
        ended = self._positions + 1 == references.lengths[self._example]
        lengths = references.prompt_lengths[self._example] + self._positions
        costs = step_entries(actions, lengths, self._read, ~ended).reshape(rows, -1) @ self._rates
        earned = self._earned[at, actions]
        self._costs += costs
        self._met += earned > 0
        self._llm_tokens += actions
        self._since_llm = np.where(actions > 0, 0, self._since_llm + 1)
        self._positions += 1
        self._in_flight[ended] = False
        decided = self._decided[self._example[ended]]
        finals = {
            "agreement": np.where(decided > 0, self._met[ended] / np.maximum(decided, 1), 1.0),
            "llm_tokens": self._llm_tokens[ended],
            "total_cost": self._costs[ended],
        }
        return earned - self.cost_weight * costs, ended, {"cost": costs}, finals

    def observe(self) -> npt.NDArray[np.float32]:
        """What is seen of all rows, (rows, width); all are in flight."""
        seen = self._seen[self.references.starts[self._example] + self._positions]
        if not self._history:
            return np.asarray(seen)
        counts = self._counts_seen[np.stack([self._positions, self._since_llm], axis=-1)]
        return np.concatenate([seen, counts], axis=-1)

    def last_observation(self) -> npt.NDArray[np.float32]:
        """What is seen behind the end-of-sequence token, (width,): zeros, as in `RoutingEnv`."""
        return np.zeros_like(self.observation_space.low)


def read_references(
    pool: ModelPool | None,
    task: Task | None,
    split: Split,
    examples: int,
    start: int | None,
    max_new_tokens: int,
    references: References | None,
) -> References:
    """The references given, or those of a task's first examples; the arguments are those of the environments."""
    if references is not None:
        if pool is not None or task is not None:
            raise ValueError("references are given beside a pool or a task; give one or the other")
        return references
    check_split(split)
    task = task or ArithmeticTask()
    if start is None:
        start = task.training_start(0) if split == "train" else 0
    size = task.size(split)
    count = examples if size is None else min(examples, size - start)
    return References.read((pool or embedded_pool()).check_choice(), task.examples(split, count, start), max_new_tokens)


def check_index(index: int, count: int) -> int:
    """The number of one of `count` examples, if it is one."""
    if isinstance(index, int | np.integer) and 0 <= index < count:
        return int(index)
    raise ValueError(f"there is no example {index!r}; the references hold {count}: give an index in 0..{count - 1}")


def check_options(options: Info | None, known: str) -> Any:
    """The one option there is, None where it is not given; others are refused rather than passed over."""
    others = set(options or {}) - {known}
    if others:
        raise ValueError(f"unknown options {', '.join(sorted(others))}; an episode is chosen by {known!r}")
    return (options or {}).get(known)


class ShortcutRoutingEnv(gym.Env[np.ndarray, int]):
    """Which model should write the next token of a reference solution?

    ## Description
    The shortcut of CITER (Zheng et al., COLM 2025) as a decision process. An episode walks along a reference solution,
    teacher-forced: at every step the agent sees the state of the small language model (SLM) before the next token and
    chooses a model, and whatever it chooses, the reference's token is what follows. States do not depend on actions
    (but for the history in `features`), so both models read a finite set of solutions once, when the environment is
    made, and none runs afterwards.

    ## Action space
    `Discrete(2)`: 0 is the SLM, 1 the larger model (LLM). Larger pools are refused: the shortcut compares two models.

    ## Observation space
    `Box(-1e6, 1e6, (width,), float32)`, as in `RoutingEnv`: the SLM's last hidden state, with richer
    `features` also the entropy and top log-probabilities of its next token, and the history, in which the LLM has
    written where it was chosen. After the last token it is all zeros.

    ## Reward
    1 / reference length where the action is the one preferred, less cost_weight x cost. In case 1 (the SLM would write
    the reference's token) the SLM is preferred, in case 2 (only the LLM would) the LLM; `case_3` says what is where
    neither would. The cost of a step is what its action would make run if it wrote the reference's token (an LLM pass,
    with the tokens the LLM had missed) and the SLM's reading of that token, in the unit of `cost`, over the cost of one
    LLM token on an empty cache; reading the prompt is not charged.

    ## Starting state
    One of the references, drawn uniformly with the environment's generator, or `options={"index": number}`.

    ## Episode end
    `terminated`: the reference has come to its end-of-sequence token. Never `truncated`: a reference longer than
    `max_new_tokens` is refused when the environment is made.

    ## Info
    At reset: `example` (its id), `index`, `prompt_tokens`. At every step: `cost` (what the reward weighs). At the end
    also: `agreement` (share of the episode's preferences that were met, 1 where there were none), `llm_tokens`,
    `total_cost` (that of all steps).

    ## Arguments
    All have defaults: the embedded pair on the generated arithmetic task, which takes seconds to read.

    Args:
        pool: the SLM and the LLM.
        task: where examples come from.
        cost: the cost model behind the reward, not a measured one; LLM tokens by default.
        cost_weight: the price of one LLM token (on an empty cache); a whole episode of preferences is worth 1.
        split: `train`, `validation` or `test`.
        examples: how many of the split are used; all of a smaller one.
        start: the first of them; where None, that of the learners' training examples in `train`, 0 in other splits.
        max_new_tokens: the longest reference, end of sequence included.
        features: what is observed: `hidden`, `hidden_logits` or `hidden_logits_history` (`envs.decoding.observation`).
        case_3: `slm`, `llm`, `agreement` (the SLM iff both models would write the same token), `drop` (nothing is
            earned) or `outcome`: the SLM where the answer finished from its token was right, the LLM where it was
            wrong, nothing earned where it was not rolled out.
        outcomes: 1 right, 0 wrong, -1 not rolled out, (tokens,); those of the references where None.
        references: in place of the pool, the task, and what else says which solutions are read: ready ones, which many
            environments may share.

    ## Version
    v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(
        self,
        pool: ModelPool | None = None,
        task: Task | None = None,
        cost: CostModel | None = None,
        cost_weight: float = 0.0,
        split: Split = "train",
        examples: int = 1000,
        start: int | None = None,
        max_new_tokens: int = 128,
        features: Features = "hidden",
        case_3: Case3 = "llm",
        outcomes: npt.NDArray[Any] | None = None,
        references: References | None = None,
    ) -> None:
        references = read_references(pool, task, split, examples, start, max_new_tokens, references)
        self.shortcut = _Shortcut(1, references, cost, cost_weight, features, case_3, outcomes)
        self.observation_space = self.shortcut.observation_space
        self.action_space = self.shortcut.action_space  # type: ignore[assignment]
        self._row: IntArray = np.zeros(1, dtype=np.int64)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        super().reset(seed=seed)
        index = check_options(options, "index")
        info = self.shortcut.start(self._row, [self.np_random], [index])
        return self.shortcut.observe()[0], scalars(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Info]:
        rewards, ended, info, finals = self.shortcut.step(np.array([action]))
        if not ended[0]:
            return self.shortcut.observe()[0], float(rewards[0]), False, False, scalars(info)
        return self.shortcut.last_observation(), float(rewards[0]), True, False, scalars(info | finals)


class ShortcutRoutingVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` shortcut environments stepped as arrays; see `ShortcutRoutingEnv` for spaces, rewards and infos.

    Autoreset mode: same step. A row that ends is given its next solution at once; the last observation and info stand
    in `final_obs` and `final_info`, the infos of the new episode's reset in their place. Row i, seeded with `seed + i`
    (or `seed[i]`), goes through the same episodes as a `ShortcutRoutingEnv` seeded so and given the same actions. The
    first episodes may be given: `options={"indices": [...]}`, one for each row.

    Args:
        num_envs: rows.
        pool: as in `ShortcutRoutingEnv`, like all that follow.
        task: where examples come from.
        cost: the cost model behind the reward.
        cost_weight: the price of one LLM token.
        split: `train`, `validation` or `test`.
        examples: how many of the split are used.
        start: the first of them.
        max_new_tokens: the longest reference.
        features: what is observed.
        case_3: what is preferred where neither model would write the reference's token.
        outcomes: those of rollouts, (tokens,).
        references: ready ones.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        pool: ModelPool | None = None,
        task: Task | None = None,
        cost: CostModel | None = None,
        cost_weight: float = 0.0,
        split: Split = "train",
        examples: int = 1000,
        start: int | None = None,
        max_new_tokens: int = 128,
        features: Features = "hidden",
        case_3: Case3 = "llm",
        outcomes: npt.NDArray[Any] | None = None,
        references: References | None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, is {num_envs}")
        references = read_references(pool, task, split, examples, start, max_new_tokens, references)
        self.num_envs = num_envs
        self.shortcut = _Shortcut(num_envs, references, cost, cost_weight, features, case_3, outcomes)
        self.single_observation_space = self.shortcut.observation_space
        self.single_action_space = self.shortcut.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rows: IntArray = np.arange(num_envs)
        self._generators: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Info | None = None
    ) -> tuple[np.ndarray, Info]:
        self._generators = row_generators(seed, self.num_envs, self._generators)
        indices = check_options(options, "indices")
        indices = [None] * self.num_envs if indices is None else indices
        if len(indices) != self.num_envs:
            raise ValueError(f"options['indices'] holds {len(indices)} indices for {self.num_envs} environments")
        info = self.shortcut.start(self._rows, self._generators, indices)
        return self.shortcut.observe(), all_masked(info)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Info]:
        rewards, terminated, info, finals = self.shortcut.step(actions)
        truncated = np.zeros(self.num_envs, dtype=bool)
        ended = np.flatnonzero(terminated)
        if not len(ended):
            return self.shortcut.observe(), rewards, terminated, truncated, all_masked(info)
        going_on = np.flatnonzero(~terminated)
        infos = masked({key: value[going_on] for key, value in info.items()}, going_on, self.num_envs)
        final_observations = np.full(self.num_envs, None, dtype=object)
        for row in ended:
            final_observations[row] = self.shortcut.last_observation()
        infos |= {"final_obs": final_observations, "_final_obs": terminated.copy()}
        whole = {key: value[ended] for key, value in info.items()} | finals
        infos |= {"final_info": masked(whole, ended, self.num_envs), "_final_info": terminated.copy()}
        started = self.shortcut.start(ended, [self._generators[row] for row in ended], [None] * len(ended))
        infos = masked(started, ended, self.num_envs, infos)
        return self.shortcut.observe(), rewards, terminated, truncated, infos
