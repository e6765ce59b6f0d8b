"""States that answers come to, and whether the judge lets the SLM's next token stand in each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from agents.common.rollout import Episode
from envs.arrays import BoolArray, FloatArray, IntArray
from envs.costs import PASSES
from envs.decoding.decoder import since_at_each
from envs.decoding.judges import OPINION, Judge, Opinions
from envs.decoding.observation import LOGIT_FEATURES, Observation, all_features
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.pool import ModelPool
from envs.storage import read_tensors, write_tensors


class JudgedStates(NamedTuple):
    """States that a policy came to, and whether the SLM's token stands there.

    Attributes:
        seen: what the network sees, float16, (n, width).
        stands: the judge's verdicts, (n,).
        examples: the number of the problem each is from, (n,).
        answers: of the answers that came to them the accuracy, and means of the calls and of the drafts of which
            something was taken back, (3,).
    """

    seen: Tensor
    stands: BoolArray
    examples: IntArray
    answers: FloatArray

    def row(self) -> dict[str, float]:
        """As learners report it."""
        names = ("accuracy", "calls", "drafts_taken_back")
        about = {"states": len(self.stands), "risk": float(1 - self.stands.mean())}
        return dict(zip(names, self.answers.tolist(), strict=True)) | about

    def save(self, file: Path) -> None:
        """Write them to a file."""
        numbers = {name: torch.from_numpy(getattr(self, name)) for name in self._fields[1:]}
        write_tensors(file, {"seen": self.seen, **numbers})

    @classmethod
    def saved(cls, file: Path | None) -> Self | None:
        """What `save` wrote; None where there is no such file.

        Raises:
            ValueError: it cannot be read.
        """
        if file is None or not file.is_file():
            return None
        try:
            found = read_tensors(file)
            return cls(found["seen"], *(found[name].numpy() for name in cls._fields[1:]))
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read ({error}); delete it, and it is made anew") from error


def until_refused(stands: BoolArray, since_llm: IntArray) -> BoolArray:
    """The states of a response that its drafts come to under the judge, (n,).

    A draft stands up to its first token that does not; so between two tokens of the LLM the states behind the first one
    whose token is taken back are left out.

    Args:
        stands: whether the SLM's token stands in each state, (n,).
        since_llm: tokens since the LLM last wrote, (n,).
    """
    refused: IntArray = np.cumsum(~stands) - ~stands  # before each state
    return np.asarray(refused == refused[np.arange(len(stands)) - since_llm])


def judged_states(pool: ModelPool, episodes: Sequence[Episode], judge: Judge, features: str, rows: int) -> JudgedStates:
    """Read answers with both models, and judge the SLM's token in each of their states.

    Args:
        pool: the models; the last one is asked.
        episodes: the answers, whose positions number the examples.
        judge: whose verdicts are the labels.
        features: what the network sees, one of `envs.decoding.observation.FEATURES`.
        rows: answers read at once.
    """
    longest = max(len(episode.tokens) for episode in episodes)
    prompts = [pool.encode_prompt(episode.example) for episode in episodes]
    capacity = max(len(prompt) for prompt in prompts) + longest
    session = TeacherSession(pool, rows, longest, capacity)
    seen, stands, examples = [], [], []
    for first in range(0, len(episodes), rows):
        part = episodes[first : first + rows]
        own, responses = np.arange(len(part)), [episode.tokens for episode in part]
        states, thought = _read(session, own, prompts[first : first + rows], responses)
        for number, (episode, state, opinions) in enumerate(zip(part, states, thought, strict=True)):
            since, verdicts = since_at_each(episode.writers), judge.stands(opinions)
            kept = np.flatnonzero(until_refused(verdicts, since))
            width = state.shape[1] - LOGIT_FEATURES
            at = state[torch.from_numpy(kept).to(state.device)]
            vectors = Observation(
                at[:, :width], None, kept, kept, since[kept], kept_logit_features=at[:, width:]
            ).vector(features)
            seen.append(vectors.half().cpu())
            stands.append(verdicts[kept])
            examples.append(np.full(len(kept), first + number))
    answers = [(one.correct, one.ledger[-1, PASSES], len(one.taken_back)) for one in episodes]
    return JudgedStates(
        torch.cat(seen), np.concatenate(stands), np.concatenate(examples), np.array(answers, dtype=float).mean(0)
    )


def _read(
    session: TeacherSession, rows: IntArray, prompts: Sequence[IntArray], responses: Sequence[IntArray]
) -> tuple[list[Tensor], list[Opinions]]:
    """What the SLM makes of each state of responses, and what the LLM thinks of the token it would write there."""
    llm = len(session.pool) - 1
    states, choices = session.start_references(rows, prompts, responses, view=all_features)
    # anew: of what it has read a model does not tell again what it thinks
    session.start(rows, prompts, responses=responses, observed=False)
    drafts = [chosen[:, 0] for chosen in choices]
    _, opinions = session.read_with_opinions(rows, llm, np.zeros(len(rows), dtype=bool), drafts)
    thought = opinions.reshape(-1, OPINION).float().cpu().numpy()
    return states, np.split(thought, np.cumsum([len(one) for one in responses])[:-1])
