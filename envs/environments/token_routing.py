"""Token-level routing as Gymnasium environments, over a decoder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from functools import lru_cache
from typing import Any, ClassVar, Self

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode

from envs.arrays import UNKNOWN, BoolArray, FloatArray, IntArray
from envs.costs import ALL_COSTS, LlmTokens, Price
from envs.decoding.decoder import Decoder
from envs.decoding.observation import DRAFTS, Step, feature_width
from envs.decoding.session import Session
from envs.environments.episodes import EpisodeRows, Info, Observations, RowSteps, State, observation_box
from envs.environments.names import settings_of
from envs.environments.prompts import PromptSource
from envs.environments.render import PROMPT, Checked, Stretch, stretches_of
from envs.environments.rewards import OutcomeReward, Transition
from envs.environments.settings import RoutingSettings
from envs.environments.vector import EpisodeEnv, EpisodeVectorEnv
from envs.models.loading import embedded_pool
from envs.prefix_tree.tree_session import TreeSession, check_tree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example

ENCODED_PROMPTS = 2**14


class RoutingEpisodes(EpisodeRows):
    """Rows that answer prompts: a decoder, the examples its rows work on, and their rewards and infos.

    Args:
        rows: responses in flight.
        settings: what they are made with.
    """

    options = ("example", "index")
    row_options = ("examples", "indices")
    settings_kind: ClassVar[type[RoutingSettings]] = RoutingSettings

    @classmethod
    def made_with(cls, rows: int, settings: Mapping[str, Any]) -> Self:
        """So many rows, by the settings that a user gives, names among them."""
        return cls(rows, settings_of(cls.settings_kind, settings))

    def __init__(self, rows: int, settings: RoutingSettings) -> None:
        super().__init__(rows)
        self.settings, pool, task, tree = settings, settings.pool, settings.task, settings.tree
        if tree is not None:
            check_tree(tree, pool, task, settings.max_new_tokens, settings.sampling)
            pool, task = tree.pool, tree.task
        self.pool, self.task = (pool or embedded_pool()).check_choice(), task or ArithmeticTask()
        self.reward = settings.reward or OutcomeReward()
        self.session = self._open(rows)
        self.source = PromptSource(
            self.task,
            settings.split,
            lru_cache(ENCODED_PROMPTS)(self.pool.encode_prompt),
            self.session.capacity - settings.max_new_tokens,
            settings.on_too_long,
            settings.order,
        )
        self.numbers = self.source.numbers
        self.cost = settings.cost or LlmTokens()
        self._cost_unit = self.cost.per_llm_token(self.pool.profiles)
        if self._cost_unit <= 0:
            raise ValueError(
                f"cost {self.cost.name}: an LLM token costs {self._cost_unit}; rewards need a price above 0"
            )
        costs = {cost.name: cost for cost in (*ALL_COSTS, self.cost)}.values()
        self._price = Price(self.pool.profiles, list(costs))
        charged = [cost for cost in costs if cost.reproducible or cost.name == self.cost.name]
        self._step_price = Price(self.pool.profiles, charged)
        self._final_types: dict[str, type] = {"text": object, "correct": bool, "slm_tokens": int, "llm_tokens": int}
        self._final_types |= {f"total_cost_{cost.name}": float for cost in costs}
        self.examples: list[Example | None] = [None] * rows
        self._references: list[IntArray] = [np.zeros(0, dtype=np.int64)] * rows
        self._reference_lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self._on_reference: BoolArray = np.zeros(rows, dtype=bool)
        self._terminated: BoolArray = np.zeros(rows, dtype=bool)
        self.observation_space = observation_box(feature_width(settings.features, self.pool.slm.width))
        self.action_space = gym.spaces.Discrete(len(self.pool))

    def start(
        self, rows: IntArray, generators: Sequence[np.random.Generator], given: Sequence[Example | int | None]
    ) -> Info:
        """Begin a response in each row, to the example given, that number of the split, or the next one drawn."""
        chosen = [self.source.choose(asked, rng) for asked, rng in zip(given, generators, strict=True)]
        examples, prompts = [example for example, _ in chosen], [prompt for _, prompt in chosen]
        read = self.session.start(rows, prompts, generators=generators, observed=self.settings.features != DRAFTS)
        for row, example in zip(rows, examples, strict=True):
            self.examples[row] = example
            self._know_reference(row, example)
        self._on_reference[rows], self._terminated[rows] = self.reward.uses_reference, False
        if not self.cost.reproducible:
            self.session.observe(rows)  # the SLM reads now, so that the prompt's seconds are charged to no step
            read = self.session.ledger[rows]
        info: Info = {
            "example": np.array([example.id for example in examples], dtype=object),
            "prompt_tokens": np.array([len(prompt) for prompt in prompts]),
        }
        return info | self._costs(self._step_price, read, "cost")

    def step(self, rows: IntArray, actions: npt.NDArray[Any]) -> RowSteps:
        """Let the models that `actions` name write a token in each row."""
        references = self._next_reference_tokens(rows)
        before = None if self.cost.reproducible else self.session.ledger[rows]
        step = self.session.step(rows, actions)
        ended = step.terminated | step.truncated
        self._terminated[rows] = step.terminated
        ledger = step.ledger
        if before is not None:
            if not step.terminated.all():
                self.session.observe(rows[~step.terminated])  # the reading that the step caused is timed now
            ledger = self.session.ledger[rows] - before
        finals = self._final_infos(rows[ended]) if ended.any() else {}
        correct = np.zeros(len(rows), dtype=bool)
        correct[ended] = finals.get("correct", False)
        self._on_reference[rows] &= step.tokens == references
        costs = self.cost.of(ledger, self.pool.profiles) / self._cost_unit
        rewards = self.reward(
            Transition(
                actions=actions,
                tokens=step.tokens,
                slm_tokens=step.slm_tokens,
                reference_tokens=references,
                reference_lengths=self._reference_lengths[rows],
                costs=costs,
                ended=ended,
                correct=correct,
            )
        )
        infos: Info = {
            "token": step.tokens, "slm_token": step.slm_tokens, "model": np.array(actions), "cost": costs
        }  # fmt: skip
        infos |= self._costs(self._step_price, ledger, "cost") | self._checks(step)
        return RowSteps(rewards, step.terminated, step.truncated, infos, finals)

    def observe(self, rows: IntArray) -> Observations:
        """What a router sees of rows, (n, width); zeros where a response has terminated."""
        terminated = self._terminated[rows]
        if terminated.all():  # as a rule all that end with a step
            return np.zeros((len(rows), *self.observation_space.shape), dtype=np.float32)
        observations = self.session.observe(rows).vector(self.settings.features).cpu().numpy()
        if terminated.any():
            observations[terminated] = 0.0
        return np.asarray(observations)

    def arguments(self) -> dict[str, Any]:
        kept = {field.name: getattr(self.settings, field.name) for field in fields(self.settings)}
        # a tree has its own pool and task, which must not be told from it when copies are made
        return kept if self.settings.tree is None else kept | {"pool": None, "task": None}

    def state(self, rows: IntArray) -> State:
        texts = [json.dumps(None if (e := self.examples[row]) is None else asdict(e)).encode() for row in rows]
        return {
            "decoder": self.session.state(rows),
            "examples": [np.frombuffer(text, dtype=np.uint8) for text in texts],
            "terminated": self._terminated[rows],
            "on_reference": self._on_reference[rows],
        }

    def restore(self, rows: IntArray, state: State, generators: Sequence[np.random.Generator]) -> None:
        self.session.restore(rows, state["decoder"], generators)
        self._terminated[rows], self._on_reference[rows] = state["terminated"], state["on_reference"]
        for row, text in zip(rows, state["examples"], strict=True):
            kept = json.loads(text.tobytes())
            self.examples[row] = example = None if kept is None else Example.from_dict(kept)
            if example is not None:
                self._know_reference(row, example)

    def stretches(self, row: int) -> list[Stretch]:
        """The prompt and the response so far, by the models that wrote it."""
        example = self.examples[row]
        if example is None:
            return []
        checks = self._checks_of(row)
        response, writers = self.session.response(row), self.session.writers(row)
        return [Stretch(PROMPT, example.prompt), *stretches_of(self.pool, response, writers, checks)]

    def _open(self, rows: int) -> Decoder:
        """The decoder of so many rows."""
        settings = self.settings
        if settings.tree is not None:
            return TreeSession(settings.tree, rows, settings.capacity)
        return Session(self.pool, rows, settings.max_new_tokens, settings.capacity, settings.sampling)

    def _checks(self, step: Step) -> Info:
        """What the infos of a step say of what was checked in it, arrays of n."""
        return {}

    def _checks_of(self, row: int) -> Checked | None:
        """What was checked in a response so far; None where drafts are not checked."""
        return None

    def _know_reference(self, row: int, example: Example) -> None:
        """Keep the tokens of the reference, where the reward asks for them."""
        if self.reward.uses_reference:
            self._references[row] = reference = self.pool.encode_reference(example)
            self._reference_lengths[row] = len(reference)

    def _next_reference_tokens(self, rows: IntArray) -> IntArray:
        tokens = np.full(len(rows), UNKNOWN)
        if self.reward.uses_reference:
            positions = self.session.observe(rows).host_positions
            for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
                if self._on_reference[row] and position < len(self._references[row]):
                    tokens[i] = self._references[row][position]
        return tokens

    def _final_infos(self, rows: IntArray) -> Info:
        """What the infos of responses that have ended gain, arrays of n."""
        finals = [self._final_info(row) for row in rows.tolist()]
        return {key: np.array([final[key] for final in finals], dtype) for key, dtype in self._final_types.items()}

    def _final_info(self, row: int) -> Info:
        example, writers = self.examples[row], self.session.writers(row)
        assert example is not None
        info: Info = {
            "text": self.pool.decode(self.session.response(row)),
            "correct": self.session.correct(row, self.task, example),
            "slm_tokens": (writers == 0).sum(),
            "llm_tokens": (writers > 0).sum(),
        }
        return info | self._costs(self._price, self.session.ledger[row], "total_cost")

    @staticmethod
    def _costs(price: Price, ledger: FloatArray, prefix: str) -> Info:
        return {f"{prefix}_{unit}": value for unit, value in price.of(ledger).items()}


class RoutingEnv(EpisodeEnv):
    """Which model should write the next token?

    ## Description
    A response to a task's prompt is written token by token. At every step the agent reads the hidden state of the small
    language model (SLM) and chooses the model that writes the next token: the SLM, or a larger one (LLM). Decoding is
    greedy unless `sampling` says otherwise, so a prefix and an action always give the same next state.

    ## Action space
    `Discrete(K)` for a pool of K models: 0 is the SLM, K - 1 the LLM.

    ## Observation space
    `Box(-1e6, 1e6, (width,), float32)`: the SLM's last-layer hidden state (after the final norm) at the last position;
    with richer `features` also the entropy and top log-probabilities of its next token, and the history. After the
    end-of-sequence token it is all zeros.

    ## Reward
    `reward`, by default `OutcomeReward`: -cost_weight x cost at every step, + 1 at the end if the answer is right. The
    cost of a step is what its action made run (an LLM pass, with the tokens the LLM had missed) and the SLM's reading
    of the new token, in the unit of `cost`, over the cost of one LLM token on an empty cache. Reading the prompt is not
    charged: it does not depend on any action. A measured cost (`Seconds`) counts the reading of the new token with the
    step that caused it, so that the costs of all steps are the episode's total less the reading of the prompt.

    ## Starting state
    A prompt of the task's `split`, drawn with the environment's generator; with `order="sequential"` the next one of a
    pass over the split, which a reset with a seed begins anew. Or `options={"example": Example}`, or number n of the
    split, `options={"index": n}`. Prompts that leave no room for `max_new_tokens` are an error, when the environment is
    built where the split is finite; with `on_too_long` they are skipped, or cut at their left.

    ## Episode end
    `terminated`: an end-of-sequence token was written. `truncated`: `max_new_tokens` were written without. Never both.

    ## Info
    At reset: `example` (its id), `prompt_tokens`, `cost_UNIT` of reading the prompt. At every step: `token`,
    `slm_token` (what the SLM would have written, greedily), `model`, `cost` (what the reward weighs), `cost_UNIT` for
    the units bytes, flops, llm_tokens and dollars. At the end also: `text`, `correct`, `slm_tokens`, `llm_tokens`, and
    `total_cost_UNIT` of the episode, prompt included, for these units and measured seconds (which are left out of a
    step's info because they never repeat, unless they are the `cost`).

    ## Arguments
    All by keyword, all with defaults: those of `envs.environments.settings.RoutingSettings` (`pool`, or `models`:
    names to load; `task`, `cost` and `reward`: objects, or names such as `arithmetic`, `bytes`, `outcome`; `split`,
    `max_new_tokens`, `capacity`, `sampling`, `features`, `tree`, `on_too_long`, `order`). With names alone the spec is
    plain JSON.
    `render_mode` is `ansi` (`render()` returns the prompt and the answer as text, each token coloured by its writer),
    `rgb_array` (the same as a picture, uint8, (360, 640, 3)) or None.

    ## Copies and states
    `get_state()` and `set_state(state)` keep and restore where an episode stands, here or in another environment made
    with the same arguments; copies, in this process or another, hold that state, and models read
    again what they had read. After either, the same actions lead to the same steps.

    ## Version
    v1: rows of a vector environment have seeds spawned from one (`row_seeds`), no longer `seed + i`; a measured cost
    charges steps with the SLM's reading; by default a token of one of several LLMs costs by that model's size.
    v0: first version.
    """

    episodes: RoutingEpisodes
    episodes_kind: ClassVar[type[RoutingEpisodes]] = RoutingEpisodes

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        super().__init__(self.episodes_kind.made_with(1, settings), render_mode)


class RoutingVectorEnv(EpisodeVectorEnv):
    """`num_envs` routing environments decoded together; see `RoutingEnv` for spaces, rewards, infos and arguments.

    Autoreset modes (same step unless asked), and seeds of rows: see `EpisodeVectorEnv`. The first episodes may be
    given: `options={"examples": [...]}` or `{"indices": [...]}`, an example, its number, or None for each row. With
    `order="sequential"` the rows share one pass over the split: each example is answered once a pass.
    """

    episodes: RoutingEpisodes
    episodes_kind: ClassVar[type[RoutingEpisodes]] = RoutingEpisodes

    def __init__(
        self,
        num_envs: int = 1,
        *,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        **settings: Any,
    ) -> None:
        super().__init__(self.episodes_kind.made_with(num_envs, settings), render_mode, autoreset_mode)
