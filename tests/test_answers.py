"""Other records: answers without references, ten choices, prompts that are too long; texts that end responses."""

import json
import logging
import pickle

import pytest

from agents.common.policy import Learner
from envs.decoding.references import References
from envs.environments.shortcut_routing import ShortcutRoutingEnv
from envs.environments.token_routing import RoutingEnv
from envs.models.language_model import LanguageModel
from envs.models.loading import load_pool
from envs.models.pool import ModelPool
from envs.tasks.math import MathTask
from envs.tasks.multiple_choice import MultipleChoiceTask
from envs.tasks.task import SPLITS
from tests.test_agents import AGENTS, agent

NEEDS_REFERENCES = {
    "citer", "citer_agreement", "citer_both", "citer_disagreements", "citer_llm_continues", "citer_logits",
    "citer_on_agreement", "citer_plus", "citer_released", "citer_s", "citer_slm", "citer_slm_continues", "collm",
    "tapo",
}  # fmt: skip


class RanError(Exception):
    """A model ran."""


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def every(task):
    return [task.example(split, n) for split in SPLITS for n in range(task.size(split))]


@pytest.fixture(scope="module")
def unsolved(tmp_path_factory):
    """Problems with answers alone."""
    rows = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(200)]
    return MathTask(path=write(tmp_path_factory.mktemp("data") / "sums.jsonl", rows), template="{question} ")


# -- answers without references ---------------------------------------------------------------------------------------


def test_an_answer_alone_is_enough_to_judge_by(unsolved, tmp_path):
    examples = every(unsolved)
    assert len(examples) == 200
    assert all(example.reference is None for example in examples)
    assert all(unsolved.is_correct(example, f"\\boxed{{{example.answer}.0}}") for example in examples[:5])
    assert not unsolved.is_correct(examples[0], "\\boxed{-1}")
    boxed = [{"problem": "x?", "answer": "$\\boxed{\\frac{1}{2}}$"}]
    [half] = every(MathTask(path=write(tmp_path / "half.jsonl", boxed)))
    assert half.answer == "\\frac{1}{2}"
    # a solution is a reference, whatever stands beside it
    solved = [{"problem": "x?", "answer": "1", "solution": "It is \\boxed{1}."}]
    [example] = every(MathTask(path=write(tmp_path / "solved.jsonl", solved)))
    assert example.reference == "It is \\boxed{1}."


@pytest.mark.parametrize("name", AGENTS)
def test_agents_that_need_references_say_so_before_a_model_runs(name, pool, unsolved, tmp_path, monkeypatch):
    def feed(*_, **__):
        raise RanError

    learner = agent(name)
    if not isinstance(learner, Learner):
        assert name not in NEEDS_REFERENCES
        return
    monkeypatch.setattr(LanguageModel, "feed", feed)
    expected = pytest.raises(ValueError, match="has an answer and no reference solution: train an agent that learns")
    with expected if name in NEEDS_REFERENCES else pytest.raises(RanError):
        learner.fit(pool, unsolved, folder=tmp_path)


def test_an_episode_needs_no_reference_unless_its_reward_does(unsolved, pool):
    env = RoutingEnv(pool=pool, task=unsolved, max_new_tokens=2)
    env.reset(seed=0)
    *_, truncated, info = [env.step(0), env.step(1)][-1]
    assert (truncated, info["correct"]) == (True, False)
    with pytest.raises(ValueError, match="has an answer and no reference solution"):
        RoutingEnv(pool=pool, task=unsolved, max_new_tokens=2, reward="shortcut").reset(seed=0)
    with pytest.raises(ValueError, match="has an answer and no reference solution"):
        ShortcutRoutingEnv(pool=pool, task=unsolved, examples=2).reset(seed=0)


# -- ten choices ------------------------------------------------------------------------------------------------------


def test_ten_options_with_a_letter(tmp_path):
    row = {
        "question": "Which one?",
        "options": [f"choice {n}" for n in range(10)],
        "answer": "J",
        "answer_index": 9,
        "cot_content": "",
        "category": "math",
    }
    task = MultipleChoiceTask(path=write(tmp_path / "pro.jsonl", [row]))
    [example] = every(task)
    assert (example.answer, example.reference) == ("J", "Therefore, the answer is choice 9 (j).")
    assert "\nA. choice 0\n" in example.prompt
    assert "\nJ. choice 9\n" in example.prompt
    assert task.is_correct(example, "The answer is (J).")
    assert not task.is_correct(example, "The answer is (I).")
    with pytest.raises(ValueError, match="its answer 'K' is none of A, B"):
        MultipleChoiceTask(path=write(tmp_path / "k.jsonl", [row | {"answer": "K"}]))
    with pytest.raises(ValueError, match="11 choices; a question has at most 10"):
        MultipleChoiceTask(path=write(tmp_path / "eleven.jsonl", [row | {"options": ["x"] * 11}]))


# -- prompts that are too long ----------------------------------------------------------------------------------------


def test_long_prompts_are_left_out_or_lose_their_beginning(tmp_path, caplog):
    long = "x" * 100 + " What is 1 + 1?"
    rows = [{"problem": long, "answer": "2"}, *({"problem": f"{n}?", "answer": "2"} for n in range(30))]
    path, template = write(tmp_path / "long.jsonl", rows), "{question} "
    with caplog.at_level(logging.WARNING):
        left = every(MathTask(path=path, template=template, longest_prompt=20))
    assert len(left) == 30
    assert all(len(example.prompt) <= 20 for example in left)
    assert "left out 1 train records whose prompts are longer than 20 characters" in caplog.text
    cut = every(MathTask(path=path, template=template, longest_prompt=16, on_long_prompt="truncate"))
    assert len(cut) == 31
    assert " What is 1 + 1? " in {example.prompt for example in cut}
    # and every problem stays in its split
    whole = MathTask(path=path, template=template)
    ends = {example.prompt[-16:]: example.id.split("/")[1] for example in every(whole)}
    assert ends == {example.prompt[-16:]: example.id.split("/")[1] for example in cut}
    with pytest.raises(ValueError, match="all 31 prompts of the train split are longer than longest_prompt=2 "):
        MathTask(path=path, template=template, longest_prompt=2)
    for settings, named in (({"longest_prompt": 0}, "longest_prompt must be at least 1"),
                            ({"on_long_prompt": "cut"}, "unknown on_long_prompt 'cut'")):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            MathTask(path=path, **settings)


# -- texts that end responses -----------------------------------------------------------------------------------------


def test_tokens_that_hold_a_stop_text_end_responses(folders):
    names = [str(folders[name]) for name in ("llama_small", "llama_large")]
    pool = load_pool(names, dtype="float32", verbose=False, stop=["7", "="])
    stops = [pool.encode(text)[0] for text in "7="]
    plain = load_pool(names, dtype="float32", verbose=False)
    assert sorted({*plain.end_tokens.tolist(), *stops}) == pool.end_tokens.tolist()
    assert pool.end_token == plain.end_token  # references end as they did
    sent = pickle.loads(pickle.dumps(pool))
    assert sent is pool
    assert pickle.loads(pickle.dumps(plain)) is plain
    with pytest.raises(ValueError, match="stop has 'xyz', which no token"):
        ModelPool(pool.models, stop=["xyz"])
    with pytest.raises(ValueError, match="stop has '', which no token"):
        ModelPool(pool.models, stop=[""])


def test_a_reference_with_a_stop_text_is_refused(pool, tmp_path):
    rows = [{"problem": "x?", "solution": "First = this.\n\\boxed{1}"}]
    examples = every(MathTask(path=write(tmp_path / "x.jsonl", rows)))
    with pytest.raises(ValueError, match=r"holds an end-of-sequence token before its end; .*the pool's stop"):
        References.read(ModelPool(pool.models, 4, 512, stop=["="]), examples)
