"""What policies see of prompts beside the SLM's state: the LLM reads them at a price, words are embedded."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

import agents.query_routing.learner
from agents.common.policy import VIEWS
from agents.common.rollout import Scheduling, decode, look
from agents.common.saving import load_policy
from agents.heuristics import Always, Random
from agents.query_routing.embeddings import TextEmbedder, TextEmbedding
from agents.query_routing.inputs import PromptViews, RouterInputs, check_views
from agents.query_routing.knn import Neighbours
from agents.query_routing.mlp import QueryMlp
from agents.query_routing.routellm import SimilarityWeighted
from agents.router.training import RouterTraining
from envs.costs import COLUMNS, PASSES, READ, SECONDS, WRITTEN, pass_entry, response_entries
from envs.decoding.observation import Observation
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.prefix_tree.tree import PrefixTree
from envs.prefix_tree.tree_session import TreeSession
from envs.tasks.arithmetic import ArithmeticTask
from experiments.evaluation.kept import KeptEvaluation
from experiments.evaluation.runner import evaluate
from experiments.evaluation.settings import EvaluationSettings
from experiments.traces.trace import read_trace, write_trace
from experiments.verification.evaluation import Verification

ONCE, FEW = Scheduling(rows=16), TextEmbedding(dimensions=6)
SHORT = {"examples": 40, "max_new_tokens": 40, "scheduling": ONCE, "text": FEW}
COUNTED = [column for column in range(COLUMNS) if column != SECONDS]
BRIEF = RouterTraining(epochs=2, batch_size=16, units=[8])


class Seeing(Random):
    """Draws each writer, and has the LLM read every prompt."""

    @property
    def sees(self):
        return VIEWS


@pytest.fixture(scope="module")
def easy():
    return ArithmeticTask("easy")


@pytest.fixture(scope="module")
def answered(pool, easy, tmp_path_factory):
    """Folders that hold what the embedded pair makes of a few problems, by what is seen of them."""
    folders = {sees: tmp_path_factory.mktemp("-".join(sees)) for sees in (VIEWS, ("slm", "text"), ("slm",))}
    for sees, folder in folders.items():
        SimilarityWeighted(sees=sees, **SHORT).fit(pool, easy, seed=1, folder=folder)
    return folders


@pytest.fixture(scope="module")
def policy(answered, pool, easy):
    """One that sees all there is, and sends half of the queries to either model."""
    return SimilarityWeighted(sees=VIEWS, llm_share=0.5, **SHORT).fit(pool, easy, seed=1, folder=answered[VIEWS])


def started(kind, pool, examples, rows=None):
    prompts = [pool.encode(example.prompt) for example in examples]
    kind.start(np.arange(len(prompts)) if rows is None else rows, prompts)
    return [len(prompt) for prompt in prompts]


# -- the LLM's reading, and what it costs -----------------------------------------------------------------------------


def test_the_llm_reads_every_prompt_once_and_is_charged_for_it(policy, pool, easy):
    examples = easy.examples("validation", 16)
    episodes = decode(pool, easy, examples, policy, 0.5, 40, Scheduling(rows=5))
    alone = [decode(pool, easy, examples, Always(slm=slm), 0.5, 40) for slm in (True, False)]
    assert 0 < sum(episode.writers[0] for episode in episodes) < len(examples)
    for number, episode in enumerate(episodes):
        writer, prompt = episode.writers[0], len(pool.encode(examples[number].prompt))
        np.testing.assert_array_equal(episode.tokens, alone[writer][number].tokens)
        # an LLM that writes has the first token from the pass that read the prompt: it costs what it does alone
        expected = alone[writer][number].ledger[writer].copy()
        np.testing.assert_array_equal(episode.ledger[writer, COUNTED], expected[COUNTED])
        own = pass_entry(np.array([prompt]), np.array([0]), 0.0)[0]
        np.testing.assert_array_equal(episode.ledger[1 - writer, COUNTED], own[COUNTED])


@pytest.mark.parametrize("tree", [False, True])
def test_it_changes_no_token_and_costs_a_pass_where_every_token_is_decided(tree, pool, easy):
    examples = easy.examples("validation", 8)
    walked = PrefixTree(pool, easy, max_new_tokens=40, memory=2**26) if tree else None
    for _ in range(1 + tree):  # decoded, then remembered
        plain, seeing = (
            decode(pool, easy, examples, kind(3), 0.3, 40, Scheduling(rows=3), tree=walked) for kind in (Random, Seeing)
        )
        for one, other in zip(plain, seeing, strict=True):
            np.testing.assert_array_equal(one.tokens, other.tokens)
            np.testing.assert_array_equal(one.writers, other.writers)
            expected = response_entries(len(pool.encode(one.example.prompt)), one.writers, one.terminated, 2, [1])
            np.testing.assert_array_equal(other.ledger[:, COUNTED], expected[:, COUNTED])
            saved = int(one.writers[0] > 0)  # the first token came with the prompt
            assert other.ledger[1, PASSES] == one.ledger[1, PASSES] + 1 - saved
            assert other.ledger[1, READ] >= one.ledger[1, READ]


def test_a_sampled_response_stays_the_same(pool, easy):
    examples = easy.examples("validation", 4)
    plain, seeing = (
        decode(pool, easy, examples, kind(3), 0.6, 24, sampling=Sampling(temperature=1.0)) for kind in (Random, Seeing)
    )
    assert [one.tokens.tolist() for one in plain] == [one.tokens.tolist() for one in seeing]
    assert any(one.writers[0] > 0 for one in plain)


@pytest.mark.parametrize("live", [True, False])
def test_what_is_seen_is_the_state_behind_the_prompt_and_its_text(live, pool, easy):
    examples = easy.examples("validation", 3)
    session = Session(pool, 4, 40) if live else TreeSession(PrefixTree(pool, easy, 40, memory=2**24), 4)
    lengths = started(session, pool, examples, np.array([2, 0, 3]))
    rows = np.array([0, 3, 2])
    first = look(session, rows, VIEWS)
    assert first.prompts == [examples[i].prompt for i in (1, 2, 0)]
    llm = pool.models[-1]
    for i, state in zip((1, 2, 0), first.llm_prompt_states, strict=True):
        hidden, _ = llm.feed(llm.new_cache(1, 128), np.array([0]), [pool.encode(examples[i].prompt)])
        torch.testing.assert_close(state, hidden[0].float(), atol=1e-4, rtol=1e-4)
    session.step(rows, np.array([0, 1, 0]))
    later = look(session, rows, VIEWS)
    assert torch.equal(later.llm_prompt_states, first.llm_prompt_states)
    assert session.ledger[rows, 1, PASSES].tolist() == [1, 1, 1]
    assert session.ledger[rows, 1, READ].tolist() == [lengths[1], lengths[2], lengths[0]]
    plain = look(session, rows, ("slm",))
    assert plain.llm_prompt_states is None
    assert plain.prompts is None


def test_copies_of_a_row_know_what_it_knows(pool, easy):
    session = Session(pool, 3, 40)
    started(session, pool, easy.examples("validation", 1))
    states = session.read_prompts(np.array([0]), 1)
    session.fork(np.array([0, 0]), np.array([1, 2]))
    assert torch.equal(session.read_prompts(np.array([2]), 1), states)
    tokens = session.step(np.arange(3), np.array([1, 1, 0])).tokens
    assert session.ledger[:, 1, PASSES].tolist() == [1, 1, 1]
    other = Session(pool, 1, 40)
    started(other, pool, easy.examples("validation", 1))
    assert other.step(np.array([0]), np.array([1])).tokens[0] == tokens[0] == tokens[1]
    # a row that is restored reads again, and goes on the same
    kept = Session(pool, 1, 40)
    started(kept, pool, easy.examples("validation", 1))
    kept.read_prompts(np.array([0]), 1)
    there = Session(pool, 1, 40)
    there.restore(np.array([0]), kept.state(np.array([0])))
    assert there.step(np.array([0]), np.array([1])).tokens[0] == tokens[0]
    assert there.ledger[0, 1, [PASSES, WRITTEN]].tolist() == [1, 1]


@pytest.mark.parametrize("live", [True, False])
def test_prompts_that_cannot_be_read_are_refused(live, pool, easy):
    session = Session(pool, 2, 40) if live else TreeSession(PrefixTree(pool, easy, 40, memory=2**24), 2)
    started(session, pool, easy.examples("validation", 2))
    for model in (0, 2):
        with pytest.raises(ValueError, match=rf"must be in 1\.\.1, is {model}"):
            session.read_prompts(np.arange(2), model)
    session.step(np.array([1]), np.array([0]))
    with pytest.raises(ValueError, match=r"embedded/llm has not read the prompts of rows \[1\]"):
        session.read_prompts(np.arange(2), 1)


# -- routers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sees", [VIEWS, ("slm", "text")], ids="-".join)
@pytest.mark.parametrize(
    "kind", [SimilarityWeighted, Neighbours, lambda **more: QueryMlp(training=BRIEF, **more)], ids=["sw", "knn", "mlp"]
)
def test_a_saved_policy_sees_and_scores_the_same(kind, sees, answered, pool, easy, tmp_path, monkeypatch):
    monkeypatch.setattr(agents.query_routing.learner, "answer_alone", None)  # the answers are there already
    made = kind(sees=sees, **SHORT).fit(pool, easy, seed=1, folder=answered[sees])
    made.save(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".safetensors"]
    loaded = load_policy(tmp_path, pool)
    assert loaded.sees == made.sees == sees
    assert loaded.fingerprint == made.fingerprint
    assert loaded.parameters == made.parameters > made.router.parameters
    session = Session(pool, 8, 40)
    started(session, pool, easy.examples("validation", 8))
    observation = look(session, np.arange(8), sees)
    scores = made.score(observation)
    assert torch.equal(loaded.score(observation), scores)
    # whoever shares a look changes no bit of what is seen of a prompt
    views = PromptViews.of(observation)
    one = PromptViews(views.slm[3:4], None if views.llm is None else views.llm[3:4], views.prompts[3:4])
    assert torch.equal(made.inputs.vectors(views)[3:4], loaded.inputs.vectors(one))


def test_a_run_goes_on_with_what_it_kept_and_refuses_other_views(answered, pool, easy, monkeypatch):
    monkeypatch.setattr(agents.query_routing.learner, "answer_alone", None)
    for sees, other in ((VIEWS, ("slm",)), (("slm",), VIEWS), (("slm", "text"), VIEWS)):
        learner = SimilarityWeighted(sees=sees, **SHORT)
        again = learner.fit(pool, easy, seed=1, folder=answered[sees])
        assert again.fingerprint == learner.fit(pool, easy, seed=1, folder=answered[sees]).fingerprint
        with pytest.raises(ValueError, match="was made with sees"):
            replace(learner, sees=other).fit(pool, easy, seed=1, folder=answered[sees])
    with pytest.raises(ValueError, match="was made with sees"):
        replace(learner, text=TextEmbedding(dimensions=5)).fit(pool, easy, seed=1, folder=answered["slm", "text"])


def test_a_policy_of_before_there_was_a_choice_sees_the_slms_state(answered, pool, easy, tmp_path):
    made = SimilarityWeighted(**SHORT).fit(pool, easy, seed=1, folder=answered[("slm",)])
    made.save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    assert settings.pop("sees") == ["slm"]
    (tmp_path / "policy.json").write_text(json.dumps(settings))
    assert load_policy(tmp_path, pool).fingerprint == made.fingerprint
    # and what it sees is the state as it is
    hidden = torch.randn(5, pool.slm.width, generator=torch.Generator().manual_seed(0))
    seen = Observation(hidden, None, *[np.zeros(5, dtype=np.int64)] * 3)
    assert torch.equal(RouterInputs().vectors(PromptViews.of(seen)), hidden)


def test_each_view_weighs_the_same():
    rng = torch.Generator().manual_seed(0)
    views = PromptViews(torch.randn(50, 4, generator=rng) * 30 + 7, torch.randn(50, 9, generator=rng) / 100)
    vectors = RouterInputs.fit(("llm", "slm"), views, FEW).vectors(views)
    for part in (vectors[:, :4], vectors[:, 4:]):
        assert (part - part.mean(0)).square().sum(1).mean().item() == pytest.approx(1, rel=1e-5)


def test_the_words_of_a_query_are_looked_up_and_counted():
    prompts = [f"{first} and {second} are {first * second}" for first in range(6) for second in range(9)]
    embedder = TextEmbedding(dimensions=4).fit(prompts)
    again = TextEmbedder(embedder.terms, embedder.weights.clone(), embedder.directions.clone(), embedder.most_terms)
    assert torch.equal(again.embed(prompts), embedder.embed(prompts))
    torch.testing.assert_close(embedder.embed(prompts).norm(dim=1), torch.ones(len(prompts)))
    most = max(sum(term in embedder.terms for term in set(prompt.split())) for prompt in prompts)
    assert embedder.parameters == embedder.most_terms * 5 >= most * 5
    with pytest.raises(ValueError, match="words and pairs need as many weights and columns"):
        TextEmbedder(embedder.terms[1:], embedder.weights, embedder.directions, 3)


# -- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sees", [[], ["slm", "slm"], ["words"], "slm"])
def test_views_that_there_are_not_are_named(sees):
    with pytest.raises(ValueError, match="sees must name some of slm, llm, text, each once"):
        SimilarityWeighted(sees=sees)
    assert check_views(["text", "slm"]) == ("slm", "text")


def test_more_dimensions_than_queries_are_refused_before_anything_is_answered(pool, easy, monkeypatch):
    monkeypatch.setattr(agents.query_routing.learner, "answer_alone", None)
    with pytest.raises(ValueError, match=r"text.dimensions must be in 1\.\.20.*it is 128"):
        SimilarityWeighted(examples=20, sees=["text"]).fit(pool, easy)


def test_what_is_not_there_to_see_is_named(policy, pool, tmp_path):
    seen = Observation(torch.zeros(2, pool.slm.width), None, *[np.zeros(2, dtype=np.int64)] * 3)
    with pytest.raises(ValueError, match="sees 'llm' of each prompt"):
        policy.score(seen)
    policy.save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    for change in (
        {"terms": settings["terms"][1:]},
        {"sees": ["slm", "text"]},
        {"terms": None},
        {"most_terms": "9"},
        {"sees": ["words"]},
        {"sees": ["slm"]},
    ):
        (tmp_path / "policy.json").write_text(json.dumps(settings | change))
        if change == {"sees": ["slm"]}:
            assert load_policy(tmp_path, pool).fingerprint != policy.fingerprint
            continue
        with pytest.raises(ValueError, match=r"router\.safetensors does not fit policy\.json"):
            load_policy(tmp_path, pool)


# -- evaluations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", [False, True])
def test_an_evaluation_is_verified_and_a_reading_left_out_is_found(tree, policy, pool, easy, tmp_path):
    settings = EvaluationSettings(
        examples=4, threshold_examples=4, llm_shares=(0.5,), refine=0, max_new_tokens=40, oracle_budget=0,
        draft_tokens=0, report=False, transcripts=0, tree=tmp_path / "tree" if tree else None, scheduling=ONCE,
    )  # fmt: skip
    evaluate(pool, easy, {"sw": policy}, settings, tmp_path / "run", trained=["sw"])
    policy.save(tmp_path / "policy")
    kept = KeptEvaluation.read(tmp_path / "run" / "runs" / "manifest.json")
    saved = {"saved": {"sw": f"{tmp_path / 'policy'}"}, "agents": {}}
    kept = replace(kept, config={**saved, "report": False, "cost": "bytes"})
    verification = Verification(easy, pool)
    found = verification.check(kept)
    assert not found.faults + found.unchecked
    assert found.counts["scores"] > 0
    path = tmp_path / "run" / "runs" / "sw" / "00.parquet"
    trace = read_trace(path)
    assert trace.head.settings["prompt_readers"] == [1]
    # as if nobody had read a prompt, in the ledgers too
    for episode in trace.episodes:
        if episode.writers[0] == 0:
            episode.ledger[1] = 0
    head = replace(trace.head, settings={k: v for k, v in trace.head.settings.items() if k != "prompt_readers"})
    write_trace(path, replace(trace, head=head))
    assert any("read prompts for the policy" in fault.what for fault in verification.check(kept).faults)
