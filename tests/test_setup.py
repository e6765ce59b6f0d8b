"""Set-up finds a Python that serves, says in one line what stops it, and goes on where it was broken off."""

import errno
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = Path(sys._base_executable)


@pytest.fixture
def checkout(tmp_path):
    """A checkout with its set-up alone."""
    shutil.copytree(ROOT / ".ci", tmp_path / "checkout" / ".ci")
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        shutil.copy(ROOT / name, tmp_path / "checkout")
    return tmp_path / "checkout"


@pytest.fixture
def path(tmp_path):
    """A folder that is all of PATH, with what a system has beside Pythons."""
    (tmp_path / "path").mkdir()
    for tool in ("sh", "dirname", "make"):
        if found := shutil.which(tool):
            (tmp_path / "path" / tool).symlink_to(found)
    return tmp_path / "path"


def add_python(path, name, version="", venv=True):
    """A program that answers as set-up's questions are answered by a Python, and says that it was chosen."""
    lines = [
        "#!/bin/sh",
        'case "$*" in',
        f"  *version_info*) {f'echo {version}' if version else 'exit 127'};;",
        f"  *ensurepip*) exit {int(not venv)};;",
        f'  *) echo "chosen: {name} $*";;',
        "esac",
    ]
    (path / name).write_text("\n".join(lines) + "\n")
    (path / name).chmod(0o755)
    return path / name


def setup(checkout, path, *command, **variables):
    variables = {"PATH": str(path), "HOME": str(checkout), **variables}
    command = command or ("/bin/sh", str(checkout / ".ci" / "setup"))
    return subprocess.run(command, cwd=checkout, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3.11": "3.11", "python3.12": "3.12"}, "python3.11"),
        ({"python3.11": "", "python3.12": "", "python3.13": "3.13"}, "python3.13"),  # shims that fail
        ({"python3.11": "3.9", "python3": "3.12"}, "python3"),
        ({"python3": "2.7", "python": "3.11"}, "python"),
    ],
)
def test_the_first_python_that_serves_is_taken(checkout, path, pythons, chosen):
    for name, version in pythons.items():
        add_python(path, name, version)
    assert setup(checkout, path).stdout.startswith(f"chosen: {chosen} {checkout}/.ci/environment.py")


def test_what_pyenv_keeps_off_the_path_is_taken(checkout, path, tmp_path):
    add_python(path, "python3.12")
    kept = tmp_path / "pyenv" / "versions" / "3.12.1" / "bin"
    kept.mkdir(parents=True)
    add_python(kept, "python3", "3.12")
    assert setup(checkout, path, PYENV_ROOT=str(tmp_path / "pyenv")).stdout.startswith("chosen: python3 ")


def test_a_user_without_a_home_is_set_up(checkout, path):
    add_python(path, "python3.12", "3.12")
    script = f"unset HOME; exec /bin/sh {checkout}/.ci/setup"
    found = setup(checkout, path, "/bin/sh", "-c", script)
    assert found.stdout.startswith(f"chosen: python3.12 {checkout}/.ci/environment.py")
    assert not found.stderr


def test_without_a_python_that_serves_one_line_says_which_are_there(checkout, path):
    refused = setup(checkout, path)
    assert refused.returncode == 1
    assert "needs Python 3.11, 3.12 or 3.13, found none;" in refused.stderr
    add_python(path, "python3.12")
    add_python(path, "python3.13", "3.13", venv=False)
    add_python(path, "python3", "3.10")
    refused = setup(checkout, path)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "python3.12 (does not run)" in refused.stderr
    assert "python3.13 (3.13 without venv, on Debian: apt install python3.13-venv)" in refused.stderr
    assert "python3 (is 3.10)" in refused.stderr
    assert "make PYTHON=/path/to/python3.13 setup" in refused.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="has no make")
def test_the_python_one_names_is_taken_or_refused(checkout, path):
    mine = add_python(checkout, "mine", "3.12")
    add_python(path, "python3.11", "3.11")
    assert "chosen: mine " in setup(checkout, path, "make", f"PYTHON={mine}", "setup").stdout
    refused = setup(checkout, path, "make", "PYTHON=python3.9", "setup")
    assert refused.returncode
    assert "PYTHON=python3.9 does not serve: no such command" in refused.stderr
    add_python(path, "python3.9", "3.9")
    assert "python3.9 (is 3.9)" in setup(checkout, path, "make", "PYTHON=python3.9", "setup").stderr


@pytest.fixture
def environment(checkout, monkeypatch):
    """The module that makes `.venv`, in that checkout; pip is not called, its call is noted."""
    spec = importlib.util.spec_from_file_location("environment", checkout / ".ci" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.installed, module.install_with_pip = [], module.install
    monkeypatch.setattr(module, "install", module.installed.append)
    monkeypatch.setattr(sys, "argv", ["environment.py"])
    return module


@pytest.fixture
def bare(environment, monkeypatch):
    """A `.venv` with a Python and what stands for pip."""
    subprocess.run([BASE, "-m", "venv", "--without-pip", str(environment.VENV)], check=True)
    packages = next(environment.VENV.glob("lib/python*/site-packages"))
    (packages / "pip-1.dist-info").mkdir()
    (packages / "pip-1.dist-info" / "RECORD").touch()
    monkeypatch.setattr(environment, "runs", lambda command: True)
    return packages


def ending(environment):
    with pytest.raises(SystemExit) as ended:
        environment.main()
    return str(ended.value)


def test_what_is_ready_is_left_alone_until_what_it_installs_changes(environment, bare, capsys):
    environment.main()
    environment.main()
    assert len(environment.installed) == 1
    assert ".venv is ready" in capsys.readouterr().out
    later = environment.STAMP.stat().st_mtime + 2
    os.utime(environment.SOURCES[0], (later, later))
    environment.main()
    assert len(environment.installed) == 2


def test_a_package_that_is_half_there_is_removed_to_be_installed_again(environment, bare):
    (bare / "torch-2.dist-info").mkdir()
    (bare / "torch-2.dist-info" / "METADATA").touch()
    (bare / "~umpy").mkdir()
    environment.main()
    assert [path.name for path in bare.iterdir()] == ["pip-1.dist-info"]
    assert environment.installed


@pytest.mark.parametrize("moment", ["folders", "python", "no activate"])
def test_a_venv_that_is_half_there_is_completed_or_made_anew(environment, monkeypatch, moment):
    if moment == "folders":
        (environment.VENV / "bin").mkdir(parents=True)
    else:
        subprocess.run([BASE, "-m", "venv", "--without-pip", str(environment.VENV)], check=True)
    if moment == "python":
        (environment.VENV / "bin" / "python").unlink()
    if moment == "no activate":
        (environment.VENV / "bin" / "activate").unlink()

    def make():
        subprocess.run([BASE, "-m", "venv", "--without-pip", str(environment.VENV)], check=True)

    monkeypatch.setattr(environment, "make", make)
    monkeypatch.setattr(environment, "runs", lambda command: False)  # what is there of pip does not run
    environment.main()
    assert environment.is_ready()
    assert (environment.VENV / "bin" / "activate").exists()


def test_what_is_no_virtual_environment_is_not_removed(environment):
    environment.VENV.mkdir()
    (environment.VENV / "thesis.txt").write_text("mine")
    assert "no virtual environment: move it away" in ending(environment)
    assert (environment.VENV / "thesis.txt").exists()


def test_another_python_than_that_of_the_venv_is_refused(environment, bare, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["environment.py", "--asked", "python3.99"])
    monkeypatch.setattr(environment.sys, "version_info", (3, 99))
    assert "PYTHON=python3.99 is 3.99: `rm -r .venv` first" in ending(environment)
    assert not environment.installed


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "cannot write in .*: copy the checkout to where you may"),
        (errno.EACCES, "cannot write in .*: copy the checkout to where you may"),
        (errno.ENOSPC, "is full: free some GB"),
    ],
)
def test_a_checkout_that_cannot_be_written_is_named_at_once(environment, monkeypatch, number, said):
    def none(**kwargs):
        raise OSError(number, os.strerror(number), f"{environment.ROOT}/tmp_drawn")

    monkeypatch.setattr(environment.tempfile, "TemporaryFile", none)
    ended = ending(environment)
    assert re.search(said, ended)
    assert "tmp_drawn" not in ended
    assert not environment.VENV.exists()


def test_a_second_setup_waits_for_the_first(environment, bare, capsys, monkeypatch):
    lock = os.open(environment.__file__, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    waits = environment.fcntl.flock

    def first_ends(file, how):
        if how == fcntl.LOCK_EX:  # the first one ends while the second waits
            environment.STAMP.touch()
            os.close(lock)
        waits(file, how)

    monkeypatch.setattr(environment.fcntl, "flock", first_ends)
    environment.main()
    assert "waiting for another set-up" in capsys.readouterr().out
    assert not environment.installed


def test_a_disk_without_room_is_named_at_once(environment, bare, monkeypatch):
    usage = shutil.disk_usage(bare)
    monkeypatch.setattr(environment.shutil, "disk_usage", lambda folder: usage._replace(free=500_000_000))
    assert "has 0.5 GB left: free some, or name a larger folder: TMPDIR=" in ending(environment)
    shutil.rmtree(environment.VENV)
    assert f"needs 3 GB, {environment.ROOT} has 0.5 GB left" in ending(environment)
    assert not environment.VENV.exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("ERROR: No matching distribution found for torch", "setup` goes on from there.*No matching distribution"),
        ("ERROR: Could not install: [Errno 28] No space left on device", "is full: free some GB"),
    ],
)
def test_of_pips_lines_the_errors_are_shown(environment, bare, monkeypatch, tmp_path, line, said):
    lines = ["WARNING: Location /x is ignored", "Collecting torch", line]
    code = f"import sys; print({chr(10).join(lines)!r}); sys.exit(1)"
    monkeypatch.setattr(environment, "PIP", [sys.executable, "-c", code])
    monkeypatch.setattr(environment, "install", environment.install_with_pip)
    ended = ending(environment)
    assert re.search(said, ended, re.DOTALL)
    assert "WARNING" not in ended
    assert not environment.STAMP.exists()
