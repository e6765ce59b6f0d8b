"""AutoJudge: which disagreements matter for the answer is found by search, and learned (Garipov et al., 2025).

"AutoJudge: Judge Decoding Without Manual Annotation", arXiv 2504.20039. On training problems the LLM's own right answer
is gone through from its beginning. Where the SLM would have written another token, it is put in and the LLM finishes
the answer: where that is still right the disagreement is harmless, and the search goes on along the new answer;
elsewhere it matters, and the LLM's token stays (semi-greedy search, their algorithm 1). A logistic model learns to tell
the two apart, and in decoding lets a drafted token stand that it finds harmless.

What differs: theirs sees hidden states of both models, this one what the LLM's logits say of the token (`Learned`);
theirs drafts windows of fixed length, this one also stops behind a token that the SLM is not sure of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from agents.checking.speculative import Speculative
from agents.common.policy import Learner, Observation, Scores, TrainingRun
from agents.common.saving import SavedPolicy, saved_as
from envs.arrays import BoolArray, IntArray
from envs.decoding.judges import GAP, OPINION, RANK, Learned, Opinions, described, judge_of
from envs.models.pool import ModelPool, models_manifest
from envs.prefix_tree.expander import TreeExpander
from envs.prefix_tree.tree import GOING_ON, PrefixTree
from envs.progress import ProgressBar
from envs.tasks.task import Example

HELD_OUT = 5
"""Of so many problems one is held out, to choose the judge's threshold on."""


@saved_as("autojudge")
@dataclass
class AutoJudgePolicy(SavedPolicy):
    """Calls the LLM behind a token that the SLM is not sure of; which drafted tokens stand was learned.

    Scores are those of `Speculative`: 1 where the SLM drafts on and 0 where the LLM is called.

    Attributes:
        judge: which drafted tokens stand.
        models: names and fingerprints of the pool it was trained for.
        draft_tokens: the longest draft.
        confidence: a draft ends behind a token whose probability under the SLM is below this; 0: at no token.
    """

    weights_file: ClassVar[str] = "judge.safetensors"
    observes: ClassVar[bool] = False

    judge: Learned = field(kw_only=True)
    models: list[dict[str, str]] = field(kw_only=True)
    draft_tokens: int = 32
    confidence: float = 0.2

    def score(self, observation: Observation) -> Scores:
        return Speculative(self.draft_tokens, self.confidence).score(observation)

    @property
    def parameters(self) -> int:
        """Of the logistic model, which is asked at a call."""
        return len(self.judge.weights) + 1

    def about(self) -> str:
        return f"{described(self.judge)} {self.draft_tokens} {self.confidence}"

    def tensors(self) -> dict[str, Tensor]:
        return {"judge": torch.tensor([*self.judge.weights, self.judge.bias], dtype=torch.float64)}

    def settings(self) -> dict[str, Any]:
        own = {"draft_tokens": self.draft_tokens, "confidence": self.confidence}
        return {"models": self.models, "judge": described(self.judge), **own}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> Self:
        judge = judge_of(settings["judge"])
        if not isinstance(judge, Learned) or [*judge.weights, judge.bias] != tensors["judge"].tolist():
            raise ValueError(f"the judge {settings['judge']} is not that of the weights")
        return cls(settings["draft_tokens"], settings["confidence"], judge=judge, models=settings["models"])


class Disagreements(NamedTuple):
    """Tokens that the SLM would have written and the LLM would not.

    Attributes:
        opinions: what the LLM thinks of them, (n, OPINION).
        harmless: whether the answer still comes out right with it, (n,).
        examples: the number of the problem each is from, (n,).
    """

    opinions: Opinions
    harmless: BoolArray
    examples: IntArray


def disagreements(tree: PrefixTree, examples: Sequence[Example], rows: int = 256) -> Disagreements:
    """Semi-greedy search for the disagreements that matter, along the LLM's right answers.

    Args:
        tree: of the pool and the task; gains the states.
        examples: problems; one that the LLM answers wrongly has none.
        rows: answers in flight.
    """
    found: list[tuple[Opinions, bool, int]] = []
    with ProgressBar(total=len(examples), desc="disagreements", leave=False) as progress:
        for first in range(0, len(examples), rows):
            part = examples[first : first + rows]
            found += [(one, harmless, first + number) for one, harmless, number in _of_part(tree, part)]
            progress.update(len(part))
    if not found:
        return Disagreements(np.zeros((0, OPINION), np.float32), np.zeros(0, bool), np.zeros(0, np.int64))
    opinions, harmless, numbers = zip(*found, strict=True)
    return Disagreements(np.stack(opinions), np.array(harmless), np.array(numbers))


def _of_part(tree: PrefixTree, examples: Sequence[Example]) -> list[tuple[Opinions, bool, int]]:
    """Those of problems whose answers share passes: the opinion, whether it is harmless, the number of the problem."""
    expander, llm = TreeExpander(tree, len(examples)), len(tree.pool) - 1
    prompts = [tree.pool.encode_prompt(example) for example in examples]
    everything = np.arange(len(examples))
    ends = _finish(expander, everything, expander.roots(everything, prompts), llm)
    begun = np.zeros(len(examples), dtype=np.int64)  # the depth from which an answer is still to be gone through
    found: list[tuple[Opinions, bool, int]] = []
    right = [tree.correct(int(end), example) for end, example in zip(ends, examples, strict=True)]
    open_rows = np.flatnonzero(right)
    while len(open_rows):
        expander.read_along(open_rows, ends[open_rows], llm, opinions=True)
        nexts = {row: _next_disagreement(tree, int(ends[row]), int(begun[row]), llm) for row in open_rows.tolist()}
        at = {row: node for row, node in nexts.items() if node is not None}
        open_rows, nodes = np.array([*at], dtype=np.int64), np.array([*at.values()], dtype=np.int64)
        if not at:
            break
        behind = expander.step(open_rows, nodes, np.zeros_like(open_rows))
        others = _finish(expander, open_rows, behind, llm)
        for (row, node), end in zip(at.items(), others.tolist(), strict=True):
            harmless = tree.correct(end, examples[row])
            found.append((tree.opinions[node, llm - 1].copy(), harmless, row))
            begun[row] = tree.depths[node] + 1
            ends[row] = end if harmless else ends[row]
    for prompt in prompts:
        tree.release(prompt)
    return sorted(found, key=lambda one: one[2])


def _finish(expander: TreeExpander, rows: IntArray, nodes: IntArray, model: int) -> IntArray:
    """Where answers end that a model finishes from nodes, (n,) each, in distinct rows."""
    nodes, tree = nodes.copy(), expander.tree
    while len(going := np.flatnonzero(tree.ends[nodes] == GOING_ON)):
        nodes[going] = expander.step(rows[going], nodes[going], np.full(len(going), model))
    return nodes


def _next_disagreement(tree: PrefixTree, end: int, begun: int, llm: int) -> int | None:
    """The first node of an answer, from a depth on, where the SLM would write another token than the LLM."""
    path = tree.path(end)[begun:-1]
    differs = np.flatnonzero(tree.tokens[path, 0] != tree.tokens[path, llm])
    return int(path[differs[0]]) if len(differs) else None


def fit_judge(found: Disagreements, recall: float) -> tuple[Learned, dict[str, float]]:
    """A judge of what was found, and how it does on the problems that were held out.

    Args:
        found: disagreements; of every HELD_OUT-th problem they choose the threshold.
        recall: the share of those that matter which is taken back there, at least.

    Raises:
        ValueError: all of them matter, or none does, among those that are learned from or those that are held out.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    held = found.examples % HELD_OUT == 0
    for part, name in ((held, "held out"), (~held, "to learn from")):
        if len(np.unique(found.harmless[part])) < 2:
            raise ValueError(
                f"of the {int(part.sum())} disagreements {name} {int(found.harmless[part].sum())} are harmless: both "
                "kinds are needed; raise examples"
            )
    inputs = np.stack([found.opinions[:, GAP], np.log1p(found.opinions[:, RANK])], axis=1).astype(np.float64)
    model = LogisticRegression(C=1e3, max_iter=1000).fit(inputs[~held], found.harmless[~held])
    probabilities = model.predict_proba(inputs)[:, 1]
    mattering = np.sort(probabilities[held & ~found.harmless])
    # the least threshold above which enough of them lie: these stand, the others are taken back
    let_stand = int(np.floor((1 - recall) * len(mattering)))
    highest = mattering[-1 - let_stand]
    threshold = float(np.clip(np.nextafter(highest, 1.0), 1e-6, 1 - 1e-6))
    judge = Learned(tuple(model.coef_[0].tolist()), float(model.intercept_[0]), threshold)
    stands = judge.stands(found.opinions[held])
    return judge, {
        "disagreements": float(len(found.harmless)),
        "harmless": float(found.harmless.mean()),
        "auc": float(roc_auc_score(found.harmless[held], probabilities[held])),
        "recall": float((~stands)[~found.harmless[held]].mean()),
        "harmless_kept": float(stands[found.harmless[held]].mean()),
    }


@dataclass(frozen=True)
class AutoJudge(Learner[AutoJudgePolicy]):
    """Learns which disagreements with the LLM are harmless.

    Args:
        examples: training problems; all of the train split where None.
        recall: of the disagreements that matter, the share that is taken back on problems held out, at least.
        draft_tokens: the longest draft.
        confidence: a draft ends behind a token whose probability under the SLM is below this; 0: at no token.
        max_new_tokens: the longest response.
        memory: bytes of the replay tree.
        rows: answers in flight.

    Raises:
        ValueError: a setting is out of range.
    """

    examples: int | None = 1500
    recall: float = 0.99
    draft_tokens: int = 32
    confidence: float = 0.2
    max_new_tokens: int = 128
    memory: int = 2**31
    rows: int = 256

    def __post_init__(self) -> None:
        Speculative(self.draft_tokens, self.confidence)
        if (self.examples is not None and self.examples < 2) or self.rows < 1:
            raise ValueError(f"examples ({self.examples}) must be at least 2 and rows ({self.rows}) at least 1")
        if not 0 < self.recall <= 1:
            raise ValueError(f"recall must be in (0, 1], is {self.recall}")

    def train(self, run: TrainingRun) -> AutoJudgePolicy:
        pool, task = run.pool, run.task
        examples = task.examples("train", self.examples, start=task.training_start(run.seed))
        kept = run.file("autojudge.tree")
        tree = PrefixTree(pool, task, self.max_new_tokens, self.memory, kept if kept and kept.is_file() else None)
        found = disagreements(tree, examples, self.rows)
        if kept is not None:
            tree.save(kept)
        judge, report = fit_judge(found, self.recall)
        run.track({"run": "judge", **report, "tree": len(tree)})
        return AutoJudgePolicy(self.draft_tokens, self.confidence, judge=judge, models=models_manifest(pool))
