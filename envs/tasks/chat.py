"""Prompts and references as chat models read them, written by the template of their tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from envs.arrays import BoolArray, IntArray
from envs.tasks.task import Chat, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_chat(name: str, tokenizer: PreTrainedTokenizerBase, example: Example) -> IntArray:
    """The prompt of an example as the user's turn, up to where the assistant's begins, (n,).

    The template writes every special token there is, so the tokenizer adds none: no prompt begins with two.

    Args:
        name: of the model whose tokenizer it is, for errors.
        tokenizer: its template writes the prompt.
        example: one with a `chat`.

    Raises:
        ValueError: the tokenizer has no template, or the template refuses the turns.
    """
    return _encode(tokenizer, render(name, tokenizer, example))


def encode_chat_reference(
    name: str, tokenizer: PreTrainedTokenizerBase, example: Example, end_tokens: IntArray
) -> IntArray:
    """The reference of an example as the assistant's turn, its end token included, (n,).

    What the template puts before the reference in an answered chat and not in a prompt (an empty thought, a space) is
    part of it, since the model would have to write it.

    Args:
        name: of the model whose tokenizer it is, for errors.
        tokenizer: its template writes the turn.
        example: one with a `chat`.
        end_tokens: what ends responses, (ends,).

    Raises:
        ValueError: as `encode_chat`; there is no reference; the template does not continue a prompt with it, or ends
            the turn with no token that ends responses.
    """
    reference = example.known_reference().strip()
    prompt, whole = render(name, tokenizer, example), render(name, tokenizer, example, reference)
    if not whole.startswith(prompt) or reference not in whole[len(prompt) :]:
        raise ValueError(
            f"{name}: its chat template does not continue the prompt of example {example.id} with the reference; say "
            "task.chat=false, or mend the template"
        )
    turn = _encode(tokenizer, whole[len(prompt) :])
    ends: BoolArray = np.isin(turn, end_tokens)
    # those inside the reference itself are for whoever reads it to refuse
    inside = int(np.isin(_encode(tokenizer, reference), end_tokens).sum())
    if ends.sum() <= inside:
        behind = whole.rpartition(reference)[2]
        raise ValueError(
            f"{name}: its chat template ends the assistant's turn with {behind!r}, in which is no token that ends a "
            f"response ({', '.join(map(repr, tokenizer.convert_ids_to_tokens(end_tokens.tolist())))}); add it to "
            "eos_token_id in generation_config.json"
        )
    return turn[: int(np.flatnonzero(ends)[inside]) + 1]


def render(name: str, tokenizer: PreTrainedTokenizerBase, example: Example, answer: str | None = None) -> str:
    """The text of a chat: its prompt, or the whole of it where an answer is given.

    Raises:
        ValueError: the tokenizer has no template, or the template refuses the turns.
    """
    from jinja2 import TemplateError

    chat = example.chat or Chat()
    if tokenizer.chat_template is None:
        raise ValueError(
            f"task.chat=true, and the tokenizer of {name} has no chat template; say task.chat=false, or choose models "
            "that were tuned to follow instructions"
        )
    turns = [] if chat.system is None else [{"role": "system", "content": chat.system}]
    turns.append({"role": "user", "content": example.prompt})
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        text = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=answer is None, **dict(chat.options)
        )
    except TemplateError as error:
        given = "task.system" if chat.system is not None else "task.chat"
        raise ValueError(f"{name}: its chat template refuses what {given} asks for ({error})") from error
    return str(text)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> IntArray:
    return np.array(tokenizer.encode(text, add_special_tokens=False), dtype=np.int64)
