"""The command, from what is typed to what lies on disk."""

import errno
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import soundfile
import torch
from typer.testing import CliRunner

from musiclm_engine import audio, output
from musiclm_engine.cli import app
from musiclm_engine.musiclm import MusicLM, write_usual_similarity

HYMN = "slow a hymn on church organ"
SHORT = ("--seconds", "0.2", "--num-samples", "2", "--threads", "1")


def musiclm(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(result):
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


def refused(result, *words):
    """Failed with one line that a user can read, and these words in it."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("musiclm: "), result.stderr
    assert not result.stdout
    for word in words:
        assert str(word) in lines[0], lines[0]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def generate(tiny_folder):
    return lambda *arguments: musiclm("generate", "--model", tiny_folder, *SHORT, *arguments)


# What is written.


def test_candidates_record_and_what_is_said(generate, tiny_folder, tmp_path):
    out = tmp_path / "hymn.wav"
    lines = done(generate(HYMN, "--seed", 3, "--set", "semantic_top_k=5", "--out", out))
    assert names(tmp_path) == ["hymn-2.wav", "hymn.json", "hymn.wav"]
    record = json.loads((tmp_path / "hymn.json").read_text())
    assert record["request"] == {
        "prompts": [HYMN],
        "seconds": 0.2,
        "num_samples": 2,
        "seed": 3,
        "settings": {"semantic_top_k": 5},
        "model": str(tiny_folder),
    }
    assert [candidate["file"] for candidate in record["candidates"]] == ["hymn.wav", "hymn-2.wav"]
    scores = [candidate["mulan_similarity"] for candidate in record["candidates"]]
    assert scores == sorted(scores, reverse=True)
    assert record["versions"]["torch"] == version("torch")  # torch itself may add its build
    assert lines[0] == f"{out}  MuLaN similarity {scores[0]:.3f}"
    assert lines[1].startswith(f"{tmp_path / 'hymn-2.wav'}  MuLaN similarity")
    assert lines[2] == str(tmp_path / "hymn.json") and "x real time" in lines[3]

    made = MusicLM.from_pretrained(tiny_folder).generate(
        HYMN, seconds=0.2, num_samples=2, seed=3, semantic_top_k=5
    )
    for n, name in enumerate(("hymn.wav", "hymn-2.wav")):
        samples, rate_hz = soundfile.read(tmp_path / name, dtype="float32")
        assert rate_hz == 16000 and samples.shape == (3200,)
        torch.testing.assert_close(
            torch.from_numpy(samples), made.audio[0, n], rtol=0, atol=2 / 32768
        )


def test_a_low_similarity_is_said_and_recorded(tiny_folder, tmp_path):
    """Between the best scores of two prompts: the one below is doubted, the other is not."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    prompts = (HYMN, "quick a jig on flute")
    out = tmp_path / "two.wav"
    asked = ("generate", *prompts, *SHORT, "--model", folder, "--out", out)
    plain = musiclm(*asked)
    done(plain)
    assert "similarity" not in plain.stderr
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["usual_similarity"] is None and record["doubts"] == []
    best = [candidate["mulan_similarity"] for candidate in record["candidates"][::2]]
    low, high = sorted(zip(best, prompts, strict=True))
    assert low[0] < high[0]
    write_usual_similarity(folder, high[0])
    told = musiclm(*asked)
    done(told)
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["usual_similarity"] == high[0]
    (doubt,) = record["doubts"]
    assert f"for {low[1]!r} has a MuLaN similarity of {low[0]:.3f};" in doubt
    assert f"95 % reach {high[0]:.3f}: this may not be what you asked for." in doubt
    assert doubt in told.stderr.splitlines() and repr(high[1]) not in told.stderr


def test_several_prompts_and_another_format(generate, tmp_path):
    done(generate(HYMN, "quick a jig on flute", "--out", tmp_path / "two.flac"))
    assert names(tmp_path) == [
        "two-prompt1-2.flac",
        "two-prompt1.flac",
        "two-prompt2-2.flac",
        "two-prompt2.flac",
        "two.json",
    ]
    record = json.loads((tmp_path / "two.json").read_text())
    assert [candidate["prompt"] for candidate in record["candidates"]] == [HYMN] * 2 + [
        "quick a jig on flute"
    ] * 2


def test_repeat_gives_the_same_bytes(generate, tmp_path):
    first, again = tmp_path / "first", tmp_path / "again"
    first.mkdir()
    again.mkdir()
    done(generate(HYMN, "--seed", 5, "--set", "guidance=2", "--out", first / "hymn.wav"))
    record = first / "hymn.json"
    done(musiclm("generate", "--repeat", record, "--out", again / "hymn.wav", "--threads", 1))
    assert names(first) == names(again)
    for path in first.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_a_relative_model_is_found_again_from_elsewhere(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_folder.parent)
    out = tmp_path / "hymn.wav"
    done(musiclm("generate", HYMN, "--model", tiny_folder.name, *SHORT, "--out", out))
    monkeypatch.chdir(tmp_path)
    done(musiclm("generate", "--repeat", "hymn.json", "--out", "again.wav"))
    assert out.read_bytes() == (tmp_path / "again.wav").read_bytes()


def test_a_spectrogram_is_drawn(generate, tmp_path):
    """The prompt is its title: as text, whatever it looks like to a typesetter."""
    done(generate("a $5 hymn, $x_ y^", "--spectrogram", "--out", tmp_path / "hymn.wav"))
    assert names(tmp_path) == ["hymn-2.wav", "hymn.json", "hymn.png", "hymn.wav"]
    assert (tmp_path / "hymn.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_spectrogram_is_refused_first(generate, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # importing it fails
    result = generate(HYMN, "--spectrogram", "--out", tmp_path / "hymn.wav")
    refused(result, 'pip install "musiclm-engine[plot]"')
    assert names(tmp_path) == []
    done(generate(HYMN, "--out", tmp_path / "hymn.wav"))  # nothing else needs it


# What is refused, and leaves nothing behind.


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ["prompts is empty"]),
        (("",), ["prompts has ''"]),
        (("  ",), ["prompts has '  '"]),
        ((HYMN, "--seconds", "0"), ["seconds is 0.0"]),
        ((HYMN, "--seconds", "-3"), ["seconds is -3.0"]),
        ((HYMN, "--seconds", "nan"), ["seconds is nan"]),
        ((HYMN, "--seconds", "inf"), ["seconds is inf"]),
        ((HYMN, "--seconds", "1e9"), ["GiB are free"]),
        ((HYMN, "--num-samples", "0"), ["num_samples is 0"]),
        ((HYMN, "--device", "cuda:99"), ["cuda:99", "CUDA devices here"]),
        ((HYMN, "--device", "abacus"), ["abacus", "wanted cpu, cuda or cuda:N"]),
        ((HYMN, "--set", "temprature=1"), ["temprature is no setting"]),
        ((HYMN, "--set", "temperature"), ["--set temperature: wanted NAME=NUMBER"]),
        ((HYMN, "--set", "temperature=hot"), ["--set temperature=hot: wanted NAME=NUMBER"]),
        ((HYMN, "--set", "temperature=-1"), ["temperature is -1"]),
        ((HYMN, "--set", "temperature=nan"), ["temperature is nan"]),
        ((HYMN, "--set", "top_k=inf"), ["top_k is inf"]),
        ((HYMN, "--set", "top_k=nan"), ["top_k is nan"]),
        ((HYMN, "--set", "top_k=2.7"), ["top_k is 2.7", "whole number"]),
        ((HYMN, "--set", "top_p=0"), ["top_p is 0"]),
        ((HYMN, "--model", "nowhere"), ["nowhere/musiclm.json is missing"]),
        ((HYMN, "--out", "nowhere/hymn.wav"), ["there is no folder nowhere"]),
        ((HYMN, "--out", "file/hymn.wav"), ["there is no folder file"]),
        ((HYMN, "--out", "hymn"), ["hymn wanted a name ending in .wav"]),
        ((HYMN, "--out", "hymn.mp3"), ["hymn.mp3 wanted a name ending in .wav"]),
        ((HYMN, "--out", "folder.wav"), ["folder.wav: cannot be written"]),
    ],
)
def test_bad_inputs_leave_nothing_behind(generate, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.wav").mkdir()
    refused(generate(*arguments), *words)
    assert names(tmp_path) == ["file", "folder.wav"]


@pytest.mark.parametrize("option", ["--seconds", "--num-samples", "--seed", "--model", "--set"])
def test_repeat_takes_no_other_wishes(tmp_path, option):
    (tmp_path / "hymn.json").write_text("{}")
    result = musiclm("generate", "--repeat", tmp_path / "hymn.json", option, 3)
    refused(result, "--repeat takes prompts and all settings from its file: leave out")
    refused(musiclm("generate", HYMN, "--repeat", tmp_path / "hymn.json"), "leave out prompts")


REQUEST = {"prompts": [HYMN], "seconds": 1.0, "num_samples": 1, "seed": 0, "settings": {}}


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "[]",
        "{}",
        json.dumps({"request": {"prompts": [HYMN], "tempo": 3}}),
        *(
            json.dumps({"request": REQUEST | change})
            for change in (
                {"prompts": HYMN},
                {"prompts": None},
                {"seconds": "long"},
                {"num_samples": 1.5},
                {"seed": "x"},
                {"settings": []},
                {"model": 3},
            )
        ),
    ],
)
def test_a_file_that_is_no_record_is_refused(tmp_path, content):
    path = tmp_path / "hymn.json"
    path.write_text(content)
    refused(musiclm("generate", "--repeat", path, "--out", tmp_path / "hymn.wav"), path)
    assert names(tmp_path) == ["hymn.json"]
    refused(musiclm("generate", "--repeat", tmp_path / "none.json"), "none.json is missing")


def test_a_full_disk_loses_nothing_that_was_written(generate, tmp_path, monkeypatch):
    out = tmp_path / "hymn.wav"
    (tmp_path / "hymn-2.wav").write_bytes(b"an earlier take")
    (tmp_path / "hymn.json").write_bytes(b"its record")

    def full(path, *arguments):
        if path.name == "hymn-2.wav":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return audio.save_audio(path, *arguments)

    monkeypatch.setattr(output, "save_audio", full)
    refused_with_files = generate(HYMN, "--out", out)
    assert refused_with_files.exit_code == 1
    assert "No space left on device" in refused_with_files.stderr.splitlines()[-1]
    assert "hymn-2.wav" in refused_with_files.stderr.splitlines()[-1]
    assert names(tmp_path) == ["hymn-2.wav", "hymn.json", "hymn.wav"]  # no partial files
    assert soundfile.info(out).frames == 3200
    assert (tmp_path / "hymn-2.wav").read_bytes() == b"an earlier take"
    assert (tmp_path / "hymn.json").read_bytes() == b"its record"


def test_a_full_disk_within_a_file_leaves_no_part_of_it(generate, tmp_path, monkeypatch):
    """The disk fills up while the second candidate is moved to its place."""
    own = audio.files.os.replace

    def full(source, target):
        if target.name == "hymn-2.wav":
            raise OSError(errno.ENOSPC, "No space left on device")
        own(source, target)

    monkeypatch.setattr(audio.files.os, "replace", full)
    result = generate(HYMN, "--out", tmp_path / "hymn.wav")
    assert result.exit_code == 1 and "No space left on device" in result.stderr
    assert names(tmp_path) == ["hymn.wav"]


def test_an_interrupt_is_no_traceback(generate, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(MusicLM, "generate", interrupted)
    result = generate(HYMN, "--out", tmp_path / "hymn.wav")
    assert result.exit_code == 130 and "musiclm: interrupted" in result.stderr
    assert names(tmp_path) == []


# The other commands.


def test_info_tells_versions_model_and_bodies():
    lines = done(musiclm("info"))
    assert any(line.startswith(f"torch {torch.__version__.split('+')[0]}") for line in lines)
    assert any(line.startswith("CUDA devices: ") for line in lines)
    assert any(line.startswith("bundled model: ") for line in lines)
    for operation in ("biased_attention", "decode_attention", "rvq_encode", "sample_logits"):
        assert any(line.strip().startswith(f"{operation}: ") for line in lines), operation


def test_info_works_without_the_bundled_model(tmp_path, monkeypatch):
    from musiclm_engine import info

    monkeypatch.setattr(info, "model_folder", lambda _: tmp_path)
    assert f"bundled model: missing in {tmp_path}" in done(musiclm("info"))


def test_a_repeat_with_other_weights_is_refused(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    asked = ("a tune", "--seconds", 0.3, "--num-samples", 1, "--model", folder)
    done(musiclm("generate", *asked, "--out", tmp_path / "a.wav"))
    description = folder / "musiclm.json"
    description.write_text(description.read_text() + " ")
    again = musiclm("generate", "--repeat", tmp_path / "a.json", "--out", tmp_path / "b.wav")
    refused(again, "made with other weights")
    assert not (tmp_path / "b.wav").exists()


@pytest.mark.parametrize("name", ["seed", "seconds", "on_progress"])
def test_an_argument_is_no_setting(tmp_path, name):
    out = tmp_path / "a.wav"
    refused(
        musiclm("generate", "a tune", "--set", f"{name}=3", "--out", out), f"{name} is no setting"
    )


def test_train_goes_through_bundle_to_generate(tiny_config, tiny_corpus, tmp_path):
    common = ("--config", tiny_config, "--run-dir", tmp_path / "run")
    trained = musiclm("train", "codec", *common, "--manifest", tiny_corpus, "--threads", 1)
    done(trained)
    assert "codec 3: loss" in trained.stderr and "held out: " in trained.stderr
    refused(musiclm("bundle", tmp_path / "out", *common), "tokenizer/model.json is missing")
    other = ("bundle", tmp_path / "out", *common, "--dtype", "float64")
    refused(musiclm(*other), "--dtype float64: wanted float32, float16, bfloat16, int8")
    assert not (tmp_path / "out").exists()


def test_train_all_stops_goes_on_and_bundles(tiny_config, tiny_corpus, tmp_path):
    common = ("--config", tiny_config, "--manifest", tiny_corpus, "--threads", 1)
    first = musiclm(
        *("train", "all", *common, "--run-dir", tmp_path / "far"),
        *("--stop-after", 0, "--parcel", tmp_path / "parcel", "--bundle", tmp_path / "model"),
    )
    assert done(first) == ["stopped and saved: the same command goes on"]
    assert names(tmp_path) == ["far", "parcel"] and names(tmp_path / "far") == ["codec"]
    here = tmp_path / "here"
    assert done(musiclm("unpack", tmp_path / "parcel", here)) == [str(here)]
    again = ("train", "all", *common, "--run-dir", here, "--bundle", tmp_path / "model")
    assert done(musiclm(*again))[-1] == str(tmp_path / "model")
    asked = ("--model", tmp_path / "model", *SHORT, "--out", tmp_path / "hymn.wav")
    told = musiclm("generate", "Polyphonic zydeco" + 9 * f", {HYMN}", *asked)
    done(told)
    assert "no music called polyphonic, zydeco: it will make the nearest" in told.stderr
    of_words, of_length = json.loads((tmp_path / "hymn.json").read_text())["doubts"]
    assert {of_words, of_length} <= {*told.stderr.splitlines()}
    assert "A prompt is too long" in of_length and HYMN.split()[-1] in of_length
    refused(musiclm("unpack", tmp_path / "parcel", here), "holds a run already")
    refused(musiclm("unpack", tmp_path, tmp_path / "new"), "holds no parcel")


def test_train_renders_what_is_not_there(tiny_config, tmp_path):
    """Two clips, both to train on: enough to see that they are taken, too few to train."""
    manifest = tmp_path / "corpus" / "manifest.jsonl"
    asked = ("--config", tiny_config, "--manifest", manifest, "--run-dir", tmp_path / "run")
    told = musiclm("train", "codec", *asked, "--hours", 0.005)
    assert told.exit_code == 1
    assert told.stderr.splitlines()[-1].endswith("no clips in split 'validation'")
    assert len(manifest.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("codec", "--manifest", "nowhere.jsonl"), ["nowhere.jsonl"]),
        (("vocals",), ["name is 'vocals', wanted one of codec"]),
        (("codec", "--config", "huge"), ["no configuration huge"]),
        (("codec", "--device", "abacus"), ["abacus"]),
        (("mulan", "--manifest", "empty.jsonl"), ["empty.jsonl: no clips"]),
        (("fine",), ["has no codec yet: run `musiclm train codec`"]),
        (("all", "--hours", "0.005", "--config", "huge"), ["no configuration huge"]),
        (("all", "--hours", "0.005", "--device", "abacus"), ["abacus"]),
        (("all", "--hours", "0.005", "--manifest", "own.jsonl"), ["there is no own.jsonl"]),
    ],
)
def test_training_that_cannot_start_says_why(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").write_text("\n")
    refused(musiclm("train", *arguments), *words)
    assert names(tmp_path) == ["empty.jsonl"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--hours", "0"), ["hours=0"]),
        (("--hours", "nan"), ["hours=nan"]),
        (("--workers", "0"), ["workers must be at least 1"]),
        (("--soundfont", "nowhere.sf2", "--hours", "0.01"), ["nowhere.sf2"]),
    ],
)
def test_a_build_that_cannot_start_says_why(tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    refused(musiclm("data", "build", "corpus", *arguments), *words)
    assert names(tmp_path) == []


def test_eval_needs_a_manifest(tiny_folder, tmp_path):
    result = musiclm("eval", "--model", tiny_folder, "--manifest", tmp_path / "none.jsonl")
    assert result.exit_code == 1 and "none.jsonl" in result.stderr


def test_a_number_that_is_none_is_a_usage_error():
    result = musiclm("generate", HYMN, "--seconds", "long")
    assert result.exit_code == 2 and "--seconds" in result.stderr


def test_a_process_of_its_own_shows_no_traceback(tmp_path):
    failed = subprocess.run(
        [sys.executable, "-m", "musiclm_engine.cli", "generate", "hymn", "--out", "no/hymn.wav"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert failed.returncode == 1
    assert failed.stderr == "musiclm: no/hymn.wav: there is no folder no\n"
    assert names(tmp_path) == []
