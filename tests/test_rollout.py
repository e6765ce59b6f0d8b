"""One queue of episodes: which row serves what, and when; and one model that answers by itself."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from agents.checking.entropy import CheckedEntropy
from agents.common.episode_queue import EpisodeQueue
from agents.common.policy import Policy
from agents.common.rollout import Scheduling, decode, decode_alone
from agents.heuristics import Always, Uncertainty
from agents.oracle import Oracle
from envs.costs import COLUMNS, READ, SECONDS
from envs.decoding.observation import Observation
from envs.decoding.sampling import Sampling
from envs.models.loading import embedded_pool, load_model
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.task import Example
from experiments.evaluation.decoder import ExampleDecoder
from experiments.evaluation.settings import EvaluationSettings
from experiments.evaluation.threshold_sweep import called_at, choose_thresholds, record_scores


def started_by(rows, items):
    log = []
    queue = EpisodeQueue(np.array(rows), items, lambda r, i: log.append((r.tolist(), i.tolist())))
    return queue, log


def test_free_rows_take_items_in_order_and_end_for_the_next_ones():
    queue, log = started_by([4, 5, 6], 6)
    assert queue.fill().tolist() == [4, 5, 6]
    assert queue.fill().tolist() == []
    queue.end(np.array([6, 4]))
    assert queue.busy.tolist() == [5]
    assert queue.fill().tolist() == [4, 6]
    assert queue.busy.tolist() == [4, 5, 6]
    assert [queue.item(row) for row in (4, 5, 6)] == [3, 1, 4]
    queue.end(queue.busy)
    assert queue.fill().tolist() == [4]
    assert queue.item(4) == 5
    queue.end(queue.busy)
    assert queue.fill().tolist() == queue.busy.tolist() == []
    assert log == [([4, 5, 6], [0, 1, 2]), ([4, 6], [3, 4]), ([4], [5])]


@pytest.mark.parametrize("items", [0, 1, 2, 3, 17])
def test_every_item_is_served_once_whatever_ends_when(items):
    rng = np.random.default_rng(items)
    queue, log = started_by([0, 1, 2], items)
    ended = []
    while len(queue.fill()) or len(queue.busy):
        assert (np.diff(queue.busy) > 0).all()
        assert len(queue.busy) == min(3, items - len(ended))
        done = queue.busy[rng.random(len(queue.busy)) < 0.5]
        ended += [queue.item(row) for row in done]
        queue.end(done)
    assert sorted(ended) == list(range(items))
    assert [item for _, taken in log for item in taken] == list(range(items))


# -- one model --------------------------------------------------------------------------------------------------------


def unmeasured(ledger):
    """A ledger, (..., COLUMNS), without the seconds, which differ from run to run."""
    return np.delete(ledger, SECONDS, axis=-1)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)], ids=["greedy", "sampled"])
def test_the_llm_alone_does_what_it_does_where_it_writes_everything(sampling, pool, task):
    examples = task.examples("test", 9)
    settings = {"max_new_tokens": 40, "scheduling": Scheduling(rows=4), "sampling": sampling, "seed": 3}
    routed = decode(pool, task, examples, Always(slm=False), **settings)
    alone = decode_alone(pool.models[-1], task, examples, pool=pool, **settings)
    assert 0 < sum(episode.terminated for episode in routed) < 9
    for one, other in zip(alone, routed, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.writers, other.writers)
        assert (one.correct, one.terminated) == (other.correct, other.terminated)
        np.testing.assert_array_equal(unmeasured(one.ledger[-1]), unmeasured(other.ledger[-1]))
        assert not one.ledger[:-1].any()
        assert not one.decisions.any()


def test_the_slm_alone_reads_what_it_must(pool, task):
    """It leaves the last state of a response that was cut off unread, which is read where somebody may look at it."""
    examples = task.examples("test", 9)
    observed = decode(pool, task, examples, Always(slm=True), max_new_tokens=40, scheduling=Scheduling(rows=4))
    alone = decode_alone(pool.slm, task, examples, max_new_tokens=40, scheduling=Scheduling(rows=4))
    for one, other in zip(alone, observed, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.ledger.shape == (1, COLUMNS)
        assert other.ledger[0, READ] - one.ledger[0, READ] == (not one.terminated)


@pytest.mark.parametrize("name", ["llama", "gpt2", "three"])
def test_any_model_of_a_pool_answers_alone(name, pools, task):
    pool, examples = pools[name], [Example("short", "1+1=", "2", "2")] * 3
    for number, model in enumerate(pool.models):
        episodes = decode_alone(model, task, examples, max_new_tokens=12, pool=pool)
        assert all((episode.writers == number).all() for episode in episodes)
        assert all(episode.ledger[:, READ].nonzero()[0].tolist() == [number] for episode in episodes)
        # by itself it writes what it does in the pool, whose models share tokens and ends
        np.testing.assert_array_equal(decode_alone(model, task, examples, 12)[0].tokens, episodes[0].tokens)


def test_one_model_is_loaded_and_answers_but_is_nothing_to_route_among(pool, task):
    model = load_model("embedded/slm", dtype="float32", verbose=False)
    assert model.fingerprint == pool.slm.fingerprint
    [own], [pooled] = (decode_alone(m, task, task.examples("test", 1), 40) for m in (model, pool.slm))
    np.testing.assert_array_equal(own.tokens, pooled.tokens)
    alone = ModelPool([model])
    for name in ("TokenRouting", "TreeRouting", "ShortcutRouting"):
        with pytest.raises(ValueError, match="a pool needs at least two models, the SLM first; it has embedded/slm"):
            gym.make(f"citer/{name}-v1", pool=alone, task=task)
    with pytest.raises(ValueError, match="embedded/slm is not of the pool"):
        decode_alone(model, task, task.examples("test", 1), pool=embedded_pool())
    with pytest.raises(ValueError, match="it has none"):
        ModelPool([])
    with pytest.raises(ValueError, match="no examples"):
        decode_alone(model, task, [])


# -- what policies score ----------------------------------------------------------------------------------------------


class Scoring(Policy):
    """Scores what it is told to, at its first decision or later."""

    def __init__(self, scores, right_before=0):
        self.scores, self.right_before, self.asked = scores, right_before, 0

    def score(self, observation):
        self.asked += 1
        count = len(observation.positions)
        return torch.full((count,), 0.25) if self.asked <= self.right_before else self.scores(count)


WRONG = [
    (lambda n: torch.full((n, 1), 0.5), ValueError, r"Scoring gave scores of shape \(3, 1\) to 3 decisions; .*\(3,\)"),
    (lambda n: torch.tensor(0.5), ValueError, r"Scoring gave scores of shape \(\) to 3"),
    (lambda n: torch.ones(n, dtype=torch.int64), ValueError, r"Scoring gave scores of type torch\.int64"),
    (lambda n: torch.ones(n, dtype=torch.bool), ValueError, r"Scoring gave scores of type torch\.bool"),
    (lambda n: [0.5] * n, TypeError, r"Scoring scored with builtins\.list; score must return a floating-point"),
    (lambda n: np.full((n, 1), 0.5), ValueError, r"Scoring gave scores of shape \(3, 1\) to 3"),
    (lambda n: np.ones(n, dtype=np.int32), ValueError, r"Scoring gave scores of type torch\.int32"),
    (lambda n: np.array(["half"] * n), TypeError, r"Scoring scored with an array of <U4; score must"),
    (lambda n: np.full(n, 1.5), ValueError, r"Scoring scored 1\.5; .* in \[0, 1\]"),
    (lambda n: None, TypeError, r"Scoring scored with builtins\.NoneType"),
    (lambda n: torch.full((n,), 1.5), ValueError, r"Scoring scored 1\.5; .* in \[0, 1\]"),
    (lambda n: torch.full((n,), -0.1, dtype=torch.float64), ValueError, r"Scoring scored -0\.1"),
    (lambda n: torch.full((n,), torch.inf), ValueError, "Scoring scored inf"),
    (lambda n: torch.full((n,), torch.nan), FloatingPointError, "Scoring scored NaN; check its weights"),
]


@pytest.mark.parametrize(("scores", "error", "message"), WRONG)
def test_scores_are_checked_at_the_first_decision_by_name(pool, task, scores, error, message):
    examples, policy = task.examples("test", 3), Scoring(scores)
    with pytest.raises(error, match=message):
        decode(pool, task, examples, policy, max_new_tokens=20)
    assert policy.asked == 1
    # where thresholds are chosen, another policy asks for them
    decoder = ExampleDecoder(pool, task, examples, 20, Scheduling(), None)
    with pytest.raises(error, match=message):
        record_scores(decoder, {"mine": Scoring(scores)})


def test_search_names_the_policy_whose_scores_are_none(pool, task):
    tree = PrefixTree(pool, task, 20)
    with pytest.raises(ValueError, match=r"Scoring gave scores of shape \(\d+, 1\)"):
        Oracle(budget=5).search(tree, task.examples("test", 20), likely=Scoring(lambda n: torch.full((n, 1), 0.5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_of_any_floating_point_type_pass_to_the_ends_of_the_range(pool, task, dtype):
    policy = Scoring(lambda n: torch.linspace(0, 1, n, dtype=dtype))
    assert len(decode(pool, task, task.examples("test", 3), policy, max_new_tokens=20)) == 3


def test_scores_may_be_arrays_of_any_layout_and_choose_what_tensors_choose(pool, task):
    def rising(n):
        return np.linspace(0, 1, n, dtype=np.float32)

    examples = task.examples("test", 3)
    expected = decode(pool, task, examples, Scoring(lambda n: torch.from_numpy(rising(n))), max_new_tokens=20)
    assert {0, 1} == {int(writer) for episode in expected for writer in episode.writers}
    decoder = ExampleDecoder(pool, task, examples, 20, Scheduling(), None)
    recorded = record_scores(decoder, {"mine": Scoring(lambda n: torch.from_numpy(rising(n)))})
    thresholds = choose_thresholds(recorded, [0.3, 0.6])
    layouts = (
        rising, lambda n: rising(n)[::-1].copy()[::-1], lambda n: np.stack([rising(n)] * 2, axis=1)[:, 0],
        lambda n: np.frombuffer(rising(n).tobytes(), dtype=np.float32),  # read-only
    )  # fmt: skip
    for scores in layouts:
        found = decode(pool, task, examples, Scoring(scores), max_new_tokens=20)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one.writers, other.writers)
            np.testing.assert_array_equal(one.scores, other.scores)
        assert choose_thresholds(record_scores(decoder, {"mine": Scoring(scores)}), [0.3, 0.6]) == thresholds


def test_a_rule_that_seldom_calls_is_evaluated_where_it_calls():
    """Quantiles below its share of zeros would all be zero, a threshold at which the LLM is never called."""
    rule, learned = np.repeat([0.0, 1.0], [9, 1]), np.linspace(0, 1, 10)
    scores = {"rule": rule, "learned": learned, "constant": np.zeros(10)}
    assert choose_thresholds(scores, [0.1, 0.3, 0.5]) == {
        "rule": [1.0],
        "learned": np.quantile(learned, [0.1, 0.3, 0.5]).tolist(),
        "constant": [0.0],
    }


def test_so_many_decisions_are_calls_at_the_thresholds_of_drafts():
    rng = np.random.default_rng(0)
    answers, length = 40, 300
    episodes = np.tile(np.arange(answers), length)  # one token of each in turn, as a batch writes them
    rates = rng.exponential(0.2, (length, answers))
    falling = np.exp(-np.cumsum(rates, axis=0)).ravel()  # a probability that all of the draft stands
    thresholds = np.quantile(called_at(falling, episodes), [0.03, 0.1, 0.3, 0.8])
    assert (np.diff(thresholds) > 0).all()
    for share, threshold in zip([0.03, 0.1, 0.3, 0.8], thresholds, strict=True):
        # the draft begins anew at each call, as in use
        calls, total = 0, np.zeros(answers)
        for own in rates:
            total += own
            called = np.exp(-total) < threshold
            calls += called.sum()
            total[called] = 0
        assert calls / rates.size == pytest.approx(share, rel=0.25)
    # quantiles of the scores themselves are those of drafts of hundreds of tokens
    assert np.quantile(falling, 0.3) < 1e-15
    # a score that does not fall with the draft has the quantiles that it has
    fresh = rng.random(answers * length)
    assert np.quantile(called_at(fresh, episodes), 0.1) == pytest.approx(0.1, abs=0.03)
    # the least that is known where no answer is long enough, the highest where each decision is a call
    assert called_at(np.array([0.5, 0.25, 0.75, 0.125]), np.array([0, 0, 1, 1]))[[0, 1, -1]].tolist() == [
        0.125,
        0.125,
        0.75,
    ]


def test_thresholds_by_calls_are_for_policies_that_check_drafts(pool, task):
    decoder = ExampleDecoder(pool, task, task.examples("test", 4), 40, Scheduling(), None)
    policies = {"checked_entropy": CheckedEntropy(), "entropy": Uncertainty()}
    by_scores, by_calls = (record_scores(decoder, policies, by) for by in (None, "calls"))
    assert by_calls["entropy"].tolist() == by_scores["entropy"].tolist()
    episodes = decoder.decode(CheckedEntropy(), 0.0)  # nobody is called; its scores fall with the entropies
    shares = [0.1, 0.3]
    expected = []
    for share in shares:
        left = int(len(episodes) * (1 / share - 1))
        falling = np.concatenate([one.scores[one.scores > 0] for one in episodes])  # an end that is drafted scores 0
        expected.append(np.sort(falling)[::-1][min(left, len(falling) - 1)])
    found = choose_thresholds(by_calls, shares)["checked_entropy"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="unknown thresholds_by 'tokens'; choose calls, or None"):
        EvaluationSettings(thresholds_by="tokens")
    assert EvaluationSettings().thresholds_found == {"thresholds_at": EvaluationSettings().thresholds_at}
    assert EvaluationSettings(thresholds_by="calls").thresholds_found["thresholds_by"] == "calls"


def test_an_observation_is_tensors_on_one_device(pool, task):
    class Spy(Policy):
        def __init__(self):
            self.seen = []

        def score(self, observation):
            self.seen.append(observation)
            # what a user writes: counts and states in one expression
            return torch.sigmoid(observation.hidden[:, 0] + observation.positions / 30 - observation.since_llm.log1p())

    tree, episodes = PrefixTree(pool, task, 20), []
    for decoded in (None, tree):
        spy = Spy()
        episodes.append(decode(pool, task, task.examples("test", 3), spy, max_new_tokens=20, tree=decoded))
        for seen in spy.seen:
            n = len(seen)
            shapes = {
                "hidden": ((n, pool.slm.width), torch.float32), "logit_features": ((n, 11), torch.float32),
                "positions": ((n,), torch.int64), "since_llm": ((n,), torch.int64), "episodes": ((n,), torch.int64),
            }  # fmt: skip
            for name, (shape, dtype) in shapes.items():
                value = getattr(seen, name)
                assert isinstance(value, torch.Tensor), name
                assert (value.shape, value.dtype, value.device) == (shape, dtype, seen.hidden.device), name
            np.testing.assert_array_equal(seen.positions, seen.host_positions)
            np.testing.assert_array_equal(seen.since_llm, seen.host_since_llm)
            assert seen.positions.data_ptr() == seen.host_positions.ctypes.data, "on the CPU nothing is copied"
    for one, other in zip(*episodes, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


def test_counts_are_where_the_hidden_states_are():
    counts = np.arange(3)
    seen = Observation(torch.zeros(3, 4, device="meta"), None, counts, counts, counts)
    assert {seen.positions.device, seen.episodes.device, seen.since_llm.device} == {torch.device("meta")}
    assert (seen.hidden[:, 0] + seen.positions).device.type == "meta"
    assert seen.vector("hidden").device.type == "meta"
    assert seen.host_positions is counts


def test_policies_are_told_apart_by_class_settings_and_weights():
    class Plain(Policy):
        def __init__(self, value=None):
            self.value = value

        def score(self, observation):
            return torch.ones(len(observation))

    class Other(Plain):
        pass

    assert Plain(1).fingerprint == Plain(1).fingerprint
    torch.manual_seed(0)
    one, two = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
    tensors = [torch.zeros(5000), torch.zeros(5000).index_fill(0, torch.tensor([2500]), 1e-6)]
    distinct = [Plain(), Plain(1), Plain(2), Other(1), *map(Plain, (one, two)), *map(Plain, tensors)]
    assert len({policy.fingerprint for policy in distinct}) == len(distinct)
    assert Plain(one).fingerprint == Plain(one).fingerprint
    assert [policy.parameters for policy in (Plain(), Plain(one))] == [0, 41 * 40]


def test_a_score_that_becomes_nan_later_is_named_too(pool, task):
    policy = Scoring(lambda n: torch.full((n,), torch.nan), right_before=2)
    with pytest.raises(FloatingPointError, match="Scoring scored NaN"):
        decode(pool, task, task.examples("test", 3), policy, max_new_tokens=20)
    assert policy.asked == 3
