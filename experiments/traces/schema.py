"""What a trace holds of every episode: the columns of its file, their types, what they mean."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, NamedTuple

from envs.costs import CONTEXT, PAIRS, PASSES, READ, SECONDS, WRITTEN
from envs.tasks.task import Example

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1
"""The number of this format. A column that is added, goes or changes its meaning makes it another one."""
ROUTED, LLM_ONLY, SPECULATIVE, SEARCH = "routed", "llm_only", "speculative", "search"
CHECKED = "checked"
PROMPT_READERS = "prompt_readers"
"""The setting that names, by number, models that read each prompt because the policy sees their states behind it."""
LEDGER = {
    "passes": PASSES, "read": READ, "context": CONTEXT, "pairs": PAIRS, "written": WRITTEN, "seconds": SECONDS,
}  # fmt: skip
"""The columns of a ledger, by the names that traces have for them."""


class Column(NamedTuple):
    """One column of a trace.

    Attributes:
        name: of it.
        type: of its values, as Arrow names them, in brackets the parts of a struct.
        meaning: of its values.
    """

    name: str
    type: str
    meaning: str


_ENTRY = "struct<passes, read, context, pairs, written, seconds: double>"
COLUMNS = (
    Column("schema", "int16", "the number of this format"),
    Column("environment", "string", "id of the environment whose episodes these are"),
    Column(
        "decoding",
        "string",
        "`routed` by a policy, `checked` where it calls the LLM to check drafts, `llm_only`, `speculative`, or "
        "`search` of the oracle",
    ),
    Column("settings", "string", "JSON: what else decoding depends on, such as `max_new_tokens` and `end_tokens`"),
    Column("hardware", "string", "what ran the models: the kind of CPU that torch computes for, or the GPU"),
    Column("threads", "int32", "of torch"),
    Column("models", "list<string>", "names of the pool's models, SLM first"),
    Column("model_fingerprints", "list<string>", "digests of their weights"),
    Column("profiles", "string", "JSON: the sizes of the models that costs depend on"),
    Column("policy", "string", "what results call the policy, or the baseline"),
    Column("policy_fingerprint", "string", "of its class, settings and weights; null where nobody decided"),
    Column("policy_profile", "string", "JSON: sizes of the policy; null where decisions are no part of the cost"),
    Column("per_response", "bool", "whether the policy decided once, for the whole response"),
    Column("threshold", "double", "the SLM writes where the score is at least this; null where nobody decided"),
    Column("task", "string", "the task's name"),
    Column("split", "string", "of the task"),
    Column("example", "string", "id of the problem"),
    Column("example_hash", "string", "digest of the whole problem: its id, prompt, reference and answer"),
    Column("episode", "int32", "its number; policies that draw do so by it"),
    Column("prompt", "list<int32>", "token ids"),
    Column("response", "list<int32>", "token ids, an end-of-sequence token included"),
    Column("text", "string", "the response as it is judged"),
    Column("writers", "list<int8>", "the number of the model that wrote each token of the response"),
    Column(
        "scores",
        "list<float>",
        "the policy's score at each decision, as compared with the threshold: one a token, of `checked` all in their "
        "order, drafted ends among them; empty: no policy",
    ),
    Column(
        "taken_back",
        "list<struct<position: int32, writer: int8, tokens: list<int32>>>",
        "tokens that were written and taken back, in this order: where in the response they stood, who wrote them",
    ),
    Column("ledger", f"list<{_ENTRY}>", "what each model did; `costs.md` says what is counted"),
    Column("decisions", _ENTRY, "what the policy did: its decisions as passes, and their seconds"),
    Column("correct", "bool", "the verdict of the task"),
    Column("terminated", "bool", "the response ended by itself, not at `max_new_tokens`"),
)
"""All columns, in the order of the file."""


def arrow_schema() -> pa.Schema:
    """The columns as pyarrow has them."""
    import pyarrow as pa

    entry = pa.struct([(name, pa.float64()) for name in LEDGER])
    gone = pa.struct([("position", pa.int32()), ("writer", pa.int8()), ("tokens", pa.list_(pa.int32()))])
    types = {
        "int16": pa.int16(),
        "int32": pa.int32(),
        "double": pa.float64(),
        "bool": pa.bool_(),
        "string": pa.string(),
        "list<string>": pa.list_(pa.string()),
        "list<int32>": pa.list_(pa.int32()),
        "list<int8>": pa.list_(pa.int8()),
        "list<float>": pa.list_(pa.float32()),
        "list<struct<position: int32, writer: int8, tokens: list<int32>>>": pa.list_(gone),
        f"list<{_ENTRY}>": pa.list_(entry),
        _ENTRY: entry,
    }
    return pa.schema([(column.name, types[column.type]) for column in COLUMNS])


def example_hash(example: Example) -> str:
    """A digest of all that an example says, the same in every process; 32 hexadecimal digits."""
    said: list[object] = [example.id, example.prompt, example.reference, example.answer]
    if example.chat is not None:
        said += [example.chat.system, example.chat.options]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]
