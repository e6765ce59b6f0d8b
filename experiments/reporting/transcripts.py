"""Answers as plain data, each stretch with its writer, for a page to show; and one answer call by call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from agents.common.rollout import Episode
from envs.arrays import IntArray
from envs.environments.render import HTML_COLOURS, STANDS, Checked, Decodes, Stretch, colour_of, gained, stretches_of
from envs.models.pool import ModelPool, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TAKEN_BACK, STOOD = "taken back", "stands"
"""What a stretch says in its fourth place: it was taken back; a call, without text, that let all stand that was
drafted."""
LINE = "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}"
"""What a new line inside a token is shown as."""


@dataclass(frozen=True)
class Tokenized:
    """What turns token ids into text where there is no pool.

    Args:
        tokenizer: of the models that wrote them.
        end_tokens: that end a response, (n,).
    """

    tokenizer: PreTrainedTokenizerBase
    end_tokens: IntArray

    def decode(self, tokens: IntArray) -> str:
        """The text of `tokens`, (n,), special tokens left out."""
        return text_of(self.tokenizer, tokens)


def transcripts(
    pool: ModelPool, episodes: Mapping[str, Sequence[Episode]], checking: Collection[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Answers by policy, as JSON can hold them.

    Args:
        pool: the models that wrote them.
        episodes: the answers, by policy.
        checking: the policies whose calls check drafts.

    Returns:
        For each answer its `id`, `prompt`, whether it is `right`, the `answer` it should give (None where that is not
        known), its number of `tokens`, the `llm_share` of them, and its `stretches`: the model that wrote each, the
        colour of that model, and the text. Where drafts are checked also how often larger models were called (`calls`),
        how many tokens were `taken_back`, and among the stretches those with TAKEN_BACK or STOOD in a fourth place.
    """
    return {name: [_answer(pool, episode, name in checking) for episode in some] for name, some in episodes.items()}


def markup(stretches: Iterable[Sequence[Any]]) -> str:
    """Stretches, as `transcripts` has them, as HTML: what was taken back in `del`, what an LLM wrote in `mark`."""
    return "".join(_marked(*stretch) for stretch in stretches)


def call_by_call(pool: ModelPool, episode: Episode) -> str:
    """An answer whose drafts were checked as HTML: its problem, and a line for each call of a larger model.

    A line has the tokens that were drafted, of these in `del` what was taken back, how many of them stand, and in
    `mark` the token that the larger model wrote behind them.
    """
    checked, tokens, writers = Checked.of(episode.taken_back, episode.ledger), episode.tokens, episode.writers
    refused = {back.position: back.tokens for back in checked.taken_back}
    lines: list[str] = []
    begun = 0
    for place in [*np.flatnonzero(writers > 0).tolist(), len(tokens)]:
        gone, by = refused.get(place, tokens[:0]), writers[place : place + 1]
        drafted = place - begun + len(gone)
        if not drafted and not len(by):
            break  # the last call wrote the end
        said = f"{place - begun} of {drafted} stand" if drafted else "nothing was drafted"
        if not len(by) and checked.calls == len(lines):
            said = "accepted, not checked"
        line = _tokens(pool, tokens[:begun], tokens[begun:place])
        line += f" <del>{_tokens(pool, tokens[:place], gone)}</del>" if len(gone) else ""
        line += f" <small>{said}</small>"
        for writer in by:
            colour = colour_of(HTML_COLOURS, int(writer))
            own = _tokens(pool, tokens[:place], tokens[place : place + 1])
            line += f' <mark style="background:{colour}">{own}</mark>'
        lines.append(f"<li>{line.strip()}</li>")
        begun = place + 1
    problem = escape(" ".join(episode.example.prompt.split()), quote=False)
    inside = "\n".join([f"<figcaption>{problem}</figcaption>", "<ol>", *lines, "</ol>"])
    return f'<figure class="calls">\n{inside}\n</figure>'


def transcript(
    pool: Decodes, tokens: IntArray, writers: npt.NDArray[np.int8], checked: Checked | None
) -> dict[str, Any]:
    """What `transcripts` says of a response itself.

    Args:
        pool: the models that wrote it, or their tokenizer.
        tokens: token ids, (n,).
        writers: of each, (n,).
        checked: what was checked; None where drafts are not.
    """
    said = {
        "tokens": len(tokens),
        "llm_share": float((writers > 0).mean()),
        "stretches": [_plain(stretch) for stretch in stretches_of(pool, tokens, writers, checked)],
    }
    if checked is None:
        return said
    return said | {"calls": checked.calls, "taken_back": sum(len(back.tokens) for back in checked.taken_back)}


def _answer(pool: ModelPool, episode: Episode, checking: bool) -> dict[str, Any]:
    checked = Checked.of(episode.taken_back, episode.ledger) if checking else None
    about = {
        "id": episode.example.id,
        "prompt": episode.example.prompt.strip(),
        "right": bool(episode.correct),
        "answer": f"{episode.example.answer}",
    }
    return about | transcript(pool, episode.tokens, episode.writers, checked)


def _plain(stretch: Stretch) -> list[Any]:
    writer = max(stretch.writer, 0)
    fate = [TAKEN_BACK] if stretch.taken_back else [STOOD] if stretch.writer == STANDS else []
    return [writer, colour_of(HTML_COLOURS, writer), stretch.text, *fate]


def _marked(writer: int, colour: str, text: str, fate: str = "") -> str:
    if fate == STOOD:
        return '<span class="call" title="the large model was called, and all that was drafted stands"></span>'
    shown = escape(text, quote=False)
    if writer > 0:
        shown = f'<mark style="background:{escape(colour)}">{shown}</mark>'
    return f"<del>{shown}</del>" if fate == TAKEN_BACK else shown


def _tokens(pool: ModelPool, front: IntArray, tokens: IntArray) -> str:
    """Tokens behind those in front of them, (n,) each, in a `code` each."""
    all_tokens, first = np.concatenate([front, tokens]), len(front)
    texts = [gained(pool, all_tokens[:i], all_tokens[i : i + 1]) for i in range(first, len(all_tokens))]
    return "".join(f"<code>{escape(text.replace(chr(10), LINE), quote=False)}</code>" for text in texts)
