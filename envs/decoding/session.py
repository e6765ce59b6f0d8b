"""Sequences in flight, and the one place where a routed token is decoded."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.costs import COLUMNS, SECONDS, WRITTEN, pass_entry
from envs.decoding.decoder import Decoder, since_llm
from envs.decoding.observation import Observation, Step
from envs.decoding.prompt_states import PromptStates
from envs.decoding.sampling import Sampling
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task


class Session(Decoder):
    """Up to `rows` sequences in flight over a pool of models; the one place where a routed token is decoded.

    Every model keeps a cache of its own. The SLM reads prompts and the tokens written when a row is next observed or
    stepped, so that one pass serves rows that went on and rows that started; another model reads what it has missed
    when it is chosen, in the same forward pass that gives its token. Rows are independent: which rows step together
    changes nothing about the tokens written.

    Args:
        pool: the models; an action is an index into them.
        rows: sequences in flight.
        max_new_tokens: the longest response.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.
        sampling: how tokens are drawn; greedy by default.

    Raises:
        ValueError: a setting out of range, or caches that do not fit in memory.
    """

    def __init__(
        self,
        pool: ModelPool,
        rows: int,
        max_new_tokens: int,
        capacity: int | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        super().__init__(pool, rows, max_new_tokens, capacity, sampling)
        self._caches = pool.new_caches(rows, self.capacity)
        self._open_books()
        self._limits: IntArray = np.full(rows, max_new_tokens, dtype=np.int64)
        self._slm_tokens: IntArray = np.zeros(rows, dtype=np.int64)
        self._unread: BoolArray = np.zeros(rows, dtype=bool)  # the SLM has tokens to read before the next decision
        self._generators: list[np.random.Generator | None] = [None] * rows
        self._hidden = torch.zeros(rows, pool.slm.width, device=pool.slm.device)
        self._logits = torch.zeros(rows, pool.vocab_size, device=pool.slm.device)
        self._prompt_states = PromptStates(rows, len(pool))

    def start(
        self,
        rows: IntArray,
        prompts: Sequence[IntArray],
        episodes: IntArray | None = None,
        generators: Sequence[np.random.Generator] | None = None,
        limits: IntArray | None = None,
        responses: Sequence[IntArray] | None = None,
        *,
        observed: bool = True,
    ) -> FloatArray:
        """Start a new sequence in each row.

        Args:
            rows: distinct rows, (n,); what they held is forgotten.
            prompts: n arrays of token ids.
            episodes: a number for each row's episode, (n,); the rows' own numbers where None.
            generators: the source of chance of each row, needed where tokens are sampled.
            limits: the longest response of each row, at most `max_new_tokens`, (n,); that where None.
            responses: n arrays of tokens that the responses begin with, as if the SLM had written them. A response of
                the longest length can be observed, but is not in flight.
            observed: whether somebody may look at the rows' states. Where nobody does, the SLM too reads what it has
                missed when it is chosen, and nothing else; `Step.slm_tokens` are of no use where others write.

        Returns:
            Ledger entries of the SLM's reading of all that, (n, models, COLUMNS).

        Raises:
            ValueError: a prompt is empty or leaves no room for `max_new_tokens`.
        """
        rows = self._checked(rows)
        for row, prompt in zip(rows, prompts, strict=True):
            self.check_fit(f"row {row}", prompt)
        for row, response in zip(rows, responses or [], strict=responses is not None):
            if len(response) > self.max_new_tokens:
                raise ValueError(
                    f"row {row} begins with {len(response)} tokens, max_new_tokens is {self.max_new_tokens}"
                )
        if not self.sampling.greedy and generators is None:
            raise ValueError("sampling needs a generator for each row")
        for cache in self._caches:
            cache.free(rows)
        self._begin(rows, prompts, episodes)
        for row, response in zip(rows, responses or [], strict=responses is not None):
            self._tokens[row, self._lengths[row] : self._lengths[row] + len(response)] = response
            self._writers[row, self._lengths[row] : self._lengths[row] + len(response)] = 0
            self._lengths[row] += len(response)
        self._since_llm[rows] = begun = self._lengths[rows] - self._prompt_lengths[rows]
        self._limits[rows] = self.max_new_tokens if limits is None else np.minimum(limits, self.max_new_tokens)
        for position, row in enumerate(rows):
            self._generators[row] = None if generators is None else generators[position]
        self._active[rows] = begun < self._limits[rows]
        self._followed[rows] = self._observed[rows] = observed
        self._unread[rows] = False
        self._prompt_states.forget(rows)
        entries = np.zeros((len(rows), len(self.pool), COLUMNS))
        entries[:, 0, WRITTEN] = begun
        self._leave_unread(rows, entries, np.arange(len(rows)))
        self.ledger[rows] = entries
        return entries

    def step(self, rows: IntArray, actions: IntArray) -> Step:
        """Write one token in each row, by the model its action names.

        Args:
            rows: distinct rows in flight, (n,).
            actions: 0 for the SLM, k for model k of the pool, (n,).

        Raises:
            ValueError: an action out of range, a row that is not in flight, or one for the SLM that was released.
            FloatingPointError: a model's logits are not numbers.
        """
        rows, actions = self._checked_step(rows, actions)
        observed = self._observed[rows]
        self._catch_up(rows)
        ledger = np.zeros((len(rows), len(self.pool), COLUMNS))
        slm_tokens = self._slm_tokens[rows]
        tokens = slm_tokens.copy()
        uniforms = None if self.sampling.greedy else np.array([self._uniform(row) for row in rows])
        has_read = observed & (actions == 0)  # the SLM's token is known
        for model in np.unique(actions):
            chosen = np.flatnonzero((actions == model) & ~has_read)
            if len(chosen):
                ledger[chosen, model], logits, tokens[chosen] = self._next(int(model), rows[chosen])
                if uniforms is not None:
                    tokens[chosen] = self.sampling.of(int(model)).draw(logits, uniforms[chosen])
        if uniforms is not None and has_read.any():
            logits = self._logits[torch.from_numpy(rows[has_read]).to(self._logits.device)]
            tokens[has_read] = self.sampling.of(0).draw(logits, uniforms[has_read])
        ledger[np.arange(len(rows)), actions, WRITTEN] = 1
        self._enter(rows, tokens, actions)
        terminated = np.isin(tokens, self.pool.end_tokens)
        truncated = ~terminated & (self._lengths[rows] - self._prompt_lengths[rows] >= self._limits[rows])
        self._active[rows] = ~(terminated | truncated)
        # The last state of a truncated row is read too: its value is what a learner bootstraps from.
        going_on = np.flatnonzero(~terminated)
        self._leave_unread(rows[going_on], ledger, going_on)
        self.ledger[rows] += ledger
        self._catch_up(rows[truncated])
        return Step(tokens, slm_tokens, terminated, truncated, ledger)

    def fork(self, sources: IntArray, targets: IntArray) -> None:
        """Copy whole rows; what a model has read of them it does not read again.

        Args:
            sources: rows to copy, (n,); one may stand several times.
            targets: distinct rows to overwrite, (n,), none of which is another's source.

        Raises:
            ValueError: rows out of range, or a target that is another fork's source.
        """
        sources, targets = self._checked_fork(sources, targets)
        self._copy(sources, targets, self._lengths[sources], reread=False)

    def fork_shortened(self, sources: IntArray, targets: IntArray, lengths: IntArray) -> None:
        """Copy the first tokens of rows.

        The SLM re-reads the last token of a shortened row, since the state behind it is not kept, and so does another
        model that had read it. A prompt of 5 tokens with 4 written, of which the SLM has read all 9 and the LLM 8, cut
        to a length of 7: both caches keep 6 tokens. Cut to 9 it is a `fork`.

        Args:
            sources: as in `fork`.
            targets: as in `fork`; a row may be its own source.
            lengths: tokens to keep, prompt included, (n,).

        Raises:
            ValueError: as in `fork`, or lengths out of range.
        """
        sources, targets = self._checked_fork(sources, targets)
        lengths = self._checked_lengths(sources, lengths)
        cut = lengths < self._lengths[sources]
        self._copy(sources, targets, lengths, reread=True)
        entries = np.zeros((len(targets), len(self.pool), COLUMNS))
        self._leave_unread(targets[cut], entries, np.flatnonzero(cut))
        self.ledger[targets] += entries

    def fork_with_next(self, sources: IntArray, targets: IntArray, lengths: IntArray, slm_tokens: IntArray) -> None:
        """Copy the first tokens of rows where it is known what comes next; the SLM re-reads nothing.

        In the example of `fork_shortened` the SLM's cache keeps 7 tokens, the LLM's 6. A row has no observation until
        its next step.

        Args:
            sources: as in `fork`.
            targets: as in `fork`.
            lengths: tokens to keep, prompt included, (n,); fewer than the sources hold.
            slm_tokens: what action 0 writes next in each row, (n,): the SLM's token, or another one that the row is
                taught.

        Raises:
            ValueError: as in `fork`, lengths out of range, or tokens are sampled.
        """
        sources, targets = self._checked_fork(sources, targets)
        lengths = self._checked_lengths(sources, lengths)
        if not (self.sampling.greedy and (lengths < self._lengths[sources]).all()):
            raise ValueError(
                "slm_tokens spare the re-reading of shortened rows under greedy decoding, and nothing else"
            )
        self._copy(sources, targets, lengths, reread=False)
        self._slm_tokens[targets] = slm_tokens

    def rewind(self, rows: IntArray, lengths: IntArray) -> None:
        """Forget the tokens of each row beyond `lengths`, (n,), prompt included; the rows go on from there."""
        self.fork_shortened(rows, rows, lengths)

    def release_slm(self, rows: IntArray) -> None:
        """Let the SLM read no more of `rows`, (n,), which other models write to their ends and nobody observes."""
        self._catch_up(self._checked(rows))
        self._followed[rows] = False

    def free(self, rows: IntArray) -> None:
        """Take rows out of flight."""
        self._active[rows] = self._unread[rows] = False

    def observe(self, rows: IntArray) -> Observation:
        """What a router may see of `rows`, (n,); copies, which later steps leave as they are."""
        rows = np.asarray(rows, dtype=np.int64)
        self._check_followed(rows)
        self._catch_up(rows)
        index = torch.from_numpy(rows).to(self._hidden.device)
        counts = (self._lengths[rows] - self._prompt_lengths[rows], self._episodes[rows], self._since_llm[rows])
        return Observation(self._hidden[index], self._logits[index], *counts)

    def read_prompts(self, rows: IntArray, model: int) -> Tensor:
        """The states of a model other than the SLM behind the prompts of `rows`, (n,); see `Decoder.read_prompts`."""
        rows = self._checked(rows)
        self._check_reader(model)
        new = rows[~self._prompt_states.known[rows, model]]
        self._check_unwritten(new, model)
        if len(new):
            entries, hidden, logits, _ = self._read(model, new)
            self.ledger[new, model] += entries
            self._prompt_states.keep(model, new, hidden, logits)
        return self._prompt_states.states(model, rows)

    def state(self, rows: IntArray) -> dict[str, npt.NDArray[Any]]:
        """Where `rows`, (n,), stand, in numbers; see `Decoder.state`."""
        read = np.stack([cache.lengths[rows] for cache in self._caches], axis=-1)
        return self._books_of(rows, "_limits", "_slm_tokens", "_unread") | {"read": read}

    def restore(
        self,
        rows: IntArray,
        state: Mapping[str, npt.NDArray[Any]],
        generators: Sequence[np.random.Generator] | None = None,
    ) -> None:
        """Let `rows`, (n,), stand where others stood; see `Decoder.restore`."""
        rows = self._checked(rows)
        self._set_books(rows, state, "_limits", "_slm_tokens", "_unread")
        self._prompt_states.forget(rows)
        for number, row in enumerate(rows):
            self._generators[row] = None if generators is None else generators[number]
        for model, cache in enumerate(self._caches):
            cache.free(rows)
            counts = state["read"][:, model]
            readers = rows[counts > 0]
            if not len(readers):
                continue
            chunks = [self._tokens[row, :count] for row, count in zip(readers, counts[counts > 0], strict=True)]
            hidden, logits = self.pool.models[model].feed(cache, readers, chunks)
            logits = logits[:, : self.pool.vocab_size]
            if model == 0:
                self._keep_state(readers, hidden, logits)
            elif len(behind := np.flatnonzero(cache.lengths[readers] == self._prompt_lengths[readers])):
                of = torch.from_numpy(behind).to(hidden.device)
                self._prompt_states.keep(model, readers[behind], hidden[of], logits[of])

    def correct(self, row: int, task: Task, example: Example) -> bool:
        """Whether the response of a row answers `example`."""
        return task.is_correct(example, self.pool.decode(self.response(row)))

    def _read(self, model: int, rows: IntArray) -> tuple[FloatArray, Tensor, Tensor, IntArray]:
        """Let a model read what it has missed.

        Returns:
            Ledger entries (n, COLUMNS), hidden states (n, width), logits (n, vocab), and greedy tokens (n,).
        """
        cache = self._caches[model]
        before, after = cache.lengths[rows], self._lengths[rows]
        chunks = [self._tokens[row, b:a] for row, b, a in zip(rows, before, after, strict=True)]
        started = time.perf_counter()
        hidden, logits = self.pool.models[model].feed(cache, rows, chunks)
        logits = logits[:, : self.pool.vocab_size]
        greedy = self.pool.greedy(model, logits)  # waits for the device, so that the time below is the pass's
        return pass_entry(after - before, before, time.perf_counter() - started), hidden, logits, greedy

    def _next(self, model: int, rows: IntArray) -> tuple[FloatArray, Tensor, IntArray]:
        """Ledger entries (n, COLUMNS), logits (n, vocab) and greedy tokens (n,) of a model that is to write.

        It reads what it has missed, which is nothing where it has read the prompt for a policy's sake and comes first.
        """
        ahead = self._caches[model].lengths[rows] == self._lengths[rows]
        if not ahead.any():
            entries, hidden, logits, greedy = self._read(model, rows)
            if model == 0:
                self._keep_state(rows, hidden, logits)
            return entries, logits, greedy
        entries, logits = np.zeros((len(rows), COLUMNS)), self._prompt_states.logits(model, rows)
        if not ahead.all():
            missed = torch.from_numpy(np.flatnonzero(~ahead)).to(logits.device)
            entries[~ahead], _, logits[missed], _ = self._read(model, rows[~ahead])
        return entries, logits, self.pool.greedy(model, logits)

    def _leave_unread(self, rows: IntArray, ledger: FloatArray, entries: IntArray) -> None:
        """Enter what the SLM has to read of rows at `ledger[entries, 0]`; it does so when they are next looked at."""
        follow = self._followed[rows]
        rows, entries = rows[follow], entries[follow]
        if not len(rows):
            return
        before = self._caches[0].lengths[rows]
        ledger[entries, 0] += pass_entry(self._lengths[rows] - before, before, 0.0)
        self._unread[rows] = True

    def _catch_up(self, rows: IntArray) -> None:
        """Let the SLM read what it has left unread of `rows`."""
        rows = rows[self._unread[rows]]
        if not len(rows):
            return
        entries, hidden, logits, self._slm_tokens[rows] = self._read(0, rows)
        self._unread[rows] = False
        self.ledger[rows, 0, SECONDS] += entries[:, SECONDS]
        self._keep_state(rows, hidden, logits)

    def _keep_state(self, rows: IntArray, hidden: Tensor, logits: Tensor) -> None:
        """Keep what the SLM made of the last tokens of rows."""
        index = torch.from_numpy(rows).to(self._hidden.device)
        self._hidden[index], self._logits[index] = hidden.to(self._hidden), logits.to(self._logits)

    def _uniform(self, row: int) -> float:
        generator = self._generators[row]
        assert generator is not None
        return float(generator.random())

    def _checked_fork(self, sources: IntArray, targets: IntArray) -> tuple[IntArray, IntArray]:
        """Sources and targets as integers, (n,); refused where they cannot be copied at once."""
        sources, targets = np.asarray(sources, dtype=np.int64), self._checked(targets)
        self._checked(np.unique(sources))
        if np.isin(targets[sources != targets], sources).any():
            raise ValueError("a fork's target is another fork's source; fork them one after the other")
        return sources, targets

    def _checked_lengths(self, sources: IntArray, lengths: IntArray) -> IntArray:
        """Lengths to keep as integers, (n,); refused where they cut prompts or exceed what was written."""
        lengths, whole = np.asarray(lengths, dtype=np.int64), self._lengths[sources]
        if (lengths > whole).any() or (lengths < self._prompt_lengths[sources]).any():
            raise ValueError(
                f"lengths {lengths.tolist()} must lie between the prompts and the {whole.tolist()} tokens written"
            )
        return lengths

    def _copy(self, sources: IntArray, targets: IntArray, lengths: IntArray, reread: bool) -> None:
        """Copy the first `lengths` tokens of rows; with `reread` the SLM's cache lacks the last one where that is less.

        Another model's always does: it must have a token to read when it is next asked for one.
        """
        self._catch_up(np.unique(sources))
        shortened = lengths < self._lengths[sources]
        for model, cache in enumerate(self._caches):
            cache.fork(sources, targets, lengths - (shortened if model > 0 or reread else 0))
        rowwise = (self._tokens, self._writers, self._prompt_lengths, self._limits, self._episodes, self._slm_tokens)
        for state in (*rowwise, self._since_llm, self._followed, self._observed, self.ledger):
            state[targets] = state[sources]
        self._prompt_states.copy(sources, targets)
        for target, source in zip(targets, sources, strict=True):
            generator = self._generators[source]
            # a copy draws from a stream of its own, so that what others draw changes nothing
            self._generators[target] = generator if generator is None or target == source else generator.spawn(1)[0]
        self._lengths[targets] = lengths
        self._active[targets] = self._active[sources] | shortened  # the copy of a finished row is finished
        device = self._hidden.device
        to, of = torch.from_numpy(targets).to(device), torch.from_numpy(sources).to(device)
        self._hidden[to], self._logits[to] = self._hidden[of], self._logits[of]
        for target in targets[shortened]:
            # tokens that are gone were not written
            writers = self.writers(target)
            self.ledger[target, :, WRITTEN] = np.bincount(writers, minlength=len(self.pool))
            self._since_llm[target] = since_llm(writers)
        self._unread[targets] = False
