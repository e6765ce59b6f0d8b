"""Story problems in the manner of GSM8K, generated: the task of the embedded pair."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from envs.tasks.quantities import read_quantity
from envs.tasks.task import SPLITS, Example, Split, Task, check_split

PEOPLE = (
    ("Mia", "She"), ("Tom", "He"), ("Ana", "She"), ("Ben", "He"),
    ("Eva", "She"), ("Leo", "He"), ("Zoe", "She"), ("Sam", "He"),
)  # fmt: skip
ITEMS = ("apples", "books", "coins", "cards", "pens", "shells", "stamps", "eggs", "cups", "toys")

# What happens in the story. {p} the person, {h} the pronoun, {o} another person, {u} the unit, {b} the number.
EVENTS = {
    "gain": ("{h} buys {b} more {u}.", "{h} finds {b} more.", "{o} gives {p} {b} {u}.", "{h} gets {b} more {u}."),
    "lose": ("{h} gives {b} to {o}.", "{h} loses {b} of them.", "{h} uses {b} {u}.", "{o} takes {b} {u}."),
    "earn": ("{h} earns {b} dollars more.", "{o} pays {p} {b} dollars.", "{h} finds {b} dollars."),
    "split": ("{h} splits the money equally among {b} people.", "The money is shared equally by {b} friends."),
    "grow": ("{h} soon has {b} times as many dollars.", "The money grows to {b} times that."),
    "spend": ("{h} spends {b} dollars.", "{h} pays {o} {b} dollars.", "{h} loses {b} dollars."),
    "times": (
        "{h} soon has {b} times as many.", "The number grows to {b} times as many.", "{h} now gets {b} times that.",
    ),
    "share": ("{h} packs them into {b} equal boxes and keeps one box.", "{h} splits the {u} among {b} people.",
              "They are shared equally by {b} friends."),
    "sell": (
        "{h} sells each one for {b} dollars.", "Each one is sold for {b} dollars.", "{o} pays {b} dollars for each.",
    ),
    "other_times": ("{o} has {b} times as many {u} as {p}.", "{o} has {b} times that number."),
    "other_gain": ("{o} has {b} more {u} than {p}.", "{o} has {b} {u} more."),
}  # fmt: skip
DISTRACTORS = (
    "{o} is {b} years old.", "The shop is {b} miles away.", "It is day {b} of the month.", "{o} waits {b} minutes.",
)  # fmt: skip
QUESTIONS = {
    "one": ("How many {u} does {p} have now?", "How many {u} are there in the end?", "How many {u} is that?"),
    "together": ("How many {u} do they have together?", "How many {u} do {p} and {o} have in all?"),
}
# How a step is told. {e} is the equation, {r} its result.
STEPS = {
    "gain": ("Now {p} has {e} {u}.", "After that there are {e} {u}.", "Adding gives {e} {u}.", "{h} then has {e}."),
    "lose": ("Now {p} has {e} {u}.", "Then {e} {u} are left.", "Taking away gives {e} {u}.", "{h} keeps {e}."),
    "times": ("Now {p} has {e} {u}.", "That makes {e} {u}.", "The number grows to {e} {u}."),
    "share": ("Each part is {e} {u}.", "So one share is {e} {u}.", "Now {p} has {e} {u}."),
    "sell": ("{h} gets {e} dollars.", "Selling brings {e} dollars.", "That makes {e} dollars."),
    "other": ("{o} has {e} {u}.", "So {o} has {e}.", "That means {e} {u} for {o}."),
    "together": ("Together they have {e} {u}.", "In all there are {e} {u}.", "The sum is {e} {u}."),
}
_MONEY_EVENTS = {"gain": "earn", "lose": "spend", "times": "grow", "share": "split"}
OPERATIONS = "+-*/"
SIGNS = {"gain": "+", "lose": "-", "times": "*", "share": "/", "sell": "*"}


@dataclass(frozen=True)
class Level:
    """The bounds of a difficulty level, all inclusive."""

    steps: tuple[int, int]
    start: tuple[int, int]
    change: tuple[int, int]
    factor: tuple[int, int]
    largest: int


LEVELS = {
    "easy": Level(steps=(2, 2), start=(5, 40), change=(2, 30), factor=(2, 5), largest=200),
    "default": Level(steps=(2, 4), start=(5, 80), change=(2, 60), factor=(2, 6), largest=500),
    "hard": Level(steps=(4, 6), start=(20, 150), change=(10, 120), factor=(2, 9), largest=999),
}

PRETRAINED_ON = 1_000_000
"""The first training problems: the embedded models have seen such, and learners begin behind them."""

# A problem belongs to the split of its chain of equations, so no chain of one split is ever seen in another.
_SPLIT_OF_RESIDUE: tuple[Split, ...] = ("train",) * 8 + ("validation", "test")
_ANSWER = re.compile(r"####\s*(-?\d+(?:[.,/]\d+)*)")


@dataclass(frozen=True)
class _Step:
    kind: str
    left: int
    right: int
    result: int

    @property
    def equation(self) -> str:
        return f"{self.left} {SIGNS[self.kind]} {self.right} = {self.result}"


@dataclass(frozen=True)
class ArithmeticTask(Task):
    """Story problems of 2 to 4 steps (`default`), solved step by step, ending in `#### answer`.

    Stories and solutions are worded at random: some reference tokens cannot be foreseen by any model, as in real
    text. Some problems name a number that does not matter. Splits are disjoint in their chains of equations, whatever
    the level and the operations: no prompt of one split stands in another one, of this task or of its siblings.

    Args:
        level: `easy`, `default` (the embedded pair is trained on it) or `hard` (more steps, larger numbers).
        operations: signs out of `+-*/`, in any order; only problems whose solutions need no other ones are drawn. Each
            set of signs draws problems of its own.
    """

    level: Literal["easy", "default", "hard"] = "default"
    operations: str = OPERATIONS

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"unknown level {self.level!r} of task arithmetic; choose one of {', '.join(LEVELS)}")
        if not self.operations or not set(self.operations) <= set(OPERATIONS):
            raise ValueError(
                f"operations of task arithmetic must be signs out of {OPERATIONS}, are {self.operations!r}"
            )

    @property
    def name(self) -> str:
        level = "arithmetic" if self.level == "default" else f"arithmetic-{self.level}"
        return level if self._all_operations else f"{level} {self.operations}"

    @property
    def _all_operations(self) -> bool:
        return set(self.operations) == set(OPERATIONS)

    def size(self, split: Split) -> None:
        check_split(split)

    def example(self, split: Split, index: int) -> Example:
        check_split(split)
        seed = [index, list(LEVELS).index(self.level), SPLITS.index(split)]
        # Operations are part of the seed, or kinds that share some would share problems. All of them are not: the
        # embedded models and every published figure rest on those problems.
        if not self._all_operations:
            seed.append(sum(1 << bit for bit, sign in enumerate(OPERATIONS) if sign in self.operations))
        rng = np.random.default_rng(seed)
        while True:
            steps, pair = _chain(LEVELS[self.level], rng)
            if not {SIGNS[step.kind] for step in steps} <= set(self.operations):
                continue
            chain = "; ".join(step.equation for step in steps)
            if _SPLIT_OF_RESIDUE[zlib.crc32(chain.encode()) % len(_SPLIT_OF_RESIDUE)] == split:
                break
        prompt, reference = _tell(steps, pair, rng)
        kind = self.level if self._all_operations else f"{self.level} {self.operations}"
        return Example(f"arithmetic/{kind}/{split}/{index}", prompt, reference, str(steps[-1].result))

    def training_start(self, seed: int) -> int:
        """The first example of learners with this seed, behind those that the embedded models were pretrained on."""
        return PRETRAINED_ON + super().training_start(seed)

    def is_correct(self, example: Example, response: str) -> bool:
        """The number behind the last `####` of the response equals the answer."""
        answers = _ANSWER.findall(response)
        quantity = read_quantity(answers[-1]) if answers else None
        return quantity is not None and quantity.value == int(example.answer)

    def token_kind(self, token: str) -> str:
        """`number` (digits), `operator` (a sign or =), `mark` (the #### before the answer) or `wording`."""
        text = token.strip()
        if text.isdigit():
            return "number"
        if text and set(text) <= {*OPERATIONS, "="}:
            return "operator"
        return "mark" if "#" in text else "wording"


def _chain(level: Level, rng: np.random.Generator) -> tuple[list[_Step], bool]:
    """The equations of a problem, and whether it ends by comparing two people."""

    def between(bounds: tuple[int, int]) -> int:
        return int(rng.integers(bounds[0], bounds[1] + 1))

    count = between(level.steps)
    pair = count >= 2 and rng.random() < 0.3
    value, sold = between(level.start), False
    steps: list[_Step] = []
    while len(steps) < count - 2 * pair:
        kind = str(rng.choice(["gain", "lose", "times", "share", "sell"], p=[0.28, 0.28, 0.14, 0.18, 0.12]))
        number = between(level.change if kind in ("gain", "lose") else level.factor)
        if kind == "gain":
            result = value + number
        elif kind == "lose":
            result = value - number
        elif kind == "share":
            divisors = [d for d in range(level.factor[0], level.factor[1] + 1) if value % d == 0]
            if not divisors:
                continue
            number = divisors[number % len(divisors)]
            result = value // number
        else:
            result = value * number
        if not 2 <= result <= level.largest or (kind == "sell" and sold):
            continue
        sold = sold or kind == "sell"
        steps.append(_Step(kind, value, number, result))
        value = result
    if pair:
        kind = str(rng.choice(["times", "gain"]))
        number = between(level.factor if kind == "times" else level.change)
        other = value * number if kind == "times" else value + number
        if value + other > level.largest:
            return _chain(level, rng)
        steps.append(_Step(kind, value, number, other))
        steps.append(_Step("gain", value, other, value + other))
    return steps, pair


def _tell(steps: list[_Step], pair: bool, rng: np.random.Generator) -> tuple[str, str]:
    """The story with its question, and the worked solution."""

    def pick(wordings: tuple[str, ...]) -> str:
        return wordings[int(rng.integers(len(wordings)))]

    first, second = rng.choice(len(PEOPLE), size=2, replace=False)
    words = {"p": PEOPLE[first][0], "h": PEOPLE[first][1], "o": PEOPLE[second][0], "u": pick(ITEMS)}
    story = [f"{words['p']} has {steps[0].left} {words['u']}."]
    solution: list[str] = []
    for position, step in enumerate(steps):
        from_end = len(steps) - position
        if pair and from_end == 1:
            wording = "together"  # the question asks for it; the story does not tell it
        elif pair and from_end == 2:
            wording = "other"
            story.append(pick(EVENTS[f"other_{step.kind}"]).format(b=step.right, **words))
        else:
            wording = step.kind
            event = _MONEY_EVENTS[wording] if words["u"] == "dollars" else wording
            story.append(pick(EVENTS[event]).format(b=step.right, **words))
        if step.kind == "sell":
            words["u"] = "dollars"
        solution.append(pick(STEPS[wording]).format(e=step.equation, r=step.result, **words))
    if rng.random() < 0.2:
        distractor = pick(DISTRACTORS).format(b=int(rng.integers(2, 61)), **words)
        story.insert(int(rng.integers(1, len(story) + 1)), distractor)
    question = pick(QUESTIONS["together" if pair else "one"]).format(**words)
    prompt = " ".join([*story, question]) + "\n"
    return prompt, " ".join(solution) + f"\n#### {steps[-1].result}"
