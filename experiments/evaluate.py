"""Draw the accuracy-cost curves of several policies on problems none of them has seen.

    python -m experiments.evaluate +saved.citer=outputs/train/citer-.../policy
    python -m experiments.evaluate +agent@agents.margin=margin examples=500

The run's folder receives `config.yaml`, `results.jsonl` (a row per policy and threshold), `summary.json`, `table.md`,
`curve.png`, `transcripts.html`, and in `runs/` the outcome of every example at every threshold. Started again in the
same folder (`hydra.run.dir=...`), an evaluation goes on after the last threshold that is done.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from agents.common.policy import Policy, policy_from
from agents.common.saving import POLICY_FILE, load_policy
from experiments.common.config import build, build_settings, program
from experiments.common.tracking import labelled
from experiments.evaluation.runner import evaluate
from experiments.evaluation.settings import EvaluationSettings


def check(config: DictConfig) -> None:
    """Refuse what would fail later, before any model is loaded."""
    if not config.saved and not config.agents:
        raise ValueError("nothing to evaluate: name policies (+saved.NAME=FOLDER) or agents (+agent@agents.NAME=...)")
    for name, path in config.saved.items():
        if not (Path(path) / POLICY_FILE).is_file():
            raise ValueError(f"saved.{name}: {path} holds no {POLICY_FILE}; give the policy folder of a training run")


@program("evaluate")
def main(config: DictConfig, folder: Path) -> None:
    """Evaluate `config.saved` policies and `config.agents`."""
    check(config)
    settings = build_settings(config, EvaluationSettings)
    agents = {name: build(config.agents, name) for name in config.agents}
    task, tracking, pool = build(config, "task"), build(config, "track"), build(config, "models")
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "evaluate") as track:
        policies: dict[str, Policy] = {name: load_policy(Path(path), pool) for name, path in config.saved.items()}
        for name, agent in agents.items():
            own = labelled(track, agent=name)
            policies[name] = policy_from(agent, pool, task, config.seed, own, folder / "agents" / name)
        summary = evaluate(
            pool, task, policies, settings, folder, track=track, trained=list(config.saved), seed=config.seed
        )
        track.summary({"policies": summary["policies"]}, {"curve": folder / "curve.png"})


if __name__ == "__main__":
    main()
