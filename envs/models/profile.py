"""What a pass of a network reads: its weights, tensor by tensor, and what its cache keeps of a token.

Weights are parameters, and buffers that are saved with them (GPTQ and AWQ keep theirs there). They are counted as a
pass over one token reads them at best:

- Tables that are looked up (of tokens, positions) are not counted: a pass reads a row of them.
- Of n experts that a router chooses k of, k / n are counted. Which ones a token takes does not matter, since they are
  alike; but a pass over several tokens, or rows, reads up to n of them, and how many cannot be told beforehand. Such a
  pass is charged too little.
- A weight of which a module keeps a packed form, in integers, has as many elements as the module says
  (`in_features` x `out_features`), and as many bytes as the packed form.
- A tensor that stands for others (`optimum-quanto`, `torchao`) has as many bytes as these.
- What a module keeps besides parameters and buffers (the scales of bitsandbytes) cannot be seen.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from envs.costs import ModelProfile
from envs.models.checks import head_size, text_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What modules and configurations call the number of experts a token goes through.
TOP_K = ("top_k", "num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
# How far above its experts a router is looked for: the block, and the layer.
NEAR = 2


@dataclass(frozen=True)
class Weight:
    """A tensor of weights.

    Attributes:
        path: where it stands in the network.
        key: the same for tensors that are one in memory.
        elements: numbers it stands for.
        size: bytes it takes.
        table: it is looked up.
        matrix: it has two dimensions or more.
    """

    path: str
    key: object
    elements: int
    size: int
    table: bool
    matrix: bool


def weights_of(network: nn.Module) -> Iterator[Weight]:
    """Every tensor of weights of a network, each once."""
    known = set()
    for path, module in network.named_modules():
        own = dict(own_weights(module))
        unpacked = _unpacked_elements(module)
        integers = [name for name, tensor in own.items() if unpacked and not tensor.is_floating_point()]
        packed = max(integers, key=lambda name: own[name].nbytes, default=None)
        for name, tensor in own.items():
            key = memory_key(tensor)
            if key in known:
                continue
            known.add(key)
            elements = tensor.numel()
            if packed is not None and name != "bias":
                # scales and zero points belong to the packed weight
                elements = unpacked if name == packed else 0
            yield Weight(
                path=f"{path}.{name}",
                key=key,
                elements=elements,
                size=sum(part.nbytes for part in stored(tensor)),
                table=isinstance(module, nn.Embedding),
                matrix=tensor.dim() > 1,
            )


def _unpacked_elements(module: nn.Module) -> int:
    """Elements of the weight of a linear layer, by what the layer says of itself; 0 for other modules."""
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return inputs * outputs if isinstance(inputs, int) and isinstance(outputs, int) else 0


def own_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters of a module itself, and its buffers that are weights: saved, and neither masks nor single numbers."""
    yield from module.named_parameters(recurse=False)
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set and buffer.dtype != torch.bool and buffer.dim() > 0:
            yield name, buffer


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors in memory behind one: itself, or those that it stands for."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from stored(getattr(tensor, name))
    else:
        yield tensor


def memory_key(tensor: Tensor) -> object:
    """The same for tensors that are one in memory."""
    tensor = next(stored(tensor))
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.data_ptr() else id(tensor)


def profile_of(name: str, network: PreTrainedModel) -> ModelProfile:
    """The sizes that costs depend on; makes one pass over one token to see what the cache keeps of it.

    Args:
        name: the model's name.
        network: a causal language model, on any device.

    Warns:
        UserWarning: experts are laid out in a way that is not known, or do not say how many of them a token goes
            through: all of them are charged, which is the most a pass can read.
    """
    head = memory_key(network.get_output_embeddings().weight)
    shares = expert_shares(network)
    elements = size = Fraction(0)
    head_elements = 0
    unknown = set()
    for weight in weights_of(network):
        if weight.key == head:
            head_elements = weight.elements
            size += weight.size
        elif not weight.table:
            share = next((s for path, s in shares.items() if weight.path.startswith(f"{path}.")), None)
            if share is None and weight.matrix and _looks_like_expert(weight.path):
                unknown.add(weight.path.rpartition(".")[0])
            elements += weight.elements * (share or 1)
            size += weight.size * (share or 1)
    if unknown:
        warnings.warn(
            f"{name}: how many of its experts a token goes through cannot be told ({min(unknown)}); its costs count "
            "all of them, the most a pass can read",
            stacklevel=2,
        )
    config = text_config(network.config)
    total = round(elements) + head_elements
    return ModelProfile(
        name=name,
        body_parameters=round(elements),
        head_parameters=head_elements,
        bytes_per_parameter=round(size) / total,
        kv_bytes_per_token=sum(store.nbytes for store in cached_token(network)),
        attention_width=attention_width(config),
        weight_bytes=round(size),
    )


def expert_shares(network: nn.Module) -> dict[str, Fraction]:
    """The share of its weights a token reads, for each module of a network that holds experts, by its path."""
    shares: dict[str, Fraction] = {}
    for path, module in network.named_modules():
        if any(path.startswith(f"{outer}.") for outer in shares):
            continue
        count = _experts_in(path, module)
        chosen = None if count is None else _top_k(network, path)
        if count is not None and chosen is not None:
            shares[path] = Fraction(min(chosen, count), count)
    return shares


def _experts_in(path: str, module: nn.Module) -> int | None:
    """How many experts a module holds, one beside the other, or stacked in tensors of three dimensions."""
    if isinstance(module, nn.ModuleList):
        return len(module) if path.rpartition(".")[2] == "experts" and len(module) > 1 else None
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int) or count < 2:
        return None
    stacked = any(tensor.dim() > 2 and len(tensor) == count for _, tensor in own_weights(module))
    return count if stacked else None


def _top_k(network: nn.Module, path: str) -> int | None:
    """How many experts a token goes through: what the router nearest to them says, else the configuration."""
    above = path
    for _ in range(NEAR):
        above = above.rpartition(".")[0]
        for module in network.get_submodule(above).modules():
            chosen = next((getattr(module, key) for key in TOP_K if isinstance(getattr(module, key, None), int)), None)
            if chosen:
                return int(chosen)
    config = text_config(network.config)
    return next((int(getattr(config, key)) for key in TOP_K if isinstance(getattr(config, key, None), int)), None)


def _looks_like_expert(path: str) -> bool:
    """Whether a weight's path says that it is one of experts among which a router chooses."""
    return "expert" in path and not any(word in path for word in ("shared_expert", "gate.", "router."))


@torch.inference_mode()
def cached_token(network: PreTrainedModel) -> list[Tensor]:
    """What a cache keeps of one token: the keys and values of every layer, as the network hands them over.

    Groups of heads, single heads and latent vectors are as they are, whatever the configuration calls them. Works on
    networks without memory (device `meta`) too.
    """
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    device = network.get_input_embeddings().weight.device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    network(
        input_ids=token,
        position_ids=token,
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    stores: list[Any] = [store for layer in cache.layers for store in (layer.keys, layer.values)]
    return [store for store in stores if store is not None]


def attention_width(config: Any) -> int:
    """Query heads x their size x layers; the mean of key and value sizes where these differ (latent attention)."""
    key = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    value = getattr(config, "v_head_dim", None)
    size = math.ceil((key + value) / 2) if key and value else head_size(config)
    return int(config.num_hidden_layers * config.num_attention_heads * size)
