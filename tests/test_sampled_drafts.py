"""Checking drafts that are sampled: whose distribution is kept, and what is token routing still."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import LlamaConfig

from agents.checking.speculative import Speculative, speculate
from agents.common.rollout import Scheduling, decode
from envs.arrays import UNKNOWN
from envs.costs import COLUMNS, PASSES, READ, SECONDS, MemoryTraffic
from envs.decoding.checked_session import CheckedSession
from envs.decoding.judges import FirstDisagreement, Gap, TopK
from envs.decoding.sampling import Sampling, SpeculativeSample
from envs.decoding.session import Session
from envs.environments.checked_routing import CheckedRoutingEnv, CheckedRoutingVectorEnv
from envs.environments.token_routing import RoutingEnv
from envs.environments.vector import row_seeds
from envs.models.language_model import LanguageModel
from envs.models.loading import load_pool
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from tests.drafting import Letters, Plain, array, kin_of

COUNTED = [column for column in range(COLUMNS) if column != SECONDS]
NEVER = Gap(float("inf"))
WARM, NUCLEUS = Sampling(temperature=1.0), Sampling(temperature=1.5, top_p=0.9)
MAX_NEW, WRITTEN_TOKENS = 14, 3
REJECTED, ACCEPTED = 1e-6, 1e-2


@pytest.fixture(scope="module")
def kin(pools):
    """In double precision: what rounds otherwise in passes of other rows must not decide where a coin falls."""
    pool = kin_of(pools["llama"])
    models = [
        LanguageModel(model.name, copy.deepcopy(model.network).double(), model.tokenizer) for model in pool.models
    ]
    return ModelPool(models)  # of their own: the other tests' LLM stays in single precision


@pytest.fixture(scope="module")
def few_words(save_model, make_tokenizer):
    """Two unlike models of five tokens, one of which ends a response."""
    tokenizer = make_tokenizer("abc")
    folders = []
    for seed, width in enumerate((16, 24)):
        config = LlamaConfig(
            hidden_size=width, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=16, tie_word_embeddings=False,
        )  # fmt: skip
        folders.append(str(save_model(f"few-{width}", config, seed + 5, tokenizer, ends=[0])))
    return load_pool(folders, dtype="float32", verbose=False)


# -- the distribution -------------------------------------------------------------------------------------------------


def written(pool, sampling, judge, answers, session=CheckedSession):
    """The first tokens of so many answers to one prompt, the LLM called after one, two or three drafts, or by doubt."""
    rows = np.arange(answers)
    decoder = session(pool, answers, WRITTEN_TOKENS, 8, sampling, judge=judge)
    decoder.start(
        rows, [array(2, 3)] * answers, generators=[np.random.default_rng([11, row]) for row in rows], observed=False
    )
    going, ways = rows, rows % 4
    while len(going):
        drafts = decoder.drafts(going)
        doubt = (drafts.counts > 0) & (drafts.last_surprisals > np.log(3))
        calls = np.where(ways[going] < 3, drafts.counts > ways[going], doubt)
        step = decoder.step(going, (drafts.ended | calls).astype(int))
        going = going[~(step.terminated | step.truncated)]
    return [tuple(decoder.response(row)) for row in rows]


def law(pool, model, sampling):
    """The probability of each beginning of an answer, by models that read whole sequences."""
    plain, found = Plain(pool), {}
    going = {(): 1.0}
    while going:
        response, likely = going.popitem()
        logits = plain.logits(model, [2, 3, *response]).double().numpy() / sampling.temperature
        p = np.exp(logits - logits.max())
        p /= p.sum()
        order = np.argsort(-p)
        p[order[np.cumsum(p[order]) - p[order] >= sampling.top_p]] = 0
        for token, share in enumerate(p / p.sum()):
            longer, ended = (*response, token), token in pool.end_tokens
            if share:
                (found if ended or len(longer) == WRITTEN_TOKENS else going)[longer] = likely * share
    return found


def p_value(responses, law):
    """Of Pearson's test that responses are drawn from a law; rare ones in one cell."""
    if set(responses) - law.keys():
        return 0.0
    names, expected = list(law), np.array(list(law.values())) * len(responses)
    observed = np.array([responses.count(name) for name in names])
    rare = expected < 5
    if rare.any():
        observed = np.append(observed[~rare], observed[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
    return chisquare(observed, expected).pvalue


ANSWERS = 400


@pytest.mark.parametrize("sampling", [WARM, NUCLEUS], ids=["warm", "nucleus"])
def test_tokens_are_distributed_as_the_llms_own(few_words, sampling):
    responses = written(few_words, sampling, FirstDisagreement(), ANSWERS)
    assert p_value(responses, law(few_words, 1, sampling)) > ACCEPTED
    # the same test tells other distributions: the SLM's, and what a judge makes that spares the likeliest tokens
    assert p_value(responses, law(few_words, 0, sampling)) < REJECTED
    assert p_value(written(few_words, sampling, TopK(2), ANSWERS), law(few_words, 1, sampling)) < REJECTED


def test_what_the_llm_likes_best_is_not_spared_without_loss(few_words):
    """An SLM that is surer of the LLM's likeliest tokens than the LLM itself."""
    network = copy.deepcopy(few_words.models[-1].network)
    with torch.no_grad():
        network.lm_head.weight *= 3
    pool = ModelPool([LanguageModel("sure", network, few_words.tokenizer), few_words.models[-1]])
    assert p_value(written(pool, WARM, FirstDisagreement(), ANSWERS), law(pool, 1, WARM)) > ACCEPTED
    for judge in (Gap(0.0), TopK(1)):
        assert p_value(written(pool, WARM, judge, ANSWERS), law(pool, 1, WARM)) < REJECTED


class FromWhole(Sampling):
    """Draws from all of p in the place of a draft that does not stand: wrong."""

    def speculative(self, drafts, slm, llm, spared, generator, model=1):
        found = super().speculative(drafts, slm, llm, spared, generator, model)
        if found.kept == len(drafts):
            return found
        return SpeculativeSample(found.kept, int(self.draw(llm[found.kept : found.kept + 1], generator.random(1))[0]))


def test_a_token_from_the_whole_distribution_behind_what_is_refused_is_told(few_words):
    responses = written(few_words, FromWhole(1.0), FirstDisagreement(), ANSWERS)
    assert p_value(responses, law(few_words, 1, WARM)) < REJECTED


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [WARM, NUCLEUS, Sampling(temperature=0.6)], ids=repr)
@pytest.mark.parametrize("swapped", [False, True])
def test_tokens_of_many_answers_are_distributed_as_the_llms_own(few_words, sampling, swapped):
    pool = ModelPool(few_words.models[::-1]) if swapped else few_words
    responses = written(pool, sampling, FirstDisagreement(), 20_000)
    assert p_value(responses, law(pool, 1, sampling)) > ACCEPTED
    assert p_value(responses, law(pool, 0, sampling)) < REJECTED


LLM, SLM = np.log([0.5, 0.3, 0.15, 0.05]), np.log([0.1, 0.2, 0.3, 0.4])


def one_token(spared, draws=300):
    """The token in the place of a draft of one, so many times."""
    llm, slm = torch.tensor(np.stack([LLM, LLM])), torch.tensor(SLM)
    found = []
    for seed in range(draws):
        generator = np.random.default_rng([7, seed])
        draft = WARM.draw(slm[None], generator.random(1))
        kept, token = WARM.speculative(draft, [slm], llm, spared[draft], generator)
        found.append(int(draft[0]) if kept else token)
    return found


def test_what_is_not_spared_is_never_more_likely_than_under_the_llm():
    """Token 3 is spared, and stands whenever it is drafted; what token 2 gives up goes where p is above q."""
    spared = np.array([False, False, False, True])
    p, q = np.exp(LLM), np.exp(SLM)
    more = np.maximum(p - q, 0)
    refused = 0.3 - 0.15
    expected = np.where(spared, q, np.minimum(p, q)) + refused * more / more.sum()
    assert (expected[~spared] <= p[~spared] + 1e-12).all()
    found = one_token(spared)
    assert p_value(found, dict(enumerate(expected))) > ACCEPTED
    assert p_value(found, dict(enumerate(p))) < REJECTED
    assert p_value(one_token(np.zeros(4, dtype=bool)), dict(enumerate(p))) > ACCEPTED


def test_of_equal_models_all_stands_and_of_models_that_share_no_token_nothing():
    generator, none = np.random.default_rng(0), np.zeros(2, dtype=bool)
    sure = torch.tensor([[0.0, -1e9, -1e9], [-1e9, 0.0, -1e9], [-1e9, -1e9, 0.0]])
    for _ in range(20):
        draft = array(0, 1)
        assert WARM.speculative(draft, list(sure[:2]), sure, none, generator) == (2, 2)
        assert WARM.speculative(draft, list(sure[:2]), sure[:2], none, generator) == (2, UNKNOWN)
        assert WARM.speculative(draft, list(sure[:2]), sure[[0, 2, 0]], none, generator) == (1, 2)
        assert WARM.speculative(draft, list(sure[:2]), sure[[2, 2, 0]], ~none, generator) == (2, 0)
        assert WARM.speculative(draft[:0], [], sure[1:2], none[:0], generator) == (0, 1)


# -- what it equals ---------------------------------------------------------------------------------------------------


def prompts_of(pool, count):
    return [pool.encode(example.prompt) for example in Letters().examples("test", count)]


def streams(rows):
    return [np.random.default_rng([3, row]) for row in rows]


def answer(session, prompts, share=0.3, accepts=False, observed=True, numbers=None):
    """Call at random, drafted ends too unless each is accepted, till all rows end; the steps."""
    rows = np.arange(len(prompts))
    numbers = rows if numbers is None else numbers
    session.start(rows, prompts, generators=streams(numbers), observed=observed)
    choices, steps, going = [np.random.default_rng([4, number]) for number in numbers], [], rows
    while len(going):
        actions = np.array([int(choices[row].random() < share) for row in going])
        if accepts and isinstance(session, CheckedSession):
            actions[session.drafts(going).ended] = 0
        steps.append(session.step(going, actions))
        going = going[~(steps[-1].terminated | steps[-1].truncated)]
    return steps


def whole(session, row):
    return session.response(row).tolist(), session.writers(row).tolist(), session.ledger[row][:, COUNTED].tolist()


@pytest.mark.parametrize("sampling", [WARM, NUCLEUS], ids=["warm", "nucleus"])
def test_where_nothing_is_taken_back_it_is_sampled_token_routing(kin, sampling):
    count = 5
    routed = Session(kin, count, MAX_NEW, sampling=sampling)
    checked = CheckedSession(kin, count, MAX_NEW, sampling=sampling, judge=NEVER)
    for session in (routed, checked):
        answer(session, prompts_of(kin, count), accepts=True)
    for row in range(count):
        assert whole(checked, row) == whole(routed, row)
    assert {len(routed.response(row)) for row in range(count)} != {MAX_NEW}


@pytest.mark.parametrize("judge", [Gap(0.5), TopK(1)], ids=repr)
def test_at_a_low_temperature_each_judge_does_what_it_does_greedily(kin, judge):
    count, prompts = 4, prompts_of(kin, 4)
    greedy = CheckedSession(kin, count, MAX_NEW, judge=judge)
    cold = CheckedSession(kin, count, MAX_NEW, sampling=Sampling(temperature=1e-5), judge=judge)
    for session in (greedy, cold):
        answer(session, prompts)
    for row in range(count):
        assert whole(cold, row) == whole(greedy, row)
    assert any(greedy.taken_back(row) for row in range(count))


@pytest.mark.parametrize("observed", [True, False])
def test_tokens_do_not_depend_on_the_rows_that_share_passes(kin, observed):
    count, prompts = 4, prompts_of(kin, 4)
    settings = {"sampling": WARM, "judge": Gap(0.3)}
    together = CheckedSession(kin, count, MAX_NEW, **settings)
    answer(together, prompts, observed=observed)
    for row in range(count):
        alone = CheckedSession(kin, 1, MAX_NEW, **settings)
        answer(alone, prompts[row : row + 1], observed=observed, numbers=[row])
        assert whole(alone, 0) == whole(together, row)
    assert sum(together.taken_back_tokens(row) for row in range(count)) > 5


@pytest.mark.parametrize("observed", [True, False])
def test_the_ledger_has_every_pass_that_is_made_and_no_other(kin, passes, observed):
    session = CheckedSession(kin, 1, MAX_NEW, sampling=WARM, judge=FirstDisagreement())
    for prompt in prompts_of(kin, 4):
        passes.clear()
        steps = answer(session, [prompt], observed=observed)
        for name, entry in zip(kin.names, session.ledger[0], strict=True):
            reads = [len(read) for model, (read,) in passes if model == name]
            assert entry[[PASSES, READ]].tolist() == [len(reads), sum(reads)]
        # a call is one pass, whatever it takes back
        assert session.ledger[0, 1, PASSES] == sum(step.ledger[0, 1, PASSES] for step in steps)


def test_a_row_goes_on_where_another_stood(kin):
    """Drafts and all: what they were drawn from is read again, and charged to nobody."""
    for observed in (True, False):
        rows = np.arange(3)
        first, other = (CheckedSession(kin, 3, MAX_NEW, sampling=WARM) for _ in range(2))
        generators = streams(rows)
        first.start(rows, prompts_of(kin, 3), generators=generators, observed=observed)
        rng, gone = np.random.default_rng(6), 0
        while len(rows):
            other.restore(rows, first.state(rows), [copy.deepcopy(generators[row]) for row in rows])
            actions = (rng.random(len(rows)) < 0.3).astype(int)
            ours, theirs = first.step(rows, actions), other.step(rows, actions)
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.checks.kept, theirs.checks.kept)
            np.testing.assert_array_equal(ours.ledger[..., COUNTED], theirs.ledger[..., COUNTED])
            gone += len(ours.checks.taken_back)
            rows = rows[~(ours.terminated | ours.truncated)]
        assert gone


def test_a_sampled_draft_is_seen_as_it_was_drafted(kin):
    """-log p of the token drawn, not of the likeliest, which is what the step says the SLM would have written."""
    session = CheckedSession(kin, 1, MAX_NEW, sampling=Sampling(temperature=3.0))
    session.start(array(0), prompts_of(kin, 1), generators=streams([0]))
    differ = 0
    while not session.drafts(array(0)).ended[0]:
        own = session.observe(array(0)).logits[0].log_softmax(-1)
        step = session.step(array(0), array(0))
        assert step.slm_tokens[0] == own.argmax()
        assert session.drafts(array(0)).last_surprisals[0] == pytest.approx(-float(own[step.tokens[0]]), rel=1e-5)
        differ += step.tokens[0] != step.slm_tokens[0]
    assert differ > 2


def test_an_end_that_was_drawn_is_what_the_slm_would_have_written_where_it_is_accepted(kin):
    rows = np.arange(12)
    session = CheckedSession(kin, 12, MAX_NEW, sampling=Sampling(temperature=3.0))
    session.start(rows, prompts_of(kin, 12), generators=streams(rows))
    drawn, accepted = np.zeros(12, dtype=bool), 0
    while len(rows):
        step = session.step(rows, np.zeros_like(rows))
        ends = step.terminated & drawn[rows]
        assert step.slm_tokens[step.terminated].tolist() == [session.response(row)[-1] for row in rows[step.terminated]]
        accepted += ends.sum()
        drawn[rows] = step.tokens != step.slm_tokens
        rows = rows[~(step.terminated | step.truncated)]
    assert accepted > 1


# -- environments and agents ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(kin):
    return {"pool": kin, "task": Letters(), "max_new_tokens": MAX_NEW, "cost": MemoryTraffic(), "sampling": WARM}


def test_the_environment_is_token_routing_where_nothing_is_taken_back(settings):
    checked, routed = CheckedRoutingEnv(judge=NEVER, **settings), RoutingEnv(**settings)
    for seed in range(4):
        checked.reset(seed=seed)
        routed.reset(seed=seed)
        choices, over = np.random.default_rng(seed), False
        while not over:
            action = int(choices.integers(2))
            ours, (_, _, *ends, theirs) = checked.step(action), routed.step(action)
            over = any(ends)
            assert {name: ours[4][name] for name in ("token", "slm_token")} == {
                name: theirs[name] for name in ("token", "slm_token")
            }
        if not (ours[2] or ours[3]):
            ours = checked.step(0)
        assert [ours[2], ours[3]] == ends
        assert ours[4]["text"] == theirs["text"]


def test_a_vector_environment_goes_through_the_episodes_of_single_ones(settings):
    count, more = 3, {"judge": "first_disagreement"}
    vector = CheckedRoutingVectorEnv(count, **settings, **more)
    singles = [CheckedRoutingEnv(**settings, **more) for _ in range(count)]
    vector.reset(seed=5)
    for single, seed in zip(singles, row_seeds(5, count), strict=True):
        single.reset(seed=seed)
    gone = 0
    for actions in (np.random.default_rng(0).random((18, count)) < 0.3).astype(int):
        _, _, terminated, truncated, infos = vector.step(actions)
        for row, single in enumerate(singles):
            *_, over, cut, info = single.step(int(actions[row]))
            assert (over, cut) == (terminated[row], truncated[row])
            seen = infos
            if over or cut:
                seen = infos["final_info"]
                single.reset()
            assert (seen["token"][row], seen["kept"][row]) == (info["token"], info["kept"])
            assert seen["taken_back"][row] == info["taken_back"]
            gone += len(info["taken_back"])
    assert gone > 5


def test_decoding_with_a_policy_depends_on_the_seed_alone(kin):
    examples = Letters().examples("test", 5)
    given = {"draft_tokens": 3, "max_new_tokens": MAX_NEW, "sampling": WARM}

    def tokens(rows, seed):
        found = speculate(kin, Letters(), examples, scheduling=Scheduling(rows), seed=seed, **given)
        assert any(episode.taken_back for episode in found)
        return [episode.tokens.tolist() for episode in found]

    assert tokens(2, 1) == tokens(5, 1) != tokens(5, 2)


def test_what_cannot_be_sampled_is_refused(kin, settings):
    tree = PrefixTree(kin, Letters(), MAX_NEW, memory=2**22)
    message = "a replay tree keeps what greedy decoding did; sampling at temperature 1.0 .* or the tree"
    with pytest.raises(ValueError, match=message):
        CheckedRoutingEnv(tree=tree, max_new_tokens=MAX_NEW, sampling=WARM)
    with pytest.raises(ValueError, match=message):
        decode(kin, Letters(), Letters().examples("test", 2), Speculative(3), 0.5, MAX_NEW, sampling=WARM, tree=tree)
    session = CheckedSession(kin, 1, MAX_NEW, sampling=WARM)
    with pytest.raises(ValueError, match="sampling needs a generator for each row"):
        session.start(array(0), prompts_of(kin, 1))
    session.start(array(0), prompts_of(kin, 1), generators=streams([0]), responses=[array(5, 6)])
    with pytest.raises(ValueError, match=r"rows \[0\] began with responses that were given.* greedy decoding"):
        session.step(array(0), array(1))
