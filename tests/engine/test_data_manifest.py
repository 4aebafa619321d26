"""Manifests: what is written comes back, and what is wrong is named."""

import json
from pathlib import Path
from typing import Any

import pytest

from musiclm_engine.data import Clip, ManifestError, load_manifest, write_manifest

ROW: dict[str, Any] = {
    "audio": "a.wav",
    "seconds": 10.0,
    "captions": ["a slow hymn"],
    "split": "train",
    "piece": "p",
    "facts": {"key": None},
}


def write_rows(folder: Path, *rows: dict[str, Any] | str) -> Path:
    (folder / "a.wav").touch()
    path = folder / "manifest.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_round_trip(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    clips = []
    for index, split in enumerate(("train", "validation", "test")):
        audio = tmp_path / "clips" / f"{index}.flac"
        audio.touch()
        clips.append(
            Clip(audio, 10.0, ("één", "two"), split, f"p{index}", {"notes": [[0.0, 1.0, 60]]})
        )
    path = write_manifest(tmp_path / "manifest.jsonl", clips)
    assert load_manifest(path) == clips
    assert load_manifest(path, "validation") == [clips[1]]
    assert json.loads(path.read_text("utf-8").splitlines()[0])["audio"] == "clips/0.flac"


def test_a_manifest_moves_with_its_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    old.mkdir()
    write_rows(old, ROW)
    new = old.rename(tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    (clip,) = load_manifest("new/manifest.jsonl")
    assert clip.audio == new / "a.wav" and clip.audio.is_absolute()


def test_a_failed_write_leaves_the_old_manifest(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ROW)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_manifest(path, [Clip(Path("b.wav"), 1.0, ("x",), "train", "p", {"bad": object()})])
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.wav", "manifest.jsonl"]


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ('{"audio": ', "not JSON"),
        ("[1]", "expected an object"),
        (
            {k: v for k, v in ROW.items() if k not in ("captions", "piece")},
            "missing captions, piece",
        ),
        (ROW | {"seconds": "10"}, "seconds"),
        (ROW | {"seconds": 0}, "seconds"),
        (ROW | {"captions": []}, "captions"),
        (ROW | {"captions": [""]}, "caption"),
        (ROW | {"captions": "a hymn"}, "captions"),
        (ROW | {"split": "dev"}, "'dev'"),
        (ROW | {"audio": 3}, "audio"),
        (ROW | {"facts": []}, "facts"),
    ],
)
def test_errors_name_file_line_and_fault(tmp_path: Path, bad: Any, said: str) -> None:
    path = write_rows(tmp_path, ROW, bad)
    with pytest.raises(ManifestError, match=said) as raised:
        load_manifest(path)
    assert str(raised.value).startswith(f"{path}:2: ")


def test_missing_audio_is_listed_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ROW, *(ROW | {"audio": f"{i}.wav"} for i in range(9)))
    with pytest.raises(ManifestError, match="9 of 10 audio files are missing") as raised:
        load_manifest(path)
    said = str(raised.value)
    assert f"{path}:2: {tmp_path / '0.wav'}" in said and "and 4 more" in said
    assert "8.wav" not in said


def test_no_clips_is_an_error(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ROW)
    with pytest.raises(ManifestError, match="no clips in split 'test'"):
        load_manifest(path, "test")
    with pytest.raises(ManifestError, match="'dev' is not one of"):
        load_manifest(path, "dev")
    with pytest.raises(ManifestError, match="no clips"):
        load_manifest(write_rows(tmp_path, ""))
    with pytest.raises(FileNotFoundError):
        load_manifest(tmp_path / "none.jsonl")
