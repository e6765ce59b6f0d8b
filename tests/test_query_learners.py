import math
from dataclasses import fields

import numpy as np
import pytest
import torch

import agents.query_routing.features
import agents.query_routing.uniroute
from agents.query_routing.embeddings import SentenceEmbedder, TextEmbedding
from agents.query_routing.features import standardise, with_constant
from agents.query_routing.knn import Neighbours, leave_one_out, nearest
from agents.query_routing.mlp import QueryMlp
from agents.query_routing.optim import GradientDescent
from agents.query_routing.routellm import MatrixFactorisation, QueryClassifier, SimilarityWeighted, llm_wins
from agents.query_routing.router import EmbeddedQueries, choose
from agents.query_routing.uniroute import (
    LearnedMapRouter,
    UniRouteKMeans,
    UniRouteLearned,
    centres_of,
    cluster_errors,
    map_loss,
)
from agents.router.training import RouterTraining

QUICK = RouterTraining(epochs=15, batch_size=32, units=[16])
PAIR = ("small", "big")
LEARNERS = [
    MatrixFactorisation(),
    SimilarityWeighted(),
    QueryClassifier(training=QUICK),
    UniRouteKMeans(),
    UniRouteLearned(),
    Neighbours(),
    QueryMlp(training=QUICK),
]
CHANGING = [UniRouteKMeans(clusters=5), UniRouteLearned(clusters=5, shrinkage=2.0)]


def named(learner):
    return type(learner).__name__


def drawn(count, models=PAIR, seed=0, width=5):
    """Queries and outcomes that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    embeddings = torch.from_numpy(rng.normal(size=(count, width))).float()
    costs = np.arange(1.0, 1 + len(models))
    return EmbeddedQueries(embeddings, tuple(models), rng.random((count, len(models))) < 0.5, costs)


def two_kinds(count, seed):
    """Two kinds of queries; each model is right on one kind, except on a tenth of the queries, where nobody is."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 2, count)
    embeddings = rng.normal(size=(count, 4))
    embeddings[:, 1] += 6 * kind
    right = np.stack([kind == 0, kind == 1], axis=1) & (rng.random(count) < 0.9)[:, None]
    return EmbeddedQueries(torch.from_numpy(embeddings).float(), PAIR, right, np.array([1.0, 10.0]))


def same(first, second):
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(first)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.mark.parametrize("learner", LEARNERS, ids=named)
def test_every_learner_tells_two_kinds_of_queries_apart(learner):
    train, test = two_kinds(400, 1), two_kinds(1000, 2)
    rows = []
    router = learner.fit_queries(train, train, 0, rows.append)
    chosen = choose(router.errors(test.embeddings), test.costs, 0.0)
    regret = test.correct.any(1).mean() - test.correct[np.arange(1000), chosen].mean()
    assert regret < 0.01
    again = learner.fit_queries(train, train, 0)
    assert torch.equal(router.errors(test.embeddings), again.errors(test.embeddings))


@pytest.mark.parametrize("learner", LEARNERS[3:], ids=named)
def test_predicted_errors_are_shares_of_wrong_answers(learner):
    train, test = two_kinds(600, 1), two_kinds(1000, 2)
    errors = learner.fit_queries(train, train, 0).errors(test.embeddings).numpy()
    assert errors.min() >= 0
    assert errors.max() <= 1
    np.testing.assert_allclose(errors.mean(0), (~test.correct).mean(0), atol=0.05)


# -- RouteLLM ---------------------------------------------------------------------------------------------------------


def test_a_win_is_a_half_plus_half_of_the_gain():
    correct = np.array([[False, False], [False, True], [True, False], [True, True]])
    assert llm_wins(correct).tolist() == [0.5, 1.0, 0.0, 0.5]


def test_similarity_weighting_maximises_the_weighted_bradley_terry_likelihood():
    train, test = drawn(40), drawn(6, seed=9)
    router = SimilarityWeighted(gamma=7.0).fit_queries(train, train)
    known = train.embeddings.double().numpy()
    wins = 0.5 + (train.correct[:, 1].astype(float) - train.correct[:, 0]) / 2
    known, queries = known - known.mean(0), test.embeddings.double().numpy() - known.mean(0)
    grid = np.linspace(-6, 6, 240_001)
    for query, found in zip(queries, router.errors(test.embeddings)[:, 0].tolist(), strict=True):
        cosine = known @ query / np.linalg.norm(known, axis=1) / np.linalg.norm(query)
        weight = 7.0 ** (1 + cosine / cosine.max())
        log_win, log_loss = -np.logaddexp(0, -grid), -np.logaddexp(0, grid)
        best = grid[np.argmax((weight @ wins) * log_win + (weight @ (1 - wins)) * log_loss)]
        assert found == pytest.approx(1 / (1 + math.exp(-best)), abs=1e-4)


def test_a_query_like_no_other_is_routed_by_all_of_them():
    train = drawn(40)
    router = SimilarityWeighted().fit_queries(train, train)
    errors = router.errors(router.mean[None])  # without the mean nothing is left of it
    assert errors[0, 0].item() == pytest.approx(llm_wins(train.correct).mean().item(), abs=1e-6)


def test_matrix_factorisation_by_hand():
    train = drawn(30)
    settings = GradientDescent(epochs=3)
    router = MatrixFactorisation(dimension=3, training=settings).fit_queries(train, train)
    query = train.embeddings[4].double().numpy()
    seen = [*((query - router.mean.numpy()) / router.scale.numpy()), 1.0]
    slm, llm = router.vectors.tolist()
    logit = sum(
        router.weights[d].item() * (llm[d] - slm[d]) * sum(router.projection[d, i].item() * seen[i] for i in range(6))
        for d in range(3)
    )
    expected = 1 / (1 + math.exp(-logit))
    assert router.errors(train.embeddings)[4].tolist() == pytest.approx([expected, 1 - expected], abs=1e-5)


def test_routellm_refuses_models_it_was_not_trained_on():
    train, known = drawn(20), drawn(20, ("small", "new"))
    for learner in LEARNERS[:3]:
        with pytest.raises(ValueError, match=r"trained on \(small, big\), not new.*uniroute, knn"):
            learner.fit_queries(train, known)


def test_descent_keeps_the_best_epoch_and_leaves_the_start_alone():
    start = {"x": torch.tensor([4.0])}
    losses = iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0])
    seen = []

    def validation_loss(tensors):
        seen.append(tensors["x"].detach().clone())
        return torch.tensor(next(losses))

    def loss(tensors, rows):
        return (tensors["x"] ** 2).sum() + 0 * rows.sum()

    found = GradientDescent(epochs=50, patience=2, lr=0.1).lower(
        start, torch.arange(8), loss, validation_loss, 0, lambda row: None, "toy"
    )
    assert len(seen) == 5  # stops two epochs after the best
    assert torch.equal(found["x"], seen[2])
    assert start["x"].item() == 4.0
    with pytest.raises(FloatingPointError, match="toy: the loss is nan"):
        GradientDescent(epochs=1).lower(
            start, torch.arange(8), lambda tensors, rows: loss(tensors, rows) * math.nan,
            lambda tensors: torch.tensor(1.0), 0, lambda row: None, "toy",
        )  # fmt: skip
    for settings in ({"epochs": 0}, {"lr": 0.0}, {"validation_share": 1.0}, {"patience": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            GradientDescent(**settings)


# -- UniRoute ---------------------------------------------------------------------------------------------------------


def test_a_cluster_for_each_query_is_the_nearest_query():
    known, test = drawn(40, ("a", "b", "c")), drawn(100, ("a", "b", "c"), seed=7)
    clusters = UniRouteKMeans(clusters=40).fit_queries(known, known)
    neighbour = Neighbours(neighbours=1).fit_queries(known, known)
    assert torch.equal(clusters.errors(test.embeddings), neighbour.errors(test.embeddings))


@pytest.mark.parametrize("kind", [UniRouteKMeans, UniRouteLearned])
def test_one_cluster_sends_everything_to_one_model(kind):
    known, test = drawn(60, ("a", "b", "c")), drawn(100, ("a", "b", "c"), seed=7)
    errors = kind(clusters=1).fit_queries(known, known).errors(test.embeddings)
    for weight in (0.0, 0.01, 0.1, 1.0):
        assert len(np.unique(choose(errors, test.costs, weight))) == 1
    torch.testing.assert_close(errors[0], torch.from_numpy((~known.correct).mean(0)).float())


def test_psi_of_the_learned_map_by_hand():
    train, known = drawn(80, ("a", "b", "c")), drawn(50, ("a", "d"), seed=3)
    router = UniRouteLearned(clusters=4).fit_queries(train, known)
    assert router.models == ("a", "d")
    scale = train.embeddings.double().numpy()
    seen = (known.embeddings.double().numpy() - scale.mean(0)) / scale.std(0)
    weights = np.exp(np.c_[seen, np.ones(50)] @ router.theta.double().numpy().T)
    phi = weights / weights.sum(1, keepdims=True)
    psi = np.array([[(phi[:, k] * ~known.correct[:, m]).sum() / phi[:, k].sum() for m in (0, 1)] for k in range(4)])
    np.testing.assert_allclose(router.rates.numpy(), psi, atol=1e-5)
    np.testing.assert_allclose(router.errors(known.embeddings).numpy(), phi @ psi, atol=1e-5)


def test_the_loss_of_the_map_by_hand():
    rng = np.random.default_rng(0)
    theta, seen, wrong = rng.normal(size=(3, 5)), rng.normal(size=(20, 4)), rng.random((20, 2)) < 0.4
    weights = np.exp(np.c_[seen, np.ones(20)] @ theta.T)
    phi = weights / weights.sum(1, keepdims=True)
    predicted = phi @ (phi.T @ wrong / phi.sum(0)[:, None])
    expected = -np.where(wrong, np.log(predicted), np.log(1 - predicted)).mean()
    found = map_loss(*(torch.from_numpy(value).float() for value in (theta, seen, wrong)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_training_lowers_the_loss_of_the_map():
    train = two_kinds(400, 1)
    seen, wrong = standardise(train.embeddings, *(train.embeddings.mean(0), train.embeddings.std(0))), ~train.correct
    losses = [
        map_loss(
            UniRouteLearned(clusters=4, training=GradientDescent(epochs=epochs, lr=0.01))
            .fit_queries(train, train)
            .theta,
            seen, torch.from_numpy(wrong).float(),
        ).item()
        for epochs in (1, 60)
    ]  # fmt: skip
    assert losses[1] < 0.95 * losses[0]


def test_a_cluster_without_known_queries_has_the_mean_error():
    memberships = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    wrong = torch.tensor([[1.0], [0.0], [0.0]])
    torch.testing.assert_close(cluster_errors(memberships, wrong), torch.tensor([[1 / 3], [1 / 3]]))
    memberships[2] = torch.tensor([0.0, 1.0])
    shrunk = cluster_errors(memberships, wrong, shrinkage=3.0)
    torch.testing.assert_close(shrunk, torch.tensor([[2 / 5], [1 / 4]]))
    assert cluster_errors(memberships, wrong).tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("learner", CHANGING, ids=named)
def test_models_come_and_go_without_training(learner, monkeypatch):
    train = drawn(90, ("a", "b", "c"))
    known = drawn(70, ("b", "new", "c", "newer"), seed=3)

    def of(*models):
        columns = [known.models.index(model) for model in models]
        return EmbeddedQueries(known.embeddings, models, known.correct[:, columns], known.costs[columns])

    before, expected = (learner.fit_queries(train, of(*models)) for models in (("b", "c"), ("new", "c", "newer")))
    monkeypatch.setattr(agents.query_routing.uniroute, "centres_of", None)
    monkeypatch.setattr(GradientDescent, "lower", None)
    after = before.with_model("new", known.correct[:, 1], place=1).with_model("newer", known.correct[:, 3].tolist())
    assert after.models == ("b", "new", "c", "newer")
    after = after.without_model("b")
    assert same(after, expected)
    assert after.theta is before.theta
    assert before.models == ("b", "c")  # what it came from stays
    test = drawn(30, seed=5).embeddings
    assert torch.equal(after.errors(test), expected.errors(test))
    assert same(after, type(after).of_tensors(after.models, after.tensors()))


def test_models_that_cannot_come_or_go_are_named():
    known = drawn(50, ("a", "b"))
    router = UniRouteKMeans(clusters=4).fit_queries(known, known)
    for call, message in (
        (lambda: router.with_model("a", known.correct[:, 0]), r"a is among the models already \(a, b\)"),
        (lambda: router.with_model("c", None), "c needs a validation pass.*each of the 50 .*there is none"),
        (lambda: router.with_model("c", known.correct[:49, 0]), r"c needs a validation pass.*shape \(49,\)"),
        (lambda: router.with_model("c", known.correct), r"shape \(50, 2\)"),
        (lambda: router.with_model("c", known.correct[:, 0], place=3), r"place of c must be in 0\.\.2"),
        (lambda: router.without_model("c"), r"c is not among the models \(a, b\)"),
        (lambda: router.without_model("a"), "one model is left"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("kind", [UniRouteKMeans, UniRouteLearned])
def test_clusters_are_chosen_where_none_are_given(kind):
    rows = []
    train = two_kinds(300, 1)
    router = kind().fit_queries(train, train, 0, rows.append)
    assert router.clusters == next(row["clusters"] for row in rows if "clusters" in row)
    few = drawn(3)
    assert kind().fit_queries(few, few).clusters == 1
    with pytest.raises(ValueError, match=r"clusters must be in 1\.\.20"):
        kind(clusters=21).fit_queries(train, drawn(20))
    with pytest.raises(ValueError, match=r"clusters must be in 1\.\.20"):
        kind(clusters=21).fit_queries(drawn(20), train)


def test_what_a_decision_reads_does_not_grow_with_the_known_queries():
    train = drawn(60)
    sizes = {UniRouteKMeans(clusters=4).fit_queries(train, drawn(n)).parameters for n in (20, 200)}
    assert sizes == {5 + 5 + 4 * 5 + 4 * 2 + 1}


# -- baselines --------------------------------------------------------------------------------------------------------


def test_neighbours_by_hand(monkeypatch):
    monkeypatch.setattr(agents.query_routing.features, "COMPARED", 100)  # a few queries at a time
    known, test = drawn(30, ("a", "b", "c")), drawn(17, ("a", "b", "c"), seed=2)
    router = Neighbours(neighbours=4).fit_queries(known, known)
    scale = known.embeddings.numpy()
    seen, queries = ((value - scale.mean(0)) / scale.std(0) for value in (scale, test.embeddings.numpy()))
    near = np.argsort(((queries[:, None] - seen) ** 2).sum(-1), axis=1)[:, :4]
    np.testing.assert_allclose(router.errors(test.embeddings).numpy(), (~known.correct)[near].mean(1), atol=1e-6)
    others = torch.cat(list(nearest(router.known, router.known, 29, others=True)))
    assert all(sorted([*row.tolist(), i]) == list(range(30)) for i, row in enumerate(others))


def test_leaving_one_out_by_hand(monkeypatch):
    monkeypatch.setattr(agents.query_routing.features, "COMPARED", 100)
    known = drawn(30)
    wrong = ~known.correct
    distances = torch.cdist(known.embeddings, known.embeddings).fill_diagonal_(torch.inf).numpy()
    order = np.argsort(distances, axis=1)
    expected = [((wrong[order[:, :k]].mean(1) - wrong) ** 2).mean() for k in (1, 2, 8)]
    found = leave_one_out(known.embeddings, torch.from_numpy(wrong), (1, 2, 8))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_an_mlp_says_how_often_a_model_is_right_that_always_is():
    train = drawn(50, ("always", "never", "sometimes"))
    train.correct[:, 0], train.correct[:, 1] = True, False
    router = QueryMlp(training=RouterTraining(epochs=2, batch_size=16, units=[4])).fit_queries(train, train)
    errors = router.errors(train.embeddings)
    assert errors[:, 0].max() < 1e-5
    assert errors[:, 1].min() > 1 - 1e-5
    assert len(errors[:, 2].unique()) > 10
    again = type(router).of_tensors(router.models, router.tensors())
    assert torch.equal(again.errors(train.embeddings), errors)


def test_phi_sums_to_one():
    features = drawn(20).embeddings
    theta = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)) * 50
    phi = LearnedMapRouter.memberships(features, theta)
    torch.testing.assert_close(phi.sum(1), torch.ones(20))
    torch.testing.assert_close(phi, torch.softmax(with_constant(features) @ theta.T, 1))


def test_embeddings_and_centres_lie_where_torch_allocates():
    """As those of a router that was saved and read again: the last bits of products depend on it."""
    prompts = [f"{first} and {second} are {first * second}" for first in range(6) for second in range(9)]
    embedder = TextEmbedding(dimensions=7, fewest=1).fit(prompts)
    tensors = [embedder.embed(prompts[:count]) for count in range(1, 12)]
    tensors += [SentenceEmbedder(Counted(), 4).embed(prompts[:count]) for count in range(1, 12)]
    tensors += [centres_of(torch.randn(20, 3), count, starts=1, seed=0) for count in range(2, 9)]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)


class Counted:
    """In the place of a model of sentence-transformers."""

    max_seq_length = None

    def tokenizer(self, prompt, truncation):
        return {"input_ids": prompt.split()}

    def encode(self, prompts, **settings):
        return np.array([[len(prompt), prompt.count("1"), 1.0] for prompt in prompts], dtype=np.float32)
