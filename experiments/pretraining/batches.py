"""Problems and their solutions, packed into rows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from envs.tasks.arithmetic import LEVELS, ArithmeticTask
from experiments.pretraining.recipe import Recipe

SECOND_CYCLE_FROM = 500_000
"""The first problem of the second cycle."""


def packed_batches(
    task: ArithmeticTask, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, cycle: int = 1
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields input ids, position ids, document ids and labels, each (rows, row_tokens).

    Documents never span rows; a label is -100 on prompts and padding, so that only responses are learned. The second
    cycle goes on with problems the first has not reached.
    """
    rng = np.random.default_rng([seed, cycle])
    index = SECOND_CYCLE_FROM * (cycle - 1)
    for step in range(recipe.steps if cycle == 1 else recipe.second_cycle):
        bare = (recipe.equations_share if cycle == 1 else 0.0) * max(
            0.0, 1 - step / (recipe.equations_until * recipe.steps)
        )
        shape = (recipe.rows, recipe.row_tokens)
        ids = np.full(shape, tokenizer.pad_token_id)
        positions, documents = np.zeros(shape, int), np.full(shape, -1)
        labels = np.full(shape, -100)
        for row in range(recipe.rows):
            filled = document = 0
            while True:
                if rng.random() < bare:
                    prompt, response = _bare_equation(LEVELS["default"].largest, rng, task.operations)
                else:
                    example = task.example("train", index)
                    prompt, response = example.prompt, example.known_reference()
                    index += 1
                head = tokenizer.encode(prompt)
                body = [*tokenizer.encode(response), tokenizer.eos_token_id]
                length = len(head) + len(body)
                if filled + length > recipe.row_tokens:
                    break
                span = slice(filled, filled + length)
                ids[row, span], documents[row, span] = head + body, document
                positions[row, span] = np.arange(length)
                # the label of a position is the token that follows it
                labels[row, filled + len(head) - 1 : filled + length - 1] = body
                filled, document = filled + length, document + 1
        yield tuple(torch.from_numpy(array) for array in (ids, positions, documents, labels))  # type: ignore[misc]


def _bare_equation(largest: int, rng: np.random.Generator, operations: str) -> tuple[str, str]:
    """An equation as solutions write it, the loss on its result alone: many more of them fit a row than stories do."""
    sign = str(rng.choice(list(operations)))
    if sign in "+-":
        left, right = sorted(int(n) for n in rng.integers(0, largest + 1, size=2))
        left, right, result = (left, right - left, right) if sign == "+" else (right, right - left, left)
    else:
        factor = int(rng.integers(2, 10))
        other = int(rng.integers(1, largest // factor + 1))
        left, right, result = (other, factor, other * factor) if sign == "*" else (other * factor, factor, other)
    return f" {left} {sign} {right} = ", f"{result}"
