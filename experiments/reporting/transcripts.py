"""A page of responses, each token marked by its writer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from agents.common.rollout import Episode
from envs.environments.render import html
from envs.models.pool import ModelPool


def transcripts(pool: ModelPool, episodes: Sequence[Episode], title: str) -> str:
    """A page of responses, each token marked by its writer."""
    parts = []
    for episode in episodes:
        verdict = "right" if episode.correct else f"wrong, the answer is {episode.example.answer}"
        share = (episode.writers > 0).mean()
        parts.append(
            f'<article class="{"right" if episode.correct else "wrong"}"><h2>{escape(episode.example.id)}</h2>'
            f"<p>{escape(episode.example.prompt.strip())}</p>"
            f"<pre>{html(pool, episode.tokens, episode.writers)}</pre>"
            f"<footer>{escape(verdict)}; {share:.0%} of {len(episode.writers)} tokens by the LLM</footer></article>"
        )
    return _PAGE.format(title=escape(title), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
article {{ border-left: 4px solid #2a8; padding: 0 1rem; margin: 2rem 0; }}
article.wrong {{ border-color: #c33; }}
h2 {{ font-size: 1rem; color: #666; }}
pre {{ white-space: pre-wrap; background: #f6f6f4; padding: 0.8rem; }}
mark {{ border-radius: 3px; }}
footer {{ color: #666; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>The small model wrote the plain tokens, the large one the <mark style="background:#ffb3a7">marked</mark> ones.</p>
{body}
</body>
</html>
"""
