"""The README's code runs as it stands."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def section(title):
    text = (ROOT / "README.md").read_text()
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def blocks():
    return BLOCK.findall(section("Your own policy in ten minutes"))


@pytest.fixture(scope="module")
def copy(blocks, tmp_path_factory):
    """A checkout with the section's files in it."""
    root = tmp_path_factory.mktemp("checkout")
    for package in ("envs", "agents", "experiments", "conf"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__", "assets"))
    for _, code in blocks:
        named = re.match(r"# ((?:agents|conf)/\S+)\n", code)
        if named:
            (root / named[1]).write_text(code)
    return root


def run(root, *command):
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=root, capture_output=True, text=True, check=False, env=environment
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_files_of_the_section_are_evaluated_beside_the_others(copy, blocks):
    (command,) = [code.strip() for kind, code in blocks if not kind]
    small = ["examples=6", "threshold_examples=4", "llm_shares=[0.1,0.5]", "bootstrap=20", "transcripts=0", "oracle=5"]
    small += ["agents.linear.examples=8", "agents.linear.steps=5", "hydra.run.dir=out", "threads=1"]
    assert command.startswith("python ")
    printed = run(copy, *command.split()[1:], *small)
    assert "impatient" in printed
    assert "linear" in printed
    assert (copy / "out" / "curve.png").is_file()


def test_the_sections_script_runs(copy, blocks):
    (script,) = [code for kind, code in blocks if kind == "python" and "PPO(" in code]
    (copy / "script.py").write_text(script.replace("learn(8192)", "learn(2048)"))
    assert re.search(r"^\d+ of 50 right$", run(copy, "script.py"), re.MULTILINE)


def test_examples_of_the_environments_run(copy):
    first, _, tree = [code for kind, code in BLOCK.findall(section("The environment")) if kind == "python"]
    (copy / "first.py").write_text(first + tree.replace("1024", "8"))
    assert re.search(r" (True|False) \d+ ", run(copy, "first.py"))
    assert (copy / "train.tree").is_file()


def test_the_example_of_whole_queries_runs(copy):
    (script,) = [code for kind, code in BLOCK.findall(section("Routing whole queries")) if kind == "python"]
    (copy / "queries.py").write_text(script)
    assert re.search(r"^[\d.]+ of the queries go to the LLM$", run(copy, "queries.py"), re.MULTILINE)


def test_the_example_without_hydra_draws_a_curve(copy):
    (script,) = [code for kind, code in BLOCK.findall(section("Experiments")) if kind == "python"]
    small = "EvaluationSettings(examples=8, threshold_examples=4, oracle=5, bootstrap=20, llm_shares=[0.1, 0.5])"
    (copy / "curve.py").write_text(script.replace("EvaluationSettings(examples=100)", small))
    run(copy, "curve.py")
    assert (copy / "curve.png").stat().st_size > 10_000
