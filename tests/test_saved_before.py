"""What earlier versions wrote still opens, and says the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from agents.common.rollout import decode
from agents.heuristics import Random
from agents.preferences.store import COLUMNS, PreferenceStore
from envs.models.language_model import LanguageModel
from envs.prefix_tree.tree import PrefixTree

SAVED = Path(__file__).parent / "data" / "saved_before"


@pytest.fixture(scope="module")
def expected():
    return json.loads((SAVED / "expected.json").read_text())


def test_a_tree_is_walked_without_running_a_model(pool, task, expected, monkeypatch):
    tree = PrefixTree(pool, task, memory=2**22, path=SAVED / "some.tree")
    assert len(tree) == expected["nodes"]
    monkeypatch.setattr(LanguageModel, "feed", lambda *_, **__: pytest.fail("decoded again"))
    episodes = decode(pool, task, task.examples("validation", 4), Random(0), 0.3, tree=tree)
    for episode, before in zip(episodes, expected["episodes"], strict=True):
        assert episode.tokens.tolist() == before["tokens"]
        assert episode.writers.tolist() == before["writers"]
        assert episode.correct == before["correct"]


def test_preference_shards_hold_the_same_labels(expected, tmp_path):
    folder = Path(shutil.copytree(SAVED / "preferences", tmp_path / "preferences"))
    store = PreferenceStore.open(folder)
    store.require()
    for name in COLUMNS:
        assert store.column(name).tolist() == expected["columns"][name], name
    sums = [float(store.features(shard).double().sum()) for shard in range(store.shards)]
    np.testing.assert_allclose(sums, expected["features"], rtol=1e-12)
