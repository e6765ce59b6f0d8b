"""From configurations to objects: the only code that knows both Hydra and the packages below.

A yaml names the dataclass or function it configures in its defaults list, `- /schema@_here_: agents.citer.Citer`, and
states what it departs from. The signature becomes the schema, so that every setting can be overridden on the command
line, and a misspelt key or a wrong type is an error that names the key before anything runs. A class is imported when a
configuration names it, and no other. One that no yaml names is chosen by its name alone, `agent=mine.Mine`, from
wherever Python finds it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.object_type import ObjectType
from hydra.core.plugins import Plugins
from hydra.errors import ConfigCompositionException, HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra_zen import builds
from hydra_zen import instantiate as zen_instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import experiments.common.job_names  # noqa: F401 (the names of folders are resolved by it)
from experiments.common.help import CONF as CONF

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Names = list[str]
Settings = TypeVar("Settings", bound="DataclassInstance")
_CLASS_NAME = re.compile(r"(?!hydra/)(?:[a-z_]+/)+([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)")
_FULL_KEY = re.compile(r"^full_key: (\S+)$", re.MULTILINE)


class SchemaSource(ConfigSource):
    """Where Hydra finds the configuration of a class or function: `GROUP/some.module.Name`, in any group."""

    @staticmethod
    def scheme() -> str:
        return "signature"

    def available(self) -> bool:
        return True

    def is_group(self, config_path: str) -> bool:
        return config_path.strip("/") == "schema"

    def is_config(self, config_path: str) -> bool:
        return _CLASS_NAME.fullmatch(config_path.removesuffix(".yaml")) is not None

    def list(self, config_path: str, results_filter: ObjectType | None) -> Names:
        return []  # there is no end to them

    def load_config(self, config_path: str) -> ConfigResult:
        found = _CLASS_NAME.fullmatch(config_path.removesuffix(".yaml"))
        assert found is not None
        config = OmegaConf.structured(schema_of(imported(found[1])))
        return ConfigResult(provider=self.provider, path=self.full_path(), config=config, header={"package": None})


class SchemaSearchPath(SearchPathPlugin):
    """Lets Hydra look there last: what a yaml names comes first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("signatures", f"{SchemaSource.scheme()}://")


def register_schemas() -> None:
    """Let Hydra make schemas of the classes and functions that a configuration names."""
    plugins = Plugins.instance()
    plugins.register(SchemaSource)
    plugins.register(SchemaSearchPath)


def imported(name: str) -> Any:
    """A class or function, by its full name.

    Raises:
        ConfigCompositionException: it cannot be imported; the error says why.
    """
    module, _, inside = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), inside)
    except Exception as error:  # whatever goes wrong in a file that somebody writes
        raise ConfigCompositionException(
            f"{name} cannot be imported: {type(error).__name__}: {error}. A module that lies elsewhere must be on the "
            "PYTHONPATH."
        ) from error


@cache
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


def prepare(config: DictConfig, side_by_side: bool = False) -> None:
    """What every run begins with: its threads, and the seed of libraries.

    Args:
        config: of the run.
        side_by_side: other runs share this machine's cores, so that one thread is enough where none are asked for.
    """
    import torch

    threads = config.get("threads") or (1 if side_by_side else None)
    if threads:
        torch.set_num_threads(threads)
    # libraries that draw from the global generators repeat too; our own code is given generators
    torch.manual_seed(config.get("seed", 0))
    np.random.seed(config.get("seed", 0))  # noqa: NPY002


def import_modules(names: Sequence[str]) -> None:
    """Import modules that lie outside, so that what they register is known.

    Raises:
        ValueError: one cannot be imported; the error says why.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever goes wrong in a file that somebody writes
            raise ValueError(f"imports: {name}: {type(error).__name__}: {error}") from error
