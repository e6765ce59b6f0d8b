"""Routing in which a call also checks what was drafted, as Gymnasium environments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from envs.decoding.checked_session import CheckedSession
from envs.decoding.decoder import Decoder
from envs.decoding.judges import Gap, Judge
from envs.decoding.observation import CheckedFeatures, Step, check_checked_features
from envs.environments.episodes import Info
from envs.environments.render import Checked
from envs.environments.settings import RoutingSettings
from envs.environments.token_routing import RoutingEnv, RoutingEpisodes, RoutingVectorEnv
from envs.prefix_tree.checked_tree_session import CheckedTreeSession
from envs.prefix_tree.tree import PrefixTree


@dataclass(frozen=True, kw_only=True)
class CheckedSettings(RoutingSettings):
    """What `CheckedRoutingEnv` is made with: all of `RoutingSettings`, other features, and a judge.

    Args:
        judge: which drafted tokens stand; `Gap()` where None.
        features: also `hidden_logits_history_drafts`, with what was drafted since the last call, and `drafts`, that
            alone; then the SLM reads its last token only when it goes on.

    Raises:
        ValueError: the reward follows a reference, which what is taken back leaves again.
    """

    judge: Judge | None = None
    features: CheckedFeatures = "hidden_logits_history_drafts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward is not None and self.reward.uses_reference:
            raise ValueError(
                f"{type(self.reward).__name__} follows a reference token by token, and here tokens are taken back; use "
                "OutcomeReward, or citer/TokenRouting-v1"
            )

    def _check_features(self) -> None:
        check_checked_features(self.features)


class CheckedEpisodes(RoutingEpisodes):
    """Rows that answer prompts, in which larger models check what the SLM has drafted.

    Args:
        rows: responses in flight.
        settings: what they are made with.
    """

    settings_kind = CheckedSettings
    settings: CheckedSettings
    session: CheckedSession | CheckedTreeSession

    def __init__(self, rows: int, settings: CheckedSettings) -> None:
        super().__init__(rows, settings)
        self._final_types |= {"tokens_taken_back": int}

    def _open(self, rows: int) -> Decoder:
        settings, judge = self.settings, self.settings.judge or Gap()
        if settings.tree is not None:
            return CheckedTreeSession(settings.tree, rows, settings.capacity, judge)
        return CheckedSession(
            self.pool, rows, settings.max_new_tokens, settings.capacity, settings.sampling, judge=judge
        )

    def _checks(self, step: Step) -> Info:
        assert step.checks is not None
        taken_back = np.empty(len(step.tokens), dtype=object)
        taken_back.fill(())
        for row, back in step.checks.taken_back.items():
            taken_back[row] = tuple(back.tokens.tolist())
        return {"kept": step.checks.kept, "taken_back": taken_back}

    def _checks_of(self, row: int) -> Checked:
        return Checked.of(self.session.taken_back(row), self.session.ledger[row])

    def _final_info(self, row: int) -> Info:
        return super()._final_info(row) | {"tokens_taken_back": self.session.taken_back_tokens(row)}


class CheckedRoutingEnv(RoutingEnv):
    """When should the LLM be called, which then also says which of the drafted tokens stand?

    ## Description
    The small language model (SLM) drafts a response token by token. An LLM that is called reads all tokens it has
    missed, for one reading of its weights, and so tells at no further price what it thinks of each token that was
    drafted since the last call. A judge decides which beginning of the draft stands; the rest is taken back, and the
    LLM writes the next token behind what stands. The agent decides when to call. Decoding is greedy unless `sampling`
    says otherwise: then what the judge does not spare stands with the probability of speculative sampling.

    Token routing is the special case that takes nothing back (`judge=Gap(inf)`); speculative decoding the one that
    calls every d tokens and takes back whatever the LLM would not have written (`judge="first_disagreement"`,
    `features="drafts"`).

    ## Action space
    `Discrete(K)` for a pool of K models. 0: the SLM drafts the next token, or, where it has drafted an end, accepts it.
    k: model k is called. An end is an end-of-sequence token, or the last one of `max_new_tokens`.

    ## Observation space
    `Box(-1e6, 1e6, (width,), float32)`: as in `RoutingEnv`, and by default four numbers more (`features=
    "hidden_logits_history_drafts"`): log(1 + tokens drafted since the last call), the sums of their entropies and of
    their -log p under the SLM (nats), and whether an end is drafted. At a drafted end of sequence the hidden state and
    the logit features are those the end was written by, since nobody reads it. With `features="drafts"` the four
    numbers alone: the SLM then reads its last token, and the LLM's, in the pass that drafts the next one.

    ## Reward
    That of `RoutingEnv`, but for `ShortcutReward`, which is refused. The cost of a call is that of the LLM's pass over
    all it has missed, drafted tokens that are taken back included, and of the SLM's reading of the LLM's token. Nothing
    is refunded for what is taken back, but that it was not written: where written tokens have a price (`Dollars`), the
    cost of a call may be below 0. With `features="drafts"` the SLM's reading of the prompt is part of its first draft.

    ## Starting state, arguments, copies and states
    Those of `RoutingEnv`; `judge` is a `envs.decoding.judges.Judge`, or `first_disagreement`, `gap`, `top_k` or
    `step_likelihood`, by default `Gap(2.0)`. With a `tree` the process is walked along it: opinions of the LLM are
    remembered, too, so that one tree serves all judges. A tree is walked greedily, and
    refuses `sampling`.

    ## Episode end
    `terminated`: an end-of-sequence token of the SLM was accepted, or let stand by the LLM, or the LLM wrote one.
    `truncated`: `max_new_tokens` were written without. Every call ends the episode or writes a token that stays, so
    that every episode ends.

    ## Info
    That of `RoutingEnv`, where `token` is -1 in a step that writes none, since a drafted end was accepted or stands. At
    every step also `kept`, the number of drafted tokens that the LLM has read and let stand, and `taken_back`, a tuple
    of the tokens that it has not; at the end `tokens_taken_back`, the number of all of them. `slm_token` is -1 where
    the SLM has not read so far (`features="drafts"`).

    ## Rendering
    As in `RoutingEnv`; tokens that were taken back are struck through, in front of the token that was written instead,
    and a thin line stands where a model was called and let all stand that was drafted.

    ## Version
    v0: first version.
    """

    episodes: CheckedEpisodes
    episodes_kind = CheckedEpisodes


class CheckedRoutingVectorEnv(RoutingVectorEnv):
    """`num_envs` checked processes decoded together; see `CheckedRoutingEnv` and `RoutingVectorEnv`."""

    episodes: CheckedEpisodes
    episodes_kind = CheckedEpisodes

    @property
    def tree(self) -> PrefixTree | None:
        """The tree that is walked; None where all is decoded."""
        return self.episodes.settings.tree
