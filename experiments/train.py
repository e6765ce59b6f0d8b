"""Train an agent and save its policy.

    python -m experiments.train agent=citer
    python -m experiments.train -m agent=citer,citer_slm seed=0,1,2

The run's folder receives `config.yaml`, `metrics.jsonl`, `summary.json` and, in `policy/`, the policy.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from agents.files import write_text
from agents.policy import SavedPolicy
from experiments.build import build, program


@program("train")
def main(config: DictConfig, folder: Path) -> None:
    """Fit `config.agent` on the task's train split."""
    agent, task, tracking = build(config, "agent"), build(config, "task"), build(config, "track")
    pool = build(config, "models")
    started = time.perf_counter()
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "train") as track:
        policy = agent.fit(pool, task, seed=config.seed, track=track)
        summary = {
            "agent": type(agent).__name__,
            "seed": config.seed,
            "seconds": round(time.perf_counter() - started, 1),
        }
        if isinstance(policy, SavedPolicy):
            policy.save(folder / "policy")
            print(f"saved {folder / 'policy'} after {summary['seconds']} s")
        track.summary(summary, {})
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
