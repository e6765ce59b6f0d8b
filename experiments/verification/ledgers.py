"""What a ledger must hold, from the writers of a response and what was taken back; no model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.arrays import FloatArray
from envs.costs import COLUMNS, WRITTEN, pass_entry, response_entries
from experiments.traces.schema import CHECKED, LLM_ONLY, PROMPT_READERS, SPECULATIVE
from experiments.traces.trace import Head, TracedEpisode
from experiments.verification.checking import walk


def expected_ledger(head: Head, episode: TracedEpisode) -> FloatArray:
    """The ledger of an episode, but for seconds, (models, COLUMNS).

    Raises:
        ValueError: nothing writes a response like this; the error says what is wrong with it.
    """
    models = len(head.models)
    if head.decoding == CHECKED:
        return walk(head, episode).entries
    if head.decoding == SPECULATIVE:
        return speculative_entries(episode, models, head.settings)
    readers = head.settings.get(PROMPT_READERS, ())
    entries = response_entries(len(episode.prompt), episode.writers, episode.terminated, models, readers)
    if head.decoding == LLM_ONLY:
        entries[:-1] = 0
    elif head.per_response and episode.writers[0] > 0:
        # the SLM reads the prompt, is asked no more, and reads no further
        entries[0] = pass_entry(np.array([len(episode.prompt)]), np.array([0]), 0.0)[0]
    return entries


def expected_decisions(head: Head, episode: TracedEpisode) -> int:
    """How many decisions a policy took for an episode."""
    if head.policy_fingerprint is None:
        return 0
    if head.decoding == CHECKED:
        return len(episode.scores)
    return 1 if head.per_response else len(episode.response)


def speculative_entries(episode: TracedEpisode, models: int, settings: Mapping[str, Any]) -> FloatArray:
    """The ledger of a speculatively decoded response, but for seconds, (models, COLUMNS).

    The SLM drafts one token a pass; the LLM reads a draft in one pass, and then the SLM what it has not read of what
    stays. A response is a row of drafts: some tokens of the SLM, those that were refused, one token of the LLM.

    Args:
        episode: its writers and what was taken back.
        models: of the pool.
        settings: `draft_tokens`, `max_new_tokens` and `end_tokens`.

    Raises:
        ValueError: no drafts give such a response.
    """
    entries = np.zeros((models, COLUMNS))
    prompt, ends = len(episode.prompt), settings["end_tokens"]

    def enter(model: int, new: int, context: int) -> None:
        entries[model] += pass_entry(np.array([new]), np.array([context]), 0.0)[0]

    refused = {one.position: one.tokens for one in episode.taken_back}
    if len(refused) != len(episode.taken_back) or any(one.writer != 0 for one in episode.taken_back):
        raise ValueError("two drafts were taken back at one place, or one that the SLM did not write")
    length, llm_read, begun = len(episode.writers), 0, 0
    pending = (prompt, 0)  # what the SLM reads before it writes again
    while begun < length:
        others = np.flatnonzero(episode.writers[begun:] > 0)
        own = begun + int(others[0]) if len(others) else length  # where the LLM writes behind the draft
        gone = refused.pop(own, episode.response[:0])
        drafted = own - begun + len(gone)
        ended = episode.terminated and own == length  # the draft held the end, and all of it stayed
        cut = ended or (len(gone) > 0 and int(gone[-1]) in ends)  # the SLM ended the draft: nobody reads its end
        longest = min(settings["draft_tokens"], settings["max_new_tokens"] - 1 - begun)
        whole = drafted == longest or (cut and drafted < longest)
        if not whole or (own == length and not ended) or (ended and len(gone)):
            raise ValueError(f"no draft of {longest} tokens is behind the token at {own}")
        start = prompt + begun
        if drafted:
            enter(0, *pending)
            for token in range(drafted - 1):
                enter(0, 1, start + token)
        llm_new = start + drafted - cut - llm_read
        enter(models - 1, llm_new, llm_read)
        slm_read = min(start + max(drafted - 1, 0), prompt + own)
        llm_read = min(llm_read + llm_new, prompt + own)
        pending = (prompt + own + 1 - slm_read, slm_read)
        begun = own + 1
    if refused:
        raise ValueError(f"something was taken back at {sorted(refused)}, where no draft was refused")
    entries[:, WRITTEN] = np.bincount(episode.writers, minlength=models)
    return entries
