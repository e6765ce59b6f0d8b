import json

import numpy as np
import pytest
import torch

from agents.collm import CoLlm, ReferenceTokens, candidate_etas, marginal_likelihood_loss, shifted
from agents.common.rollout import Scheduling, decode
from agents.common.saving import load_policy
from agents.router.dataset import LabelledTokens
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router
from envs.costs import WRITTEN
from envs.decoding.observation import Observation
from envs.decoding.teacher_forcing import TeacherSession
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example, FirstExamples

QUICK = {
    "examples": 12,
    "weak_epochs": 2,
    "validation_examples": 6,
    "training": RouterTraining(epochs=3, batch_size=64, units=[]),
    "scheduling": Scheduling(rows=16),
}


def same_weights(first, second):
    weights = (policy.network.state_dict().values() for policy in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


# -- the loss ---------------------------------------------------------------------------------------------------------


def plain_loss(logits, slm, llm):
    """The formula as the paper writes it."""
    d = 1 / (1 + logits.exp())
    return -((1 - d) * slm.exp() + d * llm.exp()).log().mean()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_the_loss_and_its_gradients_equal_the_plain_formula(dtype, tolerance):
    rng = np.random.default_rng(0)
    columns = (rng.normal(0, 3, 200), -rng.exponential(3, 200), -rng.exponential(3, 200))
    ours, plain = ([torch.tensor(c, dtype=dtype, requires_grad=True) for c in columns] for _ in range(2))
    found, expected = marginal_likelihood_loss(*ours), plain_loss(*plain)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    found.backward()
    expected.backward()
    for one, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=tolerance, atol=tolerance)


def test_the_loss_stays_finite_where_the_plain_formula_does_not():
    logits = torch.tensor([0.0, 60.0, -60.0, 0.0], requires_grad=True)
    slm, llm = torch.tensor([-200.0, -200.0, 0.0, -200.0]), torch.tensor([-200.0, 0.0, -200.0, -203.0])
    assert not plain_loss(logits, slm, llm).isfinite()
    loss = marginal_likelihood_loss(logits, slm, llm)
    loss.backward()
    # even odds on 200 nats each; 60 nats against deferring, twice; half of the likelier one
    expected = [200, 60, 60, 200 + np.log(2) - np.log1p(np.exp(-3))]
    assert loss.item() == pytest.approx(np.mean(expected), rel=1e-6)
    # the gradient: what the SLM is thought to write before and after seeing the token
    prior, posterior = np.array([0.5, 1, 0, 0.5]), np.array([0.5, 0, 1, 1 / (1 + np.exp(-3))])
    np.testing.assert_allclose(logits.grad, (prior - posterior) / 4, atol=1e-6)


# -- what the models say of a reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "three"])
@torch.no_grad()
def test_log_probabilities_equal_a_plain_forward_pass(pools, family, monkeypatch):
    pool, rng = pools[family], np.random.default_rng(3)
    # few logits at once, so that rows are read in several passes
    monkeypatch.setattr("envs.decoding.teacher_forcing.LOGITS_AT_ONCE", 60 * pool.vocab_size)
    session = TeacherSession(pool, rows=4, max_new_tokens=16, capacity=40)
    prompts = [rng.integers(2, 96, count) for count in (5, 1, 12, 7)]
    responses = [rng.integers(2, 96, count) for count in (16, 1, 9, 4)]
    found = []
    views, choices = session.start_references(np.arange(4), prompts, responses, log_probabilities=found)
    for prompt, response, log_probabilities in zip(prompts, responses, found, strict=True):
        assert log_probabilities.shape == (len(response), len(pool))
        for model, column in zip(pool.models, log_probabilities.T, strict=True):
            logits = model.network(torch.tensor([[*prompt, *response]]), use_cache=False).logits[0]
            expected = logits.log_softmax(-1)[np.arange(len(prompt) - 1, len(prompt) + len(response) - 1), response]
            np.testing.assert_allclose(column, expected, rtol=1e-4, atol=1e-4)
    without = session.start_references(np.arange(4), prompts, responses)
    assert all(torch.equal(a, b) for a, b in zip(views, without[0], strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(choices, without[1], strict=True))


@torch.no_grad()
def test_tokens_of_references_and_their_weak_labels(pool, task):
    examples = task.examples("train", 5, start=70)
    data = ReferenceTokens.read(pool, examples, 128, Scheduling(rows=2))
    for number, example in enumerate(examples):
        prompt, response = pool.encode(example.prompt).tolist(), pool.encode_response(example.reference).tolist()
        here = slice(len(prompt) - 1, -1)
        outputs = [
            model.network(torch.tensor([prompt + response]), output_hidden_states=True, use_cache=False)
            for model in pool.models
        ]
        rows = data.examples == number
        assert rows.sum() == len(response)
        slm, llm = (output.logits[0, here] for output in outputs)
        for logits, found in ((slm, data.slm_log_probability), (llm, data.llm_log_probability)):
            expected = logits.log_softmax(-1)[np.arange(len(response)), response]
            np.testing.assert_allclose(found[rows], expected, atol=1e-3)
        right_slm, right_llm = (logits.argmax(-1).numpy() == response for logits in (slm, llm))
        np.testing.assert_array_equal(data.prefers_slm[rows], ~(right_llm & ~right_slm))
        features = data.features(0)[torch.from_numpy(rows)].float()
        torch.testing.assert_close(features, outputs[0].hidden_states[-1][0, here], atol=1e-2, rtol=1e-2)
    assert 0 < data.prefers_slm.mean() < 1
    together = ReferenceTokens.read(pool, examples, 128, Scheduling(rows=5))
    np.testing.assert_allclose(together.slm_log_probability, data.slm_log_probability, atol=1e-4)
    np.testing.assert_array_equal(together.examples, data.examples)


# -- training ---------------------------------------------------------------------------------------------------------


def toy_tokens(examples=60, each=50):
    """Two kinds of states: in one the SLM is surer of the reference, in the other the LLM; labels that say nothing."""
    rng = np.random.default_rng(0)
    state = rng.integers(0, 2, size=examples * each)
    hidden = np.stack([2.0 * state - 1, rng.normal(size=len(state))], axis=-1)
    sure, unsure = (np.log(rng.uniform(low, high, len(state))) for low, high in ((0.6, 0.9), (0.05, 0.3)))
    labels = rng.random(len(state)) < 0.5
    labelled = LabelledTokens.in_memory(torch.from_numpy(hidden).half(), labels, np.repeat(np.arange(examples), each))
    slm, llm = np.where(state == 1, sure, unsure), np.where(state == 1, unsure, sure)
    return ReferenceTokens(**vars(labelled), slm_log_probability=slm, llm_log_probability=llm), state == 1


@pytest.mark.parametrize("units", [[], [8]])
def test_the_head_learns_who_is_surer_of_the_reference(units):
    data, slm_is_surer = toy_tokens()
    settings = RouterTraining(epochs=20, batch_size=256, lr=0.02, units=units)
    rows = []
    network, _ = fit_router(data, settings, 0, rows.append, torch.device("cpu"), "toy")
    chosen = network(data.features(0).float()) >= 0
    regret = (chosen.numpy() != slm_is_surer).mean()
    assert regret < 0.01
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]


def test_training_goes_on_from_a_given_network_and_leaves_it_alone():
    data, _ = toy_tokens()
    settings = RouterTraining(epochs=1, batch_size=256, lr=1e-9, weight_decay=0, units=[])
    start = RouterNetwork(2, units=[])
    start.standardise(torch.tensor([0.5, 0.5]), torch.tensor([2.0, 3.0]))
    before = {key: value.clone() for key, value in start.state_dict().items()}
    found, _ = fit_router(data, settings, 0, lambda row: None, torch.device("cpu"), "toy", start=start)
    for key, value in start.state_dict().items():
        assert torch.equal(value, before[key])
        torch.testing.assert_close(found.state_dict()[key], value, atol=1e-6, rtol=1e-6)


def test_a_network_without_hidden_layers_is_linear(pool):
    network = RouterNetwork(pool.slm.width, units=[]).eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == pool.slm.width + 1
    first, second = torch.randn(2, 5, pool.slm.width)
    middle = (network(first) + network(second)) / 2
    torch.testing.assert_close(network((first + second) / 2), middle)
    assert RouterTraining(units=[]).units == []


# -- eta --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.5, 1e-6, 0.03, 0.9, 1 - 1e-6])
def test_the_threshold_of_one_half_is_the_published_rule(eta):
    network = RouterNetwork(4, units=[]).eval()
    network.layers[-1].weight.data, network.layers[-1].bias.data = torch.tensor([[5.0, -9.0, 2.0, 0.5]]), torch.ones(1)
    hidden = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    nothing = np.zeros(500, dtype=np.int64)
    observation = Observation(hidden, torch.zeros(500, 2), nothing, nothing, nothing)
    deferred = torch.sigmoid(-network(hidden).double())
    policy = RouterPolicy(shifted(network, eta), [])
    scores = policy.score(observation)
    # float32 tells them apart
    clear = (deferred.logit() - np.log(eta / (1 - eta))).abs() > 1e-4
    assert torch.equal((scores >= 0.5)[clear], (deferred <= eta)[clear])
    assert clear.sum() > 450
    by_deferral = scores[deferred.argsort()]
    assert (by_deferral.diff() <= 1e-6).all()


def test_candidate_etas_defer_the_stated_shares():
    logits = torch.linspace(-4, 8, 10_000).double()
    first, *others = candidate_etas(logits)
    assert first == 0.5
    shares = [(torch.sigmoid(-logits) > eta).float().mean().item() for eta in others]
    np.testing.assert_allclose(sorted(shares), [0.01, 0.03, 0.06, 0.1, 0.2, 0.4], atol=1e-3)
    assert all(0 < eta < 1 for eta in candidate_etas(torch.tensor([-800.0, 800.0]).double()))


@pytest.fixture(scope="module")
def fitted(pool, task, tmp_path_factory):
    """A finished fit: its folder, its policy, and its rows."""
    folder, rows = tmp_path_factory.mktemp("collm"), []
    policy = CoLlm(**QUICK).fit(pool, task, seed=1, track=rows.append, folder=folder)
    return folder, policy, rows


def test_eta_is_the_most_accurate_of_those_tried_and_the_policy_keeps_it(fitted, pool, task, tmp_path):
    _, policy, rows = fitted
    tried = [row for row in rows if row["run"] == "eta"]
    assert len(tried) >= 3
    best = max(row["accuracy"] for row in tried)
    fewest = min(row["llm_tokens"] for row in tried if row["accuracy"] == best)
    chosen = next(row for row in tried if row["eta"] == rows[-1]["eta"])
    assert (chosen["accuracy"], chosen["llm_tokens"]) == (best, fewest)
    assert policy.calibration["eta"] == chosen["eta"]
    episodes = decode(pool, task, task.examples("validation", 6, start=1000), policy)
    assert sum(episode.ledger[1, WRITTEN] for episode in episodes) == fewest
    policy.save(tmp_path)
    assert same_weights(load_policy(tmp_path, pool), policy)
    unchosen = CoLlm(**QUICK | {"validation_examples": 0}).fit(pool, task, seed=1)
    assert same_weights(policy, RouterPolicy(shifted(unchosen.network, chosen["eta"]), []))


def test_a_head_without_the_weak_start_differs(fitted, pool, task, tmp_path):
    rows = []
    policy = CoLlm(**QUICK, weak_start=False).fit(pool, task, seed=1, track=rows.append, folder=tmp_path)
    assert not same_weights(policy, fitted[1])
    assert {row["run"] for row in rows} == {"references", "marginal", "eta"}
    assert not (tmp_path / "weak.safetensors").exists()
    with pytest.raises(ValueError, match=r"marginal\.safetensors is the checkpoint of"):
        CoLlm(**QUICK).fit(pool, task, seed=1, folder=tmp_path)


# -- interruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", [1, 3, 4, 7, 9])
def test_an_interrupted_fit_goes_on_to_the_same_policy(
    fitted, pool, task, tmp_path, monkeypatch, interrupted_at, moment
):
    folder, policy, rows = fitted
    with interrupted_at(moment):
        CoLlm(**QUICK).fit(pool, task, seed=1, folder=tmp_path)
    again, decoded = [], []

    def counted(*args, **kwargs):
        decoded.append(1)
        return decode(*args, **kwargs)

    monkeypatch.setattr("agents.collm.decode", counted)
    found = CoLlm(**QUICK).fit(pool, task, seed=1, track=again.append, folder=tmp_path)
    assert again == rows
    assert same_weights(found, policy)
    assert (tmp_path / "eta.json").read_bytes() == (folder / "eta.json").read_bytes()
    # two weak epochs and three marginal ones are written first, then each eta
    assert len(decoded) == len(json.loads((folder / "eta.json").read_text())["rows"]) - max(0, moment - 6)


# -- bad input --------------------------------------------------------------------------------------------------------


class Few(ArithmeticTask):
    """The task with one example that is too long."""

    def example(self, split, index):
        example = super().example(split, index)
        if index % 1_000_000 != (1003 if split == "validation" else 3):
            return example
        prompt = "1 " * 600 if split == "validation" else example.prompt
        return Example(f"{split}/long", prompt, "1 " * 200 + example.reference, example.answer)


def test_bad_settings_are_named():
    for settings, message in (
        ({"examples": 1}, "examples"),
        ({"weak_epochs": 0}, "weak_start=false"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"validation_examples": -1}, "validation_examples"),
        ({"weak_start": False, "training": RouterTraining(balanced=True)}, "balanced"),
    ):
        with pytest.raises(ValueError, match=message):
            CoLlm(**settings)
    with pytest.raises(ValueError, match="units"):
        RouterTraining(units=[0])


def test_bad_input_is_named_before_any_model_runs(pool, task, monkeypatch):
    monkeypatch.setattr("envs.models.language_model.LanguageModel.feed", None)
    with pytest.raises(ValueError, match="validation_examples is 6, arithmetic has 5"):
        CoLlm(**QUICK | {"examples": 5}).fit(pool, FirstExamples(task, 5))
    with pytest.raises(ValueError, match="example validation/long has a prompt"):
        CoLlm(**QUICK).fit(pool, Few())
    with pytest.raises(ValueError, match="example train/long has a reference"):
        CoLlm(**QUICK | {"validation_examples": 0}).fit(pool, Few())


def test_a_reference_a_model_finds_impossible_is_named(pool, task, monkeypatch):
    monkeypatch.setattr(
        "envs.decoding.teacher_forcing.log_probability", lambda logits, tokens: np.full(len(tokens), -np.inf)
    )
    with pytest.raises(FloatingPointError, match=r"example \S+: a model gives a token of its reference no probability"):
        CoLlm(**QUICK).fit(pool, task)
