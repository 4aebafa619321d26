"""A trained set of models, put together as one MusicLM."""

from pathlib import Path

from musiclm_engine.components import CLASSES, load_component
from musiclm_engine.generation import AudioLM, Sampling, StageSampling, Windows
from musiclm_engine.musiclm import STAGES, MusicLM
from musiclm_engine.training.config import ConfigError, load_config, models_of, table


def bundle_run(run_dir: Path, *, config: str) -> MusicLM:
    """Load every model of run_dir.

    Args:
        run_dir: as `training.run.train` fills it.
        config: the configuration it was trained with: its crops become the windows of generation,
            each stage's `sampling` its default settings.

    Raises:
        CheckpointError: a model is missing.
        ConfigError: the configuration is, or has sampling settings that do not exist.
    """
    settings = load_config(config)
    parts = {
        name: load_component(name, run_dir / name / "model")
        for name in models_of(settings)
        if name in CLASSES
    }
    counts_beats = "tempo_reader" in parts
    if (parts["semantic"].clock is not None) != counts_beats:
        raise ConfigError(
            f"{run_dir / 'semantic'} counts {'frames' if counts_beats else 'beats'}, "
            f"{config} says counts_beats = {str(counts_beats).lower()}: remove that folder and "
            "train it anew"
        )
    windows = Windows(
        **{f"{stage}_seconds": table(settings, stage)["crop_seconds"] for stage in STAGES}
    )
    try:
        sampling = StageSampling(
            **{
                stage: Sampling(**table(settings, stage).get("sampling", {"temperature": 1.0}))
                for stage in STAGES
            }
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"sampling in {config} is not understood: {error}") from None
    return MusicLM(
        mulan=parts["mulan"],
        quantizer=parts["quantizer"],
        tokenizer=parts["tokenizer"],
        audiolm=AudioLM(
            codec=parts["codec"], windows=windows, **{stage: parts[stage] for stage in STAGES}
        ),
        tempo_reader=parts.get("tempo_reader"),
        sampling=sampling,
    ).eval()
