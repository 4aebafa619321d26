"""A run as a few files of limited size, to go on with it on another machine."""

import io
import re
import zipfile
import zlib
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from musiclm_engine.checkpoint import CheckpointError, read_tensors
from musiclm_engine.training.config import TRAINED
from musiclm_engine.training.loop import CHECKPOINT
from musiclm_engine.whole_file import whole_file

PART_BYTES = 16 * 2**20
COUNTS = ("steps", "seconds")
MEMBERS = ("model.json", "model.safetensors", CHECKPOINT)


def pack(
    run_dir: Path, parcel: Path, *, unfinished: str | None = None, part_bytes: int = PART_BYTES
) -> list[Path]:
    """Write what is needed to go on with run_dir to parcel/run.zip.000, run.zip.001 …

    That is every finished model as it would be bundled, and the checkpoint of the unfinished one
    with weights rounded to float16 and moments to bfloat16: half of its size. An adversary's
    moments, token caches and curves stay behind. Parts of an older parcel are replaced, once all of
    this one is written.
    """
    left_out = {unfinished}
    if (run_dir / "tokenizer" / "model.json").exists():
        left_out.add("semantic_encoder")  # the tokenizer holds it
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in TRAINED:
            folder = run_dir / name
            if (folder / "model.json").exists() and name not in left_out:
                for member in ("model.json", "model.safetensors"):
                    archive.write(folder / member, f"{name}/{member}")
            if (folder / CHECKPOINT).exists():
                lighter = _lighter(folder, counts_alone=name != unfinished)
                archive.writestr(f"{name}/{CHECKPOINT}", save(lighter))
    parcel.mkdir(parents=True, exist_ok=True)
    whole, parts = packed.getbuffer(), []
    with ExitStack() as unfinished_parts:
        for number, start in enumerate(range(0, len(whole), part_bytes)):
            parts.append(parcel / f"run.zip.{number:03d}")
            part = unfinished_parts.enter_context(whole_file(parts[-1]))
            part.write_bytes(whole[start : start + part_bytes])
    for old in set(_parts(parcel)) - set(parts):
        old.unlink()
    return parts


def unpack(parcel: Path, run_dir: Path) -> None:
    """Fill run_dir with what `pack` wrote.

    Raises:
        CheckpointError: there is no parcel, or a part of it is missing or broken.
        ValueError: run_dir holds something already.
    """
    parts = _parts(parcel)
    if not parts:
        raise CheckpointError(f"{parcel} holds no parcel: run.zip.000 is missing")
    if run_dir.exists() and any(run_dir.iterdir()):
        raise ValueError(f"{run_dir} holds a run already: unpack into a folder of its own")
    whole = io.BytesIO(b"".join(part.read_bytes() for part in parts))
    known = {f"{name}/{member}" for name in TRAINED for member in MEMBERS}
    try:
        with zipfile.ZipFile(whole) as archive:
            contents = {name: archive.read(name) for name in archive.namelist()}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(
            f"{parcel} is broken, or one of its {len(parts)} parts is missing: {error}"
        ) from None
    if contents.keys() - known:
        raise CheckpointError(f"{parcel} holds {', '.join(contents.keys() - known)}: not a run")
    for name, content in contents.items():
        path = run_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write_bytes(content)


def _parts(parcel: Path) -> list[Path]:
    return sorted(p for p in parcel.glob("run.zip.*") if re.fullmatch(r"\.\d{3}", p.suffix))


def _lighter(folder: Path, *, counts_alone: bool) -> dict[str, Tensor]:
    tensors = read_tensors(folder / CHECKPOINT)
    if counts_alone:  # of a model that is done they say so
        return {name: tensors[name] for name in COUNTS if name in tensors}
    stored = read_tensors(folder / "model.safetensors")  # its parameters in half precision
    for key, value in list(tensors.items()):
        part, _, name = key.partition("/")
        is_stored_as_half = part == "model" and stored[name].dtype == torch.float16
        if part == "adversary_optimizer":  # its moments are soon found again
            del tensors[key]
        elif is_stored_as_half or (part == "adversary_model" and value.is_floating_point()):
            tensors[key] = value.half()
        elif part.endswith("optimizer") and value.dim() > 0:
            tensors[key] = value.bfloat16()
    return tensors
