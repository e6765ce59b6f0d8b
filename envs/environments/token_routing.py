"""Token-level routing as Gymnasium environments: thin shells over `Session`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.costs import ALL_COSTS, CostModel, LlmTokens, Price
from envs.decoding.observation import Features, Step, check_features, feature_width
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.environments.render import ansi
from envs.environments.rewards import OutcomeReward, Reward, Transition
from envs.environments.vector import Info, all_masked, masked, row_generators, scalars
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree, check_tree
from envs.prefix_tree.tree_session import TreeSession
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example, Split, Task, check_split

# Far beyond what a normalised hidden state takes; finite, since an unbounded box cannot be sampled sensibly.
HIDDEN_BOUND = 1e6
ENCODED_PROMPTS = 2**14


class _Routing:
    """What both environments share: a session, the examples its rows work on, and their rewards and infos."""

    def __init__(
        self,
        rows: int,
        pool: ModelPool | None = None,
        task: Task | None = None,
        cost: CostModel | None = None,
        reward: Reward | None = None,
        split: Split = "train",
        max_new_tokens: int = 128,
        capacity: int | None = None,
        sampling: Sampling | None = None,
        features: Features = "hidden",
        tree: PrefixTree | None = None,
    ) -> None:
        if tree is not None:
            check_tree(tree, pool, task, max_new_tokens, sampling)
            pool, task = tree.pool, tree.task
        self.pool = (pool or embedded_pool()).check_choice()
        self.task = task or ArithmeticTask()
        self.split: Split = check_split(split)
        self.reward = reward or OutcomeReward()
        self.session: Session | TreeSession
        if tree is None:
            self.session = Session(self.pool, rows, max_new_tokens, capacity, sampling)
        else:
            self.session = TreeSession(tree, rows, capacity)
        self._encode = lru_cache(ENCODED_PROMPTS)(self.pool.encode)
        self.cost = cost or LlmTokens()
        self._cost_unit = self.cost.per_llm_token(self.pool.profiles)
        if self._cost_unit <= 0:
            raise ValueError(
                f"cost {self.cost.name}: an LLM token costs {self._cost_unit}; rewards need a price above 0"
            )
        costs = {cost.name: cost for cost in (*ALL_COSTS, self.cost)}.values()
        self._price = Price(self.pool.profiles, list(costs))
        self._step_price = Price(self.pool.profiles, [cost for cost in costs if cost.reproducible])
        self.examples: list[Example | None] = [None] * rows
        self._references: list[IntArray] = [np.zeros(0, dtype=np.int64)] * rows
        self._on_reference = np.zeros(rows, dtype=bool)
        self.features = check_features(features)
        width = feature_width(features, self.pool.slm.width)
        self.observation_space = gym.spaces.Box(-HIDDEN_BOUND, HIDDEN_BOUND, (width,), np.float32)
        self.action_space: gym.spaces.Discrete = gym.spaces.Discrete(len(self.pool))

    def start(self, rows: IntArray, generators: Sequence[np.random.Generator], given: Sequence[Example | None]) -> Info:
        """Begin an episode in each row; returns the reset infos as arrays of n."""
        examples = [
            example or self.task.sample(self.split, rng) for example, rng in zip(given, generators, strict=True)
        ]
        prompts = [self._encode(example.prompt) for example in examples]
        work = self.session.start(rows, prompts, generators=generators)
        for row, example in zip(rows, examples, strict=True):
            self.examples[row] = example
            if self.reward.uses_reference:
                self._references[row] = self.pool.encode_response(example.reference)
        self._on_reference[rows] = self.reward.uses_reference
        info: Info = {
            "example": np.array([example.id for example in examples], dtype=object),
            "prompt_tokens": np.array([len(prompt) for prompt in prompts]),
        }
        return info | self._costs(self._step_price, work, "cost")

    def step(self, rows: IntArray, actions: IntArray) -> tuple[Step, FloatArray, Info, list[Info]]:
        """Step rows; returns what happened, rewards (n,), step infos as arrays of n, and the infos of ended rows."""
        references = self._next_reference_tokens(rows)
        step = self.session.step(rows, actions)
        ended = step.terminated | step.truncated
        finals = [self._final_info(int(row)) for row in rows[ended]]
        correct = np.zeros(len(rows), dtype=bool)
        correct[ended] = [final["correct"] for final in finals]
        self._on_reference[rows] &= step.tokens == references
        costs = self.cost.of(step.work, self.pool.profiles) / self._cost_unit
        lengths = np.array([len(self._references[row]) for row in rows])
        rewards = self.reward(
            Transition(actions, step.tokens, step.slm_tokens, references, lengths, costs, ended, correct)
        )
        info: Info = {"token": step.tokens, "model": np.array(actions), "cost": costs}
        info |= self._costs(self._step_price, step.work, "cost")
        return step, rewards, info, finals

    def observe(self, rows: IntArray, terminated: BoolArray | None = None) -> np.ndarray[Any, np.dtype[np.float32]]:
        """What is seen of rows, (n, width); zeros where a response has terminated."""
        seen = self.session.observe(rows).seen(self.features).cpu().numpy()
        if terminated is not None:
            seen[terminated] = 0.0
        return np.asarray(seen)

    def render(self, row: int) -> str:
        example = self.examples[row]
        if example is None:
            return ""
        return example.prompt + ansi(self.pool, self.session.response(row), self.session.writers(row))

    def _next_reference_tokens(self, rows: IntArray) -> IntArray:
        tokens = np.full(len(rows), -1)
        if self.reward.uses_reference:
            positions = self.session.observe(rows).positions
            for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
                if self._on_reference[row] and position < len(self._references[row]):
                    tokens[i] = self._references[row][position]
        return tokens

    def _final_info(self, row: int) -> Info:
        example = self.examples[row]
        assert example is not None
        text = self.pool.decode(self.session.response(row))
        writers = self.session.writers(row)
        return {
            "text": text,
            "correct": self.session.correct(row, self.task, example),
            "slm_tokens": int((writers == 0).sum()),
            "llm_tokens": int((writers > 0).sum()),
        } | {
            key: float(value) for key, value in self._costs(self._price, self.session.ledger[row], "total_cost").items()
        }

    @staticmethod
    def _costs(price: Price, work: FloatArray, prefix: str) -> Info:
        return {f"{prefix}_{unit}": value for unit, value in price.of(work).items()}


class RoutingEnv(gym.Env[np.ndarray, int]):
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
    charged: it does not depend on any action.

    ## Starting state
    A prompt of the task's `split`, drawn with the environment's generator, or `options={"example": Example}`.

    ## Episode end
    `terminated`: an end-of-sequence token was written. `truncated`: `max_new_tokens` were written without. Never both.

    ## Info
    At reset: `example` (its id), `prompt_tokens`, `cost_UNIT` of reading the prompt. At every step: `token`, `model`,
    `cost` (what the reward weighs), `cost_UNIT` for the units bytes, flops, llm_tokens and dollars. At the end also:
    `text`, `correct`, `slm_tokens`, `llm_tokens`, and `total_cost_UNIT` of the episode, prompt included, for these
    units and measured seconds (which are left out of a step's info because they never repeat).

    ## Arguments
    All have defaults: the embedded pair on the generated arithmetic task.

    Args:
        pool: the models, SLM first.
        task: where prompts come from and how answers are judged.
        cost: the cost model behind the reward; LLM tokens by default.
        reward: the reward; `OutcomeReward()` by default.
        split: `train`, `validation` or `test`.
        max_new_tokens: the longest response.
        capacity: the longest sequence, prompt included; the pool's where None.
        sampling: greedy where None.
        features: what is observed: `hidden`, `hidden_logits` or `hidden_logits_history` (`envs.decoding.observation`).
        render_mode: `ansi` (`render()` returns the prompt and the answer, each token coloured by its writer) or None.
        tree: a replay tree to walk instead of decoding; see `envs.environments.tree_routing`.

    ## Version
    v0: first version.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["ansi"], "render_fps": 10}  # type: ignore[misc]

    def __init__(
        self,
        pool: ModelPool | None = None,
        task: Task | None = None,
        cost: CostModel | None = None,
        reward: Reward | None = None,
        split: Split = "train",
        max_new_tokens: int = 128,
        capacity: int | None = None,
        sampling: Sampling | None = None,
        features: Features = "hidden",
        render_mode: str | None = None,
        tree: PrefixTree | None = None,
    ) -> None:
        check_render_mode(render_mode)
        self.routing = _Routing(1, pool, task, cost, reward, split, max_new_tokens, capacity, sampling, features, tree)
        self.observation_space = self.routing.observation_space
        self.action_space = self.routing.action_space  # type: ignore[assignment]
        self.render_mode = render_mode
        self._row: IntArray = np.zeros(1, dtype=np.int64)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        super().reset(seed=seed)
        example = (options or {}).get("example")
        info = self.routing.start(self._row, [self.np_random], [example])
        return self.routing.observe(self._row)[0], scalars(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Info]:
        step, rewards, info, finals = self.routing.step(self._row, np.array([action]))
        observation = self.routing.observe(self._row, step.terminated)[0]
        info = scalars(info) | (finals[0] if finals else {})
        return observation, float(rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), info

    def render(self) -> str | None:
        return self.routing.render(0) if self.render_mode == "ansi" else None


class RoutingVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """`num_envs` routing environments decoded together; see `RoutingEnv` for spaces, rewards, endings and infos.

    Autoreset mode: same step. A row that ends is given its next prompt at once; the last observation and info stand
    in `final_obs` and `final_info`, the infos of the new episode's reset in their place. Row i, seeded with `seed + i`
    (or `seed[i]`), goes through the same episodes as a `RoutingEnv` seeded so and given the same actions. The first
    episodes may be given: `options={"examples": [...]}`, one for each row.

    Args:
        num_envs: rows.
        pool: as in `RoutingEnv`, like all that follow.
        task: where prompts come from.
        cost: the cost model behind the reward.
        reward: the reward.
        split: `train`, `validation` or `test`.
        max_new_tokens: the longest response.
        capacity: the longest sequence, prompt included.
        sampling: greedy where None.
        features: what is observed.
        render_mode: `ansi` or None.
        tree: a replay tree to walk instead of decoding.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": ["ansi"],
        "render_fps": 10,
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        pool: ModelPool | None = None,
        task: Task | None = None,
        cost: CostModel | None = None,
        reward: Reward | None = None,
        split: Split = "train",
        max_new_tokens: int = 128,
        capacity: int | None = None,
        sampling: Sampling | None = None,
        features: Features = "hidden",
        render_mode: str | None = None,
        tree: PrefixTree | None = None,
    ) -> None:
        check_render_mode(render_mode)
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, is {num_envs}")
        self.num_envs = num_envs
        self.routing = _Routing(
            num_envs, pool, task, cost, reward, split, max_new_tokens, capacity, sampling, features, tree
        )
        self.single_observation_space = self.routing.observation_space
        self.single_action_space = self.routing.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.render_mode = render_mode
        self._rows: IntArray = np.arange(num_envs)
        self._generators: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Info | None = None
    ) -> tuple[np.ndarray, Info]:
        self._generators = row_generators(seed, self.num_envs, self._generators)
        examples = (options or {}).get("examples") or [None] * self.num_envs
        if len(examples) != self.num_envs:
            raise ValueError(f"options['examples'] holds {len(examples)} examples for {self.num_envs} environments")
        info = self.routing.start(self._rows, self._generators, examples)
        return self.routing.observe(self._rows), masked(info, self._rows, self.num_envs)

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, Info]:
        step, rewards, info, finals = self.routing.step(self._rows, np.asarray(actions))
        ended = np.flatnonzero(step.terminated | step.truncated)
        if not len(ended):
            return self.routing.observe(self._rows), rewards, step.terminated, step.truncated, all_masked(info)
        going_on = np.setdiff1d(self._rows, ended)
        infos = masked({key: value[going_on] for key, value in info.items()}, going_on, self.num_envs)
        final_observations = self.routing.observe(ended, step.terminated[ended])
        for row, final, observation in zip(ended, finals, final_observations, strict=True):
            whole = scalars({key: value[row : row + 1] for key, value in info.items()}) | final
            infos = self._add_info(infos, {"final_obs": observation, "final_info": whole}, int(row))
        started = self.routing.start(ended, [self._generators[row] for row in ended], [None] * len(ended))
        infos = masked(started, ended, self.num_envs, infos)
        return self.routing.observe(self._rows), rewards, step.terminated, step.truncated, infos

    def render(self) -> tuple[str, ...] | None:
        return tuple(self.routing.render(row) for row in range(self.num_envs)) if self.render_mode == "ansi" else None


def check_render_mode(render_mode: str | None) -> None:
    """Refuse a render mode that does not exist."""
    if render_mode not in (None, "ansi"):
        raise ValueError(f"unknown render_mode {render_mode!r}; choose 'ansi' or None")
