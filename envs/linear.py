"""Linear layers of frozen models on the CPU, through oneDNN.

PyTorch multiplies float32 matrices with MKL, which runs at half its speed and less on processors that are not Intel's;
oneDNN, which PyTorch carries for other precisions, is fast on all of them. Both round differently in the last bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# oneDNN prepares itself for every new shape, and passes seldom have as many tokens as the one before: below this size of
# the weights that takes longer than it saves.
LEAST_WEIGHTS = 2**18


class OneDnnLinear(nn.Linear):
    """A linear layer whose forward pass is oneDNN's; with gradients it is PyTorch's own."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad):
            return super().forward(input)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")
        return product


def use_onednn(network: nn.Module) -> None:
    """Turn the large float32 linear layers of a network on the CPU into `OneDnnLinear`, in place, weights untouched."""
    if not torch.backends.mkldnn.is_available():
        return
    for module in network.modules():
        if type(module) is nn.Linear and module.weight.numel() >= LEAST_WEIGHTS:
            weight = module.weight
            if weight.device.type == "cpu" and weight.dtype == torch.float32:
                module.__class__ = OneDnnLinear
