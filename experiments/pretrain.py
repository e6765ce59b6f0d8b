"""Train the embedded models from scratch: the recipe behind `envs/weights`.

    python -m experiments.pretrain                    # all of them, about an hour on 2 idle cores
    python -m experiments.pretrain only=[slm,llm]     # the pair alone, about 25 minutes

Everything is drawn from `seed`; steps, not minutes, are fixed, so that the result does not depend on the machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from envs.storage import write_text
from envs.tasks.arithmetic import LEVELS, OPERATIONS, ArithmeticTask
from experiments.common.config import program

SECOND_CYCLE_FROM = 500_000
END, PAD = "<|end|>", "<|pad|>"


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


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every digit is a token of its own, so that arithmetic has one spelling."""
    bpe = Tokenizer(models.BPE())
    pieces = Regex(r" [-+*/=] |\n#### | ?\p{L}+|\d|[^\s\p{L}\d]+|\s")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pieces, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=PAD)


def packed_batches(
    task: ArithmeticTask, tokenizer: PreTrainedTokenizerFast, recipe: Recipe, seed: int, cycle: int = 1
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yields input ids, position ids, document ids and labels, each (rows, row_tokens).

    Documents never span rows; a label is -100 on prompts and padding, so that only responses are learned. The second
    cycle goes on with problems the first has not reached.
    """
    rng = np.random.default_rng([seed, cycle])
    index = SECOND_CYCLE_FROM * (cycle - 1)
    for step in range(recipe.steps if cycle == 1 else recipe.second_cycle):
        bare = (recipe.equations_share if cycle == 1 else 0.0) * max(
            0.0, 1 - step / (recipe.equations_until * recipe.steps)
        )
        shape = (recipe.rows, recipe.row_tokens)
        ids = np.full(shape, tokenizer.pad_token_id)
        positions, documents = np.zeros(shape, int), np.full(shape, -1)
        labels = np.full(shape, -100)
        for row in range(recipe.rows):
            filled = document = 0
            while True:
                if rng.random() < bare:
                    prompt, response = _bare_equation(LEVELS["default"].largest, rng, task.operations)
                else:
                    example = task.example("train", index)
                    prompt, response = example.prompt, example.reference
                    index += 1
                head = tokenizer.encode(prompt)
                body = [*tokenizer.encode(response), tokenizer.eos_token_id]
                length = len(head) + len(body)
                if filled + length > recipe.row_tokens:
                    break
                span = slice(filled, filled + length)
                ids[row, span], documents[row, span] = head + body, document
                positions[row, span] = np.arange(length)
                # the label of a position is the token that follows it
                labels[row, filled + len(head) - 1 : filled + length - 1] = body
                filled, document = filled + length, document + 1
        yield tuple(torch.from_numpy(array) for array in (ids, positions, documents, labels))  # type: ignore[misc]


def _bare_equation(largest: int, rng: np.random.Generator, operations: str) -> tuple[str, str]:
    """An equation as solutions write it, the loss on its result alone: many more of them fit a row than stories do."""
    sign = str(rng.choice(list(operations)))
    if sign in "+-":
        left, right = sorted(int(n) for n in rng.integers(0, largest + 1, size=2))
        left, right, result = (left, right - left, right) if sign == "+" else (right, right - left, left)
    else:
        factor = int(rng.integers(2, 10))
        other = int(rng.integers(1, largest // factor + 1))
        left, right, result = (other, factor, other * factor) if sign == "*" else (other * factor, factor, other)
    return f" {left} {sign} {right} = ", f"{result}"


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised by Newton-Schulz iterations (Jordan et al. 2024), for matrices."""

    def __init__(self, parameters: list[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                rows, columns = update.shape
                parameter.add_(orthogonalised(update), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """An approximation of U V^T, where matrix = U S V^T (quintic Newton-Schulz)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix / (matrix.norm() + 1e-7)
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(iterations):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    result: Tensor = wide if x.shape[0] <= x.shape[1] else wide.T
    return result


def pretrain(
    name: str,
    recipe: Recipe,
    task: ArithmeticTask,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    folder: Path,
    first_cycle: Path | None = None,
) -> dict[str, float]:
    """Train one model and save it in half precision to `folder/name`; returns what was measured.

    Args:
        name: of the model.
        recipe: its shape and training.
        task: where problems come from.
        tokenizer: shared by the models.
        seed: of initialisation and data.
        folder: where the model is saved.
        first_cycle: a folder with a model whose first cycle is done; only the second is run then.
    """
    torch.manual_seed(seed)
    log: list[dict[str, float]] = []
    if first_cycle is None:
        network = new_network(recipe, tokenizer)
        log += train_cycle(network, recipe, task, tokenizer, seed, 1, name)
    else:
        network = LlamaForCausalLM.from_pretrained(first_cycle / name, dtype=torch.float32)
        log += json.loads((first_cycle / name / "training.json").read_text())["log"]
    if recipe.second_cycle:
        log += train_cycle(network, recipe, task, tokenizer, seed, 2, name)
    target = folder / name
    network.to(torch.float16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    steps = recipe.steps + recipe.second_cycle
    report: dict[str, float] = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "tokens": steps * recipe.rows * recipe.row_tokens,
        "loss": log[-1]["loss"],
    }
    record = {"recipe": asdict(recipe), "seed": seed, "result": report, "log": log}
    write_text(target / "training.json", json.dumps(record, indent=1) + "\n")
    return report


def new_network(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the recipe's shape, initialised from torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=recipe.hidden_size,
            intermediate_size=recipe.mlp_size,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.kv_heads,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
    )


def train_cycle(
    network: LlamaForCausalLM,
    recipe: Recipe,
    task: ArithmeticTask,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    cycle: int,
    name: str,
) -> list[dict[str, float]]:
    """One cosine cycle with fresh optimizers, in place; returns a log of step and smoothed loss."""
    matrices = [p for n, p in network.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in network.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, lr=recipe.muon_lr),
        torch.optim.AdamW(others, lr=recipe.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    steps, peak = (recipe.steps, 1.0) if cycle == 1 else (recipe.second_cycle, recipe.second_peak)
    peaks = [peak * recipe.muon_lr, peak * recipe.adam_lr]

    def loss_of(ids: Tensor, positions: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        logits = network(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)

    compiled = torch.compile(loss_of)
    causal = torch.tril(torch.ones(recipe.row_tokens, recipe.row_tokens, dtype=torch.bool))
    loss_mean = math.nan
    log: list[dict[str, float]] = []
    batches = packed_batches(task, tokenizer, recipe, seed, cycle)
    with tqdm(batches, total=steps, desc=f"pretrain {name}, cycle {cycle}", mininterval=5) as progress:
        for step, (ids, positions, documents, labels) in enumerate(progress):
            mask = (causal & (documents[:, :, None] == documents[:, None, :]))[:, None]
            loss = compiled(ids, positions, mask, labels)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"pretrain {name}: loss is {loss.item()} at step {step}; lower the lr")
            loss.backward()
            warm = min(1.0, (step + 1) / (recipe.warmup * steps))
            scale = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            for optimizer, peak_lr in zip(optimizers, peaks, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak_lr * scale
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            value = loss.item()
            loss_mean = value if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * value
            if step % 50 == 49 or step == steps - 1:
                progress.set_postfix(loss=f"{loss_mean:.4f}")
                log.append({"cycle": cycle, "step": step + 1, "loss": round(loss_mean, 5)})
    return log


@program("pretrain")
def main(config: DictConfig, folder: Path) -> None:
    """Train the models of `config.recipes`."""
    recipes = {str(name): Recipe(**node) for name, node in config.recipes.items()}
    task = ArithmeticTask()
    texts = (f"{e.prompt}{e.reference}" for e in (task.example("train", i) for i in range(config.tokenizer_examples)))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    unknown = set(config.only or []) - set(recipes)
    if unknown:
        raise ValueError(f"only: unknown models {', '.join(sorted(unknown))}; the recipes are {', '.join(recipes)}")
    for name in config.only or recipes:
        first = None if config.first_cycle is None else Path(config.first_cycle)
        task = ArithmeticTask(operations=recipes[name].operations)
        print(name, pretrain(name, recipes[name], task, tokenizer, config.seed, Path(config.folder), first))


if __name__ == "__main__":
    main()
