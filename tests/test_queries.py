import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from agents.query_routing.embeddings import SentenceEmbedder, SentenceEmbedding, SlmEmbedding, TextEmbedding
from agents.query_routing.learner import QueryLearner
from agents.query_routing.outcomes import QueryOutcomes
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example
from experiments.common.config import CONF, build, register_schemas
from experiments.queries import compare, keep_splits
from experiments.query_routing.archive import pack
from experiments.query_routing.sources import PoolAnswers
from experiments.query_routing.splits import (
    SWEEP,
    Routed,
    Split,
    SplitSettings,
    check_split,
    cost_weights,
    draw_splits,
    embedded,
    route,
)
from experiments.query_routing.summary import measured

ROOT = Path(__file__).parent.parent
REAL = ROOT.parent / "shared" / "data" / "query_outcomes_two_llms.jsonl"
SUBJECTS = {"cheap": ("apple", "pear", "plum"), "middle": ("iron", "tin", "lead"), "dear": ("rain", "snow", "hail")}
PRICES = {"cheap": 1.0, "middle": 2.0, "dear": 10.0, "other": 3.0, "another": 4.0}


def topics(count=240, models=("cheap", "middle", "dear"), seed=0):
    """Queries about three subjects, each model right on its own, the dear one on all."""
    rng = np.random.default_rng(seed)
    prompts, groups, correct = [], [], []
    for _ in range(count):
        group = str(rng.choice(list(SUBJECTS)))
        words = rng.choice(SUBJECTS[group], 3).tolist() + rng.choice(["is", "was", "has", "of"], 3).tolist()
        prompts.append(" ".join(words))
        groups.append(group)
        correct.append([model == "dear" or group == model for model in models])
    costs = np.tile([PRICES[model] for model in models], (count, 1))
    return QueryOutcomes(prompts, groups, tuple(models), np.array(correct), costs)


def settings(*overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("queries", overrides=["bootstrap=20", *overrides])


def even(count):
    return np.full(count, 1 / count)


def test_a_split_repeats_and_its_parts_are_disjoint():
    outcomes = topics(100, ("cheap", "middle", "other", "another", "dear"))
    config = SplitSettings(unseen=2, validation_queries=20, test_share=0.3)
    first, again, second = (Split.draw(outcomes, config, number) for number in (0, 0, 1))
    np.testing.assert_array_equal(first.test, again.test)
    assert not np.array_equal(first.test, second.test)
    assert (len(first.train), len(first.known), len(first.test)) == (50, 20, 30)
    assert len({*first.train, *first.known, *first.test}) == 100
    assert {*first.training_models} | {*first.routed} == {*outcomes.models}
    assert (len(first.training_models), len(first.routed)) == (3, 2)
    assert len({Split.draw(outcomes, config, number).routed for number in range(20)}) > 3
    fixed = Split.draw(outcomes, SplitSettings(), 0)
    assert fixed.training_models == fixed.routed == outcomes.models
    np.testing.assert_array_equal(fixed.train, fixed.known)


def test_cost_weights_cover_the_shares_of_calls_evenly():
    errors = torch.rand(1000, 2, generator=torch.Generator().manual_seed(0))
    costs = np.array([0.1, 1.0])
    choices = np.stack([(errors.double() + w * torch.from_numpy(costs)).argmin(1) for w in cost_weights(errors, costs)])
    shares = np.sort(choices.mean(1))
    assert shares[0] < 0.01
    assert shares[-1] > 0.99
    assert np.diff(shares).max() < 2 / SWEEP


def test_who_knows_the_outcomes_gains_all_and_who_guesses_gains_nothing():
    rng = np.random.default_rng(0)
    count = 4000
    correct = np.stack([rng.random(count) < 0.5, rng.random(count) < 0.8], axis=1)
    outcomes = QueryOutcomes(["q"] * count, [""] * count, ("cheap", "dear"), correct, np.tile([0.1, 1.0], (count, 1)))
    costs = outcomes.costs.mean(0)

    def of(errors):
        routed = Routed(route(torch.from_numpy(errors), costs))
        return measured(routed.sweep(outcomes), routed.calls(outcomes), even(count))

    knows = of(1.0 - correct)
    assert knows["peak_accuracy"] == pytest.approx(correct.any(1).mean())
    assert knows["apgr"] > 0.9
    assert knows["qnc"] < 0.5
    guesses = of(rng.random((count, 2)))
    assert guesses["apgr"] == pytest.approx(0.5, abs=0.04)
    assert guesses["area_above_line"] == pytest.approx(0, abs=0.02)


def test_models_stand_in_one_order_in_all_parts_of_a_split():
    outcomes = topics(60, ("cheap", "middle", "other", "dear"))
    costs = outcomes.costs.copy()
    costs[:, 1:3] = 2.0
    costs[:30, 1] += 0.5  # on the whole the dearer of the two, but the cheaper one on the last queries
    costs[30:, 2] += 0.4
    outcomes = QueryOutcomes(outcomes.prompts, outcomes.groups, outcomes.models, outcomes.correct, costs)
    names = ("middle", "other", "dear")
    for rows in (np.arange(30), np.arange(30, 60)):
        part = embedded(outcomes, torch.zeros(60, 2), rows, names)
        assert part.models == outcomes.of(names).rows(rows).models == ("other", "middle", "dear")
        np.testing.assert_array_equal(part.correct, outcomes.correct[rows][:, [2, 1, 3]])


def test_a_curve_stands_between_the_cheapest_model_and_the_best():
    outcomes = topics(60)
    sweep = Routed(np.ones((SWEEP, 60), dtype=np.int8)).sweep(outcomes)
    np.testing.assert_array_equal(sweep.correct[0], outcomes.correct[:, 0])
    np.testing.assert_array_equal(sweep.correct[-1], outcomes.correct[:, 2])
    np.testing.assert_array_equal(sweep.correct[1], outcomes.correct[:, 1])
    np.testing.assert_allclose(sweep.points(even(60))[-1], [1.0, 1.0])


def test_agents_route_by_subject_over_splits_and_a_second_start_makes_no_split_again(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    topics().write(path)
    overrides = [
        "outcomes=file", f"outcomes.path={path}", "embedding=text", "embedding.dimensions=6", "splits=2",
        "+agent@agents.knn=knn", "+agent@agents.uniroute=uniroute_kmeans",
    ]  # fmt: skip
    summary = compare(settings(*overrides), tmp_path / "run")
    for name in ("knn", "uniroute", "oracle"):
        measures = summary["policies"][name]["measures"]
        assert measures["area_above_line"]["interval"][0] > 0, name  # two splits say little
        assert measures["qnc"]["value"] < 0.6, name
        assert measures["peak_accuracy"]["value"] > 0.95, name
    assert (tmp_path / "run" / "curve.png").stat().st_size > 10_000
    assert "uniroute" in (tmp_path / "run" / "table.md").read_text()
    made = {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "splits").glob("*.safetensors")}
    assert compare(settings(*overrides), tmp_path / "run") == summary
    assert made == {p: p.stat().st_mtime_ns for p in (tmp_path / "run" / "splits").glob("*.safetensors")}
    with pytest.raises(ValueError, match="test_share"):
        compare(settings(*overrides, "test_share=0.5"), tmp_path / "run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["splits=0", "+agent@agents.knn=knn"], "splits"),
        (["test_share=1", "+agent@agents.knn=knn"], "test_share"),
        ([], "nothing to compare"),
        (["+agent@agents.mine=knn"], "first"),
        (["+agent@agents.knn=citer"], "does not route whole queries"),
        (["+agent@agents.knn=knn", "outcomes.path=there/is/none.jsonl"], "holds no query outcomes"),
        (["+agent@agents.knn=knn", "unseen=2"], "unseen"),
        (["+agent@agents.knn=knn", "unseen=0", "embedding.dimensions=1000"], "dimensions"),
        (["+agent@agents.knn=uniroute_kmeans", "agents.knn.clusters=5000"], "clusters"),
    ],
)
def test_bad_settings_are_named(overrides, message, tmp_path):
    topics(60).write(tmp_path / "outcomes.jsonl")
    given = [
        "outcomes=file",
        f"outcomes.path={tmp_path / 'outcomes.jsonl'}",
        "embedding=text",
        "embedding.dimensions=4",
    ]
    with pytest.raises(ValueError, match=message):
        compare(settings(*given, *overrides), tmp_path / "run")


def test_too_few_models_or_queries_are_refused():
    with pytest.raises(ValueError, match="at least two models on either side"):
        check_split(topics(60), SplitSettings(unseen=2))
    with pytest.raises(ValueError, match="validation_queries"):
        check_split(topics(60, ("cheap", "middle", "other", "dear")), SplitSettings(unseen=2, validation_queries=58))
    with pytest.raises(ValueError, match="at least two models"):
        topics(10, ("dear",))


def test_every_outcomes_and_embedding_option_composes():
    for group in ("outcomes", "embedding"):
        for path in (CONF / group).glob("*.yaml"):
            assert settings(f"{group}={path.stem}")[group]._target_


@pytest.mark.parametrize("name", ["changing_pool", "two_llms"])
def test_every_experiment_builds_its_agents(name):
    config = settings(f"experiment={name}")
    assert config.first in config.agents
    for agent in config.agents:
        assert isinstance(build(config.agents, agent), QueryLearner)


def test_the_slm_embeds_a_query_by_its_state_after_it(pool):
    prompts = [ArithmeticTask().example("test", number).prompt for number in range(5)]
    states = SlmEmbedding(rows=2).fit([]).embed(prompts)
    for prompt, state in zip(prompts, states, strict=True):
        ids = torch.from_numpy(pool.encode(prompt))[None]
        hidden = pool.slm.network.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        torch.testing.assert_close(state, hidden, atol=1e-4, rtol=1e-4)


def test_a_query_longer_than_an_embedding_reads_is_named(monkeypatch):
    with pytest.raises(ValueError, match=r"query 1 .*longer"):
        SlmEmbedding(capacity=16).fit([]).embed(["short", "longer " * 20])

    class Network:
        max_seq_length = 4

        def tokenizer(self, prompt, truncation):
            return {"input_ids": prompt.split()}

        def encode(self, prompts, batch_size, show_progress_bar):
            return np.ones((len(prompts), 3))

    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="citer-gym\\[sentences\\]"):
        SentenceEmbedding().fit([])
    assert SentenceEmbedder(Network(), 8).embed(["a b", "c"]).shape == (2, 3)
    with pytest.raises(ValueError, match=r"query 1 .*has 5 tokens, the embedding reads 4"):
        SentenceEmbedder(Network(), 8).embed(["a b", "c d e f g"])


def test_words_that_training_queries_do_not_share_are_not_seen():
    embedder = TextEmbedding(dimensions=2, fewest=1).fit(["red apple", "green apple", "red car", "green car"])
    seen = embedder.embed(["red apple", "zebra", "red apple zebra"])
    assert seen.shape == (3, 2)
    assert seen[1].abs().sum() == 0
    torch.testing.assert_close(seen[0], seen[2])
    torch.testing.assert_close(seen[0].norm(), torch.tensor(1.0))
    with pytest.raises(ValueError, match="lower dimensions"):
        TextEmbedding(dimensions=3, fewest=4).fit(["red apple"] * 4)


def test_a_pool_answers_once_and_costs_follow_sizes(tmp_path, pool, monkeypatch):
    tasks = {"mixed": ArithmeticTask(), "sums": ArithmeticTask(operations="+-")}
    source = PoolAnswers(pool, tasks, examples=6, max_new_tokens=64)
    outcomes = source.read(tmp_path)
    assert outcomes.groups == ["mixed"] * 6 + ["sums"] * 6
    assert (outcomes.costs[:, 1] > 5 * outcomes.costs[:, 0]).all()
    monkeypatch.setattr("experiments.query_routing.sources.answer_alone", lambda *given: pytest.fail("answered again"))
    again = source.read(tmp_path)
    np.testing.assert_array_equal(again.correct, outcomes.correct)
    np.testing.assert_allclose(again.costs, outcomes.costs)
    with pytest.raises(ValueError, match="examples"):
        PoolAnswers(pool, tasks, examples=7, max_new_tokens=64).read(tmp_path)


def test_models_stand_in_one_order_at_every_start(tmp_path, monkeypatch):
    count, names = 40, ("one", "two", "three", "four")
    rng = np.random.default_rng(0)
    costs = np.stack([np.full(count, 3.0), np.full(count, 2.0), np.full(count, 2.0), np.full(count, 1.0)], axis=1)
    costs[0] = [0.5, 4.0, 3.0, 9.0]  # the first query alone tells otherwise
    costs[1] = [5.5, 2.0, 3.0, 1.0]  # on the whole `two` and `three` cost the same

    def answer_alone(pool, task, examples, *settings):
        prompts = [example.prompt for example in examples]
        return QueryOutcomes(prompts, ["all"] * count, names, rng.random((count, 4)) < 0.5, costs), None

    monkeypatch.setattr("experiments.query_routing.sources.answer_alone", answer_alone)
    monkeypatch.setattr("experiments.query_routing.sources.models_manifest", lambda pool: [])
    source = PoolAnswers(SimpleNamespace(names=names), {"all": ArithmeticTask()}, examples=count)
    first, second = source.read(tmp_path), source.read(tmp_path)
    assert first.models == second.models == ("four", "three", "two", "one")
    for array in ("correct", "costs"):
        ours, again = getattr(first, array), getattr(second, array)
        np.testing.assert_array_equal(ours, again)
        assert ours.strides == again.strides  # sums over them add in one order
    settings = SplitSettings(splits=3, unseen=2, validation_queries=5)
    assert [split.routed for split in draw_splits(first, settings)] == [
        split.routed for split in draw_splits(second, settings)
    ]


def test_splits_of_an_unknown_order_of_models_are_refused(tmp_path):
    path = tmp_path / "outcomes.jsonl"
    topics(60).write(path)
    config = settings(
        "outcomes=file", f"outcomes.path={path}", "embedding=text", "embedding.dimensions=4", "splits=1",
        "+agent@agents.knn=knn",
    )  # fmt: skip
    compare(config, tmp_path / "run")
    manifest = tmp_path / "run" / "splits" / "manifest.json"
    kept = json.loads(manifest.read_text())
    assert kept.pop("models") == ["cheap", "middle", "dear"]
    manifest.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match=r"kept no order of the models.*: delete .*splits, and start again"):
        compare(config, tmp_path / "run")
    shutil.rmtree(manifest.parent)
    compare(config, tmp_path / "run")


def test_what_is_kept_as_one_file_is_gone_on_from(tmp_path, monkeypatch):
    path, kept = tmp_path / "outcomes.jsonl", tmp_path / "results" / "study.tar.xz"
    topics(60).write(path)
    config = settings(
        "outcomes=file", f"outcomes.path={path}", "embedding=text", "embedding.dimensions=4", "splits=2",
        "+agent@agents.knn=knn", f"results={kept}",
    )  # fmt: skip
    first = compare(config, tmp_path / "first")
    packed = kept.read_bytes()
    pack(tmp_path / "first", kept)
    assert kept.read_bytes() == packed
    monkeypatch.setattr("agents.query_routing.knn.Neighbours.fit_queries", lambda *args: pytest.fail("fitted again"))
    assert compare(config, tmp_path / "second") == first
    names = [path.relative_to(tmp_path / "first") for path in (tmp_path / "first" / "splits").iterdir()]
    for name in names:
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    config.embedding.dimensions = 5
    with pytest.raises(ValueError, match=r"study.tar.xz does not go with these settings; say results=null"):
        compare(config, tmp_path / "other")
    assert not (tmp_path / "other" / "splits").exists()
    kept.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match=r"study.tar.xz cannot be read .*delete it to make it anew"):
        compare(config, tmp_path / "third")


def test_queries_of_a_pool_are_distinct(tmp_path, monkeypatch):
    class Numbers(ArithmeticTask):
        def example(self, split, index):
            return Example(f"{split}/{index}", f"{index // 2}?", f"#### {index // 2}", f"{index // 2}")

    class FewNumbers(Numbers):
        def size(self, split):
            return 10

    asked = []

    def answer_alone(pool, task, examples, *settings):
        asked.append([example.prompt for example in examples])
        outcomes = np.ones((len(examples), 2))
        return QueryOutcomes(asked[-1], ["all"] * len(examples), ("one", "two"), outcomes, outcomes * [[1, 2]]), None

    monkeypatch.setattr("experiments.query_routing.sources.answer_alone", answer_alone)
    monkeypatch.setattr("experiments.query_routing.sources.models_manifest", lambda pool: [])
    pool = SimpleNamespace(names=["one", "two"])
    outcomes = PoolAnswers(pool, {"first": Numbers(), "second": Numbers()}, examples=3, start=2).read(tmp_path / "a")
    assert asked == [["1?", "2?", "3?"], ["4?", "5?", "6?"]]
    assert outcomes.groups == ["first"] * 3 + ["second"] * 3
    with pytest.raises(ValueError, match=r"task second has 2 distinct test examples from 0 on .* 3 were asked for"):
        PoolAnswers(pool, {"first": Numbers(), "second": FewNumbers()}, examples=3).read(tmp_path / "b")


def test_the_embedded_pool_is_ordered_by_cost():
    pool = build(settings(), "outcomes").pool
    assert len(pool) == 10
    sizes = [profile.body_parameters + profile.head_parameters for profile in pool.profiles]
    assert sizes == sorted(sizes)
    assert isinstance(pool, ModelPool)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason="the real outcomes are not here")
def test_routers_beat_guessing_on_real_outcomes(tmp_path):
    config = settings(
        "experiment=two_llms", f"outcomes.path={REAL}", "splits=1", "bootstrap=100", "embedding.dimensions=64",
        "results=null", "~agents.mlp", "~agents.uniroute_learned", "~agents.routellm_classifier",
    )  # fmt: skip
    summary = compare(config, tmp_path)
    for name in ("routellm_mf", "routellm_sw", "uniroute_kmeans", "knn"):
        assert summary["policies"][name]["measures"]["apgr"]["interval"][0] > 0.5, name


def test_splits_go_with_another_machine_and_not_with_other_models(tmp_path):
    def made_by(**pool):
        return {"outcomes": {"pool": {"names": ["one", "two"], "dtype": "float32", **pool}}, "seed": 0}

    keep_splits(tmp_path, made_by(rows=8), ["one", "two"])
    keep_splits(tmp_path, made_by(rows=4, device="cuda", later=None), ["one", "two"])
    with pytest.raises(ValueError, match="was made with outcomes"):
        keep_splits(tmp_path, made_by(dtype="bfloat16"), ["one", "two"])
    with pytest.raises(ValueError, match="was made with seed 0, this run has 1"):
        keep_splits(tmp_path, {**made_by(), "seed": 1}, ["one", "two"])
