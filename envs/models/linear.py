"""Linear layers of frozen models: through oneDNN on the CPU, and with weights of 8-bit integers.

PyTorch multiplies float32 matrices with MKL, which runs at half its speed and less on processors that are not Intel's;
oneDNN, which PyTorch carries for other precisions, is fast on all of them. Both round differently in the last bit.

Weights of 8-bit integers are optimum-quanto's. A pass over one token reads every weight once, so that half the bytes
take about half the time. On the CPU the product is PyTorch's own (`_weight_int8pack_mm`), up to some eight rows faster
than bfloat16's and above slower. Rows do not depend on each other: activations stay as they are, and each output has a
scale of its own.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

# oneDNN prepares itself for every new shape, and hardly two passes have the same number of tokens. So rows are filled
# up to multiples of STEP and read in pieces of PIECE: few shapes, which it keeps.
STEP, PIECE = 32, 1024
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


def can_use_int8() -> bool:
    """Whether optimum-quanto is installed."""
    try:
        return importlib.util.find_spec("optimum.quanto") is not None
    except ModuleNotFoundError:
        return False


def use_int8(network: nn.Module) -> None:
    """Turn the linear layers of a network, but for its head, into such with int8 weights, in place.

    Raises:
        ValueError: it has none.
    """
    from optimum.quanto import freeze, qint8, quantize

    names = _layers(network)
    if not names:
        raise ValueError(f"{type(network).__name__} has no linear layers that int8 weights are for; say weights=null")
    quantize(network, weights=qint8, include=names)
    freeze(network)


def int8_saving(network: nn.Module, dtype: torch.dtype) -> int:
    """Bytes that `use_int8` saves of a network whose weights are of `dtype`; the network may be without memory."""
    layers = [network.get_submodule(name) for name in _layers(network)]
    sizes = [(layer.in_features, layer.out_features) for layer in layers if isinstance(layer, nn.Linear)]
    return sum(inputs * outputs * (dtype.itemsize - 1) - outputs * dtype.itemsize for inputs, outputs in sizes)


def _layers(network: nn.Module) -> list[str]:
    """Paths of the linear layers, but for the head: it often is the table of tokens too."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    return [path for path, module in network.named_modules() if type(module) is nn.Linear and module is not head]
