"""Intervals mean what they say: their coverage, and how often equal policies are told apart, by simulation."""

from dataclasses import replace

import numpy as np
import pytest

from agents.common.curves import Sweep
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.operating_points import (
    ThresholdSearch,
    cheapest_reaching,
    operating_points,
    threshold_to_use,
)
from experiments.evaluation.summary import Results, summarize
from experiments.measures.intervals import Estimate, estimates, resampled
from experiments.measures.metrics import measures

THRESHOLDS = 6
SHARES = np.linspace(0, 1, THRESHOLDS)
REGULAR = ("cost_at_0.90", "cost_at_0.95", "accuracy_at_0.25", "accuracy_at_0.50", "aiq", "area_above_line", "cpt_0.80")
"""Measures whose value lies inside their range here; at an end of it no interval is centred."""


def policy(rng, difficulty, lengths, seeds, sigma):
    """Sweeps of one policy: each seed has a skill of its own (`sigma`), and luck of its own on each problem."""
    sweeps = []
    for _ in range(seeds):
        skill = -0.4 + 2.6 * SHARES ** (0.35 * np.exp(sigma * rng.normal()))
        skill[1:-1] += sigma * rng.normal()
        # at the ends there is one model alone, whose answers no seed changes
        luck = np.stack([np.zeros(len(difficulty)), *[0.6 * rng.normal(size=len(difficulty))] * (THRESHOLDS - 2)])
        luck = np.concatenate([luck, luck[:1]])
        sweeps.append(Sweep(difficulty + luck < skill[:, None], (0.1 + 0.9 * SHARES)[:, None] * lengths))
    return sweeps


def problems(rng, count):
    return rng.normal(size=count), 1 + rng.gamma(4, size=count)


def estimated(sweeps, weights):
    return estimates([measures(one, one, weights) for one in sweeps])


def simulated(seeds, sigma, count, repeats, samples=200):
    """How often the interval of each measure covers its true value, and how often two equal policies differ."""
    rng = np.random.default_rng(1)
    difficulty, lengths = problems(rng, 8_000)
    even = np.full((1, 8_000), 1 / 8_000)
    truth = {name: one.value for name, one in estimated(policy(rng, difficulty, lengths, 200, sigma), even).items()}
    covered, found = dict.fromkeys(REGULAR, 0), {}
    for repeat in range(repeats):
        difficulty, lengths = problems(rng, count)
        weights = resampled(count, samples, repeat)
        ours, theirs = (estimated(policy(rng, difficulty, lengths, seeds, sigma), weights) for _ in range(2))
        for name in REGULAR:
            low, high = ours[name].cost_interval() if name.startswith("cost_at") else ours[name].interval()
            covered[name] += low <= truth[name] <= high
            low, high = ours[name].less(theirs[name])[1]
            found[name] = found.get(name, 0) + (low > 0 or high < 0)
            if name.startswith("cost_at"):
                low, high = ours[name].over(theirs[name])[1]
                found[f"{name}, ratio"] = found.get(f"{name}, ratio", 0) + (low > 1 or high < 1)
    return (*({name: number / repeats for name, number in some.items()} for some in (covered, found)),)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("sigma", "count"), [(0.1, 300), (0.02, 1000)])
def test_intervals_cover_what_they_say_and_equal_policies_are_rarely_told_apart(seeds, sigma, count):
    covered, found = simulated(seeds, sigma, count, repeats=200)
    print(seeds, sigma, count, covered, found)
    for name, share in covered.items():
        assert 0.92 <= share <= 0.99, (name, share)
    shares = list(found.values())
    # single measures of 200 pairs vary by 1.5 points; all of them together by less
    assert 0.02 <= np.mean(shares) <= 0.09, found
    assert max(shares) <= 0.09, found


def reported(seeds, others, sigma, count, repeats, samples):
    """How often each comparison that a summary reports tells two policies apart that are equal in distribution.

    They have so many seeds; thresholds are chosen on a hundred other problems, as in the benchmark.
    """
    rng, found = np.random.default_rng(2), {}

    def answered(sweep):
        return [
            Answers(
                right, np.ones_like(right), 10 * cost, np.full(len(cost), 10.0), {"bytes": cost, "llm_tokens": cost}
            )
            for right, cost in zip(sweep.correct, sweep.costs, strict=True)
        ]

    for _ in range(repeats):
        difficulty, lengths = problems(rng, count + 100)
        runs = {
            name: [answered(one) for one in policy(rng, difficulty, lengths, some, sigma)]
            for name, some in (("ours", seeds), ("theirs", others))
        }
        tested, tried = ({name: [part_of(some, these) for some in runs[name]] for name in runs}
            for these in (slice(count), slice(count, None)))  # fmt: skip
        ends, tuned = ((parts["ours"][0][0], parts["ours"][0][-1]) for parts in (tested, tried))
        inner = {name: [some[1:-1] for some in parts] for name, parts in tested.items()}
        chosen = {name: [[*SHARES[1:-1]]] * len(inner[name]) for name in inner}
        results = Results(
            {},
            Baselines(*ends, None, None, 0, validation=tuned),
            inner,
            frozenset(inner),
            chosen,
            validated={name: [some[1:-1] for some in parts] for name, parts in tried.items()},
        )
        for name, said in summarize(results, samples=samples)["policies"]["theirs"]["against_ours"].items():
            low, high = said["interval"]
            neutral = 1.0 if "ratio" in name else 0.0
            found.setdefault(name, []).append(low is not None and not low <= neutral <= high)
    return {name: float(np.mean(times)) for name, times in found.items()}


def part_of(runs, these):
    """Answers to some of the problems."""
    return [
        Answers(
            *(getattr(run, key)[these] for key in ("correct", "terminated", "llm_tokens", "tokens")),
            costs={unit: cost[these] for unit, cost in run.costs.items()},
        )
        for run in runs
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "others"), [(3, 3), (5, 3), (12, 5)])
def test_no_comparison_that_is_reported_tells_equal_policies_apart_too_often(seeds, others):
    found = reported(seeds, others, sigma=0.05, count=300, repeats=200, samples=200)
    print(seeds, others, found)
    assert {"ratio_at_0.95", "gain_at_0.25", "chosen_ratio_at_0.95"} <= found.keys()
    assert 0.01 <= np.mean(list(found.values())) <= 0.09, found
    assert max(found.values()) <= 0.09, found


def test_a_sample_of_intervals_covers_what_it_says():
    covered, found = simulated(3, 0.1, 150, repeats=40, samples=60)
    assert np.mean(list(covered.values())) > 0.9
    assert np.mean(list(found.values())) < 0.12


def test_an_interval_over_problems_is_that_of_a_mean():
    values = np.random.default_rng(0).normal(size=400)
    weights = resampled(400, 2000, seed=0)
    low, high = Estimate((weights @ values)[None]).interval()
    assert low == pytest.approx(values.mean() - 1.96 * values.std() / 20, abs=0.01)
    assert high == pytest.approx(values.mean() + 1.96 * values.std() / 20, abs=0.01)


def test_three_seeds_are_too_few_to_resample():
    rng = np.random.default_rng(0)
    seeds, weights = rng.normal(size=(2000, 3)), resampled(3, 2000, seed=0)[1:]
    low, high = np.quantile(seeds @ weights.T, (0.025, 0.975), axis=1)
    assert np.mean((low <= 0) & (high >= 0)) == pytest.approx(0.75, abs=0.03)  # 1 - 2 / 2**3: from least to largest
    intervals = [Estimate(np.repeat(some[:, None], 2, axis=1)).interval() for some in seeds]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.015)


def test_an_interval_over_seeds_is_a_t_interval():
    of_seed = np.array([0.2, 0.4, 0.6])
    low, high = Estimate(np.repeat(of_seed[:, None], 11, axis=1)).interval()
    half = 4.302653 * 0.2 / np.sqrt(3)
    assert (low, high) == (pytest.approx(0.4 - half, abs=1e-5), pytest.approx(0.4 + half, abs=1e-5))
    alike = Estimate(np.full((3, 11), 0.4)).interval()
    assert alike == (pytest.approx(0.4), pytest.approx(0.4))


def test_the_interval_of_a_cost_stays_above_zero_and_is_that_of_its_logarithm_over_seeds():
    far = Estimate(np.array([[0.2], [0.25], [1.4]]) * np.ones(501))
    assert far.interval()[0] < 0 < far.cost_interval()[0] < far.value < far.cost_interval()[1]
    low, high = far.cost_interval()
    assert low * high == pytest.approx(far.value**2, rel=1e-4)
    # of a small spread it is the plain one
    near = Estimate(np.array([[0.2], [0.201], [0.202]]) * np.ones(501))
    assert near.cost_interval() == pytest.approx(near.interval(), rel=1e-3)
    # in another unit of costs it is the same
    assert Estimate(7 * far.values).cost_interval() == pytest.approx((7 * low, 7 * high), rel=1e-4)
    # some problems cost nothing: there is no logarithm
    none = Estimate(np.array([[0.0, 0.0, 0.0], [0.3, 0.2, 0.4]]))
    assert none.cost_interval() == (0.0, none.interval()[1])


def test_the_interval_of_a_share_has_a_width_and_stays_within_its_range():
    for count, right in ((20, 20), (300, 300), (300, 0), (20, 19)):
        correct = np.arange(count) < right
        share = Estimate((resampled(count, 500, 0) @ correct)[None])
        low, high = share.share_interval(count)
        assert 0 <= low < high <= 1
        assert low - 1e-9 <= share.value <= high + 1e-9
    # all of 300 right: a policy that is right on 98.8 % of all problems would be in one of 40 samples
    low, high = Estimate(np.ones((3, 501))).share_interval(300)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 300)), 1)
    # three seeds far apart: their t interval goes beyond 1, a share does not
    far = Estimate(np.array([[0.9], [0.99], [0.99]]) * np.ones(501))
    assert far.interval()[1] > 1 == far.share_interval(300)[1]


def test_what_has_no_value_has_no_interval():
    assert Estimate(np.full((2, 5), np.nan)).interval() == (None, None)
    assert Estimate(np.array([[0.3, 0.3, np.nan]])).interval() == (None, None)


def test_equal_policies_come_out_equal():
    rng = np.random.default_rng(3)
    difficulty, lengths = problems(rng, 60)
    one = estimated(policy(rng, difficulty, lengths, 1, 0.1), resampled(60, 50, 0))
    for name, estimate in one.items():
        assert estimate.less(estimate) == (0.0, (0.0, 0.0)), name
        assert estimate.over(estimate) == (1.0, (1.0, 1.0)), name


def answers(correct, cost):
    count = len(correct)
    return Answers(
        correct=np.array(correct),
        terminated=np.ones(count, dtype=bool),
        llm_tokens=np.full(count, 10 * cost),
        tokens=np.full(count, 10.0),
        costs={unit: np.full(count, cost) for unit in ("bytes", "llm_tokens")},
    )


def right(share):
    return [i < 20 * share for i in range(20)]


SLM, LLM = answers(right(0.3), 0.1), answers(right(1.0), 1.0)


def test_operating_points_are_chosen_on_validation_and_measured_on_the_problems():
    # on validation the second threshold reaches 95 %, on the problems only the third would
    tried = [answers(right(0.5), 0.2), answers(right(0.95), 0.3), answers(right(1.0), 0.5)]
    tested = [answers(right(0.4), 0.22), answers(right(0.8), 0.33), answers(right(0.95), 0.55)]
    baselines = Baselines(SLM, LLM, None, None, 0, validation=(SLM, LLM))
    results = Results(
        {}, baselines, {"mine": [tested]}, frozenset(), {"mine": [[0.1, 0.2, 0.3]]}, validated={"mine": [tried]}
    )
    points = summarize(results, samples=50)["policies"]["mine"]["operating_points"]
    assert points["0.95"]["thresholds"] == [0.2]
    assert points["0.95"]["accuracy"]["value"] == pytest.approx(0.8)
    assert points["0.95"]["share_of_llm"]["value"] == pytest.approx(0.8)
    assert points["0.95"]["cost_bytes"]["value"] == pytest.approx(0.33)
    assert points["0.99"]["thresholds"] == [0.3]
    low, high = points["0.95"]["accuracy"]["interval"]
    assert low < 0.8 < high


def test_operating_points_are_compared_pair_by_pair():
    # twice the price on each problem, whatever the problems cost: the ratio has no width
    costs = np.linspace(0.1, 0.3, 20)
    dear, cheap = (
        replace(answers(right(1.0), 0.2), costs={"bytes": factor * costs, "llm_tokens": costs}) for factor in (2.0, 1.0)
    )
    baselines = Baselines(SLM, LLM, None, None, 0, validation=(SLM, LLM))
    runs = {"cheap": [[cheap]], "dear": [[dear]]}
    chosen = {name: [[0.1]] for name in runs}
    results = Results({}, baselines, runs, frozenset(), chosen, validated=runs)
    against = summarize(results, samples=50)["policies"]["dear"]["against_cheap"]["chosen_ratio_at_0.95"]
    assert [against["value"], *against["interval"]] == pytest.approx([2, 2, 2])


def test_policies_are_compared_with_the_first_the_cheapest_and_citer():
    runs = {name: [[answers(right(0.95), cost)]] for name, cost in (("first", 0.4), ("citer", 0.3), ("cheap", 0.2))}
    results = Results({}, Baselines(SLM, LLM, None, None, 0), runs, frozenset(), {name: [[0.1]] for name in runs})
    said = summarize(results, samples=20)["policies"]
    for policy in said.values():
        assert {key for key in policy if key.startswith("against_")} == {
            "against_first",
            "against_citer",
            "against_cheap",
        }
    assert (
        said["cheap"]["against_citer"]["ratio_at_0.95"]["value"]
        < 1
        < said["first"]["against_citer"]["ratio_at_0.95"]["value"]
    )


def test_points_chosen_on_the_very_problems_are_said_to_be():
    baselines = Baselines(SLM, LLM, None, None, 0, validation=(SLM, LLM))
    runs = [[answers(right(0.95), 0.3)]]
    for split, notes in (("validation", 1), ("test", 0)):
        results = Results(
            {"split": split}, baselines, {"mine": runs}, frozenset(), {"mine": [[0.1]]}, validated={"mine": runs}
        )
        assert len([note for note in summarize(results, samples=5)["notes"] if "Operating points" in note]) == notes


def test_who_never_gets_there_on_validation_is_used_as_the_llm_alone():
    baselines = Baselines(SLM, LLM, None, None, 0, validation=(SLM, LLM))
    tried = [[answers(right(0.5), 0.2)]]
    points = operating_points(baselines, tried, tried, [[0.4]], "bytes", resampled(20, 5, 0))
    assert points["0.90"].thresholds == ["llm"]
    assert points["0.90"].measured["cost_bytes"].value == 1.0
    cheap = Baselines(LLM, LLM, None, None, 0, validation=(LLM, LLM))
    assert operating_points(cheap, tried, tried, None, "bytes", resampled(20, 5, 0))["0.90"].thresholds == ["slm"]


def test_the_cheapest_that_reaches_is_chosen_whatever_the_order():
    runs = [answers(right(1.0), 0.9), answers(right(0.95), 0.4), answers(right(0.95), 0.3), answers(right(0.5), 0.1)]
    assert cheapest_reaching(runs, 0.95, "bytes") == 2
    assert cheapest_reaching(runs[3:], 0.95, "bytes") == 0


def tried_by(accuracy, thresholds, refine, cost=lambda share: 0.1 + 0.9 * share, search="try_few"):
    """A policy whose LLM share is its threshold: which thresholds are tried, in turn, and what comes out."""
    order = []

    def at(threshold, number):
        order.append(threshold)
        assert number < 40
        return answers(right(accuracy(threshold)), cost(threshold))

    quantiles = np.linspace(0, 1, 1001)
    return order, *getattr(ThresholdSearch((SLM, LLM), quantiles, "bytes", refine), search)(thresholds, at)


def test_thresholds_are_bisected_not_all_tried():
    thresholds = [round(0.05 * number, 2) for number in range(1, 20)]
    order, _, runs = tried_by(lambda share: min(1.0, 0.3 + share), thresholds, refine=0)
    # 0.3 + share reaches 0.9 at 0.6, 0.95 at 0.65 and 0.99 at 0.7
    assert order[0] == 0.5
    assert {0.55, 0.6, 0.65, 0.7} <= set(order)
    assert len(order) <= 7
    assert [run is not None for run in runs] == [threshold in order for threshold in thresholds]
    assert threshold_to_use(runs, LLM, "bytes", 0.9) == thresholds.index(0.6)


def test_who_never_gets_there_is_tried_at_few_thresholds_in_whatever_order_they_stand():
    order, _, runs = tried_by(lambda share: 0.4, [0.7, 0.1, 0.5, 0.3, 0.6], refine=0)
    assert order == [0.5, 0.6, 0.7]
    assert threshold_to_use(runs, LLM, "bytes") is None


def test_where_costs_need_not_rise_all_thresholds_are_tried_and_others_beside_the_cheapest():
    def accuracy(share):
        return min(1.0, 0.9 + share)

    def cost(share):  # the cheapest of all is at 0.46
        return 0.2 + (share - 0.46) ** 2

    thresholds = [0.7, 0.1, 0.3]
    order, found, runs = tried_by(accuracy, thresholds, refine=0, cost=cost, search="try_all")
    assert order == found == thresholds
    assert threshold_to_use(runs, LLM, "bytes", 0.99) == 2
    order, found, runs = tried_by(accuracy, thresholds, refine=6, cost=cost, search="try_all")
    assert order == found
    assert None not in runs
    # beside 0.3, and then 0.5, the cheapest so far, on that side where the next one is further away; 0.4 and 0.6 bring
    # nothing, and for other shares nothing more is tried
    assert found[3:] == pytest.approx([0.5, 0.4, 0.6])
    assert found[threshold_to_use(runs, LLM, "bytes", 0.99)] == 0.5
    # bisection ends at the first that is accurate enough, which is dearer
    _, bisected, ended = tried_by(accuracy, thresholds, refine=4, cost=cost)
    assert cost(bisected[threshold_to_use(ended, LLM, "bytes", 0.99)]) > cost(0.5) + 0.02


def test_a_gap_is_divided_until_it_is_narrower_than_the_interval():
    order, thresholds, runs = tried_by(lambda share: min(1.0, 0.3 + share), [0.1], refine=6)
    assert thresholds[:3] == [0.1, pytest.approx(0.55), pytest.approx(0.775)]
    reached = thresholds[threshold_to_use(runs, LLM, "bytes", 0.9)]
    assert 0.6 <= reached < 0.72
    # in one step of cost nothing can be divided
    _, thresholds, _ = tried_by(lambda share: float(share > 0.5), [0.1, 0.7], refine=6, cost=lambda share: 0.2)
    assert thresholds == [0.1, 0.7]
    _, thresholds, _ = tried_by(lambda share: min(1.0, 0.3 + share), [0.1], refine=0)
    assert thresholds == [0.1]
    assert order[0] == 0.1


def test_a_curve_is_swept_until_no_share_lies_in_a_gap_wider_than_its_interval():
    def accuracy(share):
        return min(1.0, 0.3 + share)

    order, thresholds, runs = tried_by(accuracy, [0.9, 0.1, 0.2], refine=6, search="sweep")
    assert order == thresholds
    assert thresholds[:3] == [0.9, 0.1, 0.2]
    assert [run.correct.mean() for run in runs] == [round(accuracy(at) * 20) / 20 for at in thresholds]
    costs = sorted(run.costs["bytes"].mean() for run in runs)
    for level in (0.6, 0.65, 0.69):  # where the shares are reached
        at = 0.1 + 0.9 * level
        gap = min(cost for cost in costs if cost >= at) - max(cost for cost in costs if cost < at)
        assert gap < 0.1
    assert tried_by(accuracy, [0.9, 0.1], refine=0, search="sweep")[1] == [0.9, 0.1]


def test_between_two_values_of_a_score_nothing_is_looked_for_twice_in_vain():
    _, thresholds, _ = tried_by(
        lambda share: float(share > 0.8), [0.1, 0.9], 6, lambda share: 0.1 + 0.8 * (share > 0.8), "sweep"
    )
    assert len(thresholds) <= 2 + 2 * 3
