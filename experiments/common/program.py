"""What makes a Hydra program of a function: help, one line for what goes wrong, one line for Ctrl-C.

Nothing heavy is imported here, nor by the file of a program before its function is called: `--help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.continuing import Continuing
from experiments.common.help import CONF, wants_help, write_help
from experiments.common.stopping import Progress, command_to_go_on, end_with, near, stoppable

if TYPE_CHECKING:
    from omegaconf import DictConfig

REFUSED = 2
"""Exit code of a program that could not do what it was asked."""
USERS_ERRORS = (ValueError, FloatingPointError, OSError)
Begin = Callable[[], None]
"""Called when all was checked, before the first file is written; see `run_folder`."""


def program(
    name: str, continuing: Continuing | None = None
) -> Callable[[Callable[[DictConfig, Path, Begin], Any]], Callable[[], None]]:
    """Turn `run(config, folder, begin)` into a Hydra program configured by `conf/NAME.yaml`.

    The run's folder is Hydra's output directory. `run` builds and checks everything, then calls `begin`, then writes:
    what is refused before that leaves the folder as it was. An error of the user's making ends the program with its
    message alone (exit code 2); SIGINT (Ctrl-C) and SIGTERM end it with a line that says how to go on (130 and 143).

    Args:
        name: of the yaml.
        continuing: which settings may be other ones when a run goes on in its folder; few where None.
    """

    def decorate(run: Callable[[DictConfig, Path, Begin], Any]) -> Callable[[], None]:
        def main() -> None:
            if wants_help(sys.argv[1:]):
                print(write_help(name, sys.modules[run.__module__].__doc__ or ""))
                return
            with stoppable() as progress, one_line():
                _run_by_hydra(name, run, continuing or Continuing(), progress)

        return main

    return decorate


def _run_by_hydra(
    name: str, run: Callable[[DictConfig, Path, Begin], Any], continuing: Continuing, progress: Progress
) -> None:
    """Compose what the command line asks for, and run it, or show it."""
    import hydra
    from hydra.errors import HydraException

    from experiments.common import multirun
    from experiments.common.config import register_schemas

    # Hydra makes the callback that fills it
    plan = multirun.plan = multirun.Plan(progress)
    register_schemas()
    sys.argv[1:] = multirun.with_launcher(name, sys.argv[1:])
    try:
        hydra.main(version_base=None, config_path=str(CONF), config_name=name)(
            _job(name, run, continuing, progress, sys.argv[1:])
        )()
    except HydraException:
        plan.forget()
        raise
    except Exception as error:  # a launcher that has lost a job says so in its own way
        if all(job.state == "waiting" for job in plan.jobs):
            raise
        first = f"{error}".strip().partition("\n")[0]
        print(f"{type(error).__name__}: {first}", file=sys.stderr)
    if lost := plan.unfinished():
        print(
            f"{len(lost)} of {len(plan.names)} jobs are not done. The same command goes on with them: "
            f"{progress.command}\nor each by itself:\n" + "\n".join(lost),
            file=sys.stderr,
        )
        raise SystemExit(REFUSED)


def _job(
    name: str,
    run: Callable[[DictConfig, Path, Begin], Any],
    continuing: Continuing,
    progress: Progress,
    arguments: Sequence[str],
) -> Callable[[DictConfig], Any]:
    """What Hydra calls with a configuration, in this process or in one that a launcher has started elsewhere."""
    launched_by = os.getpid()

    def job(config: DictConfig) -> Any:
        from hydra.core.hydra_config import HydraConfig

        from experiments.common.config import prepare
        from experiments.common.multirun import Recorded, shard_folder
        from experiments.common.run_folder import run_folder

        end_with(launched_by)
        about = HydraConfig.get()
        if os.getcwd() != about.runtime.cwd:
            os.chdir(about.runtime.cwd)  # relative paths are meant from where the program was started
        many = about.mode is not None and about.mode.name == "MULTIRUN"
        side_by_side = many and not about.launcher._target_.endswith(".BasicLauncher")
        folder, log = Path(about.runtime.output_dir), logging.getLogger(name)
        key, place = ("hydra.sweep.dir", Path(about.sweep.dir)) if many else ("hydra.run.dir", folder)
        progress.folder, progress.command = folder, command_to_go_on(name, arguments, key, place)
        log.info("in %s", near(folder))

        def work(folder: Path) -> Any:
            with run_folder(config, folder, continuing, f"{name}.log") as begin:
                prepare(config, side_by_side)
                try:
                    return run(config, folder, begin)
                except USERS_ERRORS as error:  # here the log is open
                    said = in_words(error, folder)
                    log.error("%s", said)
                    raise RefusedError(said) from error
                except Exception:
                    if many:
                        log.exception("this job failed")
                    raise

        record = Recorded(about, name, folder)
        try:
            own = shard_folder(config, folder)
            record = Recorded(about, name, own)
            record("begun")
            result = work(own)
        except RefusedError as error:
            said = f"{error}"
        except USERS_ERRORS as error:
            said = in_words(error, folder)
            log.error("%s", said)
        except Exception as error:
            if not many:
                raise
            said = f"{type(error).__name__}: {error}"
        else:
            record("done")
            return None if many else result
        if not many:
            raise SystemExit(REFUSED)
        record("failed", said)  # the others go on, and what became of this one is said in the end
        return None

    # Hydra takes the program's name, `hydra.job.name`, from it
    job.__module__ = f"experiments.{name}"
    return job


class RefusedError(Exception):
    """What is wrong with a run, which its log says already."""


@contextmanager
def one_line() -> Iterator[None]:
    """End the program in one line where Hydra cannot compose what was asked, or cannot write the folder."""
    # Hydra prints what goes wrong itself otherwise, an OSError with all frames
    before = os.environ.get("HYDRA_FULL_ERROR")
    if before == "1":
        yield
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    except Exception as error:
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        if not isinstance(error, (HydraException, OSError)):
            raise
        from experiments.common.multirun import missing_extra

        if extra := missing_extra(error):
            print(extra, file=sys.stderr)
            raise SystemExit(1) from error
        cause = error.__cause__
        said = f"{error}{way_out(error)}" if isinstance(error, OSError) else f"{error}"
        print(said, *([cause] if isinstance(cause, OmegaConfBaseException) else []), sep="\n", file=sys.stderr)
        raise SystemExit(1 if isinstance(error, HydraException) else REFUSED) from error
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def in_words(error: Exception, folder: Path) -> str:
    """What an error says, where, if it does not (a write to a full disk does not), and the way out of the folder."""
    if not isinstance(error, OSError) or error.errno is None:
        return f"{error}"
    named = error.filename is not None or f"{folder}" in f"{error}"
    said = f"{error}" if named else f"{error}: {folder}"
    # a file that is read may lie anywhere: another folder for the run is no help there
    return said + way_out(error) if f"{folder}" in said else said


def way_out(error: OSError) -> str:
    """What to do where a run's folder cannot be written; empty where nothing general is known."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "; free some room and start it again: it goes on where it was"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return "; name a folder that you may write: hydra.run.dir=..., of a multirun hydra.sweep.dir=..."
    return ""
