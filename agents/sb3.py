"""Routers trained by Stable-Baselines3 (Raffin et al., JMLR 2021) and sb3-contrib on the routing environments.

An episode is a response, an action the model that writes its next token, the return the verdict less the price of the
LLM's tokens. On the checked tree an action drafts a token, or calls the LLM, which takes back what the judge does not
let stand. Losses are those of the algorithms' papers, as the libraries have them. What differs is said at the
settings: inputs standardised before training, a discount of 1, many rows, exploration row by row, no bootstrap at the
length limit; DQN and QR-DQN learn from returns of 32 steps, which are not corrected for what exploration did in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from agents.checking.checked import Checked
from agents.common.checkpoints import Checkpoints, described, plain
from agents.common.policy import Learner, Policy, Track, TrainingRun
from agents.common.selection import BestPolicy, Selection, Validation
from agents.rl.algorithms import DEFAULTS, algorithm_named, check_arguments
from agents.rl.cost_weights import CostWeights
from agents.rl.environments import ENVIRONMENTS, EnvSettings
from agents.rl.imitation import clone, decisions_of
from agents.rl.sb3_policy import Sb3Policy
from envs.costs import ALL_COSTS
from envs.decoding.judges import Gap, Judge
from envs.decoding.judges import described as judge_description
from envs.decoding.observation import DRAFTS, CheckedFeatures, check_checked_features, check_features
from envs.environments.rewards import OutcomeReward
from envs.models.pool import ModelPool, models_manifest
from envs.progress import ProgressBar
from envs.tasks.task import FirstExamples, Task

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm
    from stable_baselines3.common.callbacks import BaseCallback


# Of the rollout that standardises inputs: about as long as a response, so that every part of one is seen.
STATISTICS_STEPS = 64
ROWS_REPORTED = 50
CHECKPOINTS = 20


@dataclass(frozen=True)
class Imitation:
    """How an actor begins with the decisions of `checked`: it imitates them before it plays (behavioural cloning).

    Args:
        teacher: how that policy is trained, first; it answers with its own `threshold`.
        epochs: passes over its decisions on the training problems.
        smoothing: share of the probability that goes to all actions evenly, so that the actor goes on exploring.

    Raises:
        ValueError: a setting is out of range.
    """

    teacher: Checked = field(default_factory=Checked)
    epochs: int = 10
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 <= self.smoothing < 1:
            raise ValueError(f"epochs ({self.epochs}) must be at least 1, smoothing ({self.smoothing}) in [0, 1)")


@dataclass(frozen=True)
class StableBaselines(Learner[Sb3Policy]):
    """An algorithm of Stable-Baselines3 or sb3-contrib that plays a routing environment.

    Args:
        algorithm: `ppo` (Schulman et al. 2017), `a2c` (Mnih et al. 2016), `dqn` (Mnih et al. 2015), `qrdqn` (Dabney et
            al. 2018) or `recurrent_ppo` (PPO with an LSTM).
        environment: `tree` (every visited transition is remembered), `checked_tree` (the same, and a call of the LLM
            checks what was drafted), `token` (every token is decoded) or `shortcut` (reference solutions,
            teacher-forced).
        steps: tokens routed in training, all rows together; a few more where a rollout does not divide them.
        num_envs: rows.
        examples: training problems.
        cost_weight: the price of one LLM token, in right answers.
        cost: the cost model behind the reward, one of `envs.costs.ALL_COSTS`. Where drafts are checked `bytes` counts
            every pass; `llm_tokens` would leave out calls that let a drafted end stand, and drafts taken back.
        features: what the router sees, one of `envs.decoding.observation.FEATURES`; on the checked tree also
            `hidden_logits_history_drafts`.
        judge: which drafted tokens stand; of the checked tree alone.
        max_new_tokens: the longest response.
        net_arch: units of the hidden layers.
        lr: learning rate.
        schedule: of the learning rate: `constant`, or `linear`, down to 0 at the last step.
        gamma: discount. What counts is accuracy less cost, in which a token's price does not depend on when it is
            paid; every episode ends, so that 1 is well-defined, and PPO and A2C bound the variance by `gae_lambda`. At
            0.99 a right answer 60 tokens ahead would be worth 0.55.
        slm_prior: the probability of the SLM before training, where the algorithm has an actor; also its share in the
            rollout that standardises inputs. Most tokens need no LLM, and an answer in which half are the LLM's is
            dear and says little about any one of them; but near 1 the LLM is hardly ever tried. On the embedded pair,
            whose SLM is often wrong, 0.9 learns more slowly than 0.5 to 0.7.
        bootstrap: what a response cut off at `max_new_tokens` is to the agent: one that goes on, its value being
            estimated, or (False) one that is over. It has been judged and rewarded where it stands, and evaluation
            stops it there too: an estimate of more would pay for babbling on, and at a `gamma` of 1 a loop that never
            ends could be worth anything.
        threads: of torch while the network learns. It is small: where cores are shared, threads that wait for each
            other make it ten times slower.
        checkpoint_steps: steps between two checkpoints, which lie in the run's folder: an interrupted training goes on
            from the newest; a twentieth of `steps` where None. Kept are weights, optimizer, random states, replay
            buffer, the answers in flight, and with `tree` all its states, so that the policy is to the bit that of an
            undisturbed run with these settings, on the same machine with as many threads; but not where a tree is so
            large that it had to forget states. At every checkpoint models read the answers in flight anew.
        selection: how the best policy of the training is found, which is the one that is kept.
        arguments: further arguments of the algorithm's class, and in `policy_kwargs` of its network's.
        conditioned: draw a cost weight for every episode and show it to the agent, so that one policy covers them all;
            `cost_weight` is not used then.
        start: imitate a policy that checks drafts by risk before playing, of PPO on the checked tree; the actor begins
            at random where None.

    Raises:
        ValueError: a setting is unknown or out of range; the error names it.
    """

    algorithm: Literal["ppo", "a2c", "dqn", "qrdqn", "recurrent_ppo"] = "ppo"
    environment: Literal["tree", "checked_tree", "token", "shortcut"] = "tree"
    steps: int = 2_000_000
    num_envs: int = 256
    examples: int = 2000
    cost_weight: float = 0.03
    cost: str = "llm_tokens"
    features: CheckedFeatures = "hidden_logits"
    judge: Judge = field(default_factory=Gap)
    max_new_tokens: int = 128
    net_arch: Sequence[int] = field(default_factory=lambda: [64, 64])
    lr: float = 1e-3
    schedule: Literal["constant", "linear"] = "constant"
    gamma: float = 1.0
    slm_prior: float = 0.7
    bootstrap: bool = False
    threads: int = 1
    checkpoint_steps: int | None = None
    selection: Selection = field(default_factory=Selection)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    conditioned: CostWeights | None = None
    start: Imitation | None = None

    def __post_init__(self) -> None:
        algorithm = algorithm_named(self.algorithm)
        for key, value, known in (
            ("environment", self.environment, list(ENVIRONMENTS)),
            ("cost", self.cost, [cost.name for cost in ALL_COSTS]),
            ("schedule", self.schedule, ["constant", "linear"]),
        ):
            if value not in known:
                raise ValueError(f"unknown {key} {value!r}; choose one of {', '.join(known)}")
        if self.checks and check_checked_features(self.features) == DRAFTS:
            raise ValueError(f"features {DRAFTS} say nothing of the next token; choose hidden_logits_history_drafts")
        if not self.checks:
            check_features(self.features)
        for key in ("steps", "num_envs", "examples", "max_new_tokens", "threads"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, is {getattr(self, key)}")
        if self.checkpoint_steps is not None and self.checkpoint_steps < 1:
            raise ValueError(f"checkpoint_steps must be at least 1 or None, is {self.checkpoint_steps}")
        if any(units < 1 for units in self.net_arch):
            raise ValueError(f"net_arch must hold numbers of units above 0, is {list(self.net_arch)}")
        OutcomeReward(self.cost_weight)
        if not (math.isfinite(self.lr) and self.lr > 0) or not 0 < self.gamma <= 1 or not 0 < self.slm_prior < 1:
            raise ValueError(
                f"lr ({self.lr}) must be above 0, gamma ({self.gamma}) in (0, 1] and slm_prior ({self.slm_prior}) in "
                "(0, 1)"
            )
        if self.conditioned is not None and not isinstance(self.conditioned, CostWeights):
            raise ValueError(f"conditioned must be CostWeights or None, is {self.conditioned}")
        if self.start is not None:
            self._check_start(self.start)
        if self.arguments:
            given = plain(self.arguments)
            check_arguments(given, algorithm.kind, "arguments")
            check_arguments(given.get("policy_kwargs") or {}, algorithm.network, "arguments.policy_kwargs")

    def _check_start(self, start: Imitation) -> None:
        if self.algorithm != "ppo" or not self.checks or self.conditioned is not None:
            raise ValueError(
                "start is of ppo on environment=checked_tree, where one cost weight is played for; leave it out"
            )
        if start.teacher.judge != self.judge:
            raise ValueError(
                f"start.teacher.judge ({start.teacher.judge}) must be the judge played with ({self.judge})"
            )

    @property
    def checks(self) -> bool:
        """Whether drafts are checked."""
        return self.environment == "checked_tree"

    def train(self, run: TrainingRun) -> Sb3Policy:
        checkpoints = Checkpoints(run.file("checkpoints"), self.about(run))
        trained = checkpoints.trained(Sb3Policy, run.pool)
        if trained is not None:
            return trained
        problems = self.selection.problems(run.pool, run.task, self.max_new_tokens)
        environment = self.make(run.pool, run.task, run.seed, checkpoints.newest())

        def policy_of(learner: BaseAlgorithm) -> Sb3Policy:
            judge = self.judge if self.checks else None
            return Sb3Policy.of(learner, self.algorithm, run.pool, self.features, self.conditioned, judge)

        choosing = None
        if problems:
            tree = getattr(environment, "tree", None)
            # a tree has a task of its own, those examples alone that are trained on; it judges as the whole one does
            judge, rows = (run.task, None) if tree is None else (tree.task, self.num_envs)
            validation = Validation(self.selection, problems, run.pool, judge, self.max_new_tokens, rows, tree)
            begun = 0 if self.start is None else -1  # what has learned before it plays is measured then too
            choosing = BestPolicy(validation, self.selection.evaluations, self.steps, begun), policy_of
        try:
            begin = None
            if self.start is not None:
                begin = partial(self._imitate, run=run, environment=environment, start=self.start)
            learner = train(environment, self, run.seed, run.track, run.pool.slm.device, checkpoints, choosing, begin)
        finally:
            environment.close()
        policy = policy_of(learner)
        checkpoints.finish(policy)
        return policy

    def _imitate(self, learner: Any, run: TrainingRun, environment: Any, start: Imitation) -> None:
        """Train the teacher, and the learner's actor to decide likewise."""
        teacher = start.teacher.train(replace(run, folder=run.file("start")))
        decisions = decisions_of(
            replace(teacher, looks_ahead=True),  # as an actor does, which sees what the SLM has read
            start.teacher.threshold,
            self.features,
            environment.tree.task.examples("train", self.examples),
            environment.tree,
        )
        found = clone(learner.policy, decisions, start.epochs, start.smoothing, self.lr, learner.batch_size, run.seed)
        run.track({"run": "imitated", **found})

    def about(self, run: TrainingRun) -> dict[str, Any]:
        """What makes the policy of a run."""
        start = run.task.training_start(run.seed)
        settings = asdict(self)
        del settings["judge"]  # runs without one are known by the settings of before there were judges
        if self.start is None:
            del settings["start"]  # likewise
        else:
            settings["start"]["teacher"]["judge"] = judge_description(self.start.teacher.judge)
        if self.checks:
            settings["judge"] = judge_description(self.judge)
        return {
            "models": models_manifest(run.pool),
            "task": {"name": run.task.name, "start": start, "examples": self.examples},
            "seed": run.seed,
            "settings": described(settings),
        }

    def make(self, pool: ModelPool, task: Task, seed: int, checkpoint: Path | None = None) -> VectorEnv:
        """The environment to train in; a tree has the states it had at the checkpoint in that folder."""
        from agents.rl.learner_state import TREE_FILE

        arguments = {
            "pool": pool,
            "cost": next(cost for cost in ALL_COSTS if cost.name == self.cost),
            "max_new_tokens": self.max_new_tokens,
            "features": self.features,
        }
        if self.checks:
            arguments["judge"] = self.judge
        if (
            self.environment in ("tree", "checked_tree")
            and checkpoint is not None
            and (checkpoint / TREE_FILE).is_file()
        ):
            arguments["path"] = checkpoint / TREE_FILE
        problems = FirstExamples(task, self.examples, start=task.training_start(seed))
        weight = self.cost_weight if self.conditioned is None else 0.0
        return ENVIRONMENTS[self.environment](EnvSettings(self.num_envs, problems, self.examples, weight, arguments))

    def constructor_arguments(self, rows: int, mean: Tensor, deviation: Tensor) -> dict[str, Any]:
        """Arguments of the algorithm's class, for so many rows and inputs of these statistics, (width,) each."""
        from stable_baselines3.common.utils import LinearSchedule

        from agents.rl.inputs import Standardised

        defaults, given = DEFAULTS[self.algorithm](rows), plain(self.arguments)
        network = (
            defaults.pop("policy_kwargs", {})
            | (given.pop("policy_kwargs", None) or {})
            | {
                "net_arch": list(self.net_arch),
                "features_extractor_class": Standardised,
                "features_extractor_kwargs": {"mean": mean, "deviation": deviation},
            }
        )
        lr = self.lr if self.schedule == "constant" else LinearSchedule(self.lr, 0.0, 1.0)
        # means over so many of the last episodes: a thousand rows may end a hundred at once
        return {
            "stats_window_size": 1000, "learning_rate": lr, "gamma": self.gamma, **defaults, **given,
            "policy_kwargs": network,
        }  # fmt: skip


def train(
    environment: VectorEnv,
    settings: StableBaselines,
    seed: int,
    track: Track,
    device: torch.device,
    checkpoints: Checkpoints | None = None,
    choosing: tuple[BestPolicy, Callable[[BaseAlgorithm], Policy]] | None = None,
    begin: Callable[[BaseAlgorithm], None] | None = None,
) -> BaseAlgorithm:
    """Train an algorithm of Stable-Baselines3 in an environment of same-step autoreset.

    Args:
        environment: may be any; rewards, spaces and rows are its own.
        settings: how to train.
        seed: of the environment's rows (those of `envs.row_seeds`), the network and its batches.
        track: receives rows of what Stable-Baselines3 logs.
        device: of the network.
        checkpoints: what to go on from and to keep, of an environment that has `get_state` and `set_state`; nothing
            where None.
        choosing: keeps the best weights of the training, of the policies that its second part makes of a learner; the
            last ones are kept where None.
        begin: does something to the learner before it plays.

    Returns:
        The trained algorithm of Stable-Baselines3.

    Raises:
        FloatingPointError: an observation, a reward or a loss is not finite.
        ValueError: the checkpoint is damaged.
        OSError: a checkpoint cannot be written.
    """
    from stable_baselines3.common.logger import Logger

    from agents.rl.inputs import input_statistics
    from agents.rl.learner_state import Checkpointing
    from agents.rl.sb3_extensions import Reporting, Rows, random_state_kept
    from agents.rl.validating import Validating
    from agents.rl.vec_env import VectorEnvBridge, threads

    algorithm = algorithm_named(settings.algorithm)
    bridge = VectorEnvBridge(environment, settings.conditioned, settings.bootstrap)
    with (
        random_state_kept(device),
        threads(settings.threads),
        ProgressBar(total=settings.steps, desc=settings.algorithm, leave=False) as progress,
    ):
        newest = None if checkpoints is None else checkpoints.newest()
        if newest is None:
            statistics = input_statistics(bridge, settings.slm_prior, STATISTICS_STEPS, seed)
        else:  # they are part of the weights
            zeros = torch.zeros(bridge.observation_space.shape or ())
            statistics = zeros, zeros
        arguments = settings.constructor_arguments(bridge.num_envs, *statistics)
        learner: Any = algorithm.kind(algorithm.policy, bridge, seed=seed, device=device, **arguments)
        head = getattr(learner.policy, "action_net", None)
        if head is not None:
            others = head.bias.shape[0] - 1
            with torch.no_grad():
                head.bias[0] = math.log(settings.slm_prior * others / (1 - settings.slm_prior))
        if newest is None and begin is not None:
            begin(learner)
        learner.set_logger(Logger(None, [Rows(track, settings.algorithm)]))
        reporting = Reporting(settings.steps // ROWS_REPORTED, progress)
        callbacks: list[BaseCallback] = [reporting]
        validating = None if choosing is None else Validating(*choosing, bridge, track, settings.algorithm)
        if validating is not None:
            callbacks.append(validating)
        if checkpoints is not None:
            interval = settings.checkpoint_steps or max(1, settings.steps // CHECKPOINTS)
            best = None if validating is None else validating.best
            keeping = Checkpointing(checkpoints, interval, bridge, reporting, best)
            callbacks.append(keeping)
            if newest is not None:
                keeping.restore(learner, newest)
                progress.update(learner.num_timesteps)
        left = settings.steps - learner.num_timesteps
        trained: BaseAlgorithm = learner.learn(
            left, callback=callbacks, log_interval=None, reset_num_timesteps=newest is None
        )
        if validating is not None:
            trained.policy.load_state_dict(validating.best.weights)
    return trained
