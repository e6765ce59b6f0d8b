"""The policies of an evaluation as they can be had again: those that were saved, and those that learn nothing."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from agents.common.policy import Policy
from agents.common.saving import POLICY_FILE, load_policy
from agents.heuristics import Always
from envs.models.pool import ModelPool
from experiments.common.config import build
from experiments.evaluation.kept import KeptEvaluation, run_folder
from experiments.traces.trace import Head


class Policies:
    """Finds the policy that a trace is of.

    Args:
        evaluation: whose traces are checked.
        pool: the models.
    """

    def __init__(self, evaluation: KeptEvaluation, pool: ModelPool) -> None:
        self.evaluation, self.pool = evaluation, pool
        self._baselines = {policy.fingerprint: policy for policy in (Always(slm=True), Always(slm=False))}
        self._found: dict[str, Policy | str] = {}

    def of(self, head: Head) -> Policy | str | None:
        """The policy behind the head of a trace; why it is not there, in words; None where nobody decided."""
        if head.policy_fingerprint is None:
            return None
        if head.policy_profile is None:
            return self._baselines.get(head.policy_fingerprint, f"{head.policy} is no baseline that is known")
        if head.policy not in self._found:
            self._found[head.policy] = self._find(head.policy)
        found = self._found[head.policy]
        if isinstance(found, Policy) and found.fingerprint != head.policy_fingerprint:
            return f"the policy {head.policy} that is there is another one: its fingerprint is {found.fingerprint}"
        return found

    def _find(self, name: str) -> Policy | str:
        config = self.evaluation.config
        training = run_folder(self.evaluation.runs) / "policy"
        try:
            if self.evaluation.program == "train":
                if (training / POLICY_FILE).is_file():
                    return load_policy(training, self.pool)
                return self._built(config.get("agent"), name)
            if name in config.get("saved", {}):
                return load_policy(Path(config["saved"][name]), self.pool)
            return self._built(config.get("agents", {}).get(name), name)
        except ValueError as error:
            return f"{error}"

    def _built(self, settings: object, name: str) -> Policy | str:
        """A policy that its settings make; what learns is not taught again."""
        if settings is None:
            return f"no settings say what {name} is"
        agent = build(DictConfig({"agent": OmegaConf.create({**settings})}), "agent")  # type: ignore[dict-item]
        return agent if isinstance(agent, Policy) else f"{name} was trained, and is not saved with the run"
