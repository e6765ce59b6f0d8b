"""Makes `.venv` and installs the project there; `.ci/setup`, which `make` calls, runs it with a Python that serves.

What stops it is said in one line that names the way out, as far as possible before minutes are spent. Broken off at any
moment, it goes on when it is called again; called twice at once, the second waits for the first.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".installed"
SOURCES = [ROOT / "pyproject.toml", ROOT / "constraints.txt"]
WANTED = ".[dev,docs,gguf,joblib,quanto,slurm]"
VERSIONS = {"3.11", "3.12", "3.13"}
ROOM = 3_000_000_000
"""Bytes that `.venv` takes with PyTorch for CPUs and some to spare; PyTorch for CUDA takes 6 GB."""
ROOM_FOR_DOWNLOADS = 1_000_000_000
PIP = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", "--no-input"]


class SetupError(Exception):
    """What stops set-up, and the way out."""


def main() -> None:
    """Set up, unless all is there already."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--asked", default="", help="the Python that the user chose, in the user's words")
    asked = arguments.parse_args().asked
    try:
        if not is_ready():
            with alone() as lock:
                if not is_ready():  # who was waited for has made it
                    set_up(asked, lock)
        check_the_choice(asked)
        say(f".venv is ready, with Python {version_of(PYTHON)}")
    except SetupError as error:
        sys.exit(f"set-up: {error}")
    except OSError as error:
        sys.exit(f"set-up: {way_out(error)}")
    except KeyboardInterrupt:
        sys.exit("set-up: broken off; `make setup` goes on from there")


def is_ready() -> bool:
    """Whether what is asked for was installed since it last changed, into an environment that still runs."""
    newest = max(source.stat().st_mtime for source in SOURCES)
    return STAMP.exists() and STAMP.stat().st_mtime >= newest and version_of(PYTHON) in VERSIONS


@contextmanager
def alone():
    """The lock of this checkout; the system lets go of it when set-up, and pip, which inherits it, have ended."""
    with Path(__file__).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this folder")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield lock.fileno()


def set_up(asked: str, lock: int) -> None:
    """Make `.venv`, or mend it, and install."""
    begun = time.monotonic()
    check_folder()
    if VENV.exists() or VENV.is_symlink():
        mend()
    if not VENV.exists():
        check_room(ROOT, ROOM, "free some, or move the checkout to a larger disk")
        make()
    check_the_choice(asked)
    check_room(
        Path(tempfile.gettempdir()), ROOM_FOR_DOWNLOADS, "free some, or name a larger folder: TMPDIR=... make setup"
    )
    say("installing PyTorch and what else pyproject.toml names: some minutes, 0.5 to 3 GB of downloads")
    install(lock)
    STAMP.touch()
    say(f"done in {time.monotonic() - begun:.0f} s")


def check_folder() -> None:
    """Refuse a checkout where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=ROOT):
            pass
    except OSError as error:  # it names a file that nobody knows
        raise OSError(error.errno, error.strerror, f"{ROOT}") from error


def check_room(folder: Path, needed: int, way: str) -> None:
    """Refuse a disk that would be full before the end."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(f"needs {needed / 1e9:.0f} GB, {folder} has {free / 1e9:.1f} GB left: {way}")


def mend() -> None:
    """Make a `.venv` that is there usable, or remove what a broken-off set-up left of one."""
    if VENV.is_symlink() and version_of(PYTHON) not in VERSIONS:
        raise SetupError(f"{VENV} is a link to {os.readlink(VENV)}, where no Python runs: rm {VENV}")
    if not (VENV / "pyvenv.cfg").exists() and any(path.is_file() for path in VENV.rglob("*")):
        raise SetupError(f"{VENV} is there and no virtual environment: move it away")
    if version_of(PYTHON) not in VERSIONS:
        say("the Python of .venv does not run, or is of a version that does not serve: making .venv anew")
        shutil.rmtree(VENV)
        return
    # pip writes RECORD last: what has none is half a package, which pip would take for a whole one
    for package in VENV.glob("lib/python*/site-packages/*.dist-info"):
        if not (package / "RECORD").exists():
            shutil.rmtree(package)
    for remains in VENV.glob("lib/python*/site-packages/~*"):  # what pip has put aside to replace it
        shutil.rmtree(remains) if remains.is_dir() else remains.unlink()
    if runs([*PIP, "--version"]) and (VENV / "bin" / "activate").exists():
        return
    say("completing a half-made .venv")
    if not (runs([str(PYTHON), "-m", "ensurepip", "--upgrade", "--default-pip"]) and runs([*PIP, "--version"])):
        shutil.rmtree(VENV)


def make() -> None:
    """A new virtual environment; where this Python is of one itself, of the Python below it."""
    base = getattr(sys, "_base_executable", sys.executable)
    say(f"making .venv with Python {version_of(base)} ({base})")
    made = subprocess.run([base, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        said = " ".join((made.stdout + made.stderr).split())
        raise SetupError(f"{base} -m venv .venv failed, another Python may do: make PYTHON=... setup. It said: {said}")


def check_the_choice(asked: str) -> None:
    """Refuse another Python than the one that `.venv` has."""
    wanted, there = "{}.{}".format(*sys.version_info), version_of(PYTHON)
    if asked and there != wanted:
        raise SetupError(
            f".venv has Python {there}, PYTHON={asked} is {wanted}: `rm -r .venv` first, or leave PYTHON out"
        )


def install(lock: int) -> None:
    """Install with pip, of whose lines the errors are shown, and on a terminal what it is at."""
    command = [*PIP, "install", "--no-color", "--progress-bar", "off", "-c", "constraints.txt", "-e", WANTED]
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, pass_fds=[lock]
    ) as process:
        for line in process.stdout:
            if not line.startswith("WARNING"):
                lines.append(line.rstrip())
                show_progress(line)
    show_progress("")
    if process.returncode:
        said = "\n".join(lines)
        if os.strerror(errno.ENOSPC) in said:
            raise SetupError(way_out(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))))
        errors = [line for line in lines if re.match(r"\s*(ERROR|error)", line)] or lines[-5:]
        raise SetupError(
            "\n  ".join(["pip has failed (is the network there?); `make setup` goes on from there. It said:", *errors])
        )


def show_progress(line: str) -> None:
    """On a terminal, what pip is at, in one line that the next one replaces."""
    if sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1
        at = re.match(r"\s*(Collecting|Downloading|Building|Installing collected)\b.*", line)
        if at or not line:
            print("\r\033[K" + (at[0].strip()[:width] if at else ""), end="", flush=True)


def version_of(python: str | Path) -> str:
    """Its version as "3.12"; empty where it does not run."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    try:
        return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def runs(command: list[str]) -> bool:
    """Whether a command ends well."""
    return subprocess.run(command, capture_output=True).returncode == 0


def way_out(error: OSError) -> str:
    """What to do about an error of the file system."""
    if error.errno == errno.ENOSPC:
        return (
            f"the disk of {ROOT}, or that of {tempfile.gettempdir()}, is full: free some GB, then `make setup` goes on"
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"cannot write in {error.filename or ROOT} ({error.strerror}): copy the checkout to where you may"
    return str(error)


def say(text: str) -> None:
    """One line of progress."""
    print(f"set-up: {text}", flush=True)


if __name__ == "__main__":
    main()
