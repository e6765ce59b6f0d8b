"""A page of responses, each token marked by its writer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from agents.common.rollout import Episode
from envs.environments.render import html
from envs.models.pool import ModelPool


def transcripts(pool: ModelPool, episodes: Mapping[str, Sequence[Episode]], task: str) -> str:
    """A page of responses, each token marked by its writer.

    Args:
        pool: the models that wrote them.
        episodes: the responses, by policy; where there are several policies each is folded away below its name.
        task: named in the title.
    """
    bodies = {name: "\n".join(_article(pool, episode) for episode in some) for name, some in episodes.items()}
    if len(bodies) == 1:
        ((name, body),) = bodies.items()
        return _PAGE.format(title=escape(f"{task}, routed by {name}"), body=body)
    folded = [
        f"<details><summary>{escape(name)}, {sum(episode.correct for episode in episodes[name])} of "
        f"{len(episodes[name])} right</summary>\n{body}\n</details>"
        for name, body in bodies.items()
    ]
    return _PAGE.format(title=escape(f"{task}, routed by {len(bodies)} policies"), body="\n".join(folded))


def _article(pool: ModelPool, episode: Episode) -> str:
    """One response below its prompt, and whether it is right."""
    verdict = "right" if episode.correct else f"wrong, the answer is {episode.example.answer}"
    share = (episode.writers > 0).mean()
    return (
        f'<article class="{"right" if episode.correct else "wrong"}"><h2>{escape(episode.example.id)}</h2>'
        f"<p>{escape(episode.example.prompt.strip())}</p>"
        f"<pre>{html(pool, episode.tokens, episode.writers)}</pre>"
        f"<footer>{escape(verdict)}; {share:.0%} of {len(episode.writers)} tokens by the LLM</footer></article>"
    )


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
summary {{ font-size: 1.2rem; cursor: pointer; margin: 1rem 0; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>The small model wrote the plain tokens, the large one the <mark style="background:#ffb3a7">marked</mark> ones.</p>
{body}
</body>
</html>
"""
