"""The replay tree: under greedy decoding a prefix and an action always give the same next state, so it is kept.

A node is a prompt and the tokens written after it. It keeps what a router sees there and which token each model
would write, so far as that was asked. Where two models would write the same token, their actions share one child.
"""

from __future__ import annotations

import hashlib
import json
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from envs.arrays import UNKNOWN, IntArray
from envs.decoding.judges import OPINION, Opinions
from envs.decoding.observation import LOGIT_FEATURES
from envs.models.checks import gigabytes
from envs.models.pool import ModelPool, models_manifest
from envs.prefix_tree.tree_file import OPINIONS, Arrays, read_tree
from envs.storage import write_tensors
from envs.tasks.task import Example, Task

FORMAT = "1"
GOING_ON, TERMINATED, TRUNCATED = 0, 1, 2
Integer = TypeVar("Integer", np.int8, np.int32, np.int64)
DIGESTS = 2**14
"""Examples whose digests are kept."""
EVICTED_AT_ONCE = 0.1
"""Share of the nodes that is made free when there is no room left."""


class Walks(Protocol):
    """Walks through a tree that want the states they came by to be kept."""

    def in_flight(self) -> list[tuple[IntArray, int]]:
        """Prompts, and the nodes that stand after them; UNKNOWN for their roots."""


class PrefixTree:
    """Every state that was visited, for one pool of models and one task.

    Nodes stand in arrays that reach to the memory bound from the start; the system gives them memory as they fill.

    Args:
        pool: the models.
        task: whose verdicts on finished answers are kept too.
        max_new_tokens: the longest response; a longer one is truncated.
        memory: bytes the tree may take; beyond it prompts that were not started for longest are forgotten, then those
            states of others that no walk has come by.
        path: a file written by `save` to go on from. Its states are memory-mapped.

    Attributes:
        tokens: the token each model would write, (nodes, models); UNKNOWN where it was not asked.
        children: the node behind each model's token, (nodes, models); UNKNOWN where none was there.
        parents: (nodes,); UNKNOWN at a root.
        depths: tokens of the response, (nodes,).
        ends: GOING_ON, TERMINATED or TRUNCATED, (nodes,).
        verdicts: of finished answers: 1 right, 0 wrong, UNKNOWN, (nodes,).
        judged_for: digest of the example each verdict is for, (nodes,).
        opinions: what each larger model thinks of the SLM's token, (nodes, models - 1, OPINION); UNKNOWN where it has
            not read.

    Raises:
        ValueError: the file was made by other models, another task or other settings, is damaged, or does not fit
            `memory`.
    """

    def __init__(
        self, pool: ModelPool, task: Task, max_new_tokens: int = 128, memory: int = 2**30, path: Path | None = None
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, is {max_new_tokens}")
        self.pool, self.task, self.max_new_tokens, self.memory = pool, task, max_new_tokens, memory
        models, width = len(pool), pool.slm.width + LOGIT_FEATURES
        self.node_bytes = 4 * width + 2 * 4 * models + 3 * 4 + 2 + 8 + 4 * OPINION * (models - 1)
        self.capacity = memory // self.node_bytes
        if self.capacity < max_new_tokens + 1:
            raise ValueError(
                f"a tree of {gigabytes(memory)} holds {self.capacity} states of {self.node_bytes} bytes, one response "
                f"has up to {max_new_tokens + 1}; raise memory"
            )
        self.prompts: dict[int, IntArray] = {}
        self._numbers: dict[bytes, int] = {}
        self._roots: dict[int, int] = {}
        self._pins: dict[int, int] = {}
        self.prompt_states: dict[bytes, dict[int, npt.NDArray[np.float32]]] = {}
        """By prompt, the state behind it of each model other than the SLM that was asked for it; not saved."""
        self.walks: weakref.WeakSet[Walks] = weakref.WeakSet()
        self._used: dict[int, None] = {}  # prompts in the order of their last start
        self._next_prompt = 0
        self.size = 0
        """Nodes ever placed; those in use are fewer after prompts were forgotten."""
        self._free: IntArray = np.zeros(0, dtype=np.int64)
        self.evictions = 0
        """How often prompts were forgotten; a node's number may name another state after that."""
        saved = None if path is None else self._open(path)
        count = 0 if saved is None else len(saved["tokens"])
        self._mapped = torch.zeros(0, width).numpy() if saved is None else saved["features"]
        self._fresh = np.empty((self.capacity - count, width), dtype=np.float32)

        def column(name: str, dtype: type[Integer], *shape: int) -> npt.NDArray[Integer]:
            whole = np.empty((self.capacity, *shape), dtype=dtype)
            if saved is not None:
                whole[:count] = saved[name]
            return whole

        self.tokens = column("tokens", np.int32, models)
        self.children = column("children", np.int32, models)
        self.parents = column("parents", np.int32)
        self.depths = column("depths", np.int32)
        self.prompt_numbers = column("prompt_numbers", np.int32)
        self.ends = column("ends", np.int8)
        self.verdicts = column("verdicts", np.int8)
        self.judged_for = column("judged_for", np.int64)
        self.opinions: Opinions = np.empty((self.capacity, models - 1, OPINION), dtype=np.float32)
        if saved is not None:
            self.opinions[:count] = saved[OPINIONS]
            self.size = count
            offsets = saved["prompt_offsets"]
            for number, root in enumerate(saved["roots"].tolist()):
                self._name_prompt(saved["prompt_tokens"][offsets[number] : offsets[number + 1]], root)

    def __deepcopy__(self, memo: object) -> PrefixTree:
        """The tree itself: Gymnasium copies the arguments an environment was made with."""
        return self

    def __reduce__(self) -> tuple[type[PrefixTree], tuple[object, ...]]:
        """How a tree travels to another process: as an empty one of the same settings, that decodes the same states."""
        return type(self), (self.pool, self.task, self.max_new_tokens, self.memory)

    def __len__(self) -> int:
        """Nodes in use."""
        return self.size - len(self._free)

    @property
    def manifest(self) -> dict[str, Any]:
        """What made the tree."""
        return {
            "format": FORMAT,
            "models": models_manifest(self.pool),
            "task": self.task.name,
            "max_new_tokens": self.max_new_tokens,
        }

    def root(self, prompt: IntArray) -> int:
        """The node of a prompt, or UNKNOWN."""
        number = self._numbers.get(prompt.tobytes())
        return UNKNOWN if number is None else self._roots[number]

    def prompt(self, node: int) -> IntArray:
        """The prompt a node stands behind."""
        return self.prompts[int(self.prompt_numbers[node])]

    def features(self, nodes: IntArray) -> npt.NDArray[np.float32]:
        """The SLM's hidden state and logit features at nodes that have not terminated: float32, (n, width)."""
        mapped = len(self._mapped)
        if not mapped or (nodes >= mapped).all():
            return self._fresh.take(nodes - mapped, axis=0)
        features = np.empty((len(nodes), self._mapped.shape[1]), dtype=np.float32)
        old = nodes < mapped
        features[old], features[~old] = self._mapped[nodes[old]], self._fresh[nodes[~old] - mapped]
        return features

    def add_root(self, prompt: IntArray, features: npt.NDArray[np.float32], slm_token: int) -> int:
        """Place the state after a prompt: features (width,), and the token the SLM would write."""
        node = self._place(1)
        self._name_prompt(prompt, int(node[0]))
        self.parents[node], self.depths[node], self.ends[node] = UNKNOWN, 0, GOING_ON
        self.prompt_numbers[node] = self._numbers[prompt.tobytes()]
        self._fill(node, features[None], np.array([slm_token]))
        return int(node[0])

    def add(
        self,
        parents: IntArray,
        actions: IntArray,
        tokens: IntArray,
        ends: npt.NDArray[np.int8],
        features: npt.NDArray[np.float32],
        slm_tokens: IntArray,
    ) -> IntArray:
        """Place what n decisions led to; a decision that writes what another model writes there shares its child.

        Args:
            parents: nodes, (n,); the same one at most once with the same token.
            actions: the model that wrote, (n,).
            tokens: what it wrote, (n,).
            ends: GOING_ON, TERMINATED or TRUNCATED, (n,).
            features: of the new states, (n, width); of those that terminated they do not matter.
            slm_tokens: what the SLM would write next, (n,).

        Returns:
            The nodes, (n,).
        """
        nodes = self._place(len(parents))
        self.parents[nodes], self.depths[nodes] = parents, self.depths[parents] + 1
        self.prompt_numbers[nodes], self.ends[nodes] = self.prompt_numbers[parents], ends
        self._fill(nodes, features, slm_tokens)
        self.tokens[parents, actions] = tokens
        same = self.tokens[parents] == tokens[:, None]
        rows, models = np.nonzero(same)
        self.children[parents[rows], models] = nodes[rows]
        return nodes

    def learn_tokens(self, nodes: IntArray, models: IntArray, tokens: IntArray) -> None:
        """Keep what models would write at nodes, (n,) each; one that writes what another does shares its child."""
        self.tokens[nodes, models] = tokens
        same = self.tokens[nodes] == tokens[:, None]
        self.children[nodes, models] = np.where(same, self.children[nodes], UNKNOWN).max(-1)

    def learn_opinions(self, nodes: IntArray, model: int, opinions: Opinions) -> None:
        """Keep what a model thinks of the SLM's token at nodes, (n, OPINION); what is known stays."""
        new = self.opinions[nodes, model - 1, 0] == UNKNOWN
        self.opinions[nodes[new], model - 1] = opinions[new]

    def path(self, node: int) -> IntArray:
        """Nodes from the root to `node`, both included."""
        nodes = np.empty(int(self.depths[node]) + 1, dtype=np.int64)
        for depth in range(len(nodes) - 1, -1, -1):
            nodes[depth] = node
            node = int(self.parents[node])
        return nodes

    def correct(self, node: int, example: Example) -> bool:
        """Whether the answer that ends at `node` is right for `example`, judged once.

        Examples may share a prompt, and an example may be corrected: a verdict holds for the example it was made for.
        """
        judged_for = _digest(example)
        if self.verdicts[node] == UNKNOWN or self.judged_for[node] != judged_for:
            text = self.pool.decode(self.written(self.path(node)))
            self.verdicts[node], self.judged_for[node] = self.task.is_correct(example, text), judged_for
        return bool(self.verdicts[node])

    def descend(self, prompt: IntArray, tokens: IntArray) -> IntArray:
        """The states of a response that was walked, from the prompt on, (n + 1,); tokens (n,).

        Raises:
            ValueError: it was not.
        """
        nodes = [self.root(prompt)]
        for token in tokens:
            node, same = nodes[-1], self.tokens[nodes[-1]] == token
            known = node != UNKNOWN and same.any()
            nodes.append(int(self.children[node, same.argmax()]) if known else UNKNOWN)
        if UNKNOWN in nodes:
            raise ValueError("the tree does not know this response; walk it first")
        return np.array(nodes)

    def written(self, path: IntArray) -> IntArray:
        """The tokens along a path of nodes from parent to child, (nodes - 1,)."""
        parents, nodes = path[:-1], path[1:]
        action = (self.children[parents] == nodes[:, None]).argmax(-1)
        return np.asarray(self.tokens[parents, action], dtype=np.int64)

    def use(self, prompt: IntArray) -> None:
        """Note that a prompt was started."""
        number = self._numbers[prompt.tobytes()]
        self._used.pop(number)
        self._used[number] = None

    def pin(self, prompt: IntArray) -> None:
        """Start a prompt, none of whose states is forgotten before `release`."""
        self.use(prompt)
        number = self._numbers[prompt.tobytes()]
        self._pins[number] = self._pins.get(number, 0) + 1

    def release(self, prompt: IntArray) -> None:
        """Take back a `pin`."""
        self._pins[self._numbers[prompt.tobytes()]] -= 1

    def save(self, path: Path) -> None:
        """Write all nodes in use to a safetensors file, whole or not at all."""
        kept = np.setdiff1d(np.arange(self.size), self._free)
        renumbered = np.full(self.size + 1, UNKNOWN, dtype=np.int32)  # the last entry is that of UNKNOWN
        renumbered[kept], numbers = np.arange(len(kept)), sorted(self.prompts)
        of_prompt = np.zeros(self._next_prompt, dtype=np.int32)
        of_prompt[numbers] = np.arange(len(numbers))
        prompts = [self.prompts[number] for number in numbers]
        arrays: dict[str, npt.NDArray[Any]] = {
            "features": self.features(kept),
            "tokens": self.tokens[kept],
            "children": renumbered[self.children[kept]],
            "parents": renumbered[self.parents[kept]],
            "depths": self.depths[kept],
            "prompt_numbers": of_prompt[self.prompt_numbers[kept]],
            "ends": self.ends[kept],
            "verdicts": self.verdicts[kept],
            "judged_for": self.judged_for[kept],
            OPINIONS: self.opinions[kept],
            "roots": renumbered[[self._roots[number] for number in numbers]],
            "prompt_tokens": np.concatenate([np.zeros(0, dtype=np.int64), *prompts]),
            "prompt_offsets": np.cumsum([0, *(len(prompt) for prompt in prompts)]),
        }
        write_tensors(
            path,
            {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()},
            {"manifest": json.dumps(self.manifest)},
        )

    def _open(self, path: Path) -> Arrays:
        width = self.pool.slm.width + LOGIT_FEATURES
        vocabulary = max(model.vocab_size for model in self.pool.models)
        saved = read_tree(path, self.manifest, width, len(self.pool), vocabulary)
        count = len(saved["tokens"])
        if count > self.capacity:
            raise ValueError(
                f"{path} holds {count} states of {self.node_bytes} bytes, {gigabytes(count * self.node_bytes)}; the "
                f"tree's memory is {gigabytes(self.memory)}: raise memory"
            )
        return saved

    def _name_prompt(self, prompt: IntArray, root: int) -> None:
        number = self._next_prompt
        self._next_prompt += 1
        self.prompts[number] = np.array(prompt, dtype=np.int64)
        self._numbers[self.prompts[number].tobytes()] = number
        self._roots[number] = root
        self._used[number] = None

    def _fill(self, nodes: IntArray, features: npt.NDArray[np.float32], slm_tokens: IntArray) -> None:
        mapped = len(self._mapped)
        old = nodes < mapped
        self._mapped[nodes[old]], self._fresh[nodes[~old] - mapped] = features[old], features[~old]
        self.tokens[nodes], self.children[nodes], self.verdicts[nodes] = UNKNOWN, UNKNOWN, UNKNOWN
        self.judged_for[nodes], self.opinions[nodes] = 0, UNKNOWN
        self.tokens[nodes, 0] = slm_tokens

    def _place(self, count: int) -> IntArray:
        """Room for `count` nodes."""
        if self.size + count - len(self._free) > self.capacity:
            self._evict(count)
        taken, self._free = self._free[:count], self._free[count:]
        new = np.arange(self.size, self.size + count - len(taken))
        self.size += len(new)
        return np.concatenate([taken, new])

    def _evict(self, count: int) -> None:
        """Forget prompts until `count` nodes and some more are free, then what no walk has come by.

        Example: of prompts 1, 2, 3, started in this order, a walk stands at a node of prompt 2. Prompt 1 is forgotten
        whole, then 3; if that does not do, of prompt 2 all but the path to the node where the walk stands. A pinned
        prompt keeps all its nodes.
        """
        wanted = max(count, int(EVICTED_AT_ONCE * self.capacity))
        standing = self._standing()
        in_use = np.setdiff1d(np.arange(self.size), self._free)
        numbers = self.prompt_numbers[in_use]
        sizes = np.bincount(numbers, minlength=self._next_prompt)
        victims, freed = [], self.capacity - len(self)
        for number in self._used:
            if freed >= wanted:
                break
            if number not in standing and not self._pins.get(number):
                victims.append(number)
                freed += int(sizes[number])
        lost, kept = np.isin(numbers, victims), np.zeros(0, dtype=np.int64)
        if freed < wanted:
            pruned = [number for number in standing if not self._pins.get(number)]
            kept = np.unique(np.concatenate([kept, *(self.path(node) for n in pruned for node in standing[n])]))
            lost |= np.isin(numbers, pruned) & ~np.isin(in_use, kept)
        self._forget(victims, in_use[lost], kept, count)

    def _standing(self) -> dict[int, list[int]]:
        """The nodes at which walks stand, by the numbers of their prompts."""
        standing: dict[int, list[int]] = {}
        for prompt, node in (flight for walks in self.walks for flight in walks.in_flight()):
            number = self._numbers.get(prompt.tobytes())
            if number is not None:
                standing.setdefault(number, []).append(self._roots[number] if node == UNKNOWN else node)
        return standing

    def _forget(self, prompts: list[int], nodes: IntArray, parents: IntArray, count: int) -> None:
        """Free nodes, (n,), and whole prompts; `parents` may have children among the nodes. `count` must be free."""
        if self.capacity - len(self) + len(nodes) < count:
            raise ValueError(
                f"the tree's memory of {gigabytes(self.memory)} holds {self.capacity} states, and the responses in "
                "flight need more; raise memory or lower the rows"
            )
        for number in prompts:
            prompt = self.prompts.pop(number).tobytes()
            del self._numbers[prompt], self._roots[number], self._used[number]
            self.prompt_states.pop(prompt, None)
            self._pins.pop(number, None)
        children = self.children[parents]
        self.children[parents] = np.where(np.isin(children, nodes), UNKNOWN, children)
        self._free = np.concatenate([self._free, nodes])
        self.evictions += 1


@lru_cache(DIGESTS)
def _digest(example: Example) -> int:
    """A number for all that an example says, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(example).encode(), digest_size=8).digest(), "little", signed=True)
