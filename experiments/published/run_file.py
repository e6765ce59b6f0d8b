"""A run as one file, and the folder of a run made of it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from envs.storage import write_text
from experiments.common.continuing import SETTINGS
from experiments.common.tracking import METRICS
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import EXHAUSTED, Baselines
from experiments.evaluation.baselines import MANIFEST as LIMITS
from experiments.evaluation.kept import CHOSEN, MANIFEST, VALIDATED, KeptEvaluation
from experiments.evaluation.report import RESULTS
from experiments.published.answer_table import read_answers, write_answers
from experiments.training.run import SUMMARY, TRAINED
from experiments.verification.pieces import ANSWERS

RUNS = Path("evaluation") / "runs"
TEXTS = (SETTINGS, SUMMARY, TRAINED, METRICS, f"evaluation/{RESULTS}", f"{RUNS / MANIFEST}", f"{RUNS / CHOSEN}")
"""Files of a run that are kept as they are, but for the places of a machine; some runs lack one or the other."""
PLACES = ("shared", "tree")
"""Settings of an evaluation that name places of a machine, and change nothing of what is measured."""
SECONDS = "seconds"
"""The unit of costs that is no result of a run alone: the seconds of a table are measured together."""


@dataclass(frozen=True)
class PublishedRun:
    """One agent, trained with one seed and evaluated.

    Attributes:
        agent: its name.
        seed: of training.
        texts: of the files in `TEXTS`, those that the run has.
        answers: at each threshold, by their file below the evaluation's `runs` without its ending.
        traced: the one of them whose trace is shipped: at the operating point for 95 % of the LLM's accuracy, or where
            most goes to the LLM if there is none.
        made_on: the machine and the commit.
    """

    agent: str
    seed: int
    texts: Mapping[str, str]
    answers: Mapping[str, Answers]
    traced: str
    made_on: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, agent: str, made_on: Mapping[str, Any]) -> PublishedRun:
        """A run that is complete, by its folder.

        Raises:
            ValueError: it is not.
        """
        if not (folder / SUMMARY).is_file():
            raise ValueError(f"{folder} holds no run that is complete: start it again first")
        kept = KeptEvaluation.read(folder / RUNS / MANIFEST)
        if (missing := kept.missing()) is not None:
            raise ValueError(f"{missing} is missing: that evaluation was interrupted; start it again first")
        texts = {name: (folder / name).read_text() for name in TEXTS if (folder / name).is_file()}
        texts[SETTINGS] = _without_places_in_yaml(texts[SETTINGS])
        texts[SUMMARY] = _without_places_in_json(texts[SUMMARY])
        texts[f"evaluation/{RESULTS}"] = _without_seconds_in_rows(texts[f"evaluation/{RESULTS}"])
        names = [f"{agent}/{number:02d}" for number in range(len(kept.thresholds[agent]))]
        names += [name for n in names if (kept.runs / f"{(name := f'{VALIDATED}/{n}')}{ANSWERS}").is_file()]
        answers = {name: _without_seconds(Answers.load(kept.runs / f"{name}{ANSWERS}")) for name in names}
        return cls(agent, kept.seed, texts, answers, f"{agent}/{kept.number_to_trace(agent):02d}", made_on)

    @classmethod
    def read(cls, path: Path) -> PublishedRun:
        """Read what `write` wrote.

        Raises:
            ValueError: the file is damaged, or of another format; the error names it.
        """
        answers, about, texts = read_answers(path)
        try:
            return cls(answers=answers, texts=texts, **{key: about[key] for key in _PLAIN})
        except KeyError as error:
            raise ValueError(f"{path} holds no run: it lacks {error}") from error

    def write(self, path: Path) -> None:
        """Write it as one file."""
        write_answers(path, self.answers, {key: getattr(self, key) for key in _PLAIN}, self.texts)

    def unpack(self, folder: Path) -> None:
        """Write it as the folder of a run, its summary last; baselines and the policy are not among it."""
        for name, answers in self.answers.items():
            answers.save(folder / RUNS / f"{name}{ANSWERS}")
        for name, text in self.texts.items():
            if name != SUMMARY:
                write_text(folder / name, text)
        write_text(folder / SUMMARY, self.texts[SUMMARY])

    @property
    def settings(self) -> dict[str, Any]:
        """That made it, nested."""
        plain = OmegaConf.to_container(OmegaConf.create(self.texts[SETTINGS]))
        return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}

    @property
    def manifest(self) -> dict[str, Any]:
        """Of its evaluation."""
        return dict(json.loads(self.texts[f"{RUNS / MANIFEST}"]))


_PLAIN = ("agent", "seed", "traced", "made_on")


def pack_baselines(runs: Path, path: Path) -> None:
    """Write the baselines in a folder as one file."""
    files = {name: (runs / name).read_text() for name in (LIMITS, EXHAUSTED) if (runs / name).is_file()}
    write_answers(path, _baselines(runs), {}, files)


def unpack_baselines(path: Path, runs: Path) -> None:
    """Write the pieces of such a file into a folder; what says that they are complete is written last."""
    pieces, _, files = read_answers(path)
    for name, answers in pieces.items():
        answers.save(runs / f"{name}{ANSWERS}")
    for name in (LIMITS, EXHAUSTED):
        if name in files:
            write_text(runs / name, files[name])


def same_baselines(runs: Path, path: Path) -> str | None:
    """The first piece of the baselines in a folder that is not as the file has it; None where all are."""
    there, _, _ = read_answers(path)
    here = _baselines(runs)
    for name in sorted({*there, *here}):
        if name not in there or name not in here or not _alike(there[name], here[name]):
            return name
    return None


def _baselines(runs: Path) -> dict[str, Answers]:
    return {name: _without_seconds(answers) for name, answers in Baselines.load(runs).pieces().items()}


def _alike(one: Answers, other: Answers) -> bool:
    same = all((getattr(one, key) == getattr(other, key)).all() for key in ("correct", "llm_tokens", "tokens"))
    return same and all((one.costs[unit] == other.costs[unit]).all() for unit in one.costs)


def _without_seconds(answers: Answers) -> Answers:
    return answers.in_units([unit for unit in answers.costs if unit != SECONDS])


def _without_places_in_yaml(text: str) -> str:
    config = OmegaConf.create(text)
    for name in PLACES:
        if OmegaConf.select(config, f"evaluation.{name}") is not None:
            OmegaConf.update(config, f"evaluation.{name}", None)
    return OmegaConf.to_yaml(config)


def _without_places_in_json(text: str) -> str:
    summary = json.loads(text)
    for name in PLACES:
        if summary.get("evaluated_by", {}).get(name):
            summary["evaluated_by"][name] = None
    return json.dumps(summary, indent=1) + "\n"


def _without_seconds_in_rows(lines: str) -> str:
    rows = [
        {key: value for key, value in json.loads(line).items() if key != f"cost_{SECONDS}"}
        for line in lines.splitlines()
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)
