"""Results that ship: what is packed comes out again, nothing is rewritten, and what other code made is refused."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.common.config import CONF
from experiments.evaluation.kept import MANIFEST, KeptEvaluation
from experiments.published.answer_table import read_answers, write_answers
from experiments.published.canaries import restore
from experiments.published.entries import training_of
from experiments.published.run_file import RUNS, PublishedRun
from experiments.published.store import CANARIES, Store
from experiments.traces.trace import read_trace, write_trace
from experiments.training.many import Run, make_as_configured
from experiments.training.run import TRAINED

ROOT = CONF.parent
QUICK = (
    "experiment=benchmark", "evaluation.split=validation", "evaluation.start=0", "evaluation.examples=10",
    "evaluation.threshold_examples=4", "evaluation.llm_shares=[0.1,0.5]", "evaluation.refine=1",
    "evaluation.oracle_budget=2", "evaluation.max_new_tokens=24", "evaluation.draft_tokens=4",
)  # fmt: skip


def run_in(folder, overrides=QUICK):
    return Run("entropy", 0, overrides, folder / "runs" / "entropy-seed0", folder / "shared")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run that is complete, and results that hold it."""
    folder = tmp_path_factory.mktemp("made")
    run = run_in(folder)
    make_as_configured(run.config(), run.folder, run.agent)
    assert run.done, (run.failed, (run.folder / "log.txt").read_text())
    store = Store(folder / "results" / "tiny")
    store.add(run, {"commit": "abc"}, whole_trace=True)
    return run, store


@pytest.fixture
def results(made, tmp_path):
    """The same results, free to be changed."""
    return Store(shutil.copytree(made[1].folder, tmp_path / "results" / "tiny"))


def test_what_is_packed_comes_out_again(made, tmp_path):
    run, store = made
    (path,) = store.rows()
    name, published = path.stem, PublishedRun.read(path)
    assert name == "entropy-seed0"
    store.unpack(name, published, tmp_path, baselines=True)
    pieces = sorted(path.relative_to(run.folder) for path in (run.folder / RUNS).rglob("*.safetensors"))
    assert len(pieces) >= 8
    for piece in pieces:
        assert (tmp_path / piece).read_bytes() == (run.folder / piece).read_bytes(), piece
    for text in ("trained.json", "metrics.jsonl", f"{RUNS}/manifest.json", f"{RUNS}/thresholds.json"):
        assert (tmp_path / text).read_text() == (run.folder / text).read_text()
    assert KeptEvaluation.read(tmp_path / RUNS / MANIFEST).missing() is None
    assert training_of([run])["entropy"] == training_of([replace(run, folder=tmp_path)])["entropy"]


def test_no_place_of_this_machine_ships(made):
    run, store = made
    for path in store.folder.rglob("*"):
        if path.suffix == ".parquet" and path.parent == store.folder:
            said = json.dumps(read_answers(path)[1:])
            assert f"{run.folder.parent.parent}" not in said
            assert f"{ROOT}" not in said


def test_nothing_is_rewritten(made):
    run, store = made
    with pytest.raises(ValueError, match="there already"):
        store.add(run, {}, whole_trace=True)


@pytest.mark.parametrize("changed", ["evaluation.max_new_tokens=25", "+agent.weight=2", "task.level=hard"])
def test_other_settings_are_refused_by_name(made, changed):
    run, store = made
    store.check_settings([run])
    other = replace(run, overrides=(*run.overrides, changed))
    with pytest.raises(ValueError, match=rf"entropy-seed0.parquet was made with .*{changed.split('=')[0].lstrip('+')}"):
        store.check_settings([other])


def test_a_setting_that_came_later_makes_no_run_another_unless_it_is_set(made, results):
    run, path = made[0], next(results.folder.glob("entropy-seed0.parquet"))
    published = PublishedRun.read(path)
    before = re.sub(r"(?m)^  measure: .*\n", "", published.texts["config.yaml"])
    assert before != published.texts["config.yaml"]
    path.unlink()
    replace(published, texts={**published.texts, "config.yaml": before}).write(path)
    results.check_settings([run])
    with pytest.raises(ValueError, match=r"agent\.measure unset, not \"margin\""):
        results.check_settings([replace(run, overrides=(*run.overrides, "agent.measure=margin"))])


def test_a_run_that_is_kept_is_put_where_it_would_have_been_made(made, results, tmp_path):
    run = run_in(tmp_path / "new")
    restore(results, [run], tmp_path / "new")
    assert run.done
    assert not (tmp_path / "new" / "canaries").exists()
    assert (run.shared_baselines / "limits.json").read_text() == (made[0].shared_baselines / "limits.json").read_text()


def flip_a_token(store):
    path = store.folder / "traces" / "entropy-seed0.parquet"
    trace = read_trace(path)
    response = trace.episodes[3].response.copy()
    response[2] = (response[2] + 1) % 50
    changed = [replace(one, response=response) if one.episode == 3 else one for one in trace.episodes]
    write_trace(path, replace(trace, episodes=changed))


def flip_a_verdict(store):
    path = store.folder / "entropy-seed0.parquet"
    published = PublishedRun.read(path)
    answers = published.answers[published.traced]
    correct = answers.correct.copy()
    correct[CANARIES - 1] ^= True
    replace(published, answers={**published.answers, published.traced: replace(answers, correct=correct)}).write(path)


@pytest.mark.parametrize("change", [flip_a_token, flip_a_verdict])
def test_what_other_code_made_is_refused(results, tmp_path, change):
    change(results)
    with pytest.raises(ValueError, match=r"entropy-seed0\.parquet was made by another engine, agent or model"):
        restore(results, [run_in(tmp_path / "new")], tmp_path / "new")
    assert not run_in(tmp_path / "new").done


@pytest.mark.parametrize("cut", [10, 2000])
def test_a_damaged_file_is_named(results, cut):
    path = results.folder / "entropy-seed0.parquet"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"entropy-seed0\.parquet holds no readable results"):
        PublishedRun.read(path)


def test_other_baselines_are_refused(made, results):
    run, _ = made
    (results.folder / "entropy-seed0.parquet").unlink()
    path = results.folder / "baselines-tree.parquet"
    pieces, _, files = read_answers(path)
    slm = pieces["slm"]
    changed = replace(slm, costs={**slm.costs, "bytes": np.nextafter(slm.costs["bytes"], np.inf)})
    write_answers(path, {**pieces, "slm": changed}, {}, files)
    with pytest.raises(ValueError, match="measured beside another slm"):
        results.add(run, {}, whole_trace=True)


@pytest.mark.slow
def test_results_are_verified_and_a_flip_is_found(results, tmp_path):
    def verify():
        command = [sys.executable, "-m", "experiments.verify", f"{results.folder}", f"hydra.run.dir={tmp_path / 'v'}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    done = verify()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right: " in done.stdout
    assert not (tmp_path / "v" / "unpacked").exists()
    flip_a_verdict(results)
    done = verify()
    assert done.returncode == 1
    assert "correct is" in done.stdout
    assert Path(tmp_path / "v" / "unpacked").is_dir()


def trained_with(folder, seed, composition, **summary):
    run = Run("citer", seed, (), folder / f"citer-seed{seed}", folder / "shared")
    run.folder.mkdir()
    kept = {"made_by": {"agent": {"examples": 4}}, "summary": {"composition": composition, **summary}}
    (run.folder / TRAINED).write_text(json.dumps(kept))
    return run


def test_labels_are_told_by_their_share_of_those_that_ask_for_the_llm(tmp_path):
    none = {"slm": 7, "llm": 0, "dropped": 1}
    runs = [
        trained_with(
            tmp_path,
            seed,
            {
                "case_1": {"wording": none},
                "case_2": {"number": {**none, "llm": numbers}},
                "case_3": {"wording": {**none, "llm": words}},
            },
            tokens_read=read,
            cpu_seconds=read and 60.0,
        )
        for seed, numbers, words, read in ((0, 3, 1, [9, 5]), (1, 4, 0, None))
    ]
    had = training_of(runs)["citer"]
    assert had["labels"] == {"case_2": {"number": 0.875}, "case_3": {"wording": 0.125}}
    assert (had["llm_tokens"], had["minutes"]) == (5.0, 1.0)  # of the training that was not interrupted


@pytest.mark.parametrize(("start", "problems"), [(None, 4), ("citer", 4), ({"teacher": {"examples": 9}}, 9)])
def test_who_imitates_another_had_the_problems_of_both(start, problems, tmp_path):
    run = trained_with(tmp_path, 0, {}, tokens_read=None, cpu_seconds=None)
    kept = {"made_by": {"agent": {"examples": 4, "start": start}}, "summary": {}}
    (run.folder / TRAINED).write_text(json.dumps(kept))
    assert training_of([run])["citer"]["problems"] == problems
