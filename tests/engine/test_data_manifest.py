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


def test_what_captions_state_comes_back(tmp_path: Path) -> None:
    clip = Clip(
        tmp_path / "a.wav",
        10.0,
        ("a slow hymn in G major", "music"),
        "train",
        "p",
        stated=(frozenset({"tempo_word", "kind", "key"}), frozenset()),
    )
    clip.audio.touch()
    path = write_manifest(tmp_path / "manifest.jsonl", [clip])
    assert load_manifest(path) == [clip]
    assert json.loads(path.read_text("utf-8"))["stated"] == [["kind", "key", "tempo_word"], []]


def test_without_stated_every_caption_states_nothing_known(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ROW | {"captions": ["one", "two"]})
    (clip,) = load_manifest(path)
    assert clip.stated == (frozenset(), frozenset())
    assert Clip(Path("a"), 1.0, ("x", "y", "z"), "train", "p").stated == (frozenset(),) * 3
    assert "stated" not in json.loads(write_manifest(path, [clip]).read_text("utf-8"))
    with pytest.raises(ValueError, match="stated has 1 entries for 2 captions"):
        Clip(Path("a"), 1.0, ("x", "y"), "train", "p", stated=(frozenset(),))
    with pytest.raises(ValueError, match=r"stated\[0\] names 'tempo'"):
        Clip(Path("a"), 1.0, ("x",), "train", "p", stated=(frozenset({"tempo"}),))


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
        (ROW | {"stated": None}, "stated must be a list of lists, .* found None"),
        (ROW | {"stated": ["key"]}, r"stated must be a list of lists, .* found \['key'\]"),
        (ROW | {"stated": []}, r"stated must be a list of lists, .* found \[\]"),
        (ROW | {"stated": [[], []]}, "stated has 2 entries for 1 captions, want one for each"),
        (ROW | {"stated": [[3]]}, r"stated\[0\] must hold names, found \[3\]"),
        (
            ROW | {"captions": ["x", "y"], "stated": [["key"], ["bpm"]]},
            r"stated\[1\] names 'bpm', which is not one of instrument, family, kind, key",
        ),
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
