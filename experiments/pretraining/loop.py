"""The training loop of one embedded model."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from envs.progress import ProgressBar
from envs.storage import write_text
from envs.tasks.arithmetic import ArithmeticTask
from experiments.pretraining.batches import packed_batches
from experiments.pretraining.muon import Muon
from experiments.pretraining.recipe import Recipe


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
    with ProgressBar(batches, total=steps, desc=f"pretrain {name}, cycle {cycle}", mininterval=5) as progress:
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
