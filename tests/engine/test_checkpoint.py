"""Models on disk: whole or not there, and nothing in them is ever run."""

import errno
import json
import pickle
from pathlib import Path

import pytest
import torch

from musiclm_engine import checkpoint, whole_file
from musiclm_engine.audiolm import SemanticTransformer
from musiclm_engine.checkpoint import (
    CheckpointError,
    load_model,
    read_json,
    read_tensors,
    save_model,
    write_json,
    write_tensors,
)

CLASSES = {"SemanticTransformer": SemanticTransformer}


def build():
    torch.manual_seed(0)
    return SemanticTransformer(
        num_semantic_tokens=5,
        conditioning_size=3,
        conditioning_length=1,
        dim=8,
        depth=1,
        heads=1,
        dim_head=8,
        max_frames=8,
    )


@pytest.fixture
def stem(tmp_path):
    save_model(build(), tmp_path / "semantic")
    return tmp_path / "semantic"


def test_a_model_comes_back(stem):
    model, again = build(), load_model(stem, CLASSES)
    assert type(again) is SemanticTransformer and again.config == model.config
    assert not again.training
    state = again.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert sorted(path.name for path in stem.parent.iterdir()) == [
        "semantic.json",
        "semantic.safetensors",
    ]


def test_half_precision_is_half_the_file_and_loads_as_float32(stem, tmp_path):
    half = tmp_path / "half"
    save_model(build(), half, dtype=torch.float16)
    weights = half.with_suffix(".safetensors")
    assert weights.stat().st_size < 0.7 * stem.with_suffix(".safetensors").stat().st_size
    for name, value in load_model(half, CLASSES).state_dict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, build().state_dict()[name], rtol=1e-3, atol=1e-6)


@pytest.fixture
def eight_bits(tmp_path):
    """A model, and where it is stored in 8 bits."""
    torch.manual_seed(0)
    model = SemanticTransformer(
        num_semantic_tokens=50, conditioning_size=30, conditioning_length=2, dim=64, depth=2,
        heads=1, max_frames=8,
    )  # fmt: skip
    with torch.no_grad():
        model.condition_embedding.codes.weight[1] = 0.0  # a row of zeros has no largest value
    save_model(model, tmp_path / "eight", dtype=torch.int8)
    return model, tmp_path / "eight"


def test_eight_bits_are_within_half_a_step_of_each_row(eight_bits):
    model, stem = eight_bits
    again = load_model(stem, CLASSES)
    stored = read_tensors(stem.with_suffix(".safetensors"))
    buffers = dict(model.named_buffers())
    assert {"int8", "float16"} <= {str(value.dtype)[6:] for value in stored.values()}
    for name, value in again.state_dict().items():
        assert value.dtype == model.state_dict()[name].dtype
        original = model.state_dict()[name]
        if name in buffers:
            assert torch.equal(value, original)
        elif stored[name].dtype == torch.int8:
            half_a_step = original.abs().amax(-1, keepdim=True) / 254
            assert ((value - original).abs() <= half_a_step * 1.001).all()
        else:
            torch.testing.assert_close(value, original, rtol=1e-3, atol=1e-6)


def test_eight_bits_without_their_scale_are_refused(eight_bits):
    _, stem = eight_bits
    path = stem.with_suffix(".safetensors")
    stored = read_tensors(path)
    scale = next(name for name in stored if name.endswith(".int8_scale"))
    write_tensors(path, {name: value for name, value in stored.items() if name != scale})
    with pytest.raises(CheckpointError, match=f"does not fit .*has no {scale}"):
        load_model(stem, CLASSES)
    write_tensors(path, stored | {scale: torch.ones(3)})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(stem, CLASSES)


def test_other_dtypes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="dtype is torch.float64, wanted float32, float16"):
        save_model(build(), tmp_path / "semantic", dtype=torch.float64)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_missing_file_is_named(stem, suffix):
    stem.with_suffix(suffix).unlink()
    with pytest.raises(CheckpointError, match=f"semantic{suffix} is missing"):
        load_model(stem, CLASSES)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
@pytest.mark.parametrize("left", [0, 5, 100])
def test_a_truncated_file_is_named(stem, suffix, left):
    path = stem.with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(CheckpointError, match=rf"semantic\{suffix} is (broken|not JSON)"):
        load_model(stem, CLASSES)


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_folder_in_place_of_a_file_is_named(stem, suffix):
    stem.with_suffix(suffix).unlink()
    stem.with_suffix(suffix).mkdir()
    with pytest.raises(CheckpointError, match=rf"semantic\{suffix} "):
        load_model(stem, CLASSES)


def test_a_file_in_place_of_the_folder_is_named(stem):
    with pytest.raises(CheckpointError, match="semantic.json/codec.json"):
        load_model(stem.with_suffix(".json") / "codec", CLASSES)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [lambda v, p: p.write_bytes(pickle.dumps(v)), torch.save])
def test_a_pickle_is_refused_and_not_run(stem, tmp_path, write):
    sprung = tmp_path / "sprung"
    write(Trap(sprung), stem.with_suffix(".safetensors"))
    with pytest.raises(CheckpointError, match="semantic.safetensors is broken or not safetensors"):
        load_model(stem, CLASSES)
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists()  # the trap does spring


@pytest.mark.parametrize(
    "description, message",
    [
        ([], 'does not name a "class"'),
        ({"class": "SemanticTransformer"}, 'does not name a "class" and its "config"'),
        ({"class": "os.system", "config": {}}, "holds a os.system, wanted SemanticTransformer"),
        ({"class": ["x"], "config": {}}, "wanted SemanticTransformer"),
        ({"class": "SemanticTransformer", "config": {}}, "config that cannot be built"),
        ({"class": "SemanticTransformer", "config": []}, "config that cannot be built"),
        ({"class": "SemanticTransformer", "config": {"dim": -8}}, "config that cannot be built"),
    ],
)
def test_a_description_of_something_else_is_refused(stem, description, message):
    if isinstance(description, dict) and description.get("config") == {"dim": -8}:
        description["config"] = build().config | {"dim": -8}
    stem.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=f"semantic.json .*{message}"):
        load_model(stem, CLASSES)


def test_weights_of_another_size_are_refused(stem):
    description = read_json(stem.with_suffix(".json"))
    description["config"]["dim"] = 16
    write_json(stem.with_suffix(".json"), description)
    with pytest.raises(CheckpointError, match=r"semantic.safetensors does not fit .*semantic.json"):
        load_model(stem, CLASSES)


def test_weights_that_lack_one_are_refused(stem):
    weights = read_tensors(stem.with_suffix(".safetensors"))
    del weights["start_token"]
    write_tensors(stem.with_suffix(".safetensors"), weights)
    with pytest.raises(CheckpointError, match="does not fit"):
        load_model(stem, CLASSES)


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("suffix", [".json", ".safetensors"])
def test_a_full_disk_leaves_the_file_as_it_was(stem, monkeypatch, suffix):
    path = stem.with_suffix(suffix)
    before = path.read_bytes()
    monkeypatch.setattr(whole_file.os, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(build(), stem) if suffix == ".safetensors" else write_json(path, {})
    assert path.read_bytes() == before
    assert len(list(stem.parent.iterdir())) == 2  # nothing half-written stays


def test_safetensors_own_error_is_the_operating_systems(tmp_path, monkeypatch):
    """`save_file` has an error of its own for a full disk, which nobody would catch."""

    def fails(tensors, path):
        Path(path).write_bytes(b"part")
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", fails)
    with pytest.raises(OSError, match=r"model.safetensors cannot be written: .*No space left"):
        write_tensors(tmp_path / "model.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_views_are_saved(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    write_tensors(tmp_path / "t.safetensors", {"t": base.T, "part": base[0].clone()[1:]})
    read = read_tensors(tmp_path / "t.safetensors")
    assert torch.equal(read["t"], base.T) and torch.equal(read["part"], base[0, 1:])


def test_a_file_has_the_rights_that_new_files_have(tmp_path):
    """safetensors makes its files private, and a package installed by root would be no one else's."""
    (tmp_path / "plain").touch()
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(1)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
