"""CITER's shortcut as Gymnasium environments: decisions along reference solutions, with no model at run time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from envs.arrays import NO_ACTION, BoolArray, FloatArray, IntArray
from envs.costs import CostModel, LlmTokens, step_entries
from envs.decoding.decoder import checked_actions
from envs.decoding.observation import HISTORY_FEATURES, Features, check_features, feature_width, history_features
from envs.decoding.preference_rule import Case3
from envs.decoding.references import References
from envs.environments.episodes import EpisodeRows, Info, Observations, RowSteps, State, observation_box
from envs.environments.names import settings_of
from envs.environments.prompts import Order, Pass, check_choices
from envs.environments.render import PROMPT, Stretch
from envs.environments.vector import EpisodeEnv, EpisodeVectorEnv
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Split, Task, check_split


@dataclass(frozen=True, kw_only=True, eq=False)
class ShortcutSettings:
    """What `ShortcutRoutingEnv` is made with; all have defaults: the embedded pair on the generated arithmetic task.

    Args:
        pool: the SLM and the LLM; the embedded pair where None.
        task: where examples come from; the generated arithmetic task where None.
        cost: the cost model behind the reward, not a measured one; LLM tokens where None.
        cost_weight: the price of one LLM token (on an empty cache); a whole episode of preferences is worth 1.
        split: `train`, `validation` or `test`.
        examples: how many of the split are used; all of a smaller one.
        start: the first of them; where None, that of the learners' training examples in `train`, 0 in other splits.
        max_new_tokens: the longest reference, end of sequence included.
        features: what is observed: `hidden`, `hidden_logits` or `hidden_logits_history` (`envs.decoding.observation`).
        case_3: `slm`, `llm`, `agreement` (the SLM iff both models would write the same token), `drop` (nothing is
            earned) or `outcome`: the SLM where the answer finished from its token was right, the LLM where it was
            wrong, nothing earned where it was not rolled out.
        order: `random`, or `sequential`: a pass over the references, and the next, which all rows share.
        outcomes: 1 right, 0 wrong, -1 not rolled out, (tokens,); those of the references where None.
        references: in place of the pool, the task, and what else says which solutions are read: ready ones, which many
            environments may share.

    Raises:
        ValueError: an unknown split or features, a cost or a weight that rewards cannot have, or references beside a
            pool or a task.
    """

    pool: ModelPool | None = None
    task: Task | None = None
    cost: CostModel | None = None
    cost_weight: float = 0.0
    split: Split = "train"
    examples: int = 1000
    start: int | None = None
    max_new_tokens: int = 128
    features: Features = "hidden"
    case_3: Case3 = "llm"
    order: Order = "random"
    outcomes: npt.NDArray[Any] | None = None
    references: References | None = None

    def __post_init__(self) -> None:
        check_split(self.split)
        check_features(self.features)
        check_choices(order=(self.order, Order))
        if not (math.isfinite(self.cost_weight) and self.cost_weight >= 0):
            raise ValueError(f"cost_weight must be a finite number >= 0, is {self.cost_weight}")
        if self.cost is not None and not self.cost.reproducible:
            raise ValueError(f"cost {self.cost.name} is measured, and no model runs here; choose another cost")
        if self.references is not None and (self.pool is not None or self.task is not None):
            raise ValueError("references are given beside a pool or a task; give one or the other")

    def read_references(self) -> References:
        """The references given, or those of the task's examples."""
        if self.references is not None:
            return self.references
        task, start = self.task or ArithmeticTask(), self.start
        if start is None:
            start = task.training_start(0) if self.split == "train" else 0
        size = task.size(self.split)
        count = self.examples if size is None else min(self.examples, size - start)
        examples = task.examples(self.split, count, start)
        return References.read((self.pool or embedded_pool()).check_choice(), examples, self.max_new_tokens)


ROW_STATE = (
    "in_flight", "begun", "example", "positions", "since_llm", "llm_tokens", "met", "read", "costs", "choices"
)  # fmt: skip


class ShortcutEpisodes(EpisodeRows):
    """Rows that walk along references, in arrays: no Python for a row but for what it draws.

    Args:
        rows: walks at a time.
        settings: what they are made with.
    """

    options = ("index",)
    row_options = ("indices",)

    def __init__(self, rows: int, settings: ShortcutSettings) -> None:
        super().__init__(rows)
        self.settings, self.cost, self.cost_weight = settings, settings.cost or LlmTokens(), settings.cost_weight
        self.references = references = settings.read_references()
        self.numbers = Pass(len(references), settings.order)
        models = len(references.profiles)
        unit = self.cost.per_llm_token(references.profiles)
        if unit <= 0:
            raise ValueError(f"cost {self.cost.name}: an LLM token costs {unit}; rewards need a price above 0")
        self._rates = (self.cost.rates(references.profiles) / unit).ravel()
        self._ids = np.array([example.id for example in references.examples], dtype=object)
        self.preferred = references.preferred_actions(settings.case_3, settings.outcomes)
        met = self.preferred[:, None] == np.arange(2)
        self._earned = met / np.repeat(references.lengths, references.lengths)[:, None]
        self._decided = np.add.reduceat(self.preferred != NO_ACTION, references.starts[:-1], dtype=np.int64)
        width = feature_width(settings.features, references.width)
        self._history = width > references.features.shape[1]
        self._features = references.features[:, : width - HISTORY_FEATURES * self._history]
        counts = np.arange(references.lengths.max() + 1)
        self._count_features = history_features(counts, counts)[:, 0].numpy()
        self.observation_space = observation_box(width)
        self.action_space = gym.spaces.Discrete(models)
        self._in_flight: BoolArray = np.zeros(rows, dtype=bool)
        self._begun: BoolArray = np.zeros(rows, dtype=bool)
        self._example, self._positions, self._since_llm, self._llm_tokens, self._met = np.zeros((5, rows), np.int64)
        self._read: IntArray = np.zeros((rows, models), dtype=np.int64)
        self._costs: FloatArray = np.zeros(rows)
        self._choices = np.zeros((rows, references.lengths.max()), dtype=np.int8)  # filled where rendered

    def start(self, rows: IntArray, generators: Sequence[np.random.Generator], given: Sequence[int | None]) -> Info:
        """Begin a walk in each row, along the reference of the index given or of one drawn uniformly."""
        count = len(self.references)
        numbers = [
            self.numbers.draw(rng) if index is None else check_index(index, count)
            for index, rng in zip(given, generators, strict=True)
        ]
        self._in_flight[rows], self._begun[rows], self._example[rows] = True, True, numbers
        for counts in (self._positions, self._since_llm, self._llm_tokens, self._met, self._costs):
            counts[rows] = 0
        # the SLM has read the prompt; the LLM reads it when it is first chosen
        prompts = self.references.prompt_lengths[numbers]
        self._read[rows, 0], self._read[rows, 1:] = prompts, 0
        return {"example": self._ids[numbers], "index": np.array(numbers), "prompt_tokens": prompts}

    def step(self, rows: IntArray, actions: npt.NDArray[Any]) -> RowSteps:
        """Walk one token on, whatever the actions, which are judged and charged."""
        chosen, references = self.selection(rows), self.references
        in_flight = self._in_flight[chosen]
        if not in_flight.all():
            raise ValueError(f"rows {rows[~in_flight].tolist()} have no episode; reset first")
        actions = checked_actions(actions, len(rows), len(references.profiles))
        examples, positions = self._example[chosen], self._positions[chosen]
        at = references.starts[examples] + positions
        ended = positions + 1 == references.lengths[examples]
        read = self._read[chosen]
        entries = step_entries(actions, references.prompt_lengths[examples] + positions, read, ~ended)
        self._read[chosen] = read
        costs = entries.reshape(len(rows), -1) @ self._rates
        earned = self._earned[at, actions]
        self._costs[chosen] += costs
        self._met[chosen] += earned > 0
        self._llm_tokens[chosen] += actions
        self._since_llm[chosen] = np.where(actions > 0, 0, self._since_llm[chosen] + 1)
        if self.rendered:
            self._choices[rows, positions] = actions
        self._positions[chosen] += 1
        over = rows[ended]
        self._in_flight[over] = False
        decided = self._decided[self._example[over]]
        finals = {
            "agreement": np.where(decided > 0, self._met[over] / np.maximum(decided, 1), 1.0),
            "llm_tokens": self._llm_tokens[over],
            "total_cost": self._costs[over],
        }
        rewards = earned - self.cost_weight * costs
        return RowSteps(rewards, ended, np.zeros(len(rows), dtype=bool), {"cost": costs}, finals)

    def arguments(self) -> dict[str, Any]:
        kept = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        return kept | {"references": self.references, "pool": None, "task": None}

    def state(self, rows: IntArray) -> State:
        return {name: getattr(self, f"_{name}")[rows] for name in ROW_STATE}

    def restore(self, rows: IntArray, state: State, generators: Sequence[np.random.Generator]) -> None:
        for name in ROW_STATE:
            getattr(self, f"_{name}")[rows] = state[name]

    def stretches(self, row: int) -> list[Stretch]:
        """The prompt, the reference, and a square for every choice so far, by the model chosen."""
        if not self._begun[row]:
            return []
        example = self.references.examples[self._example[row]]
        choices = self._choices[row, : self._positions[row]].tolist()
        whole = f"{example.prompt}\n{example.known_reference()}\n\n"
        return [Stretch(PROMPT, whole), *(Stretch(choice, "\N{BLACK SQUARE}") for choice in choices)]

    def observe(self, rows: IntArray) -> Observations:
        """The SLM's state before the next token of each row, (n, width); zeros where the reference has ended."""
        chosen = self.selection(rows)
        in_flight = self._in_flight[chosen]
        if not in_flight.all():
            observations = np.zeros((len(rows), *self.observation_space.shape), dtype=np.float32)
            if in_flight.any():
                observations[in_flight] = self.observe(rows[in_flight])
            return observations
        positions = self._positions[chosen]
        features = self._features[self.references.starts[self._example[chosen]] + positions]
        if not self._history:
            return np.asarray(features)
        counts = self._count_features[np.stack([positions, self._since_llm[chosen]], axis=-1)]
        return np.concatenate([features, counts], axis=-1)


def check_index(index: int, count: int) -> int:
    """The number of one of `count` examples, if it is one."""
    if isinstance(index, int | np.integer) and 0 <= index < count:
        return int(index)
    raise ValueError(f"there is no example {index!r}; the references hold {count}: give an index in 0..{count - 1}")


class ShortcutRoutingEnv(EpisodeEnv):
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
    All by keyword, all with defaults, which take seconds to read: those of `ShortcutSettings`, and names for models,
    task and cost as in `RoutingEnv`. `render_mode` is `ansi` or `rgb_array`: the prompt, the reference, and a square
    for every choice so far in the colour of its model.

    ## Version
    v1: rows of a vector environment have seeds spawned from one (`row_seeds`), no longer `seed + i`.
    v0: first version.
    """

    episodes: ShortcutEpisodes

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        super().__init__(ShortcutEpisodes(1, settings_of(ShortcutSettings, settings)), render_mode)


class ShortcutRoutingVectorEnv(EpisodeVectorEnv):
    """`num_envs` shortcut environments stepped as arrays; see `ShortcutRoutingEnv` for all but what follows.

    Autoreset modes (same step unless asked), and seeds of rows: see `EpisodeVectorEnv`. The first episodes may be
    given: `options={"indices": [...]}`, a number or None for each row.
    """

    episodes: ShortcutEpisodes

    def __init__(
        self,
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **settings: Any,
    ) -> None:
        super().__init__(
            ShortcutEpisodes(num_envs, settings_of(ShortcutSettings, settings)), render_mode, autoreset_mode
        )
