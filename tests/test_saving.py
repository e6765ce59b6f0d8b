"""Policies on disk: one way to write them, and files of every age and kind load."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import agents
from agents.common.policy import Policy
from agents.common.saving import OLD_NAMES, SavedPolicy, load_policy, saved_as, saved_class, saved_name
from agents.query_routing.router import QueryRouter
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.decoding.observation import Observation
from envs.models.loading import embedded_pool
from envs.models.pool import models_manifest
from envs.storage import read_tensors, write_tensors

# Written when files named a class by its place: policies of short trainings (collm, expert, dqn, knn, routellm_mf,
# uniroute_learned) and small ones of the other kinds, with what they scored in two steps of six episodes.
SAVED = Path(__file__).parent / "data" / "saved_policies"
KINDS = sorted(path.name for path in SAVED.iterdir() if path.is_dir())
MINE = """
from agents.common.policy import Policy
from agents.common.saving import SavedPolicy, saved_as
import torch


@saved_as("mine")
class Mine(SavedPolicy):
    def __init__(self, models, weights):
        self.models, self.weights = models, weights

    def score(self, observation):
        return torch.sigmoid(observation.hidden @ self.weights)

    def tensors(self):
        return {"weights": self.weights}

    def settings(self):
        return {"models": self.models}

    @classmethod
    def restored(cls, settings, tensors, pool):
        return cls(settings["models"], tensors["weights"])
"""


def names_in(folder):
    settings = json.loads((folder / "policy.json").read_text())
    return {key: settings[key] for key in ("class", "router") if key in settings}


def test_there_is_a_file_of_every_kind_that_was_saved():
    assert {name for kind in KINDS for name in names_in(SAVED / kind).values()} == set(OLD_NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_saved_before_loads_and_scores_the_same(kind, tmp_path):
    pool, told = embedded_pool(), load_file(SAVED / "expected.safetensors")
    policy = load_policy(SAVED / kind, pool)
    policy.save(tmp_path)
    again = load_policy(tmp_path, pool)
    assert type(again) is type(policy)
    assert again.fingerprint == policy.fingerprint
    assert all("." not in name for name in names_in(tmp_path).values())
    for step in range(2):
        steps = np.full(6, step)
        observation = Observation(told["hidden"][step], told["logits"][step], steps, np.arange(6), steps)
        scores = policy.score(observation)
        torch.testing.assert_close(scores.double(), told[f"scores/{kind}"][step], rtol=0, atol=1e-6)
        assert torch.equal(again.score(observation), scores)


def test_tensors_are_read_into_memory_that_torch_allocates(tmp_path):
    tensors = {f"part {number}": torch.randn(number) for number in (1, 3, 5, 7)}
    write_tensors(tmp_path / "some.safetensors", tensors)
    read = read_tensors(tmp_path / "some.safetensors")
    assert all(torch.equal(read[name], value) for name, value in tensors.items())
    assert all(value.data_ptr() % 64 == 0 for value in read.values())


def test_a_users_own_policy_is_found_by_its_name(pool, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.setattr(agents, "__path__", [*agents.__path__, str(tmp_path)])
    (tmp_path / "policy.json").write_text(json.dumps({"class": "mine", "models": models_manifest(pool)}))
    write_tensors(tmp_path / "policy.safetensors", {"weights": torch.ones(pool.slm.width)})
    policy = load_policy(tmp_path, pool)
    hidden = torch.randn(3, pool.slm.width)
    scores = policy.score(Observation(hidden, None, *[np.zeros(3)] * 3))
    torch.testing.assert_close(scores, torch.sigmoid(hidden.sum(1)))
    policy.save(tmp_path / "again")
    assert names_in(tmp_path / "again") == {"class": "mine"}
    with pytest.raises(ValueError, match=r"yours is not a policy of agents; there are .*mine.*a_package_that_is_not"):
        saved_class("yours", SavedPolicy, "policy")


def test_a_name_stands_for_one_class_of_one_kind():
    with pytest.raises(ValueError, match=r"'router' is taken by agents\.router\.policy"):

        @saved_as("router")
        class Other(Policy):
            pass

    with pytest.raises(ValueError, match="router is not a router of agents, it is RouterPolicy"):
        saved_class("router", QueryRouter, "router")
    assert saved_name(RouterPolicy) == "router"

    class Unnamed(RouterPolicy):
        pass

    with pytest.raises(ValueError, match="Unnamed has no name for files"):
        saved_name(Unnamed)


@pytest.mark.parametrize("models", [[{"name": "only"}], [{"fingerprint": "only"}], ["no model"], 3, [None]])
def test_models_that_a_file_does_not_name_are_refused_by_the_folder(pool, tmp_path, models):
    RouterPolicy(RouterNetwork(pool.slm.width), models_manifest(pool)).save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    (tmp_path / "policy.json").write_text(json.dumps(settings | {"models": models}))
    with pytest.raises(ValueError, match=f"{tmp_path} holds no readable policy"):
        load_policy(tmp_path, pool)


def test_a_setting_that_is_no_plain_data_is_not_written(pool, tmp_path):
    policy = RouterPolicy(RouterNetwork(pool.slm.width), models_manifest(pool), calibration={"ece": object()})
    with pytest.raises(ValueError, match="cannot be written"):
        policy.save(tmp_path)
    assert not list(tmp_path.iterdir())
