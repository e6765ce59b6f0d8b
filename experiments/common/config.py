"""From configurations to objects: the only code that knows both Hydra and the packages below.

A yaml names the dataclass or function it configures in its defaults list, `- /schema@_here_: agents.citer.Citer`, and
states what it departs from. The signature becomes the schema, so that every setting can be overridden on the command
line, and a misspelt key or a wrong type is an error that names the key before anything runs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import hydra
import numpy as np
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra_zen import builds
from hydra_zen import instantiate as zen_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import experiments.common.job_names  # noqa: F401 (the names of folders are resolved by it)
from envs.storage import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

CONF = Path(__file__).parents[2] / "conf"
Settings = TypeVar("Settings", bound="DataclassInstance")
_SCHEMA = re.compile(r"^\s*- /schema@\S+: (\S+)\s*$", re.MULTILINE)

_FULL_KEY = re.compile(r"^full_key: (\S+)$", re.MULTILINE)


def register_schemas() -> None:
    """Make a schema of every class or function that a yaml under `conf` names as one."""
    store = ConfigStore.instance()
    targets = {target for path in CONF.rglob("*.yaml") for target in _SCHEMA.findall(path.read_text())}
    for target in sorted(targets):
        store.store(group="schema", name=target, node=schema_of(hydra.utils.get_object(target)))


def schema_of(target: Any) -> Any:
    """A structured config of a signature; settings that are dataclasses themselves become nested schemas."""
    nested = {
        name: schema_of(field.default_factory)
        for name, field in getattr(target, "__dataclass_fields__", {}).items()
        if field.init and hasattr(field.default_factory, "__dataclass_fields__")
    }
    # plain lists and dicts: OmegaConf's would wrap the objects that are built inside them
    return builds(target, populate_full_signature=True, hydra_convert="all", **nested)


def build(config: DictConfig, key: str) -> Any:
    """The object that `config[key]` describes.

    Raises:
        ValueError: a setting is unknown, missing or out of range; the error names it.
    """
    try:
        return zen_instantiate(config[key])
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__
        raise ValueError(f"{key}: {cause if isinstance(cause, (ValueError, TypeError)) else error}") from error


def build_settings(config: DictConfig, settings: type[Settings]) -> Settings:
    """The settings whose keys stand in `config`, where other keys may stand beside them.

    Args:
        config: of a program, or a part of it.
        settings: a dataclass; keys that are not there have its defaults.

    Raises:
        ValueError: a setting is of a wrong type or out of range; the error names it.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    given = {field.name: plain[field.name] for field in fields(settings) if field.name in plain}
    try:
        built: Settings = zen_instantiate(OmegaConf.merge(OmegaConf.structured(schema_of(settings)), given))
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key or error.key}: {f'{error}'.splitlines()[0]}") from error
    except HydraException as error:
        # the dataclass says what is wrong with a setting of its own; of one inside it Hydra says which one it is
        inside = _FULL_KEY.search(f"{error}")
        raise ValueError(f"{inside[1] + ': ' if inside else ''}{error.__cause__ or error}") from error
    return built


def prepare(config: DictConfig, folder: Path) -> None:
    """What every run begins with: `config.yaml` in its folder, threads, and the seed of libraries."""
    write_text(folder / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    if config.get("threads"):
        torch.set_num_threads(config.threads)
    # libraries that draw from the global generators repeat too; our own code is given generators
    torch.manual_seed(config.get("seed", 0))
    np.random.seed(config.get("seed", 0))  # noqa: NPY002


def program(name: str) -> Callable[[Callable[[DictConfig, Path], Any]], Callable[[], None]]:
    """Turn `run(config, folder)` into a Hydra program configured by `conf/NAME.yaml`.

    The run's folder, Hydra's output directory, receives `config.yaml`. An error of the user's making ends the program
    with its message alone.

    Args:
        name: of the yaml.
    """

    def decorate(run: Callable[[DictConfig, Path], Any]) -> Callable[[], None]:
        def hydra_run(config: DictConfig) -> Any:
            folder = Path(HydraConfig.get().runtime.output_dir)
            prepare(config, folder)
            try:
                return run(config, folder)
            except (ValueError, FloatingPointError, OSError) as error:
                logging.getLogger(name).error("%s", error)
                raise SystemExit(2) from error

        def main() -> None:
            register_schemas()
            hydra.main(version_base=None, config_path=str(CONF), config_name=name)(hydra_run)()

        return main

    return decorate
