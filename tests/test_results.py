"""The results that ship with the code: settings are today's, what traces say is right, and what is changed is found."""

import json
import os
import re
import shutil
from html import unescape
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from experiments.common.config import CONF
from experiments.evaluation.kept import MANIFEST, KeptEvaluation
from experiments.evaluation.merge import ALONE
from experiments.published.entries import entries
from experiments.published.run_file import RUNS, PublishedRun
from experiments.published.store import CANARIES, Store
from experiments.report import main as report
from experiments.reporting.tables import with_interval
from experiments.traces.trace import read_trace
from experiments.training.many import runs_of
from experiments.verification.evaluation import Verification
from tests.corruptions import CORRUPTIONS, NothingToChangeError, copied, corrupt
from tests.programs import call, composed

ARITHMETIC = Store(CONF.parent / "experiments" / "results" / "arithmetic")
ROWS = {path.stem: path for path in ARITHMETIC.rows()}
LEADERBOARD = json.loads((ARITHMETIC.folder.parent / "leaderboard.json").read_text())["tracks"]["arithmetic"]
EPISODES = 24
"""Of each trace, that are verified after a corruption."""
TRACKS = {
    "matched_hidden": "arithmetic_hidden",
    "matched_hidden_logits": "arithmetic_hidden_logits",
    "doubled_budget": "arithmetic_doubled",
    "citer_settings": "arithmetic_validation",
}
"""Studies whose rows ship, and where."""
STORES = [ARITHMETIC, *(Store(ARITHMETIC.folder.parent / track) for track in TRACKS.values())]
SHIPPED = [(store, path) for store in STORES for path in store.rows()]
"""Every row of the embedded pair."""
SOAK = os.environ.get("CITER_SOAK")
VERIFIED = set()
"""Baselines that a soak has verified whole."""


def test_the_core_table_was_made_with_the_settings_that_it_has_today(tmp_path):
    runs = runs_of(composed("leaderboard", "experiment=benchmark_page"), tmp_path)
    assert ROWS.keys() <= {run.name for run in runs}
    ARITHMETIC.check_settings([run for run in runs if run.seed == 0])


def test_traces_of_all_problems_ship_for_the_first_seed_of_core_agents(tmp_path):
    config = composed("leaderboard", "experiment=benchmark_page")
    for run in runs_of(config, tmp_path):
        trace = ARITHMETIC.folder / "traces" / f"{run.name}.parquet"
        if trace.is_file():
            whole = run.seed == config.seeds[0] and run.agent not in config.further
            assert pq.read_metadata(trace).num_rows == (1000 if whole else CANARIES), run.name


def test_shipped_rows_are_reported_on_beside_others(tmp_path, capsys):
    entropy = next(row for row in LEADERBOARD["agents"] if row["agent"] == "entropy")
    shutil.copytree(ARITHMETIC.folder, tmp_path / "others", ignore=shutil.ignore_patterns("citer*", "*.json"))
    shipped = [str(ARITHMETIC.folder), "--bootstrap", "5"]
    report([*shipped, "--agents", "entropy", "--out", str(tmp_path / "report")])
    said = json.loads((tmp_path / "report" / "summary.json").read_text())["policies"]["entropy"]
    assert said["cost_at"] == pytest.approx({at: cost["value"] for at, cost in entropy["hull_cost_at"].items()})
    with pytest.raises(SystemExit, match="say where with --out"):
        report([*shipped, "--agents", "entropy"])
    with pytest.raises(SystemExit, match="no agent 'entropi'"):
        report([*shipped, "--agents", "entropy,entropi", "--out", str(tmp_path / "report")])
    with pytest.raises(SystemExit, match="entropy with seed 0 is there twice"):
        report([*shipped, str(tmp_path / "others"), "--agents", "entropy", "--out", str(tmp_path / "report")])


def test_answers_of_shipped_traces_are_shown_side_by_side(tmp_path):
    shipped = [str(ARITHMETIC.folder), "--bootstrap", "5", "--agents", "entropy,checked_entropy", "--transcripts", "3"]
    report([*shipped, "--out", str(tmp_path)])
    page = (tmp_path / "index.html").read_text()
    for name in ("the SLM alone", "the LLM alone", "entropy", "checked_entropy"):
        assert page.count(f'<h3 class="quiet">{name}</h3>') == 3
    trace = read_trace(ARITHMETIC.folder / "traces" / "entropy-seed0.parquet")
    shown = re.findall(r'<h3 class="quiet">entropy</h3>\n<pre>(.*?)</pre>', page, re.DOTALL)
    texts = [unescape(re.sub(r"</?mark[^>]*>", "", one)) for one in shown]
    assert texts == [one.text for one in trace.episodes[:3]]
    assert any("<mark" in one for one in shown)
    shutil.copytree(ARITHMETIC.folder, tmp_path / "bare", ignore=shutil.ignore_patterns("traces"))
    with pytest.raises(SystemExit, match=r"entropy.*\.parquet: answers are shown of evaluations with traces"):
        report([str(tmp_path / "bare"), *shipped[1:], "--out", str(tmp_path / "none")])


SHOWN = re.compile(r"<!-- answers: (\S+) (\d+) -->\n\n.*\n.*\n((?:\|.*\n)+)")
"""Answers on a page of the docs: their track, the number of the problem, a table of them."""


def test_answers_on_pages_are_those_of_traces():
    pages = sorted((CONF.parent / "docs").rglob("*.md"))
    shown = [found.groups() for path in pages for found in SHOWN.finditer(path.read_text())]
    assert shown
    for track, problem, lines in shown:
        traces = ARITHMETIC.folder.parent / track / "traces"
        for line in lines.splitlines():
            policy, verdict, answer = (cell.strip() for cell in line.strip("|").split("|"))
            name = f"baselines-tree/{ALONE[policy]}" if policy in ALONE else f"{policy.strip('`')}-seed0"
            traced = read_trace(traces / f"{name}.parquet").episodes[int(problem)]
            written = re.sub(r"<del>.*?</del>|</?mark>", "", answer)
            assert unescape(written).split() == traced.text.split()
            assert verdict == ("right" if traced.correct else "wrong")


def remade(experiment, track, tmp_path):
    """All of a leaderboard but training, on a copy of the results: its page, and what it says of itself."""
    results, page = shutil.copytree(ARITHMETIC.folder.parent, tmp_path / "results"), tmp_path / "PAGE.md"
    places = [
        f"experiment={experiment}",
        f"picture={tmp_path / 'curves.png'}",
        f"results={results / track}",
        f"target={page}",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    call("leaderboard", *places)
    return page, json.loads((results / "leaderboard.json").read_text())["tracks"][track]


def pictured(path):
    """The lines that a picture of curves shows."""
    with Image.open(path) as picture:
        return json.loads(picture.info["Description"])


def assert_shows_the_same(made, shipped):
    ours, theirs = pictured(made), pictured(shipped)
    assert [line["label"] for line in ours] == [line["label"] for line in theirs]
    for one, other in zip(ours, theirs, strict=True):
        assert one["x"] == pytest.approx(other["x"], rel=1e-4)
        assert one["y"] == pytest.approx(other["y"], rel=1e-4)


def said(path):
    """A page, but for where its picture lies, and the machine that it was made on."""
    return re.sub(r"!\[.*?\)", "", path.read_text()).split("## How it was made")[0]


@pytest.mark.slow
def test_the_page_and_the_leaderboard_are_what_the_shipped_rows_say(tmp_path):
    """All of `make benchmark` but training: nothing is missing, and what stands in the checkout comes out again."""
    runs = runs_of(composed("leaderboard", "experiment=benchmark_page"), tmp_path)
    assert {run.name for run in runs} == ROWS.keys()
    page, made = remade("benchmark_page", "arithmetic", tmp_path)
    assert said(page) == said(CONF.parent / "BENCHMARK.md")
    assert_shows_the_same(tmp_path / "curves.png", CONF.parent / "docs" / "assets" / "benchmark.png")
    assert numbers(made) == pytest.approx(numbers(LEADERBOARD), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "track"), TRACKS.items())
def test_the_pages_of_other_tracks_are_what_their_rows_say(experiment, track, tmp_path, monkeypatch):
    store = Store(ARITHMETIC.folder.parent / track)
    assert {path.stem for path in store.rows()} == {
        run.name for run in runs_of(composed("leaderboard", f"experiment={experiment}"), tmp_path)
    }
    monkeypatch.setattr("experiments.published.canaries.CANARIES", 1)  # the engine is tried on the core's rows
    page, made = remade(experiment, track, tmp_path)
    assert said(page) == said(store.folder / "README.md")
    assert_shows_the_same(tmp_path / "curves.png", store.folder / "curves.png")
    shipped = json.loads((ARITHMETIC.folder.parent / "leaderboard.json").read_text())["tracks"][track]
    assert numbers(made) == pytest.approx(numbers(shipped), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("agent", "less", "more"),
    [
        ("ppo", "steps=2000000", "steps=4000000"),
        ("ppo_conditioned", "steps=2000000", "steps=4000000"),
        ("dqn", "steps=2000000", "steps=4000000"),
        ("tapo", "iterations=20", "iterations=40"),
    ],
)
def test_what_twice_the_budget_costs_is_what_the_page_says(agent, less, more, tmp_path):
    folders = [f"{ARITHMETIC.folder}", f"{ARITHMETIC.folder.parent / 'arithmetic_doubled'}"]
    report([*folders, "--agents", agent, "--first", f"{agent} {less}", "--out", f"{tmp_path}"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    ratio = summary["policies"][f"{agent} {more}"][f"against_{agent} {less}"]["ratio_at_0.95"]
    page = (CONF.parent / "docs" / "studies" / "policy_optimization.md").read_text()
    assert f"| `{agent}` | {with_interval(ratio['value'], ratio['interval'])} |" in page


@pytest.mark.slow
@pytest.mark.parametrize("study", ["changing_pool", "two_llms"])
def test_the_tables_of_query_level_agents_are_what_their_choices_say(study, tmp_path, monkeypatch):
    outcomes = CONF.parent.parent / "shared" / "data" / "query_outcomes_two_llms.jsonl"
    if study == "two_llms" and not outcomes.is_file():
        pytest.skip("its file of outcomes is not part of the repository")
    shipped = ARITHMETIC.folder.parent / "queries"
    shutil.copytree(shipped, tmp_path / "kept", ignore=shutil.ignore_patterns("*.md"))
    places = [f"results={tmp_path / 'kept' / study}.tar.xz", f"hydra.run.dir={tmp_path / 'run'}"]
    if study == "two_llms":  # the file is named as in what made them
        monkeypatch.chdir(outcomes.parent)
        places += [f"outcomes.path={outcomes.name}"]
    monkeypatch.setattr("experiments.query_routing.splits.route_split", lambda *args: pytest.fail("routed again"))
    call("queries", f"experiment={study}", *places)
    assert (tmp_path / "kept" / f"{study}.md").read_text() == (shipped / f"{study}.md").read_text()


def numbers(value, name=""):
    """All numbers of nested data, by where they stand; what is no number is left to the page."""
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: found for at, one in inner for key, found in numbers(one, f"{name}/{at}").items()}
    return {name: value} if isinstance(value, int | float) else {}


REAL_PAIR = {"commonsense_qa": "real_pair", "gsm8k": "real_pair_gsm8k"}
"""The experiment that made a track of the pretrained pair."""


@pytest.mark.parametrize("track", REAL_PAIR)
def test_the_rows_of_the_real_pair_were_made_with_the_settings_that_it_has_today(track, tmp_path):
    store = Store(ARITHMETIC.folder.parent / track)
    runs = runs_of(composed("leaderboard", f"experiment={REAL_PAIR[track]}"), tmp_path)
    assert {path.stem for path in store.rows()} <= {run.name for run in runs}
    store.check_settings(runs)


@pytest.mark.slow
@pytest.mark.parametrize("track", REAL_PAIR)
def test_the_table_of_the_real_pair_is_what_its_rows_say(track, tmp_path):
    """Its models are not here: the canaries are not decoded, but every number comes out of the rows again."""
    report([str(ARITHMETIC.folder.parent / track), "--first", "entropy", "--out", str(tmp_path)])
    made = entries(json.loads((tmp_path / "summary.json").read_text()), {}, {})
    shipped = json.loads((ARITHMETIC.folder.parent / "leaderboard.json").read_text())["tracks"][track]
    rows = [{key: value for key, value in row.items() if key in made[0]} for row in shipped["agents"]]
    for row in (*made, *rows):
        del row["training"]
    assert [row["agent"] for row in made] == [row["agent"] for row in rows]
    assert numbers(made) == pytest.approx(numbers(rows), rel=1e-9)


def test_no_place_of_a_machine_ships():
    tracks = [Store(folder) for folder in ARITHMETIC.folder.parent.iterdir() if folder.is_dir()]
    for path in [row for track in tracks for row in track.rows()]:
        said = str(PublishedRun.read(path).texts)
        assert "/tmp/" not in said
        assert "/home/" not in said


def verified(folder, pool, task):
    return Verification(task, pool).check(KeptEvaluation.read(folder / RUNS / MANIFEST))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("store", "row"),
    SHIPPED if SOAK else SHIPPED[:1],
    ids=lambda it: it.stem if isinstance(it, Path) else it.folder.name,
)
def test_shipped_traces_are_verified_and_what_is_changed_in_them_is_found(store, row, tmp_path, pool, task):
    published = PublishedRun.read(row)
    if SOAK:  # the baselines, which rows and tracks share, once
        baselines = store.baselines_of(published).resolve()
        store.unpack(row.stem, published, tmp_path / "whole", baselines=baselines not in VERIFIED)
        assert not verified(tmp_path / "whole", pool, task).faults
        VERIFIED.add(baselines)
    store.unpack(row.stem, published, tmp_path / "part", EPISODES, baselines=True)
    findings = verified(tmp_path / "part", pool, task)
    assert not findings.faults
    assert findings.counts["tokens"] > 5_000
    kinds, rng = [*CORRUPTIONS], np.random.default_rng(0)
    wanted = 100 if SOAK and row == SHIPPED[0][1] else 8  # a hundred of one row, a sample of the others
    order, made, seed = rng.permutation(len(kinds)), 0, 0
    while made < wanted:
        kind, seed = kinds[order[seed % len(kinds)]], seed + 1
        assert seed < 3 * wanted + len(kinds), f"of {seed} corruptions only {made} could be made"
        changed = copied(tmp_path / "part", tmp_path / "changed")
        try:
            file = corrupt(changed / "evaluation", kind, np.random.default_rng(seed), EPISODES)
        except (NothingToChangeError, FileNotFoundError):
            continue  # there is no refused draft, say, or no summary beside a run of many
        made += 1
        found = verified(changed, pool, task)
        # when drafts end is decided anew on the kind of machine that decided it alone, and this is said elsewhere
        elsewhere = "score" in kind and any(f"{file}: scores" in said for said in found.unchecked)
        assert found.faults or elsewhere, f"{kind}, seed {seed}: not found in {file}"
