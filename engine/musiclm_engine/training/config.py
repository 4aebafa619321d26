"""Training configurations: TOML files, one table a model."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

TRAINED = ("codec", "tokenizer", "mulan", "quantizer", "semantic", "coarse", "fine")  # in order
SCHEDULE = {  # the fields of `loop.Schedule`
    "steps",
    "learning_rate",
    "warmup",
    "weight_decay",
    "clip",
    "validate_every",
    "save_every_seconds",
    "precision",
}
STAGE = SCHEDULE | {"batch_size", "crop_seconds", "text_share", "model", "sampling"}
ENTRIES = {
    "codec": SCHEDULE | {"domain", "batch_size", "crop_seconds", "model"},
    "tokenizer": {"clips", "model"},
    "mulan": SCHEDULE
    | {"batch_size", "crop_seconds", "vocab_size", "audio", "text", "dim_latent"}
    | {"chunk_size"},
    "quantizer": {"model"},
    "semantic": STAGE,
    "coarse": STAGE | {"num_coarse_quantizers"},
    "fine": STAGE | {"num_fine_quantizers"},
}


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
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"{path} has seed = {seed!r}, wanted a whole number from 0 up")
    for model in config.keys() - {"seed"}:
        _check_table(path, model, config[model])
    return config


def _check_table(path: Any, name: str, settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} has {name} = {settings!r}, wanted a table [{name}]")
    unknown = settings.keys() - ENTRIES[name]
    if unknown:
        raise ConfigError(
            f"[{name}] of {path} has unknown entries: {', '.join(sorted(unknown))}; wanted "
            + ", ".join(sorted(ENTRIES[name]))
        )


class Table(dict[str, Any]):
    """The settings of one model; one that is missing is an error of its own."""

    def __init__(self, name: str, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.name = name

    def __missing__(self, key: str) -> Any:
        raise ConfigError(f"[{self.name}] of the configuration has no {key}")


def table(config: dict[str, Any], name: str) -> dict[str, Any]:
    """The settings of one model.

    Raises:
        ConfigError: the configuration has no such table.
    """
    if name not in config:
        raise ConfigError(f"the configuration has no [{name}]")
    return Table(name, config[name])
