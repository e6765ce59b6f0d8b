"""The policy gradient where both actions are followed to the end."""

from __future__ import annotations

import torch
from torch import Tensor


def branch_loss(logits: Tensor, advantages: Tensor) -> Tensor:
    """Minus the expected advantage of asking the LLM: its gradient is the all-action policy gradient at branchings.

    Args:
        logits: log-odds that the SLM should write, (n,).
        advantages: outcome below the LLM's branch less that below the SLM's, costs included, (n,).
    """
    return -(torch.sigmoid(-logits) * advantages).mean()
