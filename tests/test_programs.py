"""What every program promises: refused starts that change nothing, one run a folder, one line for what goes wrong."""

import errno
import json
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf

from experiments.common.config import CONF, build, register_schemas
from experiments.common.continuing import SETTINGS, TRAINING, Continuing
from experiments.common.help import write_help
from experiments.common.locks import InUseError, only_writer
from experiments.common.program import program
from experiments.common.stopping import command_to_go_on

ROOT = Path(__file__).parent.parent
PROGRAMS = ("demo", "train", "evaluate", "collect", "leaderboard", "queries", "speed", "pretrain", "verify")
MINE = """
from dataclasses import dataclass

import torch

from agents.common.policy import Observation, Policy


@dataclass(frozen=True)
class Mine(Policy):
    patience: float = 30.0

    def score(self, observation: Observation) -> torch.Tensor:
        return torch.sigmoid(observation.positions / self.patience - 1.0)
"""


@pytest.fixture
def start(monkeypatch, capsys):
    """Runs a program in this process: its exit code, and what it prints."""
    handlers, level = list(logging.getLogger().handlers), logging.getLogger().level

    def started(name, *arguments, run=None):
        main = run or __import__(f"experiments.{name}", fromlist=["main"]).main
        monkeypatch.setattr(sys, "argv", [f"experiments.{name}", *arguments])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code
        finally:
            GlobalHydra.instance().clear()
            logging.getLogger().handlers[:] = handlers
            logging.getLogger().setLevel(level)
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return started


def contents(folder):
    """Every file but the lock, which says who was there last."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def config_of(script, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(script, overrides=list(overrides))


# -- a start that is refused changes nothing --------------------------------------------------------------------------


def test_a_refused_start_in_a_finished_folder_changes_nothing(start, tmp_path):
    def train(*overrides):
        return start("train", "agent=random", "threads=1", f"hydra.run.dir={tmp_path}", *overrides)

    assert train()[0] == 0
    assert not (tmp_path / ".hydra").exists()
    made = contents(tmp_path)
    assert {path.name for path in made} >= {SETTINGS, "summary.json", "train.log"}
    code, printed = train("seed=1", "task.level=easy")
    assert code == 2
    assert "seed 0, not 1" in printed
    assert 'task.level "default", not "easy"' in printed
    assert "Traceback" not in printed
    assert contents(tmp_path) == made
    assert train("threads=null", "track=jsonl")[0] == 0


REFUSED = {
    "demo": "seed",
    "train": "seed",
    "evaluate": "examples",
    "collect": "agent.examples",
    "queries": "test_share",
    "leaderboard": "train",
    "pretrain": "vocab_size",
}


@pytest.mark.parametrize("script", REFUSED)
def test_other_settings_are_refused_by_every_program_before_anything_is_built(script, start, tmp_path):
    text = OmegaConf.to_yaml(config_of(script), resolve=True)
    value = OmegaConf.select(OmegaConf.create(text), REFUSED[script])
    (tmp_path / SETTINGS).write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    made = contents(tmp_path)
    other = "[a]" if isinstance(value, list) or OmegaConf.is_list(value) else value / 2 if value else 7
    code, printed = start(script, f"{REFUSED[script]}={other}".replace(".0", ""), f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert re.search(rf"was made with .*{REFUSED[script]}.*hydra\.run\.dir", printed), printed
    assert contents(tmp_path) == made


def test_a_mistake_in_an_empty_folder_leaves_it_empty(start, tmp_path):
    for script, mistake in [("speed", "suite=swift"), ("pretrain", "only=[mammoth]"), ("leaderboard", "seeds=[]")]:
        code, _ = start(script, mistake, f"hydra.run.dir={tmp_path / script}")
        assert code == 2
        assert contents(tmp_path / script) == {}


def test_what_was_off_and_what_is_reported_may_change(tmp_path):
    text = "evaluate: {}\nevaluation: {{examples: {}, bootstrap: {}}}\nseed: {}\n"

    def refused(folder, *values):
        try:
            TRAINING.check(text.format(*values), folder)
        except ValueError as error:
            return f"{error}"
        return None

    def made(folder, *values):
        folder.mkdir(parents=True)
        (folder / SETTINGS).write_text(text.format(*values))
        return folder

    off, on = made(tmp_path / "off", "false", 3, 10, 0), made(tmp_path / "on", "true", 3, 10, 0)
    assert refused(off, "true", 5, 10, 0) is None
    assert refused(on, "true", 3, 99, 0) is None
    assert "evaluation.examples 3, not 5" in refused(on, "true", 5, 10, 0)
    assert "seed 0, not 1" in refused(off, "true", 5, 10, 1)
    (on / SETTINGS).write_text("a: [")
    assert "cannot be read" in refused(on, "true", 3, 10, 0)


def test_a_setting_that_one_side_lacks_is_a_difference(tmp_path):
    (tmp_path / SETTINGS).write_text("agents: {a: 1}\n")
    with pytest.raises(ValueError, match=r"agents\.b unset, not 2"):
        Continuing().check("agents: {a: 1, b: 2}\n", tmp_path)
    Continuing().check("agents: {a: 1}\nimports: []\nnew: null\n", tmp_path)


# -- one run a folder -------------------------------------------------------------------------------------------------


def test_a_folder_in_use_is_refused_and_the_holder_named(start, tmp_path):
    with only_writer(tmp_path):
        holder = rf"process {os.getpid()} on {re.escape(platform.node())}, since 20"
        with pytest.raises(InUseError, match=holder), only_writer(tmp_path):
            pass
        code, printed = start("train", "agent=random", f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert f"in use by process {os.getpid()}" in printed
    assert contents(tmp_path) == {}
    with only_writer(tmp_path):
        pass


# -- signals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening():
    """SIGINT is heard, also where the tests were started in the background, which is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_program_in_one_line_that_says_how_to_go_on(number, code, start, tmp_path):
    before = signal.getsignal(signal.SIGTERM)

    @program("speed", Continuing(anything_differs=True))
    def stopped(config, folder, begin):
        begin()
        signal.raise_signal(number)

    folder = tmp_path / "a=1,b"
    ended, printed = start("speed", "suite=env", f"hydra.run.dir='{folder}'", run=stopped)
    assert ended == code
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"stopped by {number.name}; what is done is kept in {folder}; to go on: python -m ")
    assert last.endswith(command_to_go_on("speed", ["suite=env"], "hydra.run.dir", folder))
    assert f"in {folder}" in printed.splitlines()[0]
    assert "Traceback" not in printed
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_that_a_library_swallows_ends_the_program_all_the_same():
    code = (
        "import signal, time\nimport experiments.common.stopping as stopping\nstopping.CLOSING = 0.2\n"
        "with stopping.stoppable():\n"
        "    try:\n        signal.raise_signal(signal.SIGTERM)\n    except BaseException:\n        time.sleep(300)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 143
    assert done.stderr == "stopped by SIGTERM before anything was done\n"


def test_the_command_to_go_on_names_the_folder_once(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["agent=citer", "hydra.run.dir=elsewhere", "agent.labels.case_3=llm"]
    command = command_to_go_on("train", given, "hydra.run.dir", tmp_path / "outputs" / "x")
    assert command == "python -m experiments.train agent=citer agent.labels.case_3=llm hydra.run.dir=outputs/x"
    odd = command_to_go_on("train", ["-m"], "hydra.sweep.dir", tmp_path / "lr=0.1,it's")
    assert subprocess.run(["bash", "-c", f"printf '%s\\n' {odd}"], capture_output=True, text=True).stdout.endswith(
        "hydra.sweep.dir='lr=0.1,it\\'s'\n"
    )


WORKING = """
import os, sys, time
from joblib import Parallel, delayed
from tqdm import tqdm
from experiments.common.stopping import end_with, stoppable

def job(parent):
    end_with(parent)
    tqdm(total=2)
    print(os.getpid(), flush=True)
    time.sleep(300)

if __name__ == "__main__":
    with stoppable():
        Parallel(n_jobs=2)(delayed(job)(os.getpid()) for _ in range(2))
"""
"""A program with two processes that a library started."""


def working():
    """The program, and the numbers of its processes, which are at work."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}

    def heed():  # what runs in the background of a shell ignores SIGINT, and so would its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = [sys.executable, "-c", WORKING]
    parent = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, preexec_fn=heed, **pipes)
    return parent, [int(parent.stdout.readline()) for _ in range(2)]


def have_ended(workers):
    """Wait until processes have; whether they did."""
    waited = psutil.wait_procs([psutil.Process(pid) for pid in workers if psutil.pid_exists(pid)], timeout=60)[1]
    return all(process.status() == psutil.STATUS_ZOMBIE for process in waited)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_program_whose_processes_show_bars_is_stopped_in_one_line(number):
    parent, workers = working()
    os.killpg(parent.pid, number) if number == signal.SIGINT else parent.terminate()
    said = [line for line in parent.communicate(timeout=60)[1].splitlines() if line and "it/s]" not in line]
    assert parent.returncode == 128 + number
    assert said == [f"stopped by {number.name} before anything was done"]
    assert have_ended(workers)


def test_processes_end_with_a_program_that_is_killed():
    parent, workers = working()
    parent.kill()
    parent.wait()
    assert have_ended(workers)


# -- what is chosen is imported, and nothing else ---------------------------------------------------------------------


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine_outside.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    yield "mine_outside"
    sys.modules.pop("mine_outside", None)


def test_one_broken_agent_stops_no_other(tmp_path, monkeypatch):
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf)
    (conf / "agent" / "broken.yaml").write_text("defaults:\n  - /schema@_here_: broken_agent.Broken\n")
    (tmp_path / "broken_agent.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("experiments.common.config.CONF", conf)
    register_schemas()
    with initialize_config_dir(str(conf), version_base=None):
        assert compose("train", overrides=["agent=entropy"]).agent.measure == "entropy"
        with pytest.raises(HydraException, match=r"broken_agent\.Broken cannot be imported: .*no_such_package"):
            compose("train", overrides=["agent=broken"])


@pytest.mark.parametrize(
    ("script", "overrides", "place"),
    [
        ("train", ["agent={}.Mine", "agent.patience=20"], "agent"),
        ("evaluate", ["+agent@agents.mine={}.Mine", "agents.mine.patience=20"], "agents.mine"),
        ("evaluate", ["+agents.mine={{_target_: {}.Mine, patience: 20}}"], "agents.mine"),
    ],
)
def test_a_policy_that_lies_outside_is_chosen_by_its_name(script, overrides, place, mine):
    config = config_of(script, *(override.format(mine) for override in overrides))
    *above, key = place.split(".")
    policy = build(config[above[0]] if above else config, key)
    assert (type(policy).__module__, policy.patience) == (mine, 20)


def test_a_setting_of_a_class_outside_is_checked_and_a_name_that_is_not_there_is_named(mine):
    with pytest.raises(HydraException, match="patiense"):
        config_of("train", f"agent={mine}.Mine", "agent.patiense=20")
    with pytest.raises(HydraException, match=rf"{mine}\.Yours cannot be imported"):
        config_of("train", f"agent={mine}.Yours")


def test_a_policy_outside_is_trained_and_evaluated(mine, start, tmp_path):
    small = ["examples=3", "threshold_examples=2", "llm_shares=[0.5]", "bootstrap=5", "transcripts=0", "oracle=0"]
    small += ["draft_tokens=0", "max_new_tokens=16"]
    code, printed = start(
        "train", f"agent={mine}.Mine", "threads=1", "evaluate=true", f"hydra.run.dir={tmp_path / 'train'}",
        *(f"evaluation.{one}" for one in small),
    )  # fmt: skip
    assert code == 0, printed
    outside = f"+agents.mine={{_target_: {mine}.Mine, patience: 20}}"
    code, printed = start("evaluate", outside, "threads=1", f"hydra.run.dir={tmp_path / 'evaluate'}", *small)
    assert code == 0, printed
    rows = [json.loads(line) for line in (tmp_path / "evaluate" / "results.jsonl").read_text().splitlines()]
    assert "mine" in {row["policy"] for row in rows}


MY_HEURISTIC = """
import torch

from agents.common.policy import Policy


class Patient(Policy):
    \"\"\"Trusts the SLM more the longer the answer is.\"\"\"

    def score(self, observation):
        return torch.sigmoid(observation.positions / 10 - 1)
"""


def test_a_class_without_settings_is_evaluated_by_a_list_and_goes_on(mine, start, tmp_path):
    (tmp_path / "elsewhere" / f"{mine}.py").write_text(MINE + MY_HEURISTIC)
    from experiments.evaluate import main

    small = ["examples=3", "threshold_examples=2", "llm_shares=[0.5]", "bootstrap=5", "transcripts=0", "oracle=0"]
    small += ["draft_tokens=0", "max_new_tokens=16", "threads=1", f"hydra.run.dir={tmp_path / 'run'}"]
    chosen = [f"agents=[{mine}.Patient,{mine}.Mine,entropy]", "agents.Mine.patience=7"]
    code, printed = start("evaluate", *chosen, *small, run=main)
    assert code == 0, printed
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert {"Patient", "Mine", "entropy"} <= {row["policy"] for row in rows}
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["first"] == "Patient"
    # its fingerprint is the same in another process, and so is what the folder keeps
    sys.modules.pop(mine)
    code, printed = start("evaluate", *chosen, *small, "bootstrap=6", run=main)
    assert code == 0, printed


def test_what_is_no_agent_or_has_no_score_is_refused_before_models_are_loaded(mine, start, tmp_path):
    (tmp_path / "elsewhere" / f"{mine}.py").write_text(MY_HEURISTIC.replace("score", "scores") + "class No: pass\n")
    for name, message in (
        ("Patient", "Patient.* abstract .*score"),
        ("No", "No is no agent; derive it from Policy"),
        ("Yes", rf"{mine}\.Yes cannot be imported"),
    ):
        code, printed = start("evaluate", f"+agent@agents.it={mine}.{name}", f"hydra.run.dir={tmp_path / name}")
        assert code in (1, 2)
        assert re.search(message, printed), printed
        assert "Traceback" not in printed
        assert contents(tmp_path / name) == {}


def test_a_module_to_import_first_that_is_not_there_is_named(start, tmp_path):
    code, printed = start("evaluate", "imports=[no_such_module]", f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert "imports: no_such_module" in printed


# -- help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", PROGRAMS)
def test_help_says_what_a_program_does_and_what_can_be_set(script, start):
    code, printed = start(script, "--help")
    assert code == 0
    module = __import__(f"experiments.{script}", fromlist=["main"])
    assert module.__doc__.strip() in printed
    assert printed.startswith(f"python -m experiments.{script} ")
    assert "seed" in printed
    assert "hydra:" not in printed
    assert "powered by" not in printed


def test_help_shows_settings_with_their_comments_and_choices():
    text = write_help("evaluate", "Something.")
    assert "examples: 300" in text
    assert "saved: {} # NAME: the policy folder of a training run" in text
    assert re.search(r"^  task \(arithmetic\): [^:]*gsm8k", text, re.MULTILINE)
    assert re.search(r"^  agent: [^:]*citer_plus", text, re.MULTILINE)


def test_help_imports_nothing_heavy():
    code = (
        "import importlib, sys\n"
        f"for name in {PROGRAMS}:\n"
        "    sys.argv = [name, '--help']\n"
        "    importlib.import_module(f'experiments.{name}').main()\n"
        "assert not {'torch', 'hydra', 'transformers', 'numpy'} & sys.modules.keys(), sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- one line for what goes wrong -------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_that_names_the_folder(start, tmp_path):
    @program("speed", Continuing(anything_differs=True))
    def filled(config, folder, begin):
        begin()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    code, printed = start("speed", f"hydra.run.dir={tmp_path}", run=filled)
    assert code == 2
    assert f"No space left on device: {tmp_path}; free some room" in printed.splitlines()[-1]
    assert "Traceback" not in printed
    assert "No space left" in (tmp_path / "speed.log").read_text()


def test_a_folder_that_cannot_be_written_is_one_line_that_names_it(start, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    code, printed = start("speed", "suite=swift", f"hydra.run.dir={tmp_path / 'file' / 'run'}")
    assert code == 2
    assert printed.strip().splitlines() == [f"[Errno 20] Not a directory: '{tmp_path / 'file' / 'run'}'"]

    def read_only(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", f"{self.lock_file}")

    monkeypatch.setattr("filelock.BaseFileLock.acquire", read_only)
    code, printed = start("speed", "suite=swift", f"hydra.run.dir={tmp_path}")
    assert code == 2
    assert f"Permission denied: '{tmp_path / '.lock'}'; name a folder that you may write: hydra.run.dir=" in printed
    assert "Traceback" not in printed


def test_a_folder_that_hydra_cannot_make_names_the_way_out(start, tmp_path, monkeypatch):
    def read_only(self, *args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "outputs")

    monkeypatch.setattr(Path, "mkdir", read_only)
    code, printed = start("speed", "suite=swift", f"hydra.run.dir={tmp_path / 'run'}")
    assert code == 2
    (line,) = printed.strip().splitlines()
    assert line.endswith(
        "Read-only file system: 'outputs'; name a folder that you may write: hydra.run.dir=..., "
        "of a multirun hydra.sweep.dir=..."
    )


def test_a_file_of_the_users_that_cannot_be_read_is_not_answered_with_another_folder(start, tmp_path):
    @program("speed", Continuing(anything_differs=True))
    def reads(config, folder, begin):
        begin()
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/elsewhere/problems.jsonl")

    code, printed = start("speed", f"hydra.run.dir={tmp_path}", run=reads)
    assert code == 2
    assert printed.splitlines()[-1].endswith("Permission denied: '/elsewhere/problems.jsonl'")


def test_a_mistake_on_the_command_line_is_named_without_frames(start):
    code, printed = start("train", "agent.ronds=3")
    assert code == 1
    assert "ronds" in printed
    assert "Traceback" not in printed
