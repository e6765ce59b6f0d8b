"""Training on more data than fits: memory does not grow with it. Slow: five million rows are made up first."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agents.preferences.store import FEATURES, PreferenceStore

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc to tell the peak"),
]

ROOT = Path(__file__).parent.parent
SHARDS, ROWS, WIDTH = 25, 200_000, 128
EPOCH = """
import sys
from pathlib import Path
import torch
from agents.preferences.store import PreferenceStore
from agents.router.training import LabelledTokens, RouterTraining, fit_router

store = PreferenceStore.open(Path(sys.argv[1]))
labels = store.column("label")
data = LabelledTokens(store.features, store.rows(), labels == 1, store.column("example"), labels >= 0, int(sys.argv[2]))
rows = []
fit_router(data, RouterTraining(epochs=1, batch_size=4096), 0, rows.append, torch.device("cpu"), "memory")
# not ru_maxrss, which begins with what the process had that started this one
peak = next(line for line in Path("/proc/self/status").open() if line.startswith("VmHWM"))
print(len(labels), rows[0]["validation_loss"], peak.split()[1])
"""


def test_an_epoch_on_five_million_rows_stays_within_one_and_a_half_gigabytes(tmp_path):
    store = PreferenceStore(tmp_path, {"made": "up"}, SHARDS)
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        features = rng.standard_normal((ROWS, WIDTH), dtype=np.float32).astype(np.float16)
        columns = {
            "example": shard * (ROWS // 50) + np.arange(ROWS) // 50,
            "label": (features[:, 0] > 0).astype(np.int8),
            FEATURES: features,
        }
        store.write(shard, columns, {"skipped": []})
    done = subprocess.run(
        [sys.executable, "-c", EPOCH, str(tmp_path), str(WIDTH)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    count, loss, kilobytes = done.stdout.split()
    assert int(count) == 5_000_000
    assert float(loss) < 0.2
    print(f"peak resident memory: {int(kilobytes) / 1e6:.2f} GB")
    assert int(kilobytes) * 1024 < 1.5e9
