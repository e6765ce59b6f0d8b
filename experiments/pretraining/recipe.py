"""One embedded model's shape and training."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from envs.tasks.arithmetic import OPERATIONS


@dataclass(frozen=True)
class Recipe:
    """One model's shape and training."""

    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    mlp_size: int
    steps: int
    rows: int = 12  # packed rows a step
    row_tokens: int = 288
    muon_lr: float = 0.02
    adam_lr: float = 0.004
    warmup: float = 0.03  # share of the steps
    second_cycle: int = 0  # steps of a second cosine cycle, stories alone
    second_peak: float = 0.3  # its learning rate, over the first one's
    equations_until: float = 0.7  # share of the steps in which bare equations are mixed in
    equations_share: float = 0.9  # of the examples, at the start; falls to 0 linearly
    operations: str = OPERATIONS  # a specialist sees problems of these alone

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if name == "operations":
                continue  # the task checks them
            if value < 0 or (value == 0 and name not in ("second_cycle", "equations_share")):
                raise ValueError(f"recipe: {name} must be positive, is {value}")
