"""MusicLM: text in, music out, the candidates ranked by MuLaN (arXiv 2301.11325)."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from musiclm_engine.audiolm.beat_clock import bpm_of
from musiclm_engine.audiolm.clustered import ClusteredTokens
from musiclm_engine.checkpoint import CheckpointError, json_text, read_json, save_model, write_json
from musiclm_engine.components import load_component
from musiclm_engine.generation import (
    AudioLM,
    Decoding,
    Sampling,
    StageSampling,
    Windows,
    derive_seeds,
)
from musiclm_engine.generation.audiolm import StageProgress
from musiclm_engine.generation.evaluation_mode import evaluation_mode
from musiclm_engine.mulan import MuLaN, MuLaNEmbedQuantizer
from musiclm_engine.tempo_reader import TempoReader

STAGES = tuple(field.name for field in fields(StageSampling))
DESCRIPTION = "musiclm.json"  # names a folder's format and holds what no part knows
USUAL_SIMILARITY = "usual_similarity"  # in it, once it was measured


@dataclass(frozen=True)
class MusicLMOutput:
    """What `MusicLM.generate` made of P prompts, N samples each, best candidate first.

    Attributes:
        audio: [P, N, samples] float32 in [-1, 1].
        sample_rate: Hz.
        scores: [P, N] MuLaN similarity of audio and prompt, descending.
        tokens: "mulan" [P, M]; "semantic" [P, N, S]; "coarse" [P, N, T, Qc]; "fine"
            [P, N, T, Qf], int64, in the order of audio.
        sample_seeds: [P, N] int64: which of the N seeds each candidate grew from.
        tempo_bpm: [P, N] float64 beats a minute that each candidate was to be played at; None for
            a model that counts frames.
    """

    audio: Tensor
    sample_rate: int
    scores: Tensor
    tokens: dict[str, Tensor]
    sample_seeds: Tensor
    tempo_bpm: Tensor | None = None


class MusicLM(nn.Module):
    """MuLaN, its quantiser, a reader of tempi and AudioLM as one model.

    Args:
        mulan: embeds prompts and judges candidates.
        quantizer: turns embeddings into the conditioning tokens.
        tokenizer: of semantic tokens; generation from text does not use it, continuing given
            audio does.
        audiolm: stages and codec.
        tempo_reader: reads the tempo of prompts for a semantic stage that counts beats; None for others.
        sampling: settings of the stages where a caller names none.
        usual_similarity: what the best candidate of 19 in 20 held-out captions scores at least
            (`musiclm eval --calibrate`); None where that was not measured.

    Raises:
        ValueError: the parts do not speak the same tokens, or not at the same sample rate;
            usual_similarity is no cosine.
    """

    def __init__(
        self,
        *,
        mulan: MuLaN,
        quantizer: MuLaNEmbedQuantizer,
        tokenizer: ClusteredTokens,
        audiolm: AudioLM,
        tempo_reader: TempoReader | None = None,
        sampling: StageSampling,
        usual_similarity: float | None = None,
    ) -> None:
        super().__init__()
        _refuse_strangers(mulan, quantizer, tokenizer, audiolm)
        if (tempo_reader is None) != (audiolm.semantic.clock is None):
            raise ValueError(
                f"tempo_reader is {'missing' if tempo_reader is None else 'given'}, the semantic "
                f"stage counts {'frames' if audiolm.semantic.clock is None else 'beats'}"
            )
        if usual_similarity is not None:
            _refuse_what_is_no_cosine(usual_similarity)
        self.mulan = mulan
        self.quantizer = quantizer
        self.tokenizer = tokenizer
        self.audiolm = audiolm
        self.tempo_reader = tempo_reader
        self.sampling = sampling
        self.usual_similarity = usual_similarity

    @property
    def sample_rate(self) -> int:
        return self.audiolm.codec.sample_rate_hz

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str] | None = None, *, device: str | torch.device = "cpu"
    ) -> Self:
        """Load the bundled model, or one that `save_pretrained` wrote.

        Args:
            path: a folder; None is the bundled model.
            device: to put it on.

        Raises:
            CheckpointError: the folder holds no model, or a broken one.
            ValueError: there is no such device here.
        """
        folder = model_folder(path)
        target = check_device(device)
        description = read_json(folder / DESCRIPTION)
        try:
            windows = Windows(**description["windows"])
            sampling = StageSampling(
                **{stage: Sampling(**description["sampling"][stage]) for stage in STAGES}
            )
            usual_similarity = description.get(USUAL_SIMILARITY)
            if usual_similarity is not None:
                _refuse_what_is_no_cosine(usual_similarity)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{folder / DESCRIPTION} is not understood: {error!r}") from None
        parts = {
            name: load_component(name, folder / name)
            for name in ("codec", "tokenizer", "mulan", "quantizer", *STAGES)
        }
        counts_beats = parts["semantic"].clock is not None
        reader = load_component("tempo_reader", folder / "tempo_reader") if counts_beats else None
        if not (parts["quantizer"].is_fitted and parts["tokenizer"].components.any()):
            raise CheckpointError(f"{folder} holds a quantizer or tokenizer that was never fitted")
        try:
            model = cls(
                mulan=parts["mulan"],
                quantizer=parts["quantizer"],
                tokenizer=parts["tokenizer"],
                audiolm=AudioLM(
                    codec=parts["codec"],
                    windows=windows,
                    **{stage: parts[stage] for stage in STAGES},
                ),
                tempo_reader=reader,
                sampling=sampling,
                usual_similarity=usual_similarity,
            )
        except ValueError as error:
            raise CheckpointError(f"{folder} holds parts of several models: {error}") from None
        return model.to(target).eval()

    def save_pretrained(
        self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float16
    ) -> None:
        """Write the model to a folder: two files a part, and one of settings, written last.

        Args:
            path: of the folder, made if it is not there.
            dtype: of the weights on disk, see `checkpoint.save_model`. torch.int8 is for the stages;
                what makes tokens is then stored in float16, or it would make others than those that
                the stages learnt.
        """
        folder = Path(path)
        parts = {
            "codec": self.audiolm.codec,
            "tokenizer": self.tokenizer,
            "mulan": self.mulan,
            "quantizer": self.quantizer,
            **({} if self.tempo_reader is None else {"tempo_reader": self.tempo_reader}),
            **{stage: getattr(self.audiolm, stage) for stage in STAGES},
        }
        makers_dtype = torch.float16 if dtype == torch.int8 else dtype
        if self.tempo_reader is None:  # none of another model that lay there
            for suffix in (".json", ".safetensors"):
                (folder / "tempo_reader").with_suffix(suffix).unlink(missing_ok=True)
        for name, part in parts.items():
            save_model(part, folder / name, dtype=dtype if name in STAGES else makers_dtype)
        description: dict[str, Any] = {
            "windows": asdict(self.audiolm.windows),
            "sampling": asdict(self.sampling),
        }
        if self.usual_similarity is not None:
            description[USUAL_SIMILARITY] = self.usual_similarity
        write_json(folder / DESCRIPTION, description)

    @torch.inference_mode()
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seconds: float = 10.0,
        num_samples: int = 4,
        seed: int = 0,
        decoding: Decoding | None = None,
        on_progress: StageProgress | None = None,
        **settings: float,
    ) -> MusicLMOutput:
        """Make music for each prompt.

        All candidates of all prompts are one batch. A candidate depends on its prompt, its number
        and the seed, never on what else is in the batch.

        Args:
            prompts: P descriptions of music, or one.
            seconds: of audio.
            num_samples: N candidates a prompt.
            seed: of everything random.
            decoding: precision of the stages' weights and caches, and how their steps run.
            on_progress: called as work gets on: (stage, done, total).
            **settings: of sampling, `<stage>_<setting>` or `<setting>` for all three stages:
                semantic_temperature=0.9, coarse_top_k=50, guidance=2.0 … see `Sampling`.

        Returns:
            audio, scores and tokens, best candidate first.

        Raises:
            ValueError: an empty prompt, seconds or num_samples that are not positive, a setting
                that does not exist or is out of range.
            TypeError: decoding is no `Decoding`.
            MemoryError: there is not enough memory for this much audio.
        """
        texts = check_prompts(prompts)
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}, wanted at least 1")
        self.audiolm.check_seconds(seconds)
        sampling = merge_settings(self.sampling, settings)
        self._refuse_what_does_not_fit(seconds, len(texts) * num_samples, sampling, decoding)

        try:
            with evaluation_mode(self):
                wanted = self.mulan.embed_text(texts)
                conditioning = self.quantizer.encode(wanted)
                seeds = derive_seeds(seed, count=num_samples).to(conditioning.device)
                of_rows = seeds.repeat(len(texts))
                tempo = self.choose_tempo(
                    [text for text in texts for _ in range(num_samples)],
                    of_rows,
                    temperature=sampling.semantic.temperature,
                )
                generated = self.audiolm.generate(
                    conditioning.repeat_interleave(num_samples, dim=0),
                    seconds=seconds,
                    seeds=of_rows,
                    tempo=tempo,
                    sampling=sampling,
                    decoding=decoding,
                    on_progress=on_progress,
                )
                embeddings = self.mulan.embed_audio(generated.audio)
        except torch.OutOfMemoryError as error:  # of a GPU: the estimate is one
            raise MemoryError(f"{error}; ask for fewer seconds or samples") from None
        wanted = wanted.repeat_interleave(num_samples, dim=0)
        scores = (embeddings * wanted).sum(-1).view(len(texts), num_samples)
        order = scores.argsort(dim=1, descending=True, stable=True)

        def best_first(rows: Tensor) -> Tensor:
            by_prompt = rows.view(len(texts), num_samples, *rows.shape[1:])
            return torch.stack([own[best] for own, best in zip(by_prompt, order, strict=True)])

        tokens = {stage: best_first(rows) for stage, rows in generated.tokens.items()}
        return MusicLMOutput(
            audio=best_first(generated.audio),
            sample_rate=self.sample_rate,
            scores=scores.gather(1, order),
            tokens={"mulan": conditioning, **tokens},
            sample_seeds=seeds[order],
            tempo_bpm=None if tempo is None else best_first(bpm_of(tempo)),
        )

    def unread(self, prompt: str) -> str:
        """The end of a prompt that is too long to be read whole; "" of others."""
        readers = [part for part in (self.mulan, self.tempo_reader) if part is not None]
        return max((part.unread(prompt) for part in readers), key=len)

    def choose_tempo(
        self, captions: Sequence[str], seeds: Tensor, *, temperature: float = 1.0
    ) -> Tensor | None:
        """The tempi at which `AudioLM.generate` is to play.

        Args:
            captions: B.
            seeds: [B] int64, those that it is given.
            temperature: of the semantic stage; 0 takes the likeliest tempo.

        Returns:
            [B] int64 tokens (`TempoReader.choose`), or None for a model that counts frames.
        """
        if self.tempo_reader is None:
            return None
        own = torch.cat([derive_seeds(int(seed), "tempo", count=1) for seed in seeds])
        with evaluation_mode(self):
            return self.tempo_reader.choose(captions, own, temperature=temperature)

    def _refuse_what_does_not_fit(
        self, seconds: float, rows: int, sampling: StageSampling, decoding: Decoding | None
    ) -> None:
        """Compare what the caches, spectra and waveforms will take with what is free."""
        needed = self.audiolm.cache_bytes(
            seconds=seconds, rows=rows, sampling=sampling, decoding=decoding
        )
        samples = seconds * self.sample_rate
        # The waveforms of all rows, and one row's spectrum in its few copies (4 n_fft / hop each).
        needed += 8.0 * rows * samples + 200.0 * samples
        free = _free_bytes(next(self.parameters()).device)
        if needed > free:
            raise MemoryError(
                f"{rows} x {seconds:g} s of audio needs about {needed / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB are free: ask for fewer seconds or samples"
            )


def _refuse_strangers(
    mulan: MuLaN, quantizer: MuLaNEmbedQuantizer, tokenizer: ClusteredTokens, audiolm: AudioLM
) -> None:
    """Parts that were not trained together, as far as it shows: they would make noise."""
    codec, semantic = audiolm.codec, audiolm.semantic
    for name, part in (("mulan", mulan), ("tokenizer", tokenizer)):
        if part.sample_rate_hz != codec.sample_rate_hz:
            raise ValueError(
                f"{name} takes {part.sample_rate_hz} Hz, the codec gives {codec.sample_rate_hz} Hz"
            )
    if quantizer.dim != mulan.dim_latent:
        raise ValueError(f"quantizer takes {quantizer.dim} values, mulan gives {mulan.dim_latent}")
    given = quantizer.num_quantizers, quantizer.codebook_size
    taken = semantic.conditioning_length, semantic.conditioning_size
    if given != taken:
        raise ValueError(
            f"quantizer gives {given[0]} tokens of {given[1]} values, "
            f"the stages take {taken[0]} of {taken[1]}"
        )
    if tokenizer.num_tokens != semantic.target_size:
        raise ValueError(
            f"tokenizer has {tokenizer.num_tokens} tokens, "
            f"the semantic stage {semantic.target_size}"
        )
    wanted = audiolm.coarse.context_stride * codec.hop_length
    if tokenizer.hop_length != wanted:
        raise ValueError(
            f"tokenizer's tokens last {tokenizer.hop_length} samples, the coarse stage wants {wanted}"
        )


def model_folder(path: str | os.PathLike[str] | None) -> Path:
    """Where a model lies; None is the bundled one."""
    return Path(str(resources.files("musiclm_engine") / "assets") if path is None else path)


def fingerprint(folder: Path) -> str:
    """SHA-256 of a model's files, which decide with a request what is generated.

    The usual similarity decides nothing: with and without it, a model is the same.
    """
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors")]):
        content = path.read_bytes()
        if path.name == DESCRIPTION and USUAL_SIMILARITY.encode() in content:
            description = read_json(path)
            description.pop(USUAL_SIMILARITY, None)
            content = json_text(description).encode()
        digest.update(path.name.encode() + content)
    return digest.hexdigest()


def write_usual_similarity(folder: Path, similarity: float) -> None:
    """Put into a model's folder what the best candidates of its held-out captions score.

    Args:
        folder: as `save_pretrained` wrote it.
        similarity: see `MusicLM`.

    Raises:
        CheckpointError: there is no model.
        ValueError: similarity is no cosine.
    """
    _refuse_what_is_no_cosine(similarity)
    path = folder / DESCRIPTION
    write_json(path, read_json(path) | {USUAL_SIMILARITY: similarity})


def _refuse_what_is_no_cosine(similarity: float) -> None:
    if isinstance(similarity, bool) or not (math.isfinite(similarity) and abs(similarity) <= 1):
        raise ValueError(f"usual_similarity is {similarity!r}, wanted a number from -1 to 1")


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """A list of prompts, each with something in it."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("prompts is empty, wanted at least one description of music")
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"prompts has {text!r} in it, wanted a description of music")
    return texts


def check_device(device: str | torch.device) -> torch.device:
    """The device, if it is here.

    Raises:
        ValueError: it is unknown, or not here.
    """
    try:
        target = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}, wanted cpu, cuda or cuda:N") from None
    if target.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, wanted cpu, cuda or cuda:N")
    if target.type == "cuda":
        present = torch.cuda.device_count()
        if (target.index or 0) >= present:
            raise ValueError(f"device is {device!r}, but there are {present} CUDA devices here")
    return target


def check_settings(settings: Mapping[str, float]) -> None:
    """Refuse what `MusicLM.generate` would not take as settings."""
    merge_settings(StageSampling(), settings)


def merge_settings(sampling: StageSampling, settings: Mapping[str, float]) -> StageSampling:
    """Sampling with `<stage>_<setting>`, or `<setting>` for all stages, put in; specific wins."""
    known = {field.name for field in fields(Sampling)}
    changes: dict[str, dict[str, float]] = {stage: {} for stage in STAGES}
    for key, value in sorted(settings.items(), key=lambda item: item[0] not in known):
        stage, _, setting = key.partition("_")
        if key in known:
            for own in changes.values():
                own[key] = value
        elif stage in changes and setting in known:
            changes[stage][setting] = value
        else:
            raise ValueError(
                f"{key} is no setting; wanted one of {', '.join(sorted(known))}, alone or after "
                f"{'_, '.join(STAGES)}_"
            )
    merged: dict[str, Any] = {
        stage: replace(getattr(sampling, stage), **changes[stage]) for stage in STAGES
    }
    return StageSampling(**merged)


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        # PyTorch keeps what it has freed for itself: the driver counts that as taken.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return available_bytes()


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Memory of this machine that programs can have: Linux counts its file cache as not free.

    Elsewhere all of the machine's memory, which at least refuses what can never fit.
    """
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            name, _, amount = line.partition(":")
            if name == "MemAvailable":
                return int(amount.removesuffix("kB")) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
