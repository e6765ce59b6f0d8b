"""Programs killed at random moments and started again end where undisturbed ones do. Slow: every kill is a process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
KILLS = 50
SMALL = ["threads=1", "scheduling.rows=32"]
AGENT = [
    "threads=1",
    "agent.examples=120",
    "agent.shard_examples=10",
    "agent.scheduling.rows=16",
    "agent.training.epochs=6",
]
TIMED = ("cost_seconds", "seconds")


def command(script, *overrides):
    return [sys.executable, "-m", f"experiments.{script}", *overrides]


def undisturbed(script, *overrides):
    begun = time.monotonic()
    subprocess.run(command(script, *overrides), cwd=ROOT, check=True, capture_output=True)
    return time.monotonic() - begun


def killed_until_done(script, *overrides, kills, seconds, rng):
    """Start a program again and again, each time killed at a random moment of what is left; returns kills made."""
    made = 0
    # what matters happens after the imports, which take the same time again at every start
    idle = 0.6 * seconds
    while made < kills:
        process = subprocess.Popen(
            command(script, *overrides), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert process.wait(timeout=rng.uniform(0.3 * idle, seconds)) == 0
            break
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            made += 1
    subprocess.run(command(script, *overrides), cwd=ROOT, check=True, capture_output=True)
    return made


def files(folder, *patterns):
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def rows(path):
    return [
        {key: value for key, value in json.loads(line).items() if key not in TIMED}
        for line in path.read_text().splitlines()
    ]


def test_killed_programs_end_where_undisturbed_ones_do(tmp_path):
    rng, left = np.random.default_rng(0), KILLS

    def both(script, *overrides, share):
        nonlocal left
        whole, cut = tmp_path / f"{script}-whole", tmp_path / f"{script}-cut"
        seconds = undisturbed(script, *overrides, f"hydra.run.dir={whole}")
        while left > KILLS - share:
            left -= killed_until_done(
                script, *overrides, f"hydra.run.dir={cut}", kills=left - (KILLS - share), seconds=seconds, rng=rng
            )
            if left > KILLS - share:
                for name in ("preferences", "round-1", "round-2", "runs"):  # finished between two kills: from the start
                    subprocess.run(["rm", "-rf", str(cut / name)], check=True)
        return whole, cut

    whole, cut = both("collect", *AGENT, share=17)
    assert files(whole, "preferences/*") == files(cut, "preferences/*")
    whole, cut = both("train", *AGENT, share=34)
    assert files(whole, "round-*/*", "policy/*") == files(cut, "round-*/*", "policy/*")
    assert rows(whole / "metrics.jsonl") == rows(cut / "metrics.jsonl")
    few = ["examples=40", "threshold_examples=10", "bootstrap=20", "transcripts=2"]
    whole, cut = both("evaluate", *SMALL, *few, share=KILLS)
    assert rows(whole / "results.jsonl") == rows(cut / "results.jsonl")
    assert left == 0
    assert not [path for path in tmp_path.rglob("*.partial") if "-whole" in str(path)]
