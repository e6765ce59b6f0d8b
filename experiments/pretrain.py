"""Train the embedded models from scratch: the recipe behind `envs/weights`.

    python -m experiments.pretrain                    # all of them, about an hour on 2 idle cores
    python -m experiments.pretrain only=[slm,llm]     # the pair alone, about 25 minutes

Everything is drawn from `seed`; steps, not minutes, are fixed, so that the result does not depend on the machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig


@program("pretrain", Continuing(may_differ=("only", "folder", "first_cycle")))
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Train the models of `config.recipes`."""
    from envs.tasks.arithmetic import ArithmeticTask
    from experiments.pretraining.loop import pretrain
    from experiments.pretraining.recipe import Recipe
    from experiments.pretraining.tokenizer import train_tokenizer

    recipes = {str(name): Recipe(**node) for name, node in config.recipes.items()}
    unknown = set(config.only or []) - set(recipes)
    if unknown:
        raise ValueError(f"only: unknown models {', '.join(sorted(unknown))}; the recipes are {', '.join(recipes)}")
    begin()
    task = ArithmeticTask()
    texts = (f"{e.prompt}{e.reference}" for e in (task.example("train", i) for i in range(config.tokenizer_examples)))
    tokenizer = train_tokenizer(texts, config.vocab_size)
    for name in config.only or recipes:
        first = None if config.first_cycle is None else Path(config.first_cycle)
        task = ArithmeticTask(operations=recipes[name].operations)
        print(name, pretrain(name, recipes[name], task, tokenizer, config.seed, Path(config.folder), first))


if __name__ == "__main__":
    main()
