"""Tasks read from records: JSON lines on disk, or a data set of the Hugging Face hub."""

from __future__ import annotations

import json
import logging
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from envs.tasks.task import Chat, Example, Split, Task, check_split

Row = Mapping[str, object]
# A record that must be held out goes by the CRC of its prompt, modulo ten: equal prompts share a split, and a record
# stays where it is when others are added to its file.
_BUCKETS = 10
_VALIDATION_BUCKET, _TEST_BUCKET = 8, 9


class Problem(NamedTuple):
    """A record in the form every task understands.

    Attributes:
        prompt, reference, answer: those of `Example`.
        key: what a split is chosen by where the source has none, if it is not the prompt: the prompt as the record or
            the template has it, where an instruction makes another one of it.
    """

    prompt: str
    reference: str | None
    answer: str
    key: str = ""


@dataclass(frozen=True, kw_only=True)
class RecordTask(Task):
    """A task whose examples are records, read and checked when it is made. Subclasses say what a record means.

    A split that the source does not have is taken out of the train records, a tenth of them each: deterministically,
    and equal prompts together. A prompt that the source has in several splits stays in the test split, else in the
    validation split; its other copies are left out. Of records of one split with equal prompts the first stays.
    Warnings count what was left out.

    Args:
        path: a file of JSON lines: the train records.
        test_path: a file of JSON lines: the test split.
        dataset: instead of `path`, the id of a data set on the Hugging Face hub, or a folder `datasets` can load. Only
            then is the network used.
        config_name: the configuration of `dataset`; several, joined by `+`, are read one after the other.
        revision: the commit, branch or tag of `dataset`; its newest where None.
        train_split: what `dataset` calls the split with the train records.
        validation_split: what `dataset` calls the validation split; None where it has none.
        test_split: what `dataset` calls the test split. It must have labels; None where it has none.
        name: what results call the task. Where empty, the stem of `path` or the last part of `dataset`.
        longest_prompt: the longest prompt, in characters, the chat's other words not counted; any where None.
        on_long_prompt: what becomes of longer ones: `skip`, and a warning counts them, or `truncate`, their last
            characters.
        instruction: what is asked for, behind the problem, in place of what the prompts of the records or the template
            say; of records that bring prompts too. Splits do not depend on it.
        chat: put prompts as the user's turn of a chat, by the chat template of the models' tokenizer, for models that
            were tuned to follow instructions; references are then the assistant's turn.
        system: the system's turn of the chat; what the template says where None.
        chat_options: what the template reads besides, such as `{"enable_thinking": False}`.

    Raises:
        ValueError: settings that contradict each other; a record that is malformed, lacks a field or has no answer,
            named by its file and line.
        FileNotFoundError: no file at `path` or `test_path`.
        OSError: `dataset` could not be fetched.
    """

    path: str | None = None
    test_path: str | None = None
    dataset: str | None = None
    config_name: str | None = None
    revision: str | None = None
    train_split: str = "train"
    validation_split: str | None = None
    test_split: str | None = "test"
    name: str = ""
    longest_prompt: int | None = None
    on_long_prompt: Literal["skip", "truncate"] = "skip"
    instruction: str | None = None
    chat: bool = False
    system: str | None = None
    chat_options: dict[str, Any] = field(default_factory=dict, hash=False)
    _examples: Mapping[Split, tuple[Example, ...]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give a task exactly one source: path (JSON lines) or dataset (a Hugging Face id)")
        needs = {"test_path": "path", "config_name": "dataset", "revision": "dataset", "validation_split": "dataset"}
        for setting, source in needs.items():
            if getattr(self, setting) is not None and getattr(self, source) is None:
                raise ValueError(f"{setting}={getattr(self, setting)!r} goes with {source}, which is not given")
        if not self.chat and (self.system is not None or self.chat_options):
            raise ValueError("system and chat_options go with chat=true; say so, or leave them out")
        if self.instruction is not None and not self.instruction.strip():
            raise ValueError("instruction is empty; say what is asked for, or leave it out (null)")
        if self.longest_prompt is not None and self.longest_prompt < 1:
            raise ValueError(f"longest_prompt must be at least 1, is {self.longest_prompt}")
        if self.on_long_prompt not in ("skip", "truncate"):
            raise ValueError(f"unknown on_long_prompt {self.on_long_prompt!r}; choose one of skip, truncate")
        chat = Chat(self.system, tuple(self.chat_options.items())) if self.chat else None
        if not self.name:
            source = Path(self.path).stem if self.path is not None else str(self.dataset).rstrip("/").split("/")[-1]
            object.__setattr__(self, "name", source)

        splits = _divide(self._problems("train") or [], self._problems("validation"), self._problems("test"), self.name)
        examples = {
            split: tuple(
                Example(f"{self.name}/{split}/{index}", one.prompt, one.reference, one.answer, chat)
                for index, one in enumerate(problems)
            )
            for split, problems in splits.items()
        }
        object.__setattr__(self, "_examples", examples)

    @abstractmethod
    def problem(self, row: Row) -> Problem:
        """What `row` asks and answers; raises ValueError with the reason where it does not say."""

    def size(self, split: Split) -> int:
        return len(self._examples[check_split(split)])

    def example(self, split: Split, index: int) -> Example:
        if not 0 <= index < self.size(split):
            raise IndexError(f"{self.name} has {self.size(split)} {split} examples; there is no number {index}")
        return self._examples[split][index]

    def _rows(self, split: Split) -> Iterable[tuple[str, Row]] | None:
        """The records the source has for `split`, each with the place it stands at; None where it has no such split."""
        if self.dataset is not None:
            hub_splits = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
            hub_split = hub_splits[split]
            return None if hub_split is None else _read_hub(self.dataset, self.config_name, self.revision, hub_split)
        file = {"train": self.path, "validation": None, "test": self.test_path}[split]
        return None if file is None else read_jsonl(file)

    def _problems(self, split: Split) -> list[Problem] | None:
        rows = self._rows(split)
        if rows is None:
            return None
        problems, long = [], 0
        for place, row in rows:
            try:
                problem = self.problem(row)
            except ValueError as error:
                raise ValueError(f"{place}: {error}") from error
            if self.longest_prompt is not None and len(problem.prompt) > self.longest_prompt:
                if self.on_long_prompt == "skip":
                    long += 1
                    continue
                key = problem.key or problem.prompt
                problem = problem._replace(prompt=problem.prompt[-self.longest_prompt :], key=key)
            problems.append(problem)
        if long:
            if not problems:
                raise ValueError(
                    f"{self.name}: all {long} prompts of the {split} split are longer than longest_prompt="
                    f"{self.longest_prompt} characters; raise it, or say on_long_prompt=truncate"
                )
            logging.getLogger(__name__).warning(
                "%s: left out %d %s records whose prompts are longer than %d characters",
                self.name,
                long,
                split,
                self.longest_prompt,
            )
        if not problems:
            raise ValueError(f"{self.name}: the source of the {split} split holds no records; give one that does")
        return problems


def read_jsonl(path: str | Path) -> Iterator[tuple[str, Row]]:
    """The records of a file of JSON lines, each with its place `file:line`. Blank lines are passed over.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not a JSON object, named by its number; a file without records.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"no file {file} (relative paths start at {Path.cwd()}); give the path of a .jsonl file"
        )
    empty = True
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            empty = False
            try:
                row = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(
                    f"{file}:{number}: not JSON ({error}); each line holds one JSON object. Correct or delete the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}:{number}: a JSON {type(row).__name__}; each line must hold one JSON object")
            yield f"{file}:{number}", row
    if empty:
        raise ValueError(f"{file} holds no records; give a file with one JSON object per line")


def _read_hub(dataset: str, config_name: str | None, revision: str | None, split: str) -> Iterator[tuple[str, Row]]:
    """The records of one split of a data set on the hub, each with its place."""
    from datasets import load_dataset

    configs = [None] if config_name is None else config_name.split("+")
    for config in configs:
        place = f"{dataset}:{split}" if config is None else f"{dataset}/{config}:{split}"
        try:
            rows = load_dataset(dataset, config, revision=revision, split=split)
        except OSError as error:
            raise OSError(
                f"cannot fetch {place} ({error}); check its id and the network, or download its records and give "
                "them as JSON lines with path="
            ) from error
        except ValueError as error:  # the message lists the configurations or splits there are
            raise ValueError(f"cannot read {place} ({error}); set config_name and the names of the splits") from error
        for index, row in enumerate(rows):
            yield f"{place} row {index}", row


def _divide(
    train: list[Problem], validation: list[Problem] | None, test: list[Problem] | None, name: str
) -> dict[Split, list[Problem]]:
    """Three splits that share no prompt, each prompt once. A split that is None is taken out of `train`."""
    held_out: dict[int, Split] = {}
    if validation is None:
        held_out[_VALIDATION_BUCKET] = "validation"
    if test is None:
        held_out[_TEST_BUCKET] = "test"

    splits: dict[Split, list[Problem]] = {"train": [], "validation": [], "test": []}
    kept: dict[str, tuple[Split, str]] = {}  # by prompt: the split of the source it was read from, and its answer
    contaminated = repeated = contradictory = 0
    sources: tuple[tuple[Split, list[Problem]], ...] = (
        ("test", test or []),
        ("validation", validation or []),
        ("train", train),
    )
    for source, problems in sources:
        for problem in problems:
            if problem.prompt in kept:
                first_source, first_answer = kept[problem.prompt]
                contaminated += first_source != source
                repeated += first_source == source
                contradictory += first_source == source and first_answer != problem.answer
                continue
            kept[problem.prompt] = source, problem.answer
            bucket = zlib.crc32((problem.key or problem.prompt).encode()) % _BUCKETS
            splits[held_out.get(bucket, "train") if source == "train" else source].append(problem)

    log = logging.getLogger(__name__)
    if contaminated:
        log.warning(
            "%s: left out %d train or validation records whose prompts stand in a later split as well",
            name,
            contaminated,
        )
    if repeated:
        log.warning(
            "%s: left out %d records whose prompts stand before them in the same split, %d of them with another answer",
            name,
            repeated,
            contradictory,
        )
    return splits


def text(row: Row, key: str) -> str:
    """Field `key` of `row` as text.

    Raises:
        ValueError: the field is missing, blank, or neither text nor a number.
    """
    if key not in row:
        raise ValueError(f"no field {key!r} among {', '.join(row) or 'none'}")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"field {key!r} is a {type(value).__name__}; it must be text")
    if not str(value).strip():
        raise ValueError(f"field {key!r} is empty")
    return str(value)


def check_template(template: str, *placeholders: str) -> None:
    """Raises ValueError if `template` lacks one of `placeholders`, such as `{question}`."""
    for placeholder in placeholders:
        if f"{{{placeholder}}}" not in template:
            raise ValueError(f"the template {template!r} lacks {{{placeholder}}}")


def fill(template: str, **values: str) -> str:
    r"""`template` with each `{name}` replaced by its value. Other braces stay: prompts contain `\boxed{}`."""
    return re.sub("|".join(rf"\{{{name}\}}" for name in values), lambda match: values[match[0][1:-1]], template)


def prompt_template(template: str, default: str, instructed: str, instruction: str | None) -> str:
    """What prompts are made of: `template`; with an instruction `instructed`, where a task leaves it at its `default`.

    Raises:
        ValueError: a template that lacks `{instruction}` where one is given, or has it where none is.
    """
    if instruction is None:
        if "{instruction}" in template:
            raise ValueError(f"the template {template!r} asks for an instruction; give one, or take it out")
        return template
    if template == default:
        return instructed
    check_template(template, "instruction")
    return template
