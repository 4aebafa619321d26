"""Training configurations: TOML files, one table a model."""

import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

TRAINED = (  # in order
    "codec",
    "semantic_encoder",
    "tokenizer",
    "mulan",
    "quantizer",
    "tempo_reader",
    "semantic",
    "coarse",
    "fine",
)
SCHEDULE = {  # the fields of `schedule.Schedule` but minutes, which are a share of the whole's
    "steps",
    "learning_rate",
    "warmup",
    "weight_decay",
    "clip",
    "validate_every",
    "save_every_seconds",
    "precision",
}
LOOP = SCHEDULE | {"share", "compile", "batch_size", "crop_seconds"}
STAGE = LOOP | {"short_crops", "text_share", "model", "sampling"}
ENTRIES = {
    "codec": LOOP | {"domain", "model", "adversary"},
    "semantic_encoder": LOOP - {"compile"} | {"kind", "model"},
    "tokenizer": {"clips", "model"},
    "mulan": LOOP - {"compile"}
    | {"vocab_size", "audio", "text", "dim_latent", "chunk_size", "facts"},
    "quantizer": {"model"},
    "tempo_reader": LOOP - {"compile", "crop_seconds"} | {"vocab_size", "text"},
    "semantic": STAGE | {"counts_beats"},
    "coarse": STAGE | {"num_coarse_quantizers"},
    "fine": STAGE | {"num_fine_quantizers"},
}


class ConfigError(ValueError):
    """A configuration is missing, is not TOML, or lacks something."""


def models_of(config: dict[str, Any]) -> list[str]:
    """Which of `TRAINED` a set is made of: a semantic encoder where it has a table, a reader of
    tempi where the semantic stage counts beats."""
    has = {
        "semantic_encoder": "semantic_encoder" in config,
        "tempo_reader": config.get("semantic", {}).get("counts_beats", False),
    }
    return [name for name in TRAINED if has.get(name, True)]


def load_config(name: str) -> dict[str, Any]:
    """Read a configuration: a bundled one by its name ("tiny"), or a path to a .toml file.

    One that says `extends = NAME` has all entries of that one but those that it gives itself, so
    that an architecture is said once: an entry of a table takes the place of the whole entry there.
    That one may extend another.

    Raises:
        ConfigError: there is no such file, or it is broken.
    """
    return _extended(name, ())


def _extended(name: str, above: tuple[Path, ...]) -> dict[str, Any]:
    path, config = _read(name)
    base = config.pop("extends", None)
    if base is None:
        return config
    if not isinstance(base, str):
        raise ConfigError(f"{path} has extends = {base!r}, wanted the name of a configuration")
    if path.resolve() in above:
        raise ConfigError(f"{path} extends itself")
    # A file beside this one, or a bundled configuration.
    below = str(path.parent / base) if base.endswith(".toml") else base
    whole = _extended(below, (*above, path.resolve()))
    tables = {key: whole.get(key, {}) | config[key] for key in config.keys() - {"seed"}}
    return whole | config | tables


def _read(name: str) -> tuple[Any, dict[str, Any]]:
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
    unknown = config.keys() - {*TRAINED, "seed", "extends"}
    if unknown:
        raise ConfigError(
            f"{path} has unknown entries: {', '.join(sorted(unknown))}; wanted seed, extends, "
            + ", ".join(TRAINED)
        )
    seed = config.get("seed", 0)
    if not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"{path} has seed = {seed!r}, wanted a whole number from 0 up")
    for model in config.keys() - {"seed", "extends"}:
        _check_table(path, model, config[model])
    return path, config


def _check_table(path: Any, name: str, settings: Any) -> None:
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} has {name} = {settings!r}, wanted a table [{name}]")
    unknown = settings.keys() - ENTRIES[name]
    if unknown:
        raise ConfigError(
            f"[{name}] of {path} has unknown entries: {', '.join(sorted(unknown))}; wanted "
            + ", ".join(sorted(ENTRIES[name]))
        )
    counts_beats = settings.get("counts_beats", False)
    if not isinstance(counts_beats, bool):
        raise ConfigError(
            f"[{name}] of {path} has counts_beats = {counts_beats!r}, wanted true or false"
        )
    share = settings.get("share", 0)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
        raise ConfigError(f"[{name}] of {path} has share = {share!r}, wanted a number from 0 to 1")


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
