"""The documentation is true: its links lead somewhere, its code and its commands run."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pages import PAGES, ROOT, blocks, cells, check_command, first_job, programs, run_page, short
from tests.programs import WARM, call

RUN = [page for page in PAGES if any(block.language in ("python", "sh") for block in blocks(page))]
LINK = re.compile(r"(?<!`)!?\[[^\]]*\]\(([^)\s]+)\)|<img[^>]*src=\"([^\"]+)\"")


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


SHOWN = [page for page in RUN if any((block.file or "").endswith(".py") for block in blocks(page))]


@pytest.mark.parametrize("page", SHOWN)
def test_files_shown_pass_the_linter(page, tmp_path):
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in ("agents", "envs", "experiments"):  # which are the project's own
        (tmp_path / package).symlink_to(ROOT / package)
    shown = [block for block in blocks(page) if (block.file or "").endswith(".py")]
    for block in shown:
        (tmp_path / block.file).parent.mkdir(exist_ok=True)
        (tmp_path / block.file).write_text(block.text)
    files = [block.file for block in shown]
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *files], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def slugs(page):
    """The anchors of a page's headings, and those that are set by hand."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    found = set(re.findall(r"<a id=\"([^\"]+)\"|\{ ?#([\w-]+) ?\}", text))
    anchors = {anchor for pair in found for anchor in pair if anchor}
    for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", re.sub(r"\{.*\}", "", title)).strip().lower()
        anchors.add(re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return anchors


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in (a or b for a, b in LINK.findall(text)):
        if link.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in slugs(target.resolve().relative_to(ROOT)), f"{page}: {link}"


@pytest.mark.parametrize("page", RUN)
def test_commands_compose(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # classes of files that a page writes are there when it runs
    own = [f"{Path(block.file).stem}." for block in blocks(page) if block.file]
    for block in blocks(page):
        for words in block.commands if block.language == "sh" else ():
            found = programs(words)
            if found is None:
                check_command(words)
            elif found[0] != "report" and not any(name in word for name in own for word in words):
                call(found[0], *first_job(found[1]), "--cfg", "job")
                assert capsys.readouterr().out.strip()


def started(page, scratch, log, training):

    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        run_page(page, scratch, training)


def in_a_process_of_its_own(page, tmp_path, training=True):
    log = tmp_path / "log.txt"
    (tmp_path / "scratch").mkdir()
    process = WARM.Process(target=started, args=(page, tmp_path / "scratch", log, training))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()[-5000:]
    return log.read_text()


def test_the_readmes_blocks_run(tmp_path):
    assert "Impatient" in in_a_process_of_its_own("README.md", tmp_path, training=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_blocks_and_commands_run(page, tmp_path):
    in_a_process_of_its_own(page, tmp_path)


@pytest.mark.slow
def test_figures_of_checking_come_out_again():
    """The block as it stands, for one of three seeds; another kind of CPU may decode near ties otherwise."""
    page = "docs/studies/checking.md"
    code = next(block.text for block in blocks(page) if block.language == "python").replace("range(3)", "range(1)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = [cells(line) for line in done.stdout.splitlines() if line.startswith("|")]
    said = {tuple(row[:2]): row[2:] for row in map(cells, (ROOT / page).read_text().splitlines()) if len(row) == 5}
    assert len(printed) == 10
    for *row, accuracy, _, cost in printed:
        assert float(said[tuple(row)][0]) == pytest.approx(float(accuracy), abs=0.005)
        assert float(said[tuple(row)][2]) == pytest.approx(float(cost), abs=0.005)


@pytest.mark.slow
def test_figures_of_labels_come_out_again(tmp_path):
    page = "docs/agents/citer.md"
    words = next(words for block in blocks(page) for words in block.commands if "agent.sample.positions=500" in words)
    program, arguments = programs([word for word in words if not word.startswith("hydra.run.dir")])
    call(program, *arguments, "evaluate=false", f"hydra.run.dir={tmp_path}")
    sample = json.loads((tmp_path / "summary.json").read_text())["case_2_sample"]
    found = re.search(
        r"sample of (\d+), (\d+) of (\d+) wording .*? \((\S+) %\), (\d+) of (\d+) numbers", (ROOT / page).read_text()
    )
    size, right, wording, share, right_numbers, numbers = map(float, found.groups())
    assert sum(kind["rollouts"] for kind in sample.values()) == size
    assert share == round(100 * right / wording, 1)
    for kind, said_right, said_all in (("wording", right, wording), ("number", right_numbers, numbers)):
        assert sample[kind]["right"] == pytest.approx(said_right, abs=2)
        assert sample[kind]["rollouts"] == pytest.approx(said_all, abs=2)


def test_a_command_is_reduced_where_it_is_long():
    arguments = short("train", ["-m", "agent=citer,citer_s", "seed=0,1"], ["seed=3"])
    assert "agent.training.epochs=1" in arguments
    assert arguments[-1] == "seed=3"


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path):
    assert importlib.util.find_spec("material"), "the docs extra is part of the set-up"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
