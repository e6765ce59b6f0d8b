"""Linear layers of frozen models: through oneDNN on the CPU, and with weights of 8-bit or 4-bit integers.

PyTorch multiplies float32 matrices with MKL, which runs at half its speed and less on processors that are not Intel's;
oneDNN, which PyTorch carries for other precisions, is fast on all of them. Both round differently in the last bit.

Weights of integers are optimum-quanto's. A pass over one token reads every weight once, so that half the bytes take
about half the time. The products are PyTorch's own (`_weight_int8pack_mm`, `_weight_int4pack_mm`), on the CPU faster
than bfloat16's up to some eight rows and slower above. Rows do not depend on each other: activations stay as they are.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# oneDNN prepares itself for every new shape, and hardly two passes have the same number of tokens. So rows are filled
# up to multiples of STEP and read in pieces of PIECE: few shapes, which it keeps.
STEP, PIECE = 32, 1024
# Weights of 4 bits that share a scale and a shift: the one number for which optimum-quanto has a fast product.
GROUP = 128
# Outputs that the product packs together.
PACK = 16
NO_LAYERS = "has no linear layers that {weights} weights are for; say weights=null"
# Small products are not worth the detour: weights below the one with rows below the other.
FEW_WEIGHTS, FEW_ROWS = 2**18, 256


class OneDnnLinear(nn.Linear):
    """A linear layer whose forward pass is oneDNN's; with gradients it is PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return super().forward(input)
        rows = input.numel() // self.in_features
        if rows < FEW_ROWS and self.weight.numel() < FEW_WEIGHTS:
            return super().forward(input)
        flat = input.reshape(rows, self.in_features)
        if rows > STEP and rows % STEP:
            flat = pad(flat, (0, 0, 0, -rows % STEP))
        pieces = [self._product(piece) for piece in flat.split(PIECE)] if rows > PIECE else [self._product(flat)]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        return whole[:rows].view(*input.shape[:-1], self.out_features)

    def _product(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self.weight, self.bias, "none", [], "")
        return product


def use_onednn(network: nn.Module) -> None:
    """Turn the float32 linear layers of a network on the CPU into `OneDnnLinear`, in place, weights untouched."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in network.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and module.weight.dtype == torch.float32:
            module.__class__ = OneDnnLinear


def can_quantise() -> bool:
    """Whether optimum-quanto is installed."""
    try:
        return importlib.util.find_spec("optimum.quanto") is not None
    except ModuleNotFoundError:
        return False


def quantise(network: nn.Module, weights: str) -> None:
    """Turn linear layers of a network, but for its head, into such with weights of integers, in place.

    Args:
        network: on the device it stays on, in half precision.
        weights: `int8`, a scale for each output; or `int4`, a scale and a shift for each GROUP weights of an output, in
            layers whose inputs come in such groups.

    Raises:
        ValueError: it has none.
    """
    from optimum.quanto import freeze, qtypes, quantize

    names = list(_layers(network, weights))
    if not names:
        raise ValueError(f"{type(network).__name__} {NO_LAYERS.format(weights=weights)}")
    quantize(network, weights=qtypes[f"q{weights}"], include=names)
    freeze(network)


def quantised_saving(network: nn.Module, weights: str, dtype: torch.dtype) -> int:
    """Bytes that `quantise` saves of a network in `dtype`, 0 where it has no such layers; it may be without memory."""
    saved = 0.0
    for layer in _layers(network, weights).values():
        inputs, outputs = layer.in_features, layer.out_features
        scales, size = (outputs, 1.0) if weights == "int8" else (2 * outputs * inputs // GROUP, 0.5)
        saved += inputs * outputs * (dtype.itemsize - size) - scales * dtype.itemsize
    return int(saved)


def _layers(network: nn.Module, weights: str) -> dict[str, nn.Linear]:
    """Linear layers by their paths, but for the head: it often is the table of tokens too."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    linear = {path: m for path, m in network.named_modules() if type(m) is nn.Linear and m is not head}
    if weights == "int8":
        return linear
    return {path: m for path, m in linear.items() if m.in_features % GROUP == 0 and m.out_features % PACK == 0}
