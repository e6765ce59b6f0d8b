"""Linear layers of frozen models on the CPU, through oneDNN.

PyTorch multiplies float32 matrices with MKL, which runs at half its speed and less on processors that are not Intel's;
oneDNN, which PyTorch carries for other precisions, is fast on all of them. Both round differently in the last bit.
"""

from __future__ import annotations

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
