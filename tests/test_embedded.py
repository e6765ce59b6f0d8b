import json

import numpy as np
import pytest

from agents.common.rollout import decode
from agents.heuristics import Always
from envs.models.loading import embedded_pool, load_pool
from envs.models.places import EMBEDDED, WEIGHTS, embedded_folder
from envs.tasks.arithmetic import ArithmeticTask
from experiments.common.config import CONF
from experiments.pretraining.batches import packed_batches
from experiments.pretraining.loop import pretrain
from experiments.pretraining.recipe import Recipe
from experiments.pretraining.tokenizer import train_tokenizer


def accuracy(pool, slm, count):
    task = ArithmeticTask()
    episodes = decode(pool, task, task.examples("test", count, start=5000), Always(slm=slm))
    return np.mean([episode.correct for episode in episodes])


@pytest.fixture(scope="module")
def small_tokenizer():
    task = ArithmeticTask()
    examples = task.examples("train", 300)
    return train_tokenizer((f"{e.prompt}{e.reference}" for e in examples), vocab_size=400)


@pytest.mark.parametrize("examples", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_pair_is_as_strong_as_stated(examples):
    pool = embedded_pool()
    assert 0.20 <= accuracy(pool, slm=True, count=min(examples, 400)) <= 0.50
    assert accuracy(pool, slm=False, count=examples) >= 0.97


def test_the_pair_is_as_small_as_stated():
    slm, llm = (model.profile for model in embedded_pool().models)
    assert (llm.body_parameters + llm.head_parameters) / (slm.body_parameters + slm.head_parameters) >= 20
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 12e6


def test_the_weights_are_half_precision_safetensors_with_their_recipe():
    for name in EMBEDDED:
        folder = embedded_folder(name)
        assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"
        assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors"}
        assert json.loads((folder / "training.json").read_text())["recipe"]["hidden_size"] > 0


def test_every_digit_is_a_token_and_text_survives(small_tokenizer):
    text = "Mia has 123 + 45 = 168 cups.\n#### 168"
    tokens = small_tokenizer.encode(text)
    assert small_tokenizer.decode(tokens) == text
    digits = [
        small_tokenizer.decode([token]) for token in tokens if any(c.isdigit() for c in small_tokenizer.decode([token]))
    ]
    assert digits == list("12345168168")


def test_packed_rows_learn_responses_alone(small_tokenizer):
    recipe = Recipe(hidden_size=8, layers=1, heads=1, kv_heads=1, mlp_size=8, steps=2, rows=2, row_tokens=200)
    ids, positions, documents, labels = next(packed_batches(ArithmeticTask(), small_tokenizer, recipe, seed=0))
    for row in range(2):
        for document in range(int(documents[row].max()) + 1):
            inside = (documents[row] == document).nonzero()[:, 0]
            assert positions[row, inside].tolist() == list(range(len(inside)))
            learned = labels[row, inside] != -100
            assert not learned[-1]
            np.testing.assert_array_equal(labels[row, inside][learned], ids[row, inside + 1][learned])
            assert labels[row, inside][learned][-1] == small_tokenizer.eos_token_id
    assert (labels[documents == -1] == -100).all()


def test_a_recipe_makes_a_model_that_loads(small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.compile", lambda function: function)
    recipe = Recipe(hidden_size=32, layers=1, heads=2, kv_heads=1, mlp_size=32, steps=3, rows=2)
    report = pretrain("tiny", recipe, ArithmeticTask(), small_tokenizer, seed=0, folder=tmp_path)
    assert np.isfinite(report["loss"])
    folder = str(tmp_path / "tiny")
    pool = load_pool([folder, folder], dtype="float32")
    assert pool.slm.width == 32


@pytest.mark.slow
def test_the_recipe_learns_the_task(tmp_path):
    # Threads and processors change the order of sums, and the SLM's accuracy is very steep in what it has learned: the
    # loss is what repeats.
    from omegaconf import OmegaConf

    config = OmegaConf.load(CONF / "pretrain.yaml")
    report = pretrain(
        "slm", Recipe(**config.recipes.slm), ArithmeticTask(), embedded_pool().tokenizer, config.seed, tmp_path
    )
    pool = load_pool([str(tmp_path / "slm"), EMBEDDED[1]], dtype="float32")
    assert report["loss"] < 0.3
    assert accuracy(pool, slm=True, count=400) > 0.05
