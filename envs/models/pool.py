"""The pool of models a router chooses from."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from envs.arrays import IntArray
from envs.costs import ModelProfile
from envs.models.checks import check_fits, check_same_vocabulary, warn_of_order
from envs.models.language_model import LanguageModel
from envs.tasks.chat import encode_chat, encode_chat_reference
from envs.tasks.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from envs.models.kv_cache import SlotCache

Recipe: TypeAlias = "tuple[Callable[..., ModelPool], Hashable]"
"""What loads a pool, and the specs of its models."""


@dataclass
class ModelPool:
    """The models a router chooses from: the SLM first, then the others, cheapest first; one vocabulary.

    A pool of one model answers by itself (`agents.common.rollout.decode_alone`); there is nothing to route in it.

    Args:
        models: at least one.
        rows: how many sequences in flight memory was planned for; None where it was not.
        capacity: the longest sequence (prompt and response) a session holds; the models' own limit where None.
        stop: texts; every token whose own text holds one of them ends a response too. A text that two tokens make up is
            not seen.

    Attributes:
        names: of the models.
        recipe: what another process loads the pool from; None for a pool made of models at hand.

    Raises:
        ValueError: no models, vocabularies or special tokens that differ, or a stop text that no token holds.
    """

    models: Sequence[LanguageModel]
    rows: int | None = None
    capacity: int | None = None
    stop: Sequence[str] = ()
    names: list[str] = field(init=False)
    recipe: tuple[Callable[..., ModelPool], Hashable] | None = field(
        init=False, default=None, repr=False, compare=False
    )
    """What loads such a pool, and what of; None for a pool made of models at hand."""

    def __post_init__(self) -> None:
        self.names = [model.name for model in self.models]
        if not self.models:
            raise ValueError("a pool needs at least two models, the SLM first, or one that answers alone; it has none")
        for other in self.models[1:]:
            check_same_vocabulary(self.slm, other)
        self.stop = tuple(self.stop)
        self._stop_tokens = tokens_with(self.tokenizer, self.stop)

    def __deepcopy__(self, memo: object) -> ModelPool:
        """The pool itself: it holds no sequences, and Gymnasium copies the arguments of environments."""
        return self

    def __copy__(self) -> ModelPool:
        """The pool itself."""
        return self

    def __reduce__(self) -> tuple[Callable[..., ModelPool], tuple[object, ...]]:
        """How a pool travels to another process: as what it was loaded from, and is loaded from there, once.

        Raises:
            TypeError: the pool was made of models at hand, so that no other process could load them.
        """
        if self.recipe is None:
            raise TypeError(
                f"the pool of {', '.join(self.names)} was made of models at hand; weights do not travel between "
                "processes: make the pool with load_pool, which another process can do again"
            )
        load, specs = self.recipe
        return load, (specs, self.rows, self.capacity, self.fingerprints, self.stop)

    def __len__(self) -> int:
        return len(self.models)

    def check_choice(self) -> ModelPool:
        """The pool itself, for those that route in it; `ModelOrderWarning` where a model is larger than the next one.

        Raises:
            ValueError: it has fewer than two models.
        """
        if len(self.models) < 2:
            raise ValueError(f"a pool needs at least two models, the SLM first; it has {', '.join(self.names)}")
        warn_of_order(self.profiles)
        return self

    @property
    def slm(self) -> LanguageModel:
        """The small model, whose hidden state routers read."""
        return self.models[0]

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer all models share."""
        return self.slm.tokenizer

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """What tells the models' weights from others, SLM first."""
        return tuple(model.fingerprint for model in self.models)

    @cached_property
    def profiles(self) -> list[ModelProfile]:
        """Sizes of the models, SLM first."""
        return [model.profile for model in self.models]

    @cached_property
    def vocab_size(self) -> int:
        """Tokens every model can write, those of the tokenizer: heads may be padded beyond it, to different sizes."""
        known: int = max(self.tokenizer.get_vocab().values()) + 1
        return min(known, *(model.vocab_size for model in self.models))

    @cached_property
    def end_tokens(self) -> IntArray:
        """Token ids that end a response, whoever writes it: those of every model of the pool, and those of `stop`."""
        return np.unique(np.concatenate([self._own_ends, np.array(self._stop_tokens, dtype=np.int64)]))

    @cached_property
    def _own_ends(self) -> IntArray:
        return np.unique(np.concatenate([np.array(model.end_tokens) for model in self.models]))

    @cached_property
    def end_token(self) -> int:
        """The token that ends a reference: the tokenizer's own, where it is one that ends responses."""
        own = self.tokenizer.eos_token_id
        return int(own if own in self._own_ends else self._own_ends[0])

    @cached_property
    def max_positions(self) -> int:
        """The longest sequence every model can hold."""
        return min(model.max_positions for model in self.models)

    def new_caches(self, rows: int, capacity: int) -> list[SlotCache]:
        """A cache for each model, for `rows` sequences of up to `capacity` tokens.

        Raises:
            ValueError: they do not fit the memory that is free.
        """
        needed: dict[torch.device, int] = {}
        for model in self.models:
            needed[model.device] = needed.get(model.device, 0) + model.profile.kv_bytes_per_token * rows * (
                capacity + 1
            )
        for device, size in needed.items():
            check_fits(str(device), size, rows, capacity)
        return [model.new_cache(rows, capacity) for model in self.models]

    def greedy(self, model: int, logits: Tensor) -> IntArray:
        """The most likely tokens under logits (..., vocab) of model number `model`, as (...).

        Raises:
            FloatingPointError: the logits hold NaN.
        """
        best, tokens = logits.max(-1)
        # the maximum of logits that hold a NaN is NaN
        if bool(best.isnan().any()):
            name = self.names[model]
            raise FloatingPointError(f"the logits of {name} are NaN; load it with another dtype or check its weights")
        return np.asarray(tokens.cpu().numpy())

    def encode(self, text: str, special: bool = True) -> IntArray:
        """Token ids of `text`, (n,); `special` adds what the tokenizer puts around a prompt."""
        return np.array(self.tokenizer.encode(text, add_special_tokens=special), dtype=np.int64)

    def encode_response(self, text: str) -> IntArray:
        """Token ids of a whole response, (n,), its end included."""
        return np.append(self.encode(text, special=False), self.end_token)

    def encode_prompt(self, example: Example) -> IntArray:
        """Token ids of an example's prompt, (n,): its text, or where it is a chat what the SLM's template makes of it.

        Raises:
            ValueError: there is no chat template, or it refuses the prompt.
        """
        if example.chat is None:
            return self.encode(example.prompt)
        return encode_chat(self.slm.name, self.tokenizer, example)

    def encode_reference(self, example: Example) -> IntArray:
        """Token ids of an example's reference, (n,), its end included: of a chat the assistant's whole turn.

        Raises:
            ValueError: as `encode_prompt`; the template ends the turn with no token that ends responses.
        """
        if example.chat is None:
            return self.encode_response(example.known_reference())
        return encode_chat_reference(self.slm.name, self.tokenizer, example, self.end_tokens)

    def prompt_text(self, example: Example) -> str:
        """An example's prompt as text, as `Decoder.prompts` has it."""
        return example.prompt if example.chat is None else self.decode(self.encode_prompt(example))

    def decode(self, tokens: IntArray) -> str:
        """The text of `tokens`, special tokens left out."""
        return text_of(self.tokenizer, tokens)


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: IntArray) -> str:
    """The text of `tokens`, (n,), special tokens left out."""
    return str(tokenizer.decode(tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def tokens_with(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """The tokens whose own text holds one of `texts`.

    Raises:
        ValueError: a text that is empty, or that no token holds.
    """
    if not texts:
        return []
    ids = sorted(tokenizer.get_vocab().values())
    words = tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)
    found: set[int] = set()
    for text in texts:
        holding = [token for token, word in zip(ids, words, strict=True) if text and text in word]
        if not holding:
            raise ValueError(f"stop has {text!r}, which no token of the vocabulary holds; choose shorter texts")
        found.update(holding)
    return sorted(found)


def models_manifest(pool: ModelPool) -> list[dict[str, str]]:
    """Names and fingerprints of the models of a pool."""
    return [{"name": model.name, "fingerprint": model.fingerprint} for model in pool.models]
