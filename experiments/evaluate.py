"""Draw the accuracy-cost curves of several policies on problems none of them has seen.

    python -m experiments.evaluate +saved.citer=outputs/train/citer-.../policy
    python -m experiments.evaluate agents=[entropy,margin] examples=500
    python -m experiments.evaluate agents=[mine.Impatient,entropy] agents.Impatient.patience=20
    python -m experiments.evaluate +agent@agents.brief=citer agents.brief.rounds=1
    python -m experiments.evaluate '+agents.mine={_target_: mine.Mine, patience: 20}'

The run's folder receives `index.html`, the page to look at, and what it is made of: `config.yaml`, `results.jsonl` (a
row per policy and threshold), `summary.json`, `table.md`, `curve.png`, `transcripts.json`, and in `runs/` the outcome
of every example at every threshold. Started again in the same folder (`hydra.run.dir=...`), an evaluation goes on after
the last threshold that is done. Several processes share the problems of one evaluation, as `shards=N shard=k`: see
docs/guides/clusters.md.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.continuing import EVALUATING
from experiments.common.help import CONF
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from agents.common.policy import Learner, Policy
    from envs.models.pool import ModelPool
    from envs.tasks.task import Task
    from experiments.common.tracking import Jsonl, Tracker, Wandb
    from experiments.evaluation.settings import EvaluationSettings

AGENTS = "agent@agents."
"""What agents stand under in defaults lists and overrides."""


def check(config: DictConfig, settings: EvaluationSettings) -> None:
    """Refuse what would fail later, before any model is loaded."""
    from agents.common.saving import POLICY_FILE

    names = [*config.saved, *config.agents]
    if not names:
        raise ValueError("nothing to evaluate: name policies (+saved.NAME=FOLDER) or agents (agents=[NAME,...])")
    for name, path in config.saved.items():
        if not (Path(path) / POLICY_FILE).is_file():
            raise ValueError(f"saved.{name}: {path} holds no {POLICY_FILE}; give the policy folder of a training run")
    if config.first is not None and config.first not in names:
        raise ValueError(f"first is {config.first!r}, the policies are {', '.join(names)}; choose one of them")
    settings.shown(names)


def listed_agents(arguments: Sequence[str]) -> list[str]:
    """A command line in which `agents=[a,b]` is written as Hydra has it: these agents, and not those of the defaults.

    An agent is one of `conf/agent`, or a class by its full name, `mine.Impatient`; then it is called `Impatient`. The
    first of the list is the first policy, unless that is said, or saved policies are there.

    Raises:
        ValueError: a multirun over lists, or two agents of one name.
    """
    lists = [argument for argument in arguments if argument.startswith("agents=[")]
    if len(lists) != 1:
        return list(arguments)
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    override = OverridesParser.create().parse_override(lists[0])
    if override.is_sweep_override():
        raise ValueError(f"{lists[0]}: a multirun does not go over lists of agents; give all of them in one list")
    chosen = [f"{agent}" for agent in override.value()]  # type: ignore[union-attr]
    names = _names_of(chosen)
    defaults = [key for entry in OmegaConf.load(CONF / "evaluate.yaml").defaults for key in _keys(entry)]
    usual = [key.removeprefix(AGENTS) for key in defaults if key.startswith(AGENTS)]
    written = [f"~{AGENTS}{name}" for name in usual if name not in names]
    for name, agent in zip(names, chosen, strict=True):
        if agent not in usual:
            written.append(f"{'' if name in usual else '+'}{AGENTS}{name}={agent}")
    if names and not any(argument.lstrip("+").startswith(("first=", "saved")) for argument in arguments):
        written.append(f"first={names[0]}")
    at = arguments.index(lists[0])  # in its place: Hydra takes no overrides after an option
    return [*arguments[:at], *written, *arguments[at + 1 :]]


def _names_of(agents: Sequence[str]) -> list[str]:
    """What the agents of a list are called; a class by its own name, for a dot would part keys of Hydra.

    Raises:
        ValueError: two have one name, or names that one folder stands for where case is not told apart.
    """
    named: dict[str, str] = {}
    for agent in agents:
        name = agent.rpartition(".")[2]
        other = named.setdefault(name.casefold(), agent)
        if other is not agent:
            raise ValueError(
                f"agents=[{','.join(agents)}]: {other} and {agent} would both be called {name}; leave {agent} out of "
                f"the list and add it under another name: +{AGENTS}other={agent}"
            )
    return [agent.rpartition(".")[2] for agent in agents]


def _keys(entry: object) -> list[str]:
    """The groups that an entry of a defaults list chooses from."""
    return [str(key) for key in entry] if isinstance(entry, Mapping) else []


@program("evaluate", EVALUATING)
def evaluate_as_configured(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Evaluate `config.saved` policies and `config.agents`."""
    from omegaconf import OmegaConf

    from agents.common.policy import checked_agent, policy_from
    from agents.common.saving import load_policy
    from experiments.common.config import build, build_settings, import_modules
    from experiments.common.tracking import labelled
    from experiments.evaluation.settings import EvaluationSettings

    import_modules(config.imports)
    settings = build_settings(config, EvaluationSettings)
    check(config, settings)
    agents = {name: checked_agent(build(config.agents, name)) for name in config.agents}
    task, tracking, pool = build(config, "task"), build(config, "track"), build(config, "models")
    policies: dict[str, Policy] = {name: load_policy(Path(path), pool) for name, path in config.saved.items()}
    if config.shard is not None or config.shards > 1:
        in_shards(config, folder, begin, settings, agents, task, pool, tracking, policies)
        return
    begin()
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "evaluate") as track:
        for name, agent in agents.items():
            own = labelled(track, agent=name)
            policies[name] = policy_from(agent, pool, task, config.seed, own, folder / "agents" / name)
        finish(config, folder, settings, task, pool, track, policies)


def finish(
    config: DictConfig,
    folder: Path,
    settings: EvaluationSettings,
    task: Task,
    pool: ModelPool,
    track: Tracker,
    policies: dict[str, Policy],
    first: int = 0,
) -> None:
    """Evaluate policies, and show what came out; the problems are numbered from `first` on."""
    from experiments.evaluation.runner import evaluate

    if config.first is not None:
        policies = {config.first: policies[config.first], **policies}
    summary = evaluate(
        pool, task, policies, settings, folder, track=track, trained=list(config.saved), seed=config.seed, first=first
    )
    if summary is not None:
        track.summary({"policies": summary["policies"]}, {"curve": folder / "curve.png"})


def in_shards(
    config: DictConfig,
    folder: Path,
    begin: Begin,
    settings: EvaluationSettings,
    agents: Mapping[str, Policy | Learner[Policy]],
    task: Task,
    pool: ModelPool,
    tracking: Jsonl | Wandb,
    policies: dict[str, Policy],
) -> None:
    """Answer the problems of one shard; whoever has done the last puts all together."""
    from omegaconf import OmegaConf

    from agents.common.policy import policy_from
    from experiments.common.locks import one_at_a_time
    from experiments.common.multirun import missing_shards_said, shard_folders
    from experiments.common.run_folder import run_folder
    from experiments.common.tracking import Jsonl as Rows
    from experiments.evaluation import shards

    shards.check(settings, config.shards, agents)
    policies |= {name: policy_from(agent, pool, task, config.seed) for name, agent in agents.items()}
    whole = folder if config.shard is None else folder.parent.parent
    places = shard_folders(whole, config.shards)
    if config.shard is not None:
        begin()
        part = shards.of_shard(settings, config.shard, config.shards, folder)
        with Rows().open(folder, {}, "evaluate") as track:
            finish(config, folder, part, task, pool, track, policies, part.start - settings.start)
        print(f"shard {config.shard} of {config.shards} is done, in {folder}")
    missing = [number for number, place in enumerate(places) if not shards.is_done(place)]
    if missing and config.shard is None:
        raise ValueError(missing_shards_said("evaluate", config, whole, missing))
    if missing:
        return
    alone: DictConfig = OmegaConf.merge(config, {"shard": None})  # type: ignore[assignment]
    settings = replace(settings, shared=None)
    with one_at_a_time(whole / "runs"):  # two may be done at once
        if config.shard is not None and (whole / "summary.json").is_file():
            return
        with nullcontext(begin) if config.shard is None else run_folder(alone, whole, EVALUATING) as ready:
            ready()
            shards.put_together(places, settings, whole)
            plain: Any = OmegaConf.to_container(alone, resolve=True)
            with tracking.open(whole, plain, "evaluate") as track:
                finish(alone, whole, settings, task, pool, track, policies)


def main() -> None:
    """The program: its command line may name agents by a list."""
    try:
        sys.argv[1:] = listed_agents(sys.argv[1:])
    except ValueError as error:
        sys.exit(f"{error}")
    evaluate_as_configured()


if __name__ == "__main__":
    main()
