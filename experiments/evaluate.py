"""Draw the accuracy-cost curves of several policies on problems none of them has seen.

    python -m experiments.evaluate +saved.citer=outputs/train/citer-.../policy
    python -m experiments.evaluate +agent@agents.margin=margin examples=500
    python -m experiments.evaluate '+agents.mine={_target_: mine.Mine, patience: 20}'

The run's folder receives `config.yaml`, `results.jsonl` (a row per policy and threshold), `summary.json`, `table.md`,
`curve.png`, `transcripts.html`, and in `runs/` the outcome of every example at every threshold. Started again in the
same folder (`hydra.run.dir=...`), an evaluation goes on after the last threshold that is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import EVALUATING
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from agents.common.policy import Policy


def check(config: DictConfig) -> None:
    """Refuse what would fail later, before any model is loaded."""
    from agents.common.saving import POLICY_FILE

    if not config.saved and not config.agents:
        raise ValueError("nothing to evaluate: name policies (+saved.NAME=FOLDER) or agents (+agent@agents.NAME=...)")
    for name, path in config.saved.items():
        if not (Path(path) / POLICY_FILE).is_file():
            raise ValueError(f"saved.{name}: {path} holds no {POLICY_FILE}; give the policy folder of a training run")


@program("evaluate", EVALUATING)
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Evaluate `config.saved` policies and `config.agents`."""
    from omegaconf import OmegaConf

    from agents.common.policy import policy_from
    from agents.common.saving import load_policy
    from experiments.common.config import build, build_settings, import_modules
    from experiments.evaluation.runner import evaluate
    from experiments.evaluation.settings import EvaluationSettings

    check(config)
    import_modules(config.imports)
    settings = build_settings(config, EvaluationSettings)
    agents = {name: build(config.agents, name) for name in config.agents}
    task, tracking, pool = build(config, "task"), build(config, "track"), build(config, "models")
    policies: dict[str, Policy] = {name: load_policy(Path(path), pool) for name, path in config.saved.items()}
    begin()
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "evaluate") as track:
        for name, agent in agents.items():
            policies[name] = policy_from(agent, pool, task, config.seed, track, folder / "agents" / name)
        summary = evaluate(
            pool, task, policies, settings, folder, track=track, trained=list(config.saved), seed=config.seed
        )
        track.summary({"policies": summary["policies"]}, {"curve": folder / "curve.png"})


if __name__ == "__main__":
    main()
