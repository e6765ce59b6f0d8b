"""The oracle, what is distilled from it, and counterfactual advantages: against plain decoding."""

import json
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from agents.checking.entropy import CheckedEntropy
from agents.common.curves import Hull
from agents.common.policy import Policy
from agents.common.rollout import Scheduling, decode
from agents.distillation import OracleDistillation
from agents.heuristics import Always, Random
from agents.oracle import Oracle
from agents.rl.branching import branch_loss
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from agents.searched_states import OracleStates, SearchedStates
from agents.tapo import Tapo, _Improvement
from envs.costs import ALL_COSTS, PASSES, MemoryTraffic, response_entries
from envs.decoding.decoder import since_at_each, since_llm
from envs.decoding.judges import FirstDisagreement, Gap, TopK
from envs.decoding.observation import feature_width
from envs.environments.token_routing import RoutingVectorEnv
from envs.models.pool import models_manifest
from envs.prefix_tree.tree import TERMINATED, PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from experiments.evaluation.answers import Answers, sweep
from experiments.evaluation.baselines import Baselines, measure_baselines, oracle_outcomes
from experiments.evaluation.decoder import ExampleDecoder
from experiments.measures.metrics import oracle_share

EXAMPLES = 16


@pytest.fixture(scope="module")
def examples(task):
    return task.examples("validation", EXAMPLES, start=500)


@pytest.fixture(scope="module")
def tree(pool, task):
    return PrefixTree(pool, task, memory=2**27)


@pytest.fixture(scope="module")
def found(tree, examples):
    return Oracle(budget=200).search(tree, examples, label=None)


def routed(pool, task, examples, plans):
    """Whether the answers to `examples` routed by `plans`, (n, 128) of actions, are right; decoded live, together."""
    environment = RoutingVectorEnv(len(plans), pool=pool, task=task)
    environment.reset(seed=0, options={"examples": examples})
    verdicts, finals = np.full(len(plans), -1), [None] * len(plans)
    for step in range(plans.shape[1]):
        *_, infos = environment.step(plans[:, step])
        for row in np.flatnonzero(infos.get("_final_info", np.zeros(len(plans), dtype=bool))):
            if verdicts[row] < 0:
                verdicts[row] = infos["final_info"]["correct"][row]
                finals[row] = {key: infos["final_info"][key][row] for key in ("llm_tokens", "total_cost_bytes")}
        if (verdicts >= 0).all():
            return verdicts, finals
    raise AssertionError("responses go on beyond the limit")


def plans_of(found):
    plans = np.zeros((len(found), 128), dtype=int)
    for plan, one in zip(plans, found, strict=True):
        plan[: len(one.writers)] = one.writers
    return plans


def test_what_the_oracle_finds_is_right_when_it_is_decoded(found, pool, task, examples, tree):
    assert sum(one.solved for one in found) > EXAMPLES / 2
    verdicts, finals = routed(pool, task, examples, plans_of(found))
    for one, example, verdict, final in zip(found, examples, verdicts, finals, strict=True):
        assert bool(verdict) == one.solved
        assert final["llm_tokens"] == one.llm_tokens
        prompt = len(pool.encode(example.prompt))
        entries = response_entries(prompt, one.writers, tree.ends[one.nodes[-1]] == TERMINATED, len(pool))
        assert MemoryTraffic().of(entries, pool.profiles) == pytest.approx(final["total_cost_bytes"])


def test_no_routing_with_fewer_llm_tokens_is_right(found, pool, task, examples):
    """All routings with one LLM token less, for problems that need one or two."""
    counts = [one.llm_tokens for one in found if one.solved]
    assert 1 in counts
    ones = [example for one, example in zip(found, examples, strict=True) if one.solved and one.llm_tokens == 1]
    assert not routed(pool, task, ones, np.zeros((len(ones), 128), dtype=int))[0].any()
    for one, example in zip(found, examples, strict=True):
        if one.solved and one.llm_tokens == 2:
            assert not routed(pool, task, [example] * 100, np.eye(128, dtype=int)[:100])[0].any()


def test_the_least_cost_is_no_more_than_that_of_the_fewest_tokens(found, pool, examples, tree):
    def cost(one, example):
        prompt = len(pool.encode(example.prompt))
        return float(MemoryTraffic().of(response_entries(prompt, one.writers, True, len(pool)), pool.profiles))

    some = [i for i, one in enumerate(found) if one.solved and one.llm_tokens <= 1][:4]
    cheapest = Oracle(cost="bytes", budget=2000).search(tree, [examples[i] for i in some], label=None)
    for i, one in zip(some, cheapest, strict=True):
        assert one.solved
        assert not one.exhausted
        assert cost(one, examples[i]) <= cost(found[i], examples[i])


class Planned(Policy):
    """Calls the LLM where it writes in plans, one an episode."""

    observes = True

    def __init__(self, plans, judge):
        self.plans, self.judge = plans, judge

    def score(self, observation):
        places = zip(observation.host_episodes, observation.host_positions, strict=True)
        asked = [at < len(self.plans[episode]) and self.plans[episode][at] > 0 for episode, at in places]
        return 1.0 - torch.tensor(asked, dtype=torch.float64)


def test_the_oracle_is_the_limit_of_what_checks_drafts_too(found, pool, task, examples, tree):
    # what stands of a draft is the SLM's own, so that each answer is a routing, and each token of the LLM in it a call
    right = 0
    for judge, threshold in ((Gap(2.0), 0.01), (Gap(2.0), 0.3), (TopK(2), 0.1), (FirstDisagreement(), 0.1)):
        for result, episode in zip(
            found, decode(pool, task, examples, CheckedEntropy(judge), threshold, tree=tree), strict=True
        ):
            if episode.correct and not result.exhausted:
                assert episode.ledger[-1, PASSES] >= result.llm_tokens
                right += 1
    assert right > EXAMPLES
    # and who knows when to call takes nothing back: the same answers at the same price
    plans = [result.writers for result in found]
    for result, episode in zip(
        found, decode(pool, task, examples, Planned(plans, Gap(float("inf"))), 0.5), strict=True
    ):
        assert episode.tokens.tolist() == tree.tokens[result.nodes[:-1], result.writers].tolist()
        assert episode.ledger[-1, PASSES] == result.llm_tokens
        assert not episode.taken_back


def test_a_budget_that_runs_out_is_reported(found, pool, task, examples):
    hard = [i for i, one in enumerate(found) if one.llm_tokens > 0][:3]
    cut = Oracle(budget=1).search(PrefixTree(pool, task, memory=2**25), [examples[i] for i in hard], label=None)
    assert all(one.exhausted and not one.solved and one.walks == 1 for one in cut)
    alone = decode(pool, task, [examples[i] for i in hard], Always(slm=True))
    for one, episode in zip(cut, alone, strict=True):
        assert len(one.writers) == len(episode.tokens)
        assert not one.writers.any()


def test_a_search_goes_on_from_any_state(found, pool, task, examples, tree):
    number = next(i for i, one in enumerate(found) if one.solved and one.llm_tokens == 1)
    one = found[number]
    depth = int(np.flatnonzero(one.writers)[0]) + 1  # behind the only LLM token
    (rest,) = Oracle().search(
        tree, [examples[number]], [int(one.nodes[depth])], [one.writers[:depth]], label=None
    )  # fmt: skip
    assert rest.solved
    assert rest.llm_tokens == 0
    np.testing.assert_array_equal(rest.nodes, one.nodes[depth:])


def test_a_second_search_runs_no_model(found, examples, tree, monkeypatch):
    monkeypatch.setattr("envs.models.language_model.LanguageModel.feed", None)
    again = Oracle(budget=200).search(tree, examples, label=None)
    assert [one.llm_tokens for one in again] == [one.llm_tokens for one in found]


def test_oracle_settings_are_checked():
    with pytest.raises(ValueError, match="seconds"):
        Oracle(cost="seconds")
    with pytest.raises(ValueError, match="budget"):
        Oracle(budget=0)


def test_since_at_each_by_hand():
    writers = np.array([0, 1, 0, 0, 1, 1, 0], dtype=np.int8)
    assert since_at_each(writers).tolist() == [0, 1, 0, 1, 2, 0, 0]
    assert since_llm(writers) == 1
    assert since_llm(writers[:0]) == 0
    assert len(since_at_each(writers[:0])) == 0


@dataclass(frozen=True)
class SearchesKnownTree(ExampleDecoder):
    """Decodes live, and searches a tree that is there already."""

    known: PrefixTree | None = None

    def search(self, oracle):
        return self.known, oracle.search(self.known, self.examples)


class NeverDecodes(ExampleDecoder):
    def decode(self, *args):
        raise AssertionError("decoded again")

    search = speculate = decode


@pytest.fixture(scope="module")
def measured(pool, task, examples, tree, tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits")

    decoder = SearchesKnownTree(pool, task, examples, scheduling=Scheduling(rows=16), known=tree)
    about = {"examples": len(examples)}
    limits = measure_baselines(decoder, Oracle(budget=200), folder=folder, about=about)
    return limits, folder, decoder.decode


def test_limits_are_measured_once(measured, pool, task, examples):
    limits, folder, _ = measured
    never = NeverDecodes(pool, task, examples)
    again = measure_baselines(never, Oracle(budget=200), folder=folder, about={"examples": len(examples)})
    for one, other in ((limits.oracle, again.oracle), (limits.llm, again.llm)):
        np.testing.assert_array_equal(one.costs["bytes"], other.costs["bytes"])
    with pytest.raises(ValueError, match="examples"):
        measure_baselines(never, folder=folder, about={"examples": 3})
    assert Baselines.load(folder).exhausted == limits.exhausted


def test_the_frontier_rises_from_the_slm_to_the_oracle(measured, found, tree):
    limits, _, _ = measured
    frontier = limits.frontier("llm_tokens")
    accuracies = [float(run.correct.mean()) for run in frontier]
    tokens = [float(run.llm_tokens.sum()) for run in frontier]
    assert accuracies == sorted(accuracies)
    assert tokens == sorted(tokens)
    assert accuracies[0] == limits.slm.correct.mean()
    assert tokens[0] == 0
    assert accuracies[-1] == np.mean([one.solved for one in found])
    whole = oracle_outcomes(tree, found, limits.slm)
    assert tokens[-1] == whole.llm_tokens[whole.correct & ~limits.slm.correct].sum()


def test_shares_of_the_oracles_area(measured, pool):
    limits, _, run = measured
    even = np.full(EXAMPLES, 1 / EXAMPLES)

    def of(runs):
        return sweep(runs, limits.slm, limits.llm, "bytes")

    oracle = of(limits.frontier("bytes"))
    assert oracle_share(of([]), oracle, even) == 0
    assert oracle_share(oracle, oracle, even) == 1
    other = of([Answers.of(run(Random(7), 0.4, ""), pool)])
    assert 0 <= oracle_share(other, oracle, even) < 1
    # no cheaper point of any routing is above the oracle's
    best = Hull.of(oracle.points(even))
    assert all(best.accuracy_at(cost) >= accuracy for cost, accuracy in Hull.of(other.points(even)).vertices[:-1])


def test_states_taught_are_those_of_live_decoding(found, pool, task, examples, tree):
    number = next(i for i, one in enumerate(found) if one.solved and one.llm_tokens)
    taught = OracleStates.of([found[number]], [number])
    environment = RoutingVectorEnv(1, pool=pool, task=task, features="hidden_logits_history")
    observation, _ = environment.reset(seed=0, options={"examples": [examples[number]]})
    seen = taught.features(tree, "hidden_logits_history").float().numpy()
    for row, prefers_slm in zip(seen, taught.prefers_slm, strict=True):
        np.testing.assert_allclose(row, observation[0], rtol=2e-3, atol=2e-3)
        observation = environment.step(np.array([int(not prefers_slm)]))[0]


def test_the_expert_goes_on_from_what_it_found_and_iterates(pool, task, tmp_path, monkeypatch):
    settings = {"examples": 24, "oracle": Oracle(budget=50), "memory": 2**26}
    rows = []
    first = OracleDistillation(**settings).fit(pool, task, track=rows.append, folder=tmp_path)
    assert (tmp_path / "expert.tree").is_file()
    assert all(json.dumps(row) for row in rows)
    for kept in tmp_path.glob("round-*"):
        kept.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("envs.models.language_model.LanguageModel.feed", None)  # all is known: no model runs
        again = OracleDistillation(**settings).fit(pool, task, folder=tmp_path)
    assert again.fingerprint == first.fingerprint
    later = OracleDistillation(**settings, rounds=2, ties="router").fit(pool, task, track=rows.append, folder=tmp_path)
    assert later.fingerprint != first.fingerprint
    second = next(row for row in rows if row["run"] == "round 2" and "states" in row)
    assert second["states"] > rows[0]["states"]
    with pytest.raises(ValueError, match="raise memory"):
        OracleDistillation(examples=24, memory=2**18).fit(pool, task)
    with pytest.raises(ValueError, match="ties"):
        OracleDistillation(ties="luck")


def test_counterfactual_advantages_equal_plain_decoding(pool, task, examples):
    """Of asking the LLM at a state, then following the router: both answers decoded live."""
    torch.manual_seed(1)
    features = "hidden_logits_history"
    policy = RouterPolicy(
        RouterNetwork(feature_width(features, pool.slm.width)).eval(), models_manifest(pool), features
    )
    settings = Tapo(start="scratch", examples=8, batch=8, rows=8, llm_share=0.2)
    tree = PrefixTree(pool, task, memory=2**26)
    run = _Improvement(settings, tree, examples[:4], policy, seed=0)
    problems = np.arange(4)
    nothing = np.zeros(4, dtype=np.int64)
    _, _, states = run._follow(run._roots(problems), nothing, nothing - 1, False)
    position = 5
    nodes, since = (np.array([column[position] for column in part]) for part in zip(*states, strict=True))
    advantages = run._advantages(nodes, since, problems, price=0.1)
    shifted = RouterPolicy(run.network, policy.models, features)

    class Forced(Policy):
        def __init__(self, action):
            self.action = action

        def score(self, observation):
            scores = shifted.score(observation).detach()
            scores[observation.positions == position] = float(self.action == 0)
            return scores

    values = []
    for action in (1, 0):
        episodes = decode(pool, task, examples[:4], Forced(action), 0.5)
        calls = np.array([(episode.writers[position:] > 0).sum() for episode in episodes])
        values.append(np.array([episode.correct for episode in episodes]) - 0.1 * calls)
    np.testing.assert_allclose(advantages, values[0] - values[1])


def test_the_branch_loss_raises_what_pays():
    logits = torch.tensor([0.0, 0.0], requires_grad=True)
    loss = branch_loss(logits, torch.tensor([0.9, -0.1]))
    assert loss.item() == pytest.approx(-0.2)
    loss.backward()
    # towards the LLM where it brings 0.9, towards the SLM where it costs 0.1
    assert logits.grad[0] == pytest.approx(0.25 * 0.9 / 2)
    assert logits.grad[1] == pytest.approx(-0.25 * 0.1 / 2)


def test_every_reproducible_cost_can_be_minimised():
    for cost in ALL_COSTS:
        assert not cost.reproducible or Oracle(cost=cost.name).cost == cost.name


def test_an_expert_learns_from_searches_that_were_collected(pool, task, tmp_path):
    agent = OracleDistillation(examples=24, shard_examples=10, oracle=Oracle(budget=50), memory=2**26)
    store, told = agent.collect(pool, task, 0, tmp_path / "searches"), []
    given = replace(agent, searched=f"{tmp_path / 'searches'}")
    collected = SearchedStates.kept(store)
    # those of one tree of all problems, whose passes read other problems beside them
    problems = task.examples("train", 24, start=task.training_start(0))
    tree = PrefixTree(pool, task, memory=2**26)
    whole = SearchedStates.of(agent.oracle.search(tree, problems), range(24), tree, agent.features)
    assert collected.about == whole.about
    np.testing.assert_array_equal(collected.prefers_slm, whole.prefers_slm)
    np.testing.assert_array_equal(collected.examples, whole.examples)
    np.testing.assert_allclose(collected.features.float(), whole.features.float(), rtol=2e-3, atol=2e-3)
    given.fit(pool, task, track=told.append, folder=tmp_path)
    assert not (tmp_path / "expert.tree").exists()
    assert told[0]["states"] == len(whole.features) == sum(store.rows())
    for change in ({"oracle": Oracle(budget=49)}, {"features": "hidden"}, {"examples": 23}):
        with pytest.raises(ValueError, match="searches"):
            replace(given, **change).fit(pool, task)
    (tmp_path / "searches" / "shard-00001.json").unlink()
    with pytest.raises(ValueError, match=r"shard-00001.arrow of 3 shards is missing"):
        given.fit(pool, task)


def test_searches_that_solve_nothing_leave_files_without_rows(pool, tmp_path):
    agent = OracleDistillation(examples=2, shard_examples=2, oracle=Oracle(budget=1), memory=2**24, max_new_tokens=1)
    store = agent.collect(pool, ArithmeticTask(level="hard"), 0, tmp_path)
    assert store.rows() == [0]
    assert SearchedStates.kept(store).features.shape == (0, feature_width(agent.features, pool.slm.width))


def test_what_a_router_that_is_improved_sees_is_said_where_it_is_trained():
    assert Tapo(start="scratch", features="hidden").features == "hidden"
    with pytest.raises(ValueError, match=r"features=hidden is what a router from scratch sees.* say citer\.features="):
        Tapo(features="hidden")
    with pytest.raises(ValueError, match="leave it out, or start=scratch"):
        Tapo(start="scratch", policy="outputs/begun/policy", features="hidden")
