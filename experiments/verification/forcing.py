"""Teacher forcing: what each model would have written in the place of every token of a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import Policy, as_tensor
from envs.arrays import FloatArray, IntArray
from envs.decoding.decoder import since_at_each
from envs.decoding.judges import judge_of
from envs.decoding.observation import Observation
from envs.decoding.teacher_forcing import LOGITS_AT_ONCE
from envs.models.pool import ModelPool
from experiments.traces.schema import CHECKED, SPECULATIVE
from experiments.traces.trace import Head, TracedEpisode
from experiments.verification.checking import wrong_verdicts

TOGETHER = 64
"""Sequences that share a pass at most; fewer where memory was planned for fewer."""


@dataclass(frozen=True)
class Forced:
    """What a model makes of n tokens, reading those before each of them.

    Attributes:
        greedy: what it would have written in the place of each, (n,).
        gaps: by how much the logit of that one is above the token's own, (n,).
        hidden: its hidden states before each, (n, width).
        logits: its logits before each, (n, vocab).
    """

    greedy: IntArray
    gaps: FloatArray
    hidden: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Unlike:
    """A token that is not its writer's greedy choice.

    Attributes:
        episode: its number.
        place: of the response; of what was taken back there where that is said.
        what: is wrong, in words.
        gap: between the logit of the greedy choice and the token's own.
    """

    episode: int
    place: int
    what: str
    gap: float


def forced(
    pool: ModelPool, model: int, prompts: Sequence[IntArray], responses: Sequence[IntArray]
) -> Iterator[list[tuple[int, Forced]]]:
    """Let a model read prompts and, behind each, a response, one pass for many of them.

    Args:
        pool: of the model.
        model: its number.
        prompts: n arrays of token ids.
        responses: n arrays of token ids.

    Yields:
        Of the responses that shared a pass, alike lengths together, each one's number and what the model makes of it.
    """
    reader = pool.models[model]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    if not lengths:
        return
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    most = LOGITS_AT_ONCE // (max(map(len, responses)) * reader.vocab_size)
    together = max(1, min(pool.rows or TOGETHER, TOGETHER, len(order), most))
    cache = reader.new_cache(together, max(lengths))
    for first in range(0, len(order), together):
        part = order[first : first + together]
        rows = np.arange(len(part))
        cache.free(rows)
        # what comes before the last token of a prompt has no logits to look at
        begun = [i for i, number in enumerate(part) if len(prompts[number]) > 1]
        if begun:
            reader.feed(cache, rows[begun], [prompts[part[i]][:-1] for i in begun])
        chunks = [np.concatenate([prompts[number][-1:], responses[number][:-1]]) for number in part]
        states, logits = reader.feed(cache, rows, chunks, every_position=True)
        logits = logits[:, : pool.vocab_size]
        counts = [len(chunk) for chunk in chunks]
        pieces = zip(part, states.split(counts), logits.split(counts), strict=True)
        made = []
        for number, hidden, own in pieces:
            tokens = torch.from_numpy(responses[number]).to(own.device)
            gaps = (own.max(-1).values - own.gather(-1, tokens[:, None])[:, 0]).double().cpu().numpy()
            made.append((number, Forced(pool.greedy(model, own), gaps, hidden.float(), own.float())))
        yield made


def unlike_tokens(
    pool: ModelPool, head: Head, episodes: Sequence[TracedEpisode], policy: Policy | None = None
) -> tuple[list[Unlike], dict[int, FloatArray]]:
    """Tokens that their writers would not have written there, and the scores of a policy at every decision.

    Args:
        pool: the models.
        head: of the trace.
        episodes: of it; they have the shapes that they should.
        policy: whose scores are computed; none are where None.

    Returns:
        The tokens, and for each episode's number its scores, (n,).
    """
    unlike: list[Unlike] = []
    scores: dict[int, FloatArray] = {}
    last = len(pool) - 1
    for model in range(len(pool)):
        # the LLM has checked every token of speculative decoding
        checks = head.decoding == SPECULATIVE and model == last
        observed = model == 0 and policy is not None
        judge = judge_of(head.settings["judge"]) if head.decoding == CHECKED and model == last else None
        read = [one for one in episodes if checks or judge or observed or (one.writers == model).any()]
        for part in forced(pool, model, [one.prompt for one in read], [one.response for one in read]):
            seen = [(read[number], made) for number, made in part]
            for episode, made in seen:
                own = np.ones(len(episode.response), dtype=bool) if checks else episode.writers == model
                for place in np.flatnonzero(own & (made.greedy != episode.response)).tolist():
                    unlike.append(_unlike(pool, model, episode.episode, place, episode.response, made))
                if judge is not None:
                    wrong = wrong_verdicts(judge, head, episode, made.logits)
                    unlike += [Unlike(episode.episode, *verdict) for verdict in wrong]
            if observed and policy is not None:
                scores |= scored(policy, seen, pool)
    return unlike + _unlike_drafts(pool, episodes), scores


def scored(policy: Policy, seen: Sequence[tuple[TracedEpisode, Forced]], pool: ModelPool) -> dict[int, FloatArray]:
    """The scores of a policy at every token of some episodes, asked for token after token as in decoding.

    Args:
        policy: decides.
        seen: episodes, and what the SLM makes of them.
        pool: the models.

    Returns:
        By the number of each episode, (n,); of a policy that decides once its one score at every token.
    """
    lengths = np.array([len(episode.response) for episode, _ in seen])
    since = [since_at_each(episode.writers) for episode, _ in seen]
    scores = [np.zeros(length) for length in lengths]
    numbers = np.array([episode.episode for episode, _ in seen])
    prompts = [episode.prompt for episode, _ in seen]
    states: dict[int, Tensor] = {}  # of the LLM behind the prompts
    if "llm" in policy.sees:
        firsts = [episode.response[:1] for episode, _ in seen]
        states = {i: made.hidden[0] for part in forced(pool, len(pool) - 1, prompts, firsts) for i, made in part}
    texts = [pool.decode(prompt) for prompt in prompts] if "text" in policy.sees else []
    for position in range(1 if policy.per_response else int(lengths.max())):
        going = np.flatnonzero(lengths > position).tolist()
        observation = Observation(
            torch.stack([seen[i][1].hidden[position] for i in going]),
            torch.stack([seen[i][1].logits[position] for i in going]),
            np.full(len(going), position),
            numbers[going],
            np.array([since[i][position] for i in going]),
            llm_prompt_states=torch.stack([states[i] for i in going]) if states else None,
            prompts=[texts[i] for i in going] if texts else None,
        )
        with torch.no_grad():
            found = as_tensor(policy.score(observation)).float().cpu().numpy()
        for i, score in zip(going, found, strict=True):
            scores[i][position if not policy.per_response else slice(None)] = score
    policy.forget(numbers)
    return dict(zip(numbers.tolist(), scores, strict=True))


def _unlike_drafts(pool: ModelPool, episodes: Sequence[TracedEpisode]) -> list[Unlike]:
    """Tokens that were taken back, and that their writers would not have written there."""
    unlike = []
    for model in range(len(pool)):
        gone = [(one, back) for one in episodes for back in one.taken_back if back.writer == model and len(back.tokens)]
        before = [np.concatenate([one.prompt, one.response[: back.position]]) for one, back in gone]
        parts = forced(pool, model, before, [back.tokens for _, back in gone])
        for number, made in (one for part in parts for one in part):
            episode, back = gone[number]
            for place in np.flatnonzero(made.greedy != back.tokens).tolist():
                found = _unlike(pool, model, episode.episode, place, back.tokens, made)
                what = f"of what was taken back at token {back.position}, {found.what}"
                unlike.append(Unlike(episode.episode, back.position, what, found.gap))
    return unlike


def _unlike(pool: ModelPool, model: int, episode: int, place: int, tokens: IntArray, made: Forced) -> Unlike:
    said, greedy, gap = int(tokens[place]), int(made.greedy[place]), float(made.gaps[place])
    what = f"token {place} is {said}, {pool.names[model]} writes {greedy} there, by {gap:.2g} in the logits"
    return Unlike(episode, place, what, gap)
