"""Anything at all is answered, or refused by name: no error from within, no hang, no file left half-written.

The fast suite tries 500 inputs, always the same; `make soak` (CITER_SOAK=1) tries 20 times as many, others each time.
"""

import faulthandler
import importlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agents.common.policy import check_scores
from agents.common.saving import load_policy
from agents.preferences.store import COLUMNS, FEATURES, PreferenceStore
from agents.query_routing.outcomes import QueryOutcomes
from agents.router.dataset import LabelledTokens
from agents.router.training import RouterTraining, fit_router
from envs.decoding.observation import Observation
from envs.prefix_tree.tree import GOING_ON, PrefixTree
from envs.prefix_tree.tree_session import TreeSession
from envs.tasks.math import MathTask
from envs.tasks.multiple_choice import MultipleChoiceTask
from envs.tasks.task import Example, FirstExamples, Task
from experiments.common.config import CONF
from experiments.evaluation.answers import Answers
from experiments.evaluation.settings import EvaluationSettings

pytestmark = pytest.mark.fuzz

_SCHEMA = re.compile(r"^\s*- /schema@\S+: (\S+)\s*$", re.MULTILINE)
SOAK = os.environ.get("CITER_SOAK") == "1"
SOAK_TIMES = 20
HANGS_AFTER = 120
"""Seconds in which any one input is done with, on a busy machine too; the process ends with a traceback beyond."""
NAMED = (ValueError, TypeError, FloatingPointError, OSError, IndexError, gym.error.Error)
SAVED = Path(__file__).parent / "data" / "saved_policies"
MAX_NEW = 6


def inputs(count):
    """So many inputs in the fast suite, the same ones in every run."""
    return settings(
        max_examples=count * (SOAK_TIMES if SOAK else 1),
        derandomize=not SOAK,
        database=None,
        deadline=None,  # `answered` ends what hangs
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def answered(*names, folder=None):
    """What is tried inside is done in time, or refused with an error that names one of `names`."""
    faulthandler.dump_traceback_later(HANGS_AFTER, exit=True, file=sys.__stderr__)
    try:
        yield
    except NAMED as error:
        if not any(f"{name}" in f"{error}" for name in names):
            raise AssertionError(f"{type(error).__name__} names none of {names}: {error}") from error
    finally:
        faulthandler.cancel_dump_traceback_later()
    assert folder is None or not list(Path(folder).rglob("*.partial")), "a file was left half-written"


# -- settings ---------------------------------------------------------------------------------------------------------


def dataclasses_of_yamls():
    """The dataclasses that a yaml configures, but for those that read files or load models when they are made."""
    targets = {target for path in CONF.rglob("*.yaml") for target in _SCHEMA.findall(path.read_text())}
    found = {EvaluationSettings, RouterTraining}
    for target in sorted(targets):
        module, name = target.rsplit(".", 1)
        kind = getattr(importlib.import_module(module), name)
        if is_dataclass(kind) and not issubclass(kind, MathTask | MultipleChoiceTask):
            found.add(kind)
    return sorted(found, key=lambda kind: kind.__name__)


def values_of(kind):
    """Values of a type, the odd ones among them; None where nothing is drawn for it."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(-2, 5) | st.sampled_from([-(2**63), 2**31, 10**20])
    if kind is float:
        return st.floats() | st.sampled_from([0.0, 1.0, 0.5, -1.0, 1e-300])
    if kind is str:
        return st.text(max_size=5) | st.sampled_from(["llm_tokens", "seconds", "bytes"])
    if kind is type(None):
        return st.none()
    if origin is Literal:
        return st.sampled_from(inner) | st.text(max_size=5)
    if origin is Union or type(kind).__name__ == "UnionType":
        parts = [part for part in map(values_of, inner) if part is not None]
        return st.one_of(parts) if parts else None
    if origin in (list, tuple):
        part = values_of(inner[0])
        return None if part is None else st.lists(part, max_size=3)
    return None


def required(kind):
    """The settings of a dataclass that have no default."""
    return {one.name for one in fields(kind) if one.init and one.default is one.default_factory is MISSING}


KINDS = [
    kind
    for kind in dataclasses_of_yamls()
    if all(values_of(get_type_hints(kind)[name]) is not None for name in required(kind))
]


@given(st.data())
@inputs(120)
def test_settings_are_accepted_or_refused_by_name(data):
    kind = data.draw(st.sampled_from(KINDS))
    hints = get_type_hints(kind)
    drawn = {one.name: values_of(hints[one.name]) for one in fields(kind) if one.init}
    drawn = {name: values for name, values in drawn.items() if values is not None}
    chosen = data.draw(st.sets(st.sampled_from(sorted(drawn)), max_size=3)) if drawn else set()
    chosen |= required(kind)
    given_settings = {name: data.draw(drawn[name], label=f"{kind.__name__}.{name}") for name in sorted(chosen)}
    with answered(*chosen):
        kind(**given_settings)


# -- data files -------------------------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON = st.recursive(
    PLAIN, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=4), part, max_size=3)
)
GOOD = {
    MathTask: [
        {"question": "1+1?", "answer": "It is 2. #### 2"},
        {"problem": "2+2?", "solution": "So \\boxed{4}"},
        {"prompt": "3?", "cot": "\\boxed{3}", "answerKey": "3"},
    ],
    MultipleChoiceTask: [
        {"question": "Which?", "choices": {"label": ["A", "B"], "text": ["x", "y"]}, "answerKey": "B"},
        {"question": "Which one?", "choices": ["x", "y", "z"], "answer": 2},
    ],
    QueryOutcomes: [
        {"prompt": "a", "group": "g", "correct": {"s": True, "l": False}, "prices": {"s": 1, "l": 2.5}},
        {"prompt": "b", "correct": {"s": True, "l": True}, "prices": {"s": 1, "l": 2.5}},
    ],
}


@st.composite
def lines_of(draw, kind):
    """Lines of a file: right records, records of which something was changed, and what is no record."""
    lines = []
    for _ in range(draw(st.integers(0, 4))):
        record = dict(draw(st.sampled_from(GOOD[kind])))
        way = draw(st.sampled_from(["right", "right", "changed", "within", "lacking", "cut", "other", "bytes"]))
        key = draw(st.sampled_from(sorted(record)))
        if way == "changed":
            record[key] = draw(JSON)
        if way == "within" and isinstance(record[key], dict):
            record[key] = {**record[key], draw(st.sampled_from(sorted(record[key]))): draw(JSON)}
        if way == "lacking":
            del record[key]
        line = json.dumps(draw(JSON) if way == "other" else record).encode()
        if way == "cut":
            line = line[: draw(st.integers(0, len(line)))]
        lines.append(draw(st.binary(max_size=12)) if way == "bytes" else line)
    return b"\n".join(lines)


@pytest.mark.parametrize("kind", [MathTask, MultipleChoiceTask, QueryOutcomes])
def test_data_files_are_read_or_refused_by_name(kind, tmp_path):
    path = tmp_path / "records.jsonl"

    @given(lines_of(kind))
    @inputs(40)
    def check(content):
        path.write_bytes(content)
        with answered(path, "records", "costs of", "a router needs"):
            if kind is QueryOutcomes:
                QueryOutcomes.read(path, {"s": 1.0}).write(tmp_path / "again.jsonl")
                QueryOutcomes.read(tmp_path / "again.jsonl")
                return
            task = kind(path=str(path))
            for example in task.examples("train") if task.size("train") else []:
                assert task.is_correct(example, example.reference)

    check()
    assert not list(tmp_path.glob("*.partial"))


# -- answers ----------------------------------------------------------------------------------------------------------

NOTATION = r"""
\boxed{ } #### \frac{1}{2} \sqrt{ ^ ^{ _ ! ( ) [ ] , . - + = \$ $ % 1/2 12 9999 0.5 x A B (a) (B) answer is option
\text{ \begin{matrix} & \\ \int \infty \pi e i \cup \{ \} \le < | ' " ** \binom{
"""
PIECES = st.sampled_from([*NOTATION.split(), "\n"])
ANSWERS = st.lists(PIECES | st.text(max_size=3), max_size=12).map(" ".join) | st.text(max_size=40)
GOLD = [*"0123456789", "72", "\\frac{1}{2}", "x^2+1", "(1,2)", "\\text{yes}", "[0,1)"]


@given(ANSWERS, st.sampled_from(GOLD), st.sampled_from("ABCDEFGH12345678"))
@inputs(80)
def test_any_answer_of_a_model_has_a_verdict(answer, gold, label):
    with answered():
        for response in (answer, f"\\boxed{{{answer}}}", f"#### {answer}"):
            example = Example("some", "prompt", "reference", gold)
            assert MathTask.is_correct(None, example, response) in (True, False)
        choice = Example("some", "prompt", "reference", label)
        assert MultipleChoiceTask.is_correct(None, choice, f"The answer is {answer}") in (True, False)


# -- saved files ------------------------------------------------------------------------------------------------------


@st.composite
def spoilt(draw, content):
    """A file of which bytes were flipped, or the end is lost; its beginning, where its structure is, more often."""
    if draw(st.integers(0, 3)) == 0:
        return content[: draw(st.integers(0, len(content)))]
    changed = bytearray(content)
    reach = draw(st.sampled_from([64, 1024, len(content)]))
    for position in draw(st.lists(st.integers(0, min(reach, len(content)) - 1), min_size=1, max_size=4)):
        changed[position] ^= draw(st.integers(1, 255))
    return bytes(changed)


@st.composite
def spoilt_in(draw, folder):
    """One file of a folder, and what became of it."""
    path = draw(st.sampled_from(sorted(path for path in folder.rglob("*") if path.is_file())))
    return path.relative_to(folder), draw(spoilt(path.read_bytes()))


POLICIES = sorted(path for path in SAVED.iterdir() if path.is_dir())


@given(st.data())
@inputs(60)
def test_saved_policies_load_or_are_refused_by_name(pool, tmp_path_factory, data):
    source = data.draw(st.sampled_from(POLICIES))
    name, content = data.draw(spoilt_in(source))
    folder = tmp_path_factory.mktemp("policy") / "policy"
    shutil.copytree(source, folder)
    (folder / name).write_bytes(content)
    steps = np.zeros(2, dtype=np.int64)
    with answered(folder, folder=folder), torch.no_grad():
        policy = load_policy(folder, pool)
        seen = Observation(torch.ones(2, pool.slm.width), torch.ones(2, pool.vocab_size), steps, np.arange(2), steps)
        with answered(type(policy).__name__, folder):
            check_scores(policy, policy.score(seen), 2)
    shutil.rmtree(folder)


class Letters(Task):
    """Short prompts for random models."""

    name = "letters"

    def size(self, split):
        return 5

    def example(self, split, index):
        if not 0 <= index < 5:
            raise IndexError(f"letters has 5 examples; there is no {index}")
        return Example(f"letters/{index}", "abcde"[index] * (index + 1), "a", "a")

    def is_correct(self, example, response):
        return "a" in response


def walk(tree):
    """All of a tree's prompts, a few tokens on."""
    session, row = TreeSession(tree, 1), np.array([0])
    for number, prompt in enumerate(list(tree.prompts.values())):
        if len(prompt) + MAX_NEW <= session.capacity:
            session.start(row, [prompt])
            while tree.ends[session.nodes(0)[-1]] == GOING_ON:
                session.observe(row)
                session.step(row, np.array([number % 2]))
            session.correct(0, tree.task, tree.task.example("train", 0))


def test_saved_trees_open_and_are_walked_or_are_refused_by_name(tiny_pool, tmp_path):
    path, task = tmp_path / "some.tree", Letters()
    tree = PrefixTree(tiny_pool, task, MAX_NEW)
    for example in task.examples("train"):
        session = TreeSession(tree, 1)
        session.start(np.array([0]), [tiny_pool.encode(example.prompt)])
        session.step(np.array([0]), np.array([1]))
    walk(tree)
    tree.save(path)
    whole = path.read_bytes()

    @given(spoilt(whole))
    @inputs(40)
    def check(content):
        path.write_bytes(content)
        with answered(path, folder=tmp_path):
            walk(PrefixTree(tiny_pool, task, MAX_NEW, path=path))

    check()


def test_preferences_and_answers_and_checkpoints_are_read_or_refused_by_name(tmp_path):
    whole, rows = tmp_path / "whole", 5
    store = PreferenceStore(whole / "preferences", {"seed": 0}, shards=2)
    for shard in range(2):
        columns = {name: np.arange(rows).astype(kind) for name, kind in COLUMNS.items()}
        store.write(shard, {**columns, FEATURES: np.ones((rows, 3), dtype=np.float16)}, {"skipped": []})
    right, numbers = np.ones(4, dtype=bool), np.arange(4.0)
    Answers(right, right, numbers, numbers, {"bytes": numbers}).save(whole / "answers.safetensors")
    hidden = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).half()
    labels = LabelledTokens.in_memory(hidden, np.arange(40) % 2 == 0, np.arange(40) // 4)
    training = RouterTraining(epochs=1, units=[2], batch_size=16)

    def trained(path):
        return fit_router(labels, training, 0, lambda row: None, torch.device("cpu"), "fuzzed", path)

    trained(whole / "checkpoint.safetensors")

    @given(spoilt_in(whole))
    @inputs(80)
    def check(change):
        folder = tmp_path / "spoilt"
        shutil.copytree(whole, folder)
        (folder / change[0]).write_bytes(change[1])
        with answered(folder, folder=folder):
            opened = PreferenceStore.open(folder / "preferences")
            opened.require()
            assert len(opened.column("label")) == sum(opened.rows()) == 2 * rows
            assert opened.features(1).shape == (rows, 3)
            assert opened.skipped() == 0
        with answered(folder, folder=folder):
            Answers.load(folder / "answers.safetensors")
        with answered(folder, "fuzzed", folder=folder):
            trained(folder / "checkpoint.safetensors")
        shutil.rmtree(folder)

    check()


# -- environments -----------------------------------------------------------------------------------------------------

SEEDS = st.none() | st.integers(0, 2**40) | st.sampled_from([-1, np.int64(3), 1.5, "three", [1, 2], [7, None]])
OPTIONS = st.none() | st.sampled_from(
    [
        {},
        {"example": None},
        {"example": "first"},
        {"exmple": 1},
        {"index": 0},
        {"index": 10**9},
        {"indices": [0, 1]},
        [],
    ]
)
ACTIONS = st.integers(-1, 3) | st.sampled_from(
    [None, 0.5, np.nan, "llm", np.int64(1), np.array(0), np.array([0, 1]), np.array([1, 0, 1]), [1, 1], [0, 9], True]
)
CALLS = st.lists(
    st.tuples(st.just("reset"), SEEDS, OPTIONS) | st.tuples(st.just("step"), ACTIONS, st.none()), max_size=8
)


@given(st.sampled_from(["TokenRouting", "TreeRouting", "ShortcutRouting"]), st.sampled_from([None, 2]), CALLS)
@inputs(80)
def test_calls_of_environments_are_answered_or_refused(tiny_pool, name, rows, calls):
    """What each refusal says is for the tests of environments; here no error is one from within."""
    made = {"pool": tiny_pool, "task": FirstExamples(Letters(), 3), "max_new_tokens": MAX_NEW}
    if rows is None:
        environment = gym.make(f"citer/{name}-v1", disable_env_checker=True, **made).unwrapped
    else:
        environment = gym.make_vec(f"citer/{name}-v1", num_envs=rows, **made).unwrapped
    for call, what, options in calls:
        with answered(""):
            if call == "reset":
                environment.reset(seed=what, options=options)
            else:
                environment.step(what)
    # whatever was refused, it goes on
    observation, _ = environment.reset(seed=0)
    assert observation in environment.observation_space
    environment.step(0 if rows is None else np.zeros(rows, dtype=np.int64))
    environment.close()
