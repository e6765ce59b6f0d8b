"""The results that ship with the code: settings are today's, what traces say is right, and what is changed is found."""

import os

import numpy as np
import pytest

from experiments.common.config import CONF
from experiments.evaluation.kept import MANIFEST, KeptEvaluation
from experiments.published.run_file import RUNS, PublishedRun
from experiments.published.store import Store
from experiments.training.many import runs_of
from experiments.verification.evaluation import Verification
from tests.corruptions import CORRUPTIONS, NothingToChangeError, copied, corrupt
from tests.programs import composed

ARITHMETIC = Store(CONF.parent / "experiments" / "results" / "arithmetic")
ROWS = {path.stem: path for path in ARITHMETIC.rows()}
EPISODES = 24
"""Of each trace, that are verified after a corruption."""
SOAK = os.environ.get("CITER_SOAK")


def test_the_core_table_was_made_with_the_settings_that_it_has_today(tmp_path):
    runs = runs_of(composed("leaderboard"), tmp_path)
    assert ROWS.keys() <= {run.name for run in runs}
    ARITHMETIC.check_settings([run for run in runs if run.seed == 0])


def test_no_place_of_a_machine_ships():
    for path in ROWS.values():
        said = str(PublishedRun.read(path).texts)
        assert "/tmp/" not in said
        assert "/home/" not in said


def verified(folder, pool, task):
    return Verification(task, pool).check(KeptEvaluation.read(folder / RUNS / MANIFEST))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROWS] if SOAK else [*ROWS][:1])
def test_shipped_traces_are_verified_and_what_is_changed_in_them_is_found(name, tmp_path, pool, task):
    published = PublishedRun.read(ROWS[name])
    if SOAK:
        ARITHMETIC.unpack(name, published, tmp_path / "whole", baselines=True)
        assert not verified(tmp_path / "whole", pool, task).faults
    ARITHMETIC.unpack(name, published, tmp_path / "part", EPISODES, baselines=True)
    findings = verified(tmp_path / "part", pool, task)
    assert not findings.faults
    assert findings.counts["tokens"] > 5_000
    kinds, rng = [*CORRUPTIONS], np.random.default_rng(0)
    for seed in range(100) if SOAK else rng.choice(len(kinds), 8, replace=False).tolist():
        kind = kinds[seed % len(kinds)]
        changed = copied(tmp_path / "part", tmp_path / "changed")
        try:
            file = corrupt(changed / "evaluation", kind, np.random.default_rng(seed))
        except (NothingToChangeError, FileNotFoundError):
            continue  # there is no refused draft, say, or no summary beside a run of many
        assert verified(changed, pool, task).faults, f"{kind}, seed {seed}: not found in {file}"
