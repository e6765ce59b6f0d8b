"""AutoJudge: its labels are those of plain decoding, its judge is a logistic model, and it is saved and evaluated."""

from dataclasses import replace

import numpy as np
import pytest

from agents.checking.autojudge import AutoJudge, AutoJudgePolicy, Disagreements, disagreements, fit_judge
from agents.common.rollout import decode
from agents.common.saving import load_policy
from envs.decoding.judges import GAP, RANK, FirstDisagreement, Learned, described, judge_of
from envs.models.pool import models_manifest
from envs.prefix_tree.tree import PrefixTree

LIMIT = 96


@pytest.fixture(scope="module")
def problems(task):
    return task.examples("train", 12, start=3000)


@pytest.fixture(scope="module")
def found(pool, task, problems):
    return disagreements(PrefixTree(pool, task, LIMIT, 2**26), problems, rows=5)


def written(pool, model, tokens, count):
    """Greedy tokens of one model behind others, by passes over all of them."""
    import torch

    out = list(tokens)
    with torch.inference_mode():
        while len(out) - len(tokens) < count and (len(out) == len(tokens) or out[-1] not in pool.end_tokens):
            logits = pool.models[model].network(torch.tensor([out])).logits[0, -1]
            out.append(int(pool.greedy(model, logits[None])[0]))
    return out[len(tokens) :]


def test_labels_are_those_of_semi_greedy_search_by_plain_passes(pool, task, problems, found):
    expected, llm = [], len(pool) - 1
    for number, example in enumerate(problems):
        prompt = pool.encode_prompt(example).tolist()
        answer = written(pool, llm, prompt, LIMIT)
        if not task.is_correct(example, pool.decode(np.array(answer))):
            continue
        place = 0
        while place < len(answer):
            (slm,) = written(pool, 0, prompt + answer[:place], 1)
            if slm != answer[place]:
                other = [*answer[:place], slm]
                if slm not in pool.end_tokens and len(other) < LIMIT:
                    other += written(pool, llm, prompt + other, LIMIT - len(other))
                harmless = task.is_correct(example, pool.decode(np.array(other)))
                expected.append((number, harmless))
                answer = other if harmless else answer
            place += 1
    assert list(zip(found.examples.tolist(), found.harmless.tolist(), strict=True)) == expected
    assert 0 < found.harmless.mean() < 1
    assert (found.opinions[:, RANK] > 0).all()
    assert (found.opinions[:, GAP] >= 0).all()


def drawn(count=400, seed=3):
    """Disagreements of which the small gaps are harmless, most of them."""
    rng = np.random.default_rng(seed)
    gaps = rng.exponential(2, count).astype(np.float32)
    opinions = np.stack([gaps, rng.integers(1, 9, count).astype(np.float32)], axis=1)
    return Disagreements(opinions, rng.random(count) < 1 / (1 + np.exp(2 * gaps - 3)), np.arange(count) // 4)


@pytest.mark.parametrize("recall", [0.5, 0.9, 1.0])
def test_the_judge_takes_back_the_share_that_is_asked_for(recall):
    data = drawn()
    judge, report = fit_judge(data, recall)
    held = data.examples % 5 == 0
    mattering = ~judge.stands(data.opinions[held & ~data.harmless])
    assert report["recall"] == mattering.mean() >= recall
    assert mattering.mean() - recall <= 1 / len(mattering)  # and no more than it must
    assert judge.weights[0] < 0
    assert report["auc"] > 0.8


def test_disagreements_of_one_kind_teach_nothing():
    data = drawn()
    with pytest.raises(ValueError, match=r"are harmless: both kinds are needed; raise examples"):
        fit_judge(data._replace(harmless=np.ones_like(data.harmless)), 0.9)


def test_a_learned_judge_is_a_logistic_model_of_disagreements():
    opinions = np.array([[0.0, 0], [0.5, 1], [2.0, 1], [2.0, 60]], dtype=np.float32)
    judge = Learned((-1.0, -0.5), 2.0, threshold=0.5)
    assert judge.stands(opinions).tolist() == [True, True, False, False]
    assert Learned((-1.0, 0.0), 2.5).stands(opinions).tolist() == [True] * 4
    # what the larger model would write itself stands whatever the weights say
    assert Learned((-1.0, 0.0), -50.0).stands(opinions).tolist() == FirstDisagreement().stands(opinions).tolist()
    # the margin is how far the gap is from another verdict
    margins = judge.margin(opinions)
    assert margins[0] == np.inf
    for opinion, margin in zip(opinions[1:], margins[1:], strict=True):
        for share, turns in ((0.99, False), (1.01, True)):
            moved = opinion + np.array([[margin, 0], [-margin, 0]], dtype=np.float32) * share
            moved[moved[:, GAP] <= 0] = 0  # then it is no disagreement
            assert (judge.stands(moved) != judge.stands(opinion[None])).any() == turns
    assert judge_of(described(judge)) == judge
    for bad in ({"weights": (1.0,)}, {"bias": float("nan")}, {"threshold": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            Learned(**bad)


def test_it_is_trained_saved_and_goes_on_from_what_it_searched(pool, task, tmp_path, monkeypatch):
    agent, rows = AutoJudge(examples=120, max_new_tokens=LIMIT, memory=2**28), []
    policy = agent.fit(pool, task, track=rows.append, folder=tmp_path)
    assert rows[0]["recall"] >= 0.99
    policy.save(tmp_path / "policy")
    assert load_policy(tmp_path / "policy", pool) == policy
    with monkeypatch.context() as patch:
        patch.setattr("envs.models.language_model.LanguageModel.feed", None)  # all is known: no model runs
        assert agent.fit(pool, task, folder=tmp_path) == policy
    examples = task.examples("validation", 40)
    often = replace(policy, confidence=0.9)
    always, sure = (decode(pool, task, examples, one, 0.5, LIMIT) for one in (often, policy))
    llm = decode(
        pool,
        task,
        examples,
        AutoJudgePolicy(judge=Learned((-1.0, 0.0), -50.0), models=models_manifest(pool)),
        0.5,
        LIMIT,
    )
    assert sum(one.ledger[-1, 0] for one in sure) < sum(one.ledger[-1, 0] for one in always)
    taken = [sum(len(tokens.tokens) for tokens in one.taken_back) for one in sure]
    strict = [sum(len(tokens.tokens) for tokens in one.taken_back) for one in llm]
    assert sum(taken) < sum(strict)  # it lets more stand than speculative decoding
    assert np.mean([one.correct for one in sure]) > 0.8
