import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import agents.query_routing.learner
from agents.common.rollout import Scheduling, decode
from agents.common.saving import load_policy
from agents.heuristics import Always
from agents.query_routing.knn import Neighbours
from agents.query_routing.learner import answer_alone, calibrated_threshold
from agents.query_routing.mlp import QueryMlp
from agents.query_routing.outcomes import QueryOutcomes
from agents.query_routing.policy import QueryPolicy
from agents.query_routing.routellm import MatrixFactorisation, QueryClassifier, SimilarityWeighted
from agents.query_routing.router import EmbeddedQueries, choose
from agents.query_routing.uniroute import UniRouteKMeans, UniRouteLearned
from agents.router.training import RouterTraining
from envs.costs import PASSES, READ, SECONDS, WRITTEN, MemoryTraffic
from envs.decoding.observation import Observation
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree

ONCE = Scheduling(rows=16)
SHORT = {"max_new_tokens": 40, "scheduling": ONCE}


# -- outcomes ---------------------------------------------------------------------------------------------------------


def line(prompt="1 + 1 =", correct=None, **more):
    return {"prompt": prompt, "group": "sums", "correct": correct or {"big": True, "small": False}} | more


def write(path, *lines):
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in lines) + "\n")
    return path


PRICES = {"big": 10.0, "small": 1.0}


def test_outcomes_are_read_cheapest_first_and_written_back(tmp_path):
    rows = [line(), line("2 + 2 =", {"small": True, "big": True}, prices={"big": 30.0}), line("3 + 3 =", group="more")]
    outcomes = QueryOutcomes.read(write(tmp_path / "outcomes.jsonl", *rows), PRICES)
    assert outcomes.models == ("small", "big")
    assert outcomes.groups == ["sums", "sums", "more"]
    np.testing.assert_array_equal(outcomes.correct, [[False, True], [True, True], [False, True]])
    np.testing.assert_array_equal(outcomes.costs, [[1, 10], [1, 30], [1, 10]])
    outcomes.write(tmp_path / "again.jsonl")
    again = QueryOutcomes.read(tmp_path / "again.jsonl")
    assert (again.prompts, again.groups, again.models) == (outcomes.prompts, outcomes.groups, outcomes.models)
    np.testing.assert_array_equal(again.correct, outcomes.correct)
    np.testing.assert_array_equal(again.costs, outcomes.costs)


def test_some_queries_and_some_models():
    rng = np.random.default_rng(0)
    correct, costs = rng.random((4, 3)) < 0.5, np.array([[1.0, 5.0, 3.0]] * 4)
    outcomes = QueryOutcomes(list("abcd"), ["g"] * 4, ("x", "y", "z"), correct, costs)
    part = outcomes.rows(np.array([3, 1]))
    assert part.prompts == ["d", "b"]
    np.testing.assert_array_equal(part.correct, correct[[3, 1]])
    pair = outcomes.of(["y", "z"])
    assert pair.models == ("z", "y")
    np.testing.assert_array_equal(pair.correct, correct[:, [2, 1]])
    np.testing.assert_array_equal(pair.costs, costs[:, [2, 1]])
    with pytest.raises(ValueError, match=r"no outcomes of w.*x, y, z"):
        outcomes.of(["x", "w"])
    with pytest.raises(ValueError, match="at least two models"):
        outcomes.of(["x"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no query outcomes"),
        ([line(), "{"], "line 2: not an object"),
        ([line(), ["a list"]], "line 2: not an object"),
        ([line(), line(" ")], "line 2: the prompt is empty"),
        ([line(correct={"small": 1, "big": True})], "line 1: correct must say true or false"),
        ([line(correct={"small": True, "vast": True})], "line 1 names vast without a price"),
        ([line(), line(correct={"small": True})], r"line 2 has outcomes of small, the first line of small, big"),
        ([line(correct={"small": True})], "at least two models"),
        ([line(prices={"small": 0})], "costs of small must be positive"),
    ],
)
def test_bad_outcomes_are_named(tmp_path, rows, message):
    path = write(tmp_path / "outcomes.jsonl", *[json.dumps(row) if isinstance(row, list) else row for row in rows])
    with pytest.raises(ValueError, match=message):
        QueryOutcomes.read(path, PRICES)


def test_arrays_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        QueryOutcomes(["a", "b"], ["g"] * 2, ("x", "y"), np.ones((2, 3), bool), np.ones((2, 2)))
    with pytest.raises(ValueError, match="distinct names"):
        QueryOutcomes(["a"], ["g"], ("x", "x"), np.ones((1, 2), bool), np.ones((1, 2)))
    with pytest.raises(ValueError, match=r"3 queries and 2 models"):
        EmbeddedQueries(torch.zeros(3, 2), ("x", "y"), np.ones((2, 2), bool), np.ones(2))


def test_the_cheapest_of_equals_is_chosen():
    errors = torch.tensor([[0.5, 0.5, 0.1], [0.3, 0.2, 0.2]])
    costs = np.array([1.0, 2.0, 4.0])
    assert choose(errors, costs, 0.0).tolist() == [2, 1]
    assert choose(errors, costs, 0.2).tolist() == [0, 0]


# -- learning on a pool -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(pool, task, tmp_path_factory):
    """A folder that holds what the embedded pair makes of 60 problems."""
    folder = tmp_path_factory.mktemp("answered")
    SimilarityWeighted(examples=60, **SHORT).fit(pool, task, seed=1, folder=folder)
    return folder


LEARNERS = [
    MatrixFactorisation(examples=60, **SHORT),
    SimilarityWeighted(examples=60, **SHORT),
    QueryClassifier(examples=60, training=RouterTraining(epochs=3, batch_size=32), **SHORT),
    UniRouteKMeans(examples=60, **SHORT),
    UniRouteLearned(examples=60, **SHORT),
    Neighbours(examples=60, **SHORT),
    QueryMlp(examples=60, training=RouterTraining(epochs=3, batch_size=32, units=[8]), **SHORT),
]


@pytest.mark.parametrize("learner", LEARNERS, ids=lambda learner: type(learner).__name__)
def test_a_saved_policy_scores_the_same(learner, answered, pool, task, tmp_path, monkeypatch):
    monkeypatch.setattr(agents.query_routing.learner, "answer_alone", None)  # the answers are there already
    policy = learner.fit(pool, task, seed=1, folder=answered)
    policy.save(tmp_path)
    loaded = load_policy(tmp_path, pool)
    assert isinstance(loaded, QueryPolicy)
    hidden = torch.randn(50, pool.slm.width, generator=torch.Generator().manual_seed(0))
    observation = Observation(hidden, None, *[np.zeros(50)] * 3)
    assert torch.equal(policy.score(observation), loaded.score(observation))
    assert policy.parameters == loaded.parameters > 0
    assert type(policy.router) is type(loaded.router)


def test_answers_of_other_settings_are_not_taken(answered, pool, task):
    with pytest.raises(ValueError, match="max_new_tokens"):
        SimilarityWeighted(examples=60, max_new_tokens=41).fit(pool, task, seed=1, folder=answered)


def test_answering_alone_is_what_each_model_does_alone(pool, task):
    examples = task.examples("validation", 6)
    outcomes, views = answer_alone(pool, task, examples, 40, ONCE)
    assert outcomes.models == tuple(pool.names)
    assert views.slm.shape == (6, pool.slm.width)
    for number in (0, 1):
        episodes = decode(pool, task, examples, Always(slm=number == 0), 0.5, 40)
        assert outcomes.correct[:, number].tolist() == [episode.correct for episode in episodes]
        rates = MemoryTraffic().rates(pool.profiles)[number]
        expected = [(episode.ledger[number] * rates).sum() for episode in episodes]
        np.testing.assert_allclose(outcomes.costs[:, number], expected)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.85])
def test_the_threshold_sends_the_share_asked_for(share, answered, pool, task):
    policy = SimilarityWeighted(examples=60, llm_share=share, **SHORT).fit(pool, task, seed=1, folder=answered)
    embeddings = load_file(answered / "queries.safetensors")["embeddings"]
    scores = policy.score(Observation(embeddings, None, *[np.zeros(60)] * 3))
    assert (scores < 0.5).float().mean().item() == pytest.approx(share, abs=1 / 60)


def test_the_share_is_exact_where_scores_differ():
    scores = torch.linspace(0.01, 0.9, 200)
    for share in (0.05, 0.3, 0.995):
        assert (scores < calibrated_threshold(scores, share)).float().mean().item() == pytest.approx(share, abs=0.005)


# -- one decision a response ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(answered, pool, task):
    """Problems, their episodes by a query policy that sends some to either model, and that policy."""
    policy = SimilarityWeighted(examples=60, llm_share=0.5, **SHORT).fit(pool, task, seed=1, folder=answered)
    examples = task.examples("validation", 16)
    episodes = decode(pool, task, examples, policy, 0.5, 40, Scheduling(rows=5))
    assert 0 < sum(episode.writers[0] for episode in episodes) < len(examples)
    return examples, episodes, policy


def test_one_model_writes_a_response_as_it_would_alone(routed, pool, task):
    examples, episodes, _ = routed
    alone = [decode(pool, task, examples, Always(slm=slm), 0.5, 40) for slm in (True, False)]
    for number, episode in enumerate(episodes):
        writer = episode.writers[0]
        expected = alone[writer][number]
        assert (episode.writers == writer).all()
        np.testing.assert_array_equal(episode.tokens, expected.tokens)
        assert episode.correct == expected.correct
        assert len(np.unique(episode.scores)) == 1
        assert episode.decisions[PASSES] == 1
        np.testing.assert_array_equal(episode.ledger[writer, :SECONDS], expected.ledger[writer, :SECONDS])
        assert episode.ledger[1 - writer, WRITTEN] == 0
        prompt = len(pool.encode(examples[number].prompt))
        # where the LLM writes, the SLM has read the prompt for the router's sake and nothing else
        passes, read = (1, prompt) if writer else (0, 0)
        assert episode.ledger[1 - writer, [PASSES, READ]].tolist() == [passes, read]


def test_the_tree_gives_the_same_episodes(routed, pool, task):
    examples, episodes, policy = routed
    tree = PrefixTree(pool, task, max_new_tokens=40, memory=2**26)
    for _ in range(2):  # decoded, then remembered
        walked = decode(pool, task, examples, policy, 0.5, 40, Scheduling(rows=5), tree=tree)
        for live, other in zip(episodes, walked, strict=True):
            np.testing.assert_array_equal(live.tokens, other.tokens)
            np.testing.assert_array_equal(live.writers, other.writers)
            np.testing.assert_array_equal(live.ledger[:, :SECONDS], other.ledger[:, :SECONDS])
            assert live.decisions[PASSES] == other.decisions[PASSES] == 1


# -- refused before anything is answered ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        (MatrixFactorisation(), r"MatrixFactorisation routes between two models, the pool has 3 .*uniroute, knn, mlp"),
        (SimilarityWeighted(), "SimilarityWeighted routes between two models"),
        (QueryClassifier(), "QueryClassifier routes between two models"),
        (UniRouteKMeans(examples=20, clusters=21), r"clusters must be in 1\.\.20.*it is 21"),
        (UniRouteLearned(examples=20, clusters=21), r"clusters must be in 1\.\.20"),
        (Neighbours(examples=20, neighbours=21), r"neighbours must be in 1\.\.20"),
    ],
)
def test_what_cannot_be_learned_is_refused_before_anything_is_answered(learner, message, pools, task, monkeypatch):
    monkeypatch.setattr(agents.query_routing.learner, "answer_alone", None)
    with pytest.raises(ValueError, match=message):
        learner.fit(pools["three"], task)


def test_a_pool_of_namesakes_is_refused(pool, task):
    twins = ModelPool([pool.slm, pool.slm], pool.rows, pool.capacity)
    with pytest.raises(ValueError, match="distinct names"):
        Neighbours(examples=4).fit(twins, task)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (Neighbours, {"examples": 1}, "examples must be at least 2"),
        (Neighbours, {"neighbours": 0}, "neighbours must be at least 1"),
        (Neighbours, {"llm_share": 1.0}, "llm_share must be in"),
        (SimilarityWeighted, {"gamma": 1.0}, "gamma must be above 1"),
        (SimilarityWeighted, {"gamma": float("nan")}, "gamma must be above 1"),
        (MatrixFactorisation, {"dimension": 0}, "dimension must be at least 1"),
        (UniRouteKMeans, {"clusters": 0}, "clusters must be at least 1"),
        (UniRouteKMeans, {"starts": 0}, "starts must be at least 1"),
        (UniRouteLearned, {"shrinkage": -1.0}, "shrinkage must be at least 0"),
        (QueryMlp, {"examples": 0}, "examples must be at least 2"),
    ],
)
def test_bad_settings_are_named(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_a_policy_of_other_models_or_routers_is_refused(answered, pool, pools, task, tmp_path):
    LEARNERS[1].fit(pool, task, seed=1, folder=answered).save(tmp_path)
    with pytest.raises(ValueError, match="models"):
        load_policy(tmp_path, pools["llama"])
    settings = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(settings | {"router": "os.path"}))
    with pytest.raises(ValueError, match=r"os\.path is not a router of agents"):
        load_policy(tmp_path, pool)
