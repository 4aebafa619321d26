"""Train one model of a set, whichever it is: what `musiclm train` does."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch

from musiclm_engine.training import recipes
from musiclm_engine.training.config import TRAINED, ConfigError, load_config, table
from musiclm_engine.training.loop import fit
from musiclm_engine.training.recipes import Workplace

Report = Callable[[str, int, int, dict[str, float]], None]  # what is done, how far, figures


def train(
    name: str,
    *,
    config: str,
    manifest: Path,
    run_dir: Path,
    device: torch.device,
    minutes: float | None = None,
    report: Report,
) -> None:
    """Train, or go on training, one of `TRAINED` in run_dir; one that is done is left as it is.

    Models build on those before them in `TRAINED`; a missing one is named by the error.

    Args:
        name: of the model.
        config: see `load_config`.
        manifest: of the audio.
        run_dir: of the whole set.
        minutes: stop after this long, to be resumed by the same call.
        report: called with what is going on, as it goes on.

    Raises:
        ConfigError, CheckpointError, ManifestError: something it needs is missing or broken.
        FloatingPointError: training diverged.
        ModuleNotFoundError: the extra `train` is not installed.
    """
    if name not in TRAINED:
        raise ValueError(f"name is {name!r}, wanted one of {', '.join(TRAINED)}")
    if find_spec("tensorboard") is None:
        raise ModuleNotFoundError(
            'training writes TensorBoard logs: pip install "musiclm-engine[train]"'
        )
    place = Workplace(run_dir, manifest, load_config(config), device)
    torch.manual_seed(place.seed)  # of the first weights; each step has a seed of its own

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, total: report(what, done, total, {})

    fitted = {"tokenizer": recipes.fit_tokenizer, "quantizer": recipes.fit_quantizer}
    try:
        if name in fitted:
            if not (run_dir / name / "model.json").exists():  # written last: it is whole
                fitted[name](place, progress(name))
            return
        schedule = recipes.schedule(table(place.config, name))
        if name == "codec":
            recipe = recipes.codec_recipe(place)
        elif name == "mulan":
            recipe = recipes.mulan_recipe(place)
        else:
            recipe = recipes.stage_recipe(place, name, progress("tokens"))
    except TypeError as error:  # the entries of the table are arguments of the model
        raise ConfigError(f"[{name}] of {config} does not fit the model: {error}") from error
    for done, figures in fit(
        recipe, schedule, run_dir / name, seed=place.seed, device=device, minutes=minutes
    ):
        report(name, done, schedule.steps, figures)
