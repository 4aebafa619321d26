"""Models on disk: NAME.safetensors beside NAME.json. Nothing is ever unpickled."""

import json
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from musiclm_engine.whole_file import whole_file
from musiclm_kernels import quantize_weight

STORED = {
    name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "int8")
}  # how parameters can lie on disk
SCALE = ".int8_scale"  # of the parameter whose name is before it
LEAST_ROW = 64  # values that share a scale: shorter rows would hardly save anything


class CheckpointError(ValueError):
    """A checkpoint is missing, broken, or of another kind than was asked for."""


class Configured(Protocol):
    """A module that can be rebuilt from what its `config` says."""

    @property
    def config(self) -> dict[str, Any]: ...

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self: ...


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=1) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write value as JSON; the file is either whole or as it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        unfinished.write_text(json_text(value))


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors; the file is either whole or as it was."""
    packed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        try:
            save_file(packed, unfinished)
        except SafetensorError as error:  # its word for a full disk
            raise OSError(f"{path} cannot be written: {error}") from None


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is broken or not safetensors: {error}") from None


def save_model(model: Any, stem: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write model's weights to stem.safetensors and its class and config to stem.json.

    Args:
        model: a module with `config`.
        stem: path without suffix.
        dtype: parameters are stored in it, or in their own. torch.int8 stores matrices with a scale
            a row (`quantize_weight`) and what has no rows of 64 values and more in float16. Buffers
            always keep theirs: codebooks are compared with, and running sums would overflow half
            precision.

    Raises:
        ValueError: dtype is none of `STORED`.
    """
    if dtype not in (None, *STORED.values()):
        raise ValueError(f"dtype is {dtype}, wanted {', '.join(STORED)} or None")
    state = model.state_dict()
    for name, weight in model.named_parameters():
        if dtype is not torch.int8:
            state[name] = weight if dtype is None else weight.to(dtype)
        elif weight.ndim < 2 or weight.shape[-1] < LEAST_ROW:
            state[name] = weight.half()
        else:
            rows, scale = quantize_weight(weight.flatten(0, -2), dtype)
            state[name] = rows.view(weight.shape)
            state[name + SCALE] = scale.view(weight.shape[:-1])
    write_tensors(stem.with_name(stem.name + ".safetensors"), state)
    write_json(
        stem.with_name(stem.name + ".json"),
        {"class": type(model).__name__, "config": model.config},
    )


def load_model(stem: Path, classes: dict[str, Any]) -> Any:
    """Rebuild what `save_model` wrote, in float32 and evaluation mode.

    Args:
        stem: path without suffix.
        classes: the classes that may stand there, by name.

    Raises:
        CheckpointError: a file is missing or broken, or holds another class or other weights.
    """
    path = stem.with_name(stem.name + ".json")
    description = read_json(path)
    if not isinstance(description, dict) or not {"class", "config"} <= description.keys():
        raise CheckpointError(f'{path} does not name a "class" and its "config"')
    if str(description["class"]) not in classes:
        raise CheckpointError(
            f"{path} holds a {description['class']}, wanted {' or '.join(classes)}"
        )
    try:
        model = classes[description["class"]].from_config(description["config"])
    except Exception as error:  # noqa: BLE001 - tokenizers raises no class of its own
        raise CheckpointError(f"{path} has a config that cannot be built: {error}") from None
    weights = read_tensors(stem.with_name(stem.name + ".safetensors"))
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{stem}.safetensors holds values of {name} that are not numbers")
    try:
        model.load_state_dict(_in_float32(weights))
    except RuntimeError as error:
        raise CheckpointError(f"{stem}.safetensors does not fit {path}: {error}") from None
    return model.eval()


def _in_float32(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `save_model` stored, as the model has it; whole numbers but int8 stay as they are."""
    weights = {}
    for name, value in stored.items():
        if value.dtype == torch.int8:
            if name + SCALE not in stored:
                raise RuntimeError(f"{name} is int8 and has no {name}{SCALE}")
            weights[name] = value * stored[name + SCALE][..., None]
        elif not name.endswith(SCALE):
            weights[name] = value.float() if value.is_floating_point() else value
    return weights
