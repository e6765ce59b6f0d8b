"""Calls the programs of `experiments` without a new Python: in this process, or in one forked from a warm one."""

import importlib
import logging
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

WARM = multiprocessing.get_context("forkserver")
# all that a start imports, so that a fork has it: a start of its own takes seconds
WARM.set_forkserver_preload(
    ["tests.programs", "experiments.train", "experiments.evaluate", "experiments.collect", "experiments.queries",
     "experiments.leaderboard", "experiments.common.config",
     "experiments.training.run", "experiments.training.many", "experiments.training.seconds",
     "experiments.evaluation.runner", "experiments.evaluation.merge", "experiments.reporting.leaderboard_page",
     "experiments.verify", "experiments.verification.evaluation",
     "experiments.query_routing.report", "experiments.query_routing.sources", "experiments.query_routing.summary",
     "agents.citer", "agents.r2r", "agents.collm", "agents.tapo", "agents.query_routing.mlp",
     "agents.query_routing.routellm", "agents.query_routing.uniroute", "agents.sb3",
     "agents.rl.inputs", "agents.rl.sb3_extensions", "agents.rl.vec_env",
     "sb3_contrib", "stable_baselines3", "sklearn.cluster", "sklearn.feature_extraction.text", "matplotlib.figure",
     "matplotlib.backends.backend_svg",
     "transformers.models.llama.modeling_llama"]
)  # fmt: skip
LIMIT = 300.0
"""Seconds after which a program hangs."""


def composed(program, *overrides):
    """The settings of a program, as its command line would give them."""
    from hydra import compose, initialize_config_dir

    from experiments.common.config import CONF, register_schemas

    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(program, overrides=list(overrides))


def call(script, *overrides):
    """Call a program in this process, whose log is afterwards as it was."""
    before, root = list(sys.argv), logging.getLogger()
    handlers, level = list(root.handlers), root.level
    GlobalHydra.instance().clear()
    sys.argv = [script, *overrides]
    try:
        importlib.import_module(f"experiments.{script}").main()
    finally:
        sys.argv = before
        root.handlers[:], root.level = handlers, level
        GlobalHydra.instance().clear()


class Start:
    """One start of a program, in a process group of its own that was forked from a warm process.

    Args:
        script: of `experiments`.
        overrides: its arguments.
        log: what it prints is added there.
    """

    def __init__(self, script, overrides, log):
        self.log = log
        self._process = WARM.Process(target=_started, args=(script, list(overrides), str(log)))
        self._process.start()

    def ended(self, seconds=LIMIT):
        """Wait so long at most; whether it has ended."""
        self._process.join(seconds)
        return not self._process.is_alive()

    def finish(self, limit=LIMIT):
        """Wait for its end, which must be a good one; seconds since the call."""
        begun = time.monotonic()
        assert self.ended(limit), f"it hangs:\n{self.log.read_text()[-3000:]}"
        assert self._process.exitcode == 0, f"it failed:\n{self.log.read_text()[-3000:]}"
        return time.monotonic() - begun

    def kill(self):
        """SIGKILL to it and its workers, as when a machine goes down."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it has no group yet
            os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()


def _started(script, overrides, log):
    os.setpgid(0, 0)
    with Path(log).open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # workers are forked too, to be as warm as their parent; as spawned ones they know nothing of its Hydra
    fork = multiprocessing.get_context("fork")
    multiprocessing.get_context = lambda method=None: fork
    os.register_at_fork(after_in_child=GlobalHydra.instance().clear)
    sys.argv = [script, *overrides]
    importlib.import_module(f"experiments.{script}").main()
