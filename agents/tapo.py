"""TAPO: policy gradient on counterfactual advantages in trees of routed continuations (the idea of AlphaRouter, 2026).

The router answers training problems. At some states of each answer the other choice is followed too, to the end of the
answer. The difference between what comes below the two branches, less what they cost, is the advantage of asking the
LLM at that state, and the policy gradient is taken for both actions at once (`branch_loss`): nothing estimates what a
state is worth, both branches are followed to their ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Literal

import numpy as np
import torch
from torch import Tensor

from agents.citer import Citer
from agents.common.checkpoints import (
    Checkpoints,
    array_of,
    described,
    optimizer_state,
    read,
    restore_optimizer,
    restoring,
)
from agents.common.policy import Learner, TrainingRun
from agents.common.saving import load_policy
from agents.common.selection import BestPolicy, Selection, Validation
from agents.distillation import OracleDistillation
from agents.preferences.labels import Labels
from agents.rl.branching import branch_loss
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy, restored_network
from envs.arrays import NO_ACTION, FloatArray, IntArray
from envs.decoding.observation import check_features, feature_width
from envs.environments.episodes import generator_numbers, generator_of
from envs.models.pool import models_manifest
from envs.prefix_tree.expander import TreeExpander
from envs.prefix_tree.tree import GOING_ON, PrefixTree
from envs.prefix_tree.tree_session import observation_at
from envs.progress import ProgressBar
from envs.tasks.task import Example

TREE_FILE = "replay.tree"
FROM_SCRATCH: Final = "hidden_logits_history"
"""What a router from scratch sees where nothing else is said."""


@dataclass(frozen=True)
class Tapo(Learner[RouterPolicy]):
    """A router improved by counterfactual policy gradient.

    Args:
        start: the router to improve: `citer` or `expert`, trained first on the settings of that name, or `scratch`.
        policy: the folder of a saved router to improve, instead of `start`.
        citer: how the router of `start=citer` is trained.
        expert: how the router of `start=expert` is trained.
        examples: training problems; all of the train split where None.
        iterations: of answering, branching and updating.
        batch: problems an iteration.
        branches: states per answer at which the other choice is followed, drawn where the router is least decided.
        samples: continuations of each branch; 1 follows the router's better choice at every state, more are sampled.
        cost_weight: the price of an LLM token, in right answers.
        anneal: share of the iterations over which that price rises from 0: an untrained router would learn to be cheap
            long before it learns where the LLM is worth its price.
        llm_share: the share of tokens the router gives to the LLM at first.
        epochs: passes over an iteration's branchings.
        batch_size: branchings a step.
        lr: of Adam.
        features: what a router from scratch sees, one of `envs.decoding.observation.FEATURES`.
        max_new_tokens: the longest response.
        memory: bytes of the replay tree.
        rows: answers in flight.
        selection: how the best router is found, of the one to begin with and those of the iterations; it is kept.
        checkpoint_iterations: iterations between two checkpoints, which lie in the run's folder: an interrupted
            training goes on from the newest. Kept are weights, optimizer, the random state and the replay tree, so that
            the policy is to the bit that of an undisturbed run with these settings, on the same machine with as many
            threads; but not where the tree is so large that it had to forget states.
    """

    needs_folder: ClassVar[bool] = True

    start: Literal["citer", "expert", "scratch"] = "citer"
    policy: str | None = None
    citer: Citer = field(default_factory=lambda: Citer(features="hidden_logits", labels=Labels(on_agreement="slm")))
    expert: OracleDistillation = field(default_factory=OracleDistillation)
    examples: int | None = 2000
    iterations: int = 20
    batch: int = 256
    branches: int = 8
    samples: int = 1
    cost_weight: float = 0.07
    anneal: float = 0.0
    llm_share: float = 0.06
    epochs: int = 4
    batch_size: int = 256
    lr: float = 1e-3
    features: Literal["hidden", "hidden_logits", "hidden_logits_history"] = FROM_SCRATCH
    max_new_tokens: int = 128
    memory: int = 2**31
    rows: int = 256
    selection: Selection = field(default_factory=Selection)
    checkpoint_iterations: int = 1

    def __post_init__(self) -> None:
        check_features(self.features)
        if self.start not in ("citer", "expert", "scratch"):
            raise ValueError(f"unknown start {self.start!r}; choose citer, expert or scratch")
        if self.features != FROM_SCRATCH and (self.start != "scratch" or self.policy is not None):
            way = "leave it out" if self.policy is not None else f"say {self.start}.features={self.features}"
            raise ValueError(
                f"features={self.features} is what a router from scratch sees, and one that is improved sees what it "
                f"saw before: {way}, or start=scratch"
            )
        least = dict.fromkeys(("iterations", "branches", "samples", "epochs", "batch_size", "rows"), 1)
        for key, smallest in (least | {"batch": 2, "checkpoint_iterations": 1}).items():
            if getattr(self, key) < smallest:
                raise ValueError(f"{key} must be at least {smallest}, is {getattr(self, key)}")
        if not 0 < self.llm_share < 1 or not 0 <= self.anneal <= 1 or self.cost_weight < 0 or self.lr <= 0:
            raise ValueError(
                f"llm_share ({self.llm_share}) must be in (0, 1), anneal ({self.anneal}) in [0, 1], cost_weight "
                f"({self.cost_weight}) >= 0, lr ({self.lr}) > 0"
            )

    def train(self, run: TrainingRun) -> RouterPolicy:
        checkpoints = Checkpoints(run.workspace / "checkpoints", self.about(run))
        trained = checkpoints.trained(RouterPolicy, run.pool)
        if trained is not None:
            return trained
        improvement = self._improvement(run, checkpoints.newest())
        with ProgressBar(total=self.iterations, initial=improvement.made, desc="tapo", leave=False) as progress:
            for number in range(improvement.made, self.iterations):
                validated = improvement.validate()
                run.track({"run": "tapo", "iteration": number, **validated, **improvement.iterate(number)})
                if improvement.made % self.checkpoint_iterations == 0 and improvement.made < self.iterations:
                    improvement.keep(checkpoints)
                progress.update()
        if validated := improvement.validate():
            run.track({"run": "tapo", "iteration": self.iterations, **validated})
        policy = improvement.policy()
        checkpoints.finish(policy)
        return policy

    def about(self, run: TrainingRun) -> dict[str, Any]:
        """What makes the policy of a run."""
        unused = {"policy", "citer", "expert"} - {self.start if self.policy is None else "policy"}
        return {
            "models": models_manifest(run.pool),
            "task": {"name": run.task.name, "start": run.task.training_start(run.seed)},
            "seed": run.seed,
            "settings": {key: value for key, value in described(asdict(self)).items() if key not in unused},
        }

    def _improvement(self, run: TrainingRun, checkpoint: Path | None) -> _Improvement:
        """A router before its first iteration, or as it stood when a checkpoint was kept in that folder.

        Raises:
            ValueError: the checkpoint is damaged, or `policy` is not the folder of a router.
        """
        examples = run.task.examples("train", self.examples, start=run.task.training_start(run.seed))
        problems = self.selection.problems(run.pool, run.task, self.max_new_tokens)
        if checkpoint is None:
            begun = self._begin(run)
            tree = PrefixTree(run.pool, run.task, self.max_new_tokens, self.memory)
            return _Improvement(self, tree, examples, begun, run.seed, problems)
        path = checkpoint / TREE_FILE
        tree = PrefixTree(run.pool, run.task, self.max_new_tokens, self.memory, path if path.is_file() else None)
        arrays, about = read(checkpoint)
        with restoring(checkpoint):
            weights = {name: torch.tensor(value) for name, value in arrays["network"].items()}
            network = restored_network(about["router"], weights, run.pool)
            begun = RouterPolicy(network, models_manifest(run.pool), about["router"]["features"])
            improvement = _Improvement(self, tree, examples, begun, run.seed, problems, set_out=False)
            improvement.restore(arrays, about)
        return improvement

    def _begin(self, run: TrainingRun) -> RouterPolicy:
        """The router to improve.

        Raises:
            ValueError: `policy` is not the folder of a router.
        """
        if self.policy is not None:
            policy = load_policy(Path(self.policy), run.pool)
            if not isinstance(policy, RouterPolicy):
                raise ValueError(f"{self.policy} holds a {type(policy).__name__}; give the folder of a router")
            return policy
        if self.start != "scratch":
            learner: Learner[RouterPolicy] = self.citer if self.start == "citer" else self.expert
            return learner.train(replace(run, folder=run.workspace / self.start))
        slm = run.pool.slm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.seed)
            network = RouterNetwork(feature_width(self.features, slm.width)).to(slm.device)
        return RouterPolicy(network.eval(), models_manifest(run.pool), self.features)


class _Improvement:
    """A router between two iterations, of which `made` are made."""

    def __init__(
        self,
        settings: Tapo,
        tree: PrefixTree,
        examples: Sequence[Example],
        begun: RouterPolicy,
        seed: int,
        problems: Sequence[Example] = (),
        set_out: bool = True,
    ) -> None:
        self.settings, self.tree, self.examples = settings, tree, examples
        self.features = begun.features
        self.network = begun.network.eval().requires_grad_(True)
        self.expander = TreeExpander(tree, settings.rows)
        self.rng = np.random.default_rng([seed, 1])
        self.llm = len(tree.pool) - 1
        self.optimizer = torch.optim.Adam(self.network.parameters(), lr=settings.lr)
        self.prompts = [tree.pool.encode_prompt(example) for example in examples]
        self.made = 0
        selection, pool, task = settings.selection, tree.pool, tree.task
        validation = Validation(selection, problems, pool, task, tree.max_new_tokens, settings.rows, tree)
        self.best = BestPolicy(validation, selection.evaluations if problems else 0, settings.iterations)
        if set_out:
            self._set_out()

    def validate(self) -> dict[str, float]:
        """Measure the router on validation problems if it is due; what is reported of it."""
        router = RouterPolicy(self.network, models_manifest(self.tree.pool), self.features)
        return self.best.measure(self.made, router, self.network) if self.best.due(self.made) else {}

    def policy(self) -> RouterPolicy:
        """The best router so far; the last one where none was measured."""
        if self.best.weights:
            self.network.load_state_dict(self.best.weights)
        network = self.network.eval().requires_grad_(False)
        return RouterPolicy(network, models_manifest(self.tree.pool), self.features)

    def keep(self, checkpoints: Checkpoints) -> None:
        """Keep a checkpoint.

        What is decoded next is read from the prompt on, as it must be where a checkpoint is gone on from: both go on
        with the same bits.
        """
        self.expander.forget(np.arange(self.settings.rows))
        moments, others = optimizer_state(self.optimizer)
        arrays = {
            "network": {name: array_of(value) for name, value in self.network.state_dict().items()},
            "optimizer": moments,
            "generator": generator_numbers(self.rng),
        }
        arrays["best"], best = self.best.state()
        router = {"features": self.features, "width": self.network.width, "units": self.network.units}
        about = {"made": self.made, "router": router, "optimizer": others, "best": best}
        checkpoints.save(self.made, arrays, about, lambda folder: self.tree.save(folder / TREE_FILE))

    def restore(self, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Go on from what `keep` has kept, but for the network, which is made with its weights."""
        restore_optimizer(self.optimizer, arrays["optimizer"], about["optimizer"])
        self.rng, self.made = generator_of(arrays["generator"]), about["made"]
        self.best.restore(arrays.get("best", {}), about["best"], self.network)

    def _set_out(self) -> None:
        """Move the router's threshold of one half to where the share of LLM tokens is the one to begin with."""
        some = np.arange(min(len(self.examples), self.settings.batch))
        roots = self._roots(some)
        fresh = np.zeros(len(some), dtype=np.int64)
        _, _, states = self._follow(roots, since=fresh, first=np.full(len(some), NO_ACTION), sampled=False)
        nodes, since = (np.concatenate(column) for column in zip(*states, strict=True))
        inputs = self._features(nodes.astype(np.int64), since.astype(np.int64))
        if self.settings.start == "scratch" and self.settings.policy is None:
            # an untrained router sees inputs of unit scale
            self.network.standardise(inputs.mean(0), inputs.std(0))
        with torch.no_grad():
            shift = self.network(inputs).quantile(self.settings.llm_share)
            last = self.network.layers[-1]
            assert isinstance(last, torch.nn.Linear)
            last.bias.sub_(shift)
        self._release(some)

    def iterate(self, number: int) -> dict[str, float]:
        """Answer a batch of problems, branch, update; the row it is reported by."""
        settings = self.settings
        rising = settings.anneal * settings.iterations
        price = settings.cost_weight * (min(1.0, number / rising) if rising else 1.0)
        chosen = self.rng.choice(len(self.examples), min(settings.batch, len(self.examples)), replace=False)
        roots = self._roots(chosen)
        fresh, undecided = np.zeros(len(chosen), dtype=np.int64), np.full(len(chosen), NO_ACTION)
        ends, calls, states = self._follow(roots, since=fresh, first=undecided, sampled=settings.samples > 1)
        right = self._right(ends, chosen)
        nodes, since, owners = self._branchings(states)
        advantages = self._advantages(nodes, since, chosen[owners], price)
        inputs = self._features(nodes, since)
        target = torch.from_numpy(advantages).float().to(inputs.device)
        losses = []
        for _ in range(settings.epochs):
            for part in np.array_split(self.rng.permutation(len(nodes)), max(1, len(nodes) // settings.batch_size)):
                loss = branch_loss(self.network(inputs[torch.from_numpy(part)]), target[torch.from_numpy(part)])
                if not torch.isfinite(loss):
                    raise FloatingPointError(f"tapo: the loss is {loss.item()}; lower lr, or look at the rewards")
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
        self._release(chosen)
        self.made = number + 1
        tokens = self.tree.depths[ends].sum()
        return {
            "return": float((right - settings.cost_weight * calls).mean()),
            "accuracy": float(right.mean()),
            "llm_share": float(calls.sum() / tokens),
            "loss": float(np.mean(losses)),
            "decisive": float((np.abs(advantages) > 0.5).mean()),
            "tree": len(self.tree),
        }

    def _branchings(self, states: Sequence[tuple[IntArray, IntArray]]) -> tuple[IntArray, IntArray, IntArray]:
        """States of each answer at which the other choice is followed: nodes, since_llm and answers, (n,) each."""
        nodes, since, owners = [], [], []
        for number, (where, ago) in enumerate(states):
            with torch.no_grad():
                slm = torch.sigmoid(self.network(self._features(where, ago))).double().cpu().numpy()
            weights = np.sqrt(slm * (1 - slm)) + 1e-3
            drawn = self.rng.choice(
                len(where), min(self.settings.branches, len(where)), replace=False, p=weights / weights.sum()
            )
            nodes.append(where[drawn])
            since.append(ago[drawn])
            owners.append(np.full(len(drawn), number))
        return np.concatenate(nodes), np.concatenate(since), np.concatenate(owners)

    def _advantages(self, nodes: IntArray, since: IntArray, problems: IntArray, price: float) -> FloatArray:
        """What asking the LLM at each state brings over letting the SLM write, (n,)."""
        values = []
        for action in (self.llm, 0):
            total = np.zeros(len(nodes))
            for _ in range(self.settings.samples):
                first = np.full(len(nodes), action)
                ends, calls, _ = self._follow(nodes, since, first, self.settings.samples > 1)
                total += self._right(ends, problems) - price * calls
            values.append(total / self.settings.samples)
        return np.asarray(values[0] - values[1])

    def _follow(
        self, nodes: IntArray, since: IntArray, first: IntArray, sampled: bool
    ) -> tuple[IntArray, IntArray, list[tuple[IntArray, IntArray]]]:
        """Go on from nodes to the ends of the answers.

        Args:
            nodes: (n,).
            since: tokens since the LLM last wrote, (n,).
            first: the first action, (n,); NO_ACTION leaves it to the router.
            sampled: draw actions from the router's probabilities, instead of the better one.

        Returns:
            The ends (n,), the tokens the LLM wrote (n,), and of each answer its states with since_llm there.
        """
        at, ago, calls = nodes.astype(np.int64), since.copy(), np.zeros(len(nodes), dtype=np.int64)
        forced = first.copy()
        visited: list[tuple[IntArray, IntArray, IntArray]] = []
        going = np.arange(len(nodes))
        while len(going):
            with torch.no_grad():
                slm = torch.sigmoid(self.network(self._features(at[going], ago[going]))).double().cpu().numpy()
            drawn = self.rng.random(len(going)) if sampled else 0.5
            actions = np.where(slm >= drawn, 0, self.llm)
            actions = np.where(forced[going] == NO_ACTION, actions, forced[going])
            forced[going] = NO_ACTION
            visited.append((going, at[going], ago[going]))
            for begin in range(0, len(going), self.settings.rows):
                part = going[begin : begin + self.settings.rows]
                at[part] = self.expander.step(np.arange(len(part)), at[part], actions[begin : begin + len(part)])
            calls[going] += actions > 0
            ago[going] = np.where(actions > 0, 0, ago[going] + 1)
            going = going[self.tree.ends[at[going]] == GOING_ON]
        answers, where, agos = (np.concatenate(column) for column in zip(*visited, strict=True))
        order = np.argsort(answers, kind="stable")
        cuts = np.cumsum(np.bincount(answers, minlength=len(nodes)))[:-1]
        return at, calls, list(zip(np.split(where[order], cuts), np.split(agos[order], cuts), strict=True))

    def _features(self, nodes: IntArray, since: IntArray) -> Tensor:
        return observation_at(self.tree, nodes, since).vector(self.features).to(self.tree.pool.slm.device)

    def _right(self, ends: IntArray, problems: IntArray) -> FloatArray:
        pairs = zip(ends.tolist(), problems.tolist(), strict=True)
        return np.array([float(self.tree.correct(end, self.examples[problem])) for end, problem in pairs])

    def _roots(self, problems: IntArray) -> IntArray:
        rows = np.arange(self.settings.rows)
        parts = [problems[i : i + len(rows)] for i in range(0, len(problems), len(rows))]
        return np.concatenate([self.expander.roots(rows[: len(p)], [self.prompts[n] for n in p]) for p in parts])

    def _release(self, problems: IntArray) -> None:
        for number in problems:
            self.tree.release(self.prompts[number])
