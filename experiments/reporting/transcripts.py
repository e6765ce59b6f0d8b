"""Answers as plain data, each stretch with its writer, for a page to show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from agents.common.rollout import Episode
from envs.environments.render import HTML_COLOURS, colour_of, runs
from envs.models.pool import ModelPool


def transcripts(pool: ModelPool, episodes: Mapping[str, Sequence[Episode]]) -> dict[str, list[dict[str, Any]]]:
    """Answers by policy, as JSON can hold them.

    Args:
        pool: the models that wrote them.
        episodes: the answers, by policy.

    Returns:
        For each answer its `id`, `prompt`, whether it is `right`, the `answer` it should give, its number of `tokens`,
        the `llm_share` of them, and its `stretches`: the model that wrote each, the colour of that model, and the text.
    """
    return {name: [_answer(pool, episode) for episode in some] for name, some in episodes.items()}


def _answer(pool: ModelPool, episode: Episode) -> dict[str, Any]:
    return {
        "id": episode.example.id,
        "prompt": episode.example.prompt.strip(),
        "right": bool(episode.correct),
        "answer": f"{episode.example.answer}",
        "tokens": len(episode.tokens),
        "llm_share": float((episode.writers > 0).mean()),
        "stretches": [
            [int(writer), colour_of(HTML_COLOURS, writer), text]
            for writer, text in runs(pool, episode.tokens, episode.writers)
        ],
    }
