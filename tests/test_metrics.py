"""What a sweep is measured by: the concave hull, and the law that one more option never makes a measure worse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from agents.common.curves import Hull, Sweep
from experiments.measures.metrics import measures, oracle_share

UNIT = st.floats(0, 1, width=32)


def test_hull_costs_and_accuracies_by_hand():
    points = np.array([[0.5, 0.8], [0.1, 0.3], [0.2, 0.25], [0.3, 0.6], [0.4, 0.6], [0.6, 0.82], [1.0, 1.0]])
    hull = Hull.of(points)
    # (0.6, 0.82) lies below the line from (0.5, 0.8) to the end
    np.testing.assert_allclose(hull.vertices, [[0.1, 0.3], [0.3, 0.6], [0.5, 0.8], [1.0, 1.0]])
    assert hull.cost_at(0.7) == pytest.approx(0.4)
    assert hull.cost_at(0.2) == 0.1
    assert hull.cost_at(1.01) == np.inf
    assert hull.accuracy_at(0.2) == pytest.approx(0.45)
    assert hull.accuracy_at(2.0) == 1.0
    assert np.isnan(hull.accuracy_at(0.05))
    assert hull.area(0.0, 0.3) == pytest.approx(0.2 * 0.45)


def test_a_worse_point_does_not_raise_a_cost():
    """A monotone hull takes (0.9, 0.80) in, and reads 0.963 off it where the two ends alone have 0.914."""
    ends = np.array([[0.0, 0.4], [1.0, 0.96]])
    with_a_worse_one = np.array([[0.0, 0.4], [0.9, 0.8], [1.0, 0.96]])
    costs = [float(Hull.of(points).cost_at(0.95 * 0.96)) for points in (ends, with_a_worse_one)]
    assert costs[0] == pytest.approx(0.9142857)
    assert costs[1] == costs[0]


@given(points=st.integers(1, 12).flatmap(lambda count: arrays(float, (3, count, 2), elements=UNIT)), at=UNIT)
def test_the_hull_is_the_best_mixture_of_two_points(points, at):
    hulls = Hull.of(points)
    for batch, some in enumerate(points):
        found = Hull.of(some).accuracy_at(at)
        mixed = [b for a, b in some if a <= at]
        for x0, y0 in some:
            for x1, y1 in some:
                if x0 <= at <= x1 and x0 < x1:
                    mixed.append(y0 + (at - x0) / (x1 - x0) * (y1 - y0))
        assert np.isnan(found) if not mixed else found == pytest.approx(max(mixed), abs=1e-9)
        np.testing.assert_array_equal(hulls.accuracy_at(at)[batch], found)


def sweep_of(rng, thresholds, examples=40):
    """Made up: dearer thresholds are right more often, mostly."""
    shares = np.sort(rng.random(thresholds))
    shares[0], shares[-1] = 0.0, 1.0
    correct = rng.random((thresholds, examples)) < (0.3 + 0.6 * shares[:, None])
    return Sweep(correct, (0.1 + 0.9 * shares[:, None]) * (1 + rng.random(examples)))


@pytest.mark.parametrize("seed", range(20))
def test_one_more_point_never_makes_a_measure_worse(seed):
    rng = np.random.default_rng(seed)
    more = sweep_of(rng, 9)
    kept = np.sort([0, 8, *rng.choice(np.arange(1, 8), rng.integers(0, 7), replace=False)])
    fewer = Sweep(more.correct[kept], more.costs[kept])
    oracle = sweep_of(rng, 5)
    weights = rng.dirichlet(np.ones(40), size=7)
    one, other = (
        {**measures(some, some, weights), "oracle_share": oracle_share(some, oracle, weights)} for some in (fewer, more)
    )
    for name in one:
        better = -1 if name.startswith(("cost_at", "qnc", "cpt")) else 1
        known = np.isfinite(one[name]) & np.isfinite(other[name])
        assert (better * (other[name] - one[name]) >= -1e-9)[known].all(), name


def test_points_are_relative_to_llm_only_decoding():
    sweep = Sweep(correct=np.array([[True, False], [True, True]]), costs=np.array([[1.0, 2.0], [6.0, 4.0]]))
    np.testing.assert_allclose(sweep.points(np.array([0.5, 0.5])), [[0.3, 0.5], [1.0, 1.0]])


def three_points():
    """The SLM: 40 % at 0.1; a policy: 80 % at 0.3; the LLM: 90 % at 1."""
    rights = (4, 8, 9)
    correct = np.array([[i < right for i in range(10)] for right in rights])
    return Sweep(correct, np.repeat([[0.1], [0.3], [1.0]], 10, axis=1))


def test_measures_by_hand():
    even = np.full(10, 0.1)
    found = measures(three_points(), three_points(), even)
    assert found["cost_at_0.90"] == pytest.approx(0.3 + 0.01 / 0.1 * 0.7)
    assert found["accuracy_at_0.25"] == pytest.approx(0.7)
    inside = 0.2 * 0.6 + 0.7 * 0.85
    assert found["deferral_area"] == pytest.approx(inside)
    assert found["aiq"] == pytest.approx(inside / 0.9)
    assert found["area_above_line"] == pytest.approx(inside / 0.9 - 0.65)
    assert found["qnc"] == pytest.approx(1.0)
    assert found["cpt_0.50"] == pytest.approx(0.1 + 0.25 / 0.4 * 0.2)
    assert found["cpt_0.80"] == pytest.approx(0.3)
    assert found["apgr"] == pytest.approx((inside - 0.4) / 0.5)


def test_a_coin_per_query_gains_nothing():
    whole = three_points()
    ends = Sweep(whole.correct[[0, 2]], whole.costs[[0, 2]])
    found = measures(ends, ends, np.full(10, 0.1))
    assert found["area_above_line"] == 0
    assert found["aiq"] == pytest.approx(0.65)
    # a point below the line changes nothing
    below = Sweep(np.stack([whole.correct[0], whole.correct[0], whole.correct[2]]), whole.costs)
    for name, value in measures(below, below, np.full(10, 0.1)).items():
        np.testing.assert_array_equal(value, found[name], name)
