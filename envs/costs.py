"""What decoding costs: a ledger of what every forward pass did, and the cost models that read it.

The ledger keeps sums per model, since every cost model here is linear in what a pass did. An entry is an array
(models, COLUMNS):

    PASSES    forward passes
    READ      new tokens the passes read
    CONTEXT   tokens that were in the cache when a pass began, summed over passes
    PAIRS     query-key pairs: n c + n (n + 1) / 2 for n new tokens over a context of c
    WRITTEN   tokens of the response this model wrote
    SECONDS   measured time; a batched pass is shared equally among its rows

A cost model is a price per entry: an array of the same shape, `rates`. The cost of an entry is its product with the
rates, summed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from envs.arrays import FloatArray, IntArray

PASSES, READ, CONTEXT, PAIRS, WRITTEN, SECONDS = range(6)
COLUMNS = 6


def pass_entry(new_tokens: IntArray, context: IntArray, seconds: float) -> FloatArray:
    """The ledger entries of one batched forward pass, (n, COLUMNS).

    Args:
        new_tokens: tokens read per row, (n,).
        context: tokens already in the cache per row, (n,).
        seconds: time of the whole pass.
    """
    entry = np.zeros((len(new_tokens), COLUMNS))
    entry[:, PASSES] = 1
    entry[:, READ] = new_tokens
    entry[:, CONTEXT] = context
    entry[:, PAIRS] = new_tokens * context + new_tokens * (new_tokens + 1) / 2
    entry[:, SECONDS] = seconds / max(1, len(new_tokens))
    return entry


def step_entries(actions: IntArray, lengths: IntArray, read: IntArray, going_on: IntArray) -> FloatArray:
    """The ledger entries of a routed step, but for seconds: what `Session.step` enters, without running a model.

    Args:
        actions: the model that writes, (n,).
        lengths: tokens of each row before the step, prompt included, (n,).
        read: tokens of each row that each model has in its cache, (n, models); updated. The SLM has them all.
        going_on: whether the SLM reads the token written, (n,); it does not where that ends the response.

    Returns:
        (n, models, COLUMNS).
    """
    n = np.arange(len(actions))
    entries = np.zeros((*read.shape, COLUMNS))
    others = np.flatnonzero(actions)
    writers = actions[others]
    missed = lengths[others] - read[others, writers]
    # a model that has read the prompt for a policy's sake knows its first token
    entries[others, writers] = pass_entry(missed, read[others, writers], 0.0) * (missed > 0)[:, None]
    read[others, writers] = lengths[others]
    entries[n, 0] += pass_entry(np.ones_like(lengths), lengths, 0.0) * going_on[:, None]
    read[n, 0] += going_on
    entries[n, actions, WRITTEN] += 1
    return entries


def response_entries(
    prompt: int, writers: npt.NDArray[np.int8], terminated: bool, models: int, prompt_readers: Sequence[int] = ()
) -> FloatArray:
    """The ledger of a whole routed response, but for seconds, (models, COLUMNS).

    Args:
        prompt: tokens of the prompt.
        writers: the model that wrote each token, (n,).
        terminated: the last token ended the response, so that the SLM did not read it.
        models: of the pool.
        prompt_readers: models besides the SLM that read the prompt before anybody wrote, since the policy sees their
            states behind it.
    """
    entries = np.zeros((models, COLUMNS))
    one = np.ones(len(writers) - terminated, dtype=np.int64)
    entries[0] = pass_entry(np.array([prompt]), np.array([0]), 0.0)[0] + pass_entry(
        one, prompt + np.arange(len(one)), 0.0
    ).sum(0)
    for model in range(1, models):
        ends = prompt + np.flatnonzero(writers == model)
        if model in prompt_readers:
            ends = np.union1d([prompt], ends)
        before = np.concatenate([[0], ends[:-1]])[: len(ends)]
        entries[model] = pass_entry(ends - before, before, 0.0).sum(0)
    entries[:, WRITTEN] = np.bincount(writers, minlength=models)
    return entries


@dataclass(frozen=True)
class ModelProfile:
    """The sizes of a model that costs depend on.

    Attributes:
        name: the model's name.
        body_parameters: parameters every token passes through (all but tables that are looked up, the head, and experts
            that a token does not go through).
        head_parameters: parameters of the output head, used once a pass.
        bytes_per_parameter: 4 for float32, 2 for bfloat16; the mean where tensors differ.
        kv_bytes_per_token: bytes one token takes in the key-value cache, all layers.
        attention_width: query heads x head size x layers.
        weight_bytes: bytes of weights a pass reads; `bytes_per_parameter` for each parameter where None.
        head_inputs: inputs the head multiplies in a pass.
    """

    name: str
    body_parameters: int
    head_parameters: int
    bytes_per_parameter: float
    kv_bytes_per_token: int
    attention_width: int
    weight_bytes: int | None = None
    head_inputs: int = 1

    @property
    def parameters(self) -> int:
        """Parameters behind a token, the embedding table left out."""
        return self.body_parameters + self.head_parameters


class CostModel(ABC):
    """A linear price on the ledger."""

    name: ClassVar[str]
    reproducible: ClassVar[bool] = True

    @abstractmethod
    def rates(self, models: Sequence[ModelProfile]) -> FloatArray:
        """Prices, (models, COLUMNS), in this model's unit."""

    def of(self, ledger: FloatArray, models: Sequence[ModelProfile]) -> FloatArray:
        """Cost of ledger entries (..., models, COLUMNS), as (...)."""
        return np.asarray((ledger * self.rates(models)).sum((-2, -1)))

    def per_llm_token(self, models: Sequence[ModelProfile]) -> float:
        """Cost of one LLM token on an empty cache: the unit in which rewards are weighed."""
        token = np.zeros((len(models), COLUMNS))
        token[-1] = pass_entry(np.array([1]), np.array([0]), seconds=1.0)[0]
        token[-1, WRITTEN] = 1
        return float(self.of(token, models))


@dataclass(frozen=True)
class MemoryTraffic(CostModel):
    """Memory traffic at batch 1, in bytes (the measure of the CITER paper).

    A pass reads the weights it uses once (rows of tables that are looked up are not counted), reads the keys and values
    of its context and writes those of its new tokens:

        bytes = passes x weight_bytes + kv_bytes_per_token x (context + new tokens)

    Of experts among which a router chooses, a pass is charged those one token goes through. A pass over several tokens
    reads more of them, and how many cannot be told from the ledger.
    """

    name: ClassVar[str] = "bytes"

    def rates(self, models: Sequence[ModelProfile]) -> FloatArray:
        rates = np.zeros((len(models), COLUMNS))
        for row, model in zip(rates, models, strict=True):
            parameters = model.body_parameters + model.head_parameters
            row[PASSES] = parameters * model.bytes_per_parameter if model.weight_bytes is None else model.weight_bytes
            row[CONTEXT] = row[READ] = model.kv_bytes_per_token
        return rates


@dataclass(frozen=True)
class Flops(CostModel):
    """Floating-point operations, a multiply-add counted as two.

        flops = 2 x body_parameters x new tokens + 2 x head_parameters x head_inputs x passes
              + 4 x attention_width x pairs

    The head of a model runs on the last position of a pass only; 4 = 2 for the query-key product + 2 for the weighted
    values. Latent attention is counted at the width of its heads, without what it takes to unfold the cached latents.
    """

    name: ClassVar[str] = "flops"

    def rates(self, models: Sequence[ModelProfile]) -> FloatArray:
        rates = np.zeros((len(models), COLUMNS))
        for row, model in zip(rates, models, strict=True):
            row[READ] = 2 * model.body_parameters
            row[PASSES] = 2 * model.head_parameters * model.head_inputs
            row[PAIRS] = 4 * model.attention_width
        return rates


@dataclass(frozen=True)
class LlmTokens(CostModel):
    """Tokens written by a model other than the SLM. Over LLM-only decoding: about their share.

    With three models or more a token weighs as its model does: that model's parameters over those of the largest one.
    """

    name: ClassVar[str] = "llm_tokens"

    def rates(self, models: Sequence[ModelProfile]) -> FloatArray:
        rates = np.zeros((len(models), COLUMNS))
        sizes = np.array([model.parameters for model in models[1:]])
        rates[1:, WRITTEN] = sizes / sizes.max() if len(models) > 2 else 1
        return rates


@dataclass(frozen=True)
class Seconds(CostModel):
    """Measured seconds of the forward passes, a batched pass shared equally among its rows."""

    name: ClassVar[str] = "seconds"
    reproducible: ClassVar[bool] = False

    def rates(self, models: Sequence[ModelProfile]) -> FloatArray:
        rates = np.zeros((len(models), COLUMNS))
        rates[:, SECONDS] = 1
        return rates


@dataclass(frozen=True)
class Dollars(CostModel):
    """Price per token: `read` for each token a model reads, `written` for each it writes, per million tokens.

    Prices go by position in the pool, SLM first. Without prices a token costs 1 dollar per million per billion
    parameters, read or written: a stand-in that keeps the proportions of hosted models.
    """

    name: ClassVar[str] = "dollars"
    read: Sequence[float] | None = None
    written: Sequence[float] | None = None

    def rates(self, models: Sequence[ModelProfile]) -> FloatArray:
        stand_in = [(model.body_parameters + model.head_parameters) / 1e9 for model in models]
        rates = np.zeros((len(models), COLUMNS))
        for column, label, given in ((READ, "read", self.read), (WRITTEN, "written", self.written)):
            prices = stand_in if given is None else list(given)
            if len(prices) != len(models) or min(prices) < 0:
                raise ValueError(
                    f"cost dollars: {label} must hold one price >= 0 for each of {', '.join(m.name for m in models)}; "
                    f"it is {prices}"
                )
            rates[:, column] = np.array(prices) / 1e6
        return rates


ALL_COSTS: tuple[CostModel, ...] = (MemoryTraffic(), Flops(), LlmTokens(), Seconds(), Dollars())


@dataclass(frozen=True)
class Price:
    """Several cost models applied at once to a fixed pool.

    Args:
        models: the pool's profiles, SLM first.
        costs: the cost models; all by default.
    """

    models: Sequence[ModelProfile]
    costs: Sequence[CostModel] = ALL_COSTS
    _rates: FloatArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        names = [cost.name for cost in self.costs]
        if len(set(names)) != len(names):
            raise ValueError(f"cost models share a name: {', '.join(names)}")
        stacked = np.stack([cost.rates(self.models).ravel() for cost in self.costs], axis=-1)
        object.__setattr__(self, "_rates", stacked)

    def of(self, ledger: FloatArray) -> Mapping[str, FloatArray]:
        """Cost in every unit of ledger entries (..., models, COLUMNS); each value has shape (...)."""
        prices = ledger.reshape(*ledger.shape[:-2], -1) @ self._rates
        return {cost.name: prices[..., column] for column, cost in enumerate(self.costs)}
