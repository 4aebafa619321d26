"""Training configurations: TOML files, one table a model."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

TRAINED = ("codec", "tokenizer", "mulan", "quantizer", "semantic", "coarse", "fine")  # in order


class ConfigError(ValueError):
    """A configuration is missing, is not TOML, or lacks something."""


def load_config(name: str) -> dict[str, Any]:
    """Read a configuration: a bundled one by its name ("tiny"), or a path to a .toml file.

    Raises:
        ConfigError: there is no such file, or it is broken.
    """
    bundled = resources.files("musiclm_engine") / "training" / "configs"
    path = Path(name) if name.endswith(".toml") else bundled / f"{name}.toml"
    try:
        config = tomllib.loads(path.read_text())
    except FileNotFoundError:
        names = sorted(p.name[:-5] for p in bundled.iterdir() if p.name.endswith(".toml"))
        raise ConfigError(
            f"no configuration {name}: give a .toml file or one of {', '.join(names)}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from None
    unknown = config.keys() - {*TRAINED, "seed"}
    if unknown:
        raise ConfigError(
            f"{path} has unknown entries: {', '.join(sorted(unknown))}; wanted seed, "
            + ", ".join(TRAINED)
        )
    return config


def table(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of one model.

    Raises:
        ConfigError: the configuration has no such table.
    """
    if name not in config:
        raise ConfigError(f"the configuration has no [{name}]")
    return config[name]
