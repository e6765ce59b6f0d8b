"""Pages of the documentation as programs: their blocks and commands run in order, reduced where they are long.

A page's python blocks are one script. A block whose first line is a comment with a path (`# mine.py`) is a file. A line
of an `sh` block is a command. An HTML comment above a block reduces it: `<!-- test: learn(50_000) -> learn(512) -->`
replaces text, `<!-- test: agent.examples=8 -->` adds words to the block's commands.
"""

import contextlib
import os
import re
import runpy
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.programs import call

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "envs").rglob("*.md")]
)
_FENCE = re.compile(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1`*$", re.MULTILINE | re.DOTALL)
_REDUCED = re.compile(r"<!-- test: ((?:(?!-->).)*) -->\s*\Z", re.DOTALL)
_FILE = re.compile(r"# ([\w/-]+\.(?:py|yaml|jsonl))\n")

EVALUATION = ["examples=3", "threshold_examples=2", "llm_shares=[0.3]", "bootstrap=5", "oracle_budget=2"]
EVALUATION += ["max_new_tokens=48", "draft_tokens=8", "transcripts=1"]
TRAINING = {
    "examples": 24, "training.epochs": 1, "training.batch_size": 64, "steps": 256, "num_envs": 8, "memory": 2**26,
    "iterations": 1, "batch": 8, "rows": 8, "validation_examples": 8,
    "selection.evaluations": 2, "selection.examples": 4, "selection.llm_shares": [0.2],
    **{f"{part}.examples": 24 for part in ("citer", "expert")},
    **{f"{part}.training.epochs": 1 for part in ("citer", "expert")}, "expert.memory": 2**26,
}  # fmt: skip
"""Settings of agents that make a training short; those that an agent has are set."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and what stands in the comment above it."""

    language: str
    text: str
    reduced: str

    @property
    def file(self):
        """The path that its first line names, or None."""
        found = _FILE.match(self.text)
        return found and found[1]

    @property
    def short(self):
        """Its text, with what the comment replaces."""
        text = self.text
        for line in filter(None, map(str.strip, self.reduced.splitlines())):
            long, arrow, short = line.partition(" -> ")
            if arrow:
                assert long in text, f"the comment above a block replaces {long!r}, which is not in it"
                text = text.replace(long, short)
        return text

    @property
    def words(self):
        """What the comment adds to commands."""
        return shlex.split(" ".join(line for line in self.reduced.splitlines() if " -> " not in line))

    @property
    def commands(self):
        """The lines of an `sh` block, as words, comments left out."""
        joined = self.text.replace("\\\n", " ")
        return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def cells(line):
    """Those of a line of a table."""
    return [cell.strip() for cell in line[1:-1].split(" |")]


def blocks(page):
    """The blocks of a page."""
    text, found = (ROOT / page).read_text(), []
    for fence in _FENCE.finditer(text):
        above = _REDUCED.search(text, 0, fence.start())
        found.append(Block(fence[2], fence[3], above[1] if above else ""))
    return found


def programs(words):
    """What a command line runs: (`experiments` program, its arguments), or None."""
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        words = words[1:]
    if words[:2] == ["python", "-m"] and words[2].startswith("experiments."):
        return words[2].removeprefix("experiments."), words[3:]
    return None


def short(program, arguments, reduced):
    """The arguments of a program in a small setting; what the page's comment says comes last."""
    if {"--help", "-h", "--cfg"} & set(arguments) or program == "report":
        return [*arguments, *reduced]
    small = {"speed": ["--cfg", "job"], "pretrain": ["--cfg", "job"], "evaluate": EVALUATION}.get(program, [])
    if program in ("train", "collect"):
        small = [*_training(program, [*arguments, *reduced])]
    if program == "train":
        small += [f"evaluation.{setting}" for setting in EVALUATION]
    said = {argument.lstrip("+").partition("=")[0] for argument in reduced}
    return [*arguments, *(word for word in small if word.partition("=")[0] not in said), *reduced]


def first_job(arguments):
    """The arguments of the first job of a multirun; of a single run, its own."""
    one = [argument for argument in arguments if argument not in ("-m", "--multirun")]
    return [re.sub(r"^([^=\[{]+=)([^,\[{]+),.*", r"\1\2", argument) for argument in one]


def _training(program, arguments):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from experiments.common.config import CONF, register_schemas

    register_schemas()
    own = [argument for argument in first_job(arguments) if not argument.startswith("hydra.")]
    with initialize_config_dir(str(CONF), version_base=None):
        agent = compose(program, overrides=own).agent
    return [f"agent.{key}={value}" for key, value in TRAINING.items() if OmegaConf.select(agent, key) is not None]


def run_page(page, scratch, training=True):
    """Run all blocks and commands of a page in the folder `scratch`, in this process.

    Without `training`, commands that train, and those that need what is trained, are left out.
    """
    os.chdir(scratch)
    sys.path.insert(0, str(scratch))
    namespace = {"__name__": "__main__"}
    for number, block in enumerate(blocks(page)):
        if block.file:
            Path(block.file).parent.mkdir(parents=True, exist_ok=True)
            Path(block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.short, f"{page}, block {number}", "exec"), namespace)
        elif block.language == "sh":
            for words in block.commands:
                if training or not _trains(words):
                    _run_command(words, block.words)


def _trains(words):
    found = programs(words)
    return found is not None and (found[0] != "evaluate" or any(word.startswith("+saved") for word in found[1]))


def _run_command(words, reduced):
    path = [word.partition("=")[2] for word in words if word.startswith("PYTHONPATH=")]
    sys.path[:0] = path
    found = programs(words)
    if found is not None:
        print(">", *words)
        program, arguments = found
        with contextlib.suppress(SystemExit) if program == "report" else contextlib.nullcontext():
            call(program, *short(program, arguments, reduced))
    elif words[0] == "python" and words[1:2] != ["-m"]:
        runpy.run_path(words[1], run_name="__main__")
    else:
        check_command(words)


def check_command(words):
    """A command that is not run here: a target of the Makefile, or a program that a set-up brings."""
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for target in words[1:]:
            assert target in targets or "=" in target, f"make {target}: there is no such target"
        return
    brought = {"cd", "git", "pip", "mkdocs", "wandb", "hf"}
    assert words[0] in brought or shutil.which(words[0]), f"{words[0]}: a newcomer has no such command"
