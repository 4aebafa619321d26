"""A whole evaluation with a tiny model and stand-in judges: what is kept, redone and refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from musiclm_engine.audio import save_audio
from musiclm_engine.cli import app
from musiclm_engine.data.manifest import Clip, load_manifest, write_manifest
from musiclm_engine.evaluation import clip_tokens, held_out, memorisation
from musiclm_engine.evaluation.held_out import evaluate_held_out
from musiclm_engine.evaluation.instruments import INSTRUMENT_TAGS
from musiclm_engine.evaluation.judges import Judgement
from musiclm_engine.evaluation.notes import NoteActivity, NotePosteriors
from musiclm_engine.evaluation.report import markdown_table
from musiclm_engine.evaluation.tagger import Tagging
from musiclm_engine.musiclm import MusicLM

pytest.importorskip("scipy")
CLIPS = 10  # two batches of prompts
FACTS = {"instrument": "flute", "key": "G", "mode": "major", "tempo_bpm": 90}
STATED = ({"instrument", "key"}, {"mode", "tempo_word"}, {"tempo_bpm"})


class StandIn:
    """Judges quickly, always the same of the same samples, and counts how often."""

    judged = 0

    def __call__(self, audio: np.ndarray, sample_rate_hz: int) -> Judgement:
        StandIn.judged += 1
        rng = self.random(audio)
        return Judgement(
            {name: float(rng.normal()) for name in INSTRUMENT_TAGS},
            (int(rng.integers(12)), str(rng.choice(["major", "minor"]))),
            float(rng.integers(60, 120)),
            NoteActivity(10, 5.0, 0.9),
            self.tag(audio, sample_rate_hz).embedding,
        )

    def transcribe(self, audio: np.ndarray, sample_rate_hz: int) -> NotePosteriors:
        notes = np.zeros((40, 88))
        notes[: 15 + int(self.random(audio).integers(20)), 40] = 1
        return NotePosteriors(notes, np.zeros_like(notes))

    def tag(self, audio: np.ndarray, sample_rate_hz: int) -> Tagging:
        rng = self.random(audio)
        return Tagging(rng.random(50), rng.normal(size=(3, 4)))

    @staticmethod
    def random(audio: np.ndarray) -> np.random.Generator:
        assert audio.dtype == np.float32 and audio.ndim == 1
        return np.random.default_rng(crc32(audio.tobytes()))


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(held_out, "Judges", StandIn)
    monkeypatch.setattr(held_out, "CODEC_CLIPS", 2)
    monkeypatch.setattr(clip_tokens, "CLIPS_PER_FILE", 2)
    for module in (held_out, memorisation):
        monkeypatch.setattr(module, "CONTINUED_SECONDS", 0.2)
        monkeypatch.setattr(module, "PROMPT_SECONDS", (0.0, 0.2))
    StandIn.judged = 0


@pytest.fixture(scope="module")
def manifest(tones, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("held-out")
    clips = []
    for n, split in enumerate(["train"] * 5 + ["validation"] * 3 + ["test"] * 12):
        path = folder / f"{n}.wav"
        save_audio(path, tones(0.4, 200.0 + 30 * n, 500.0), 16_000)
        caption = f"tune {n} on a flute"
        clips.append(
            Clip(
                path, 0.4, (caption, "a flute"), split, f"piece {n}", FACTS, (STATED[n % 3], set())
            )
        )
    return write_manifest(folder / "manifest.jsonl", clips)


@pytest.fixture
def generated(tiny_musiclm, monkeypatch) -> list[str]:
    """The prompts that the model was asked for, as they come."""
    asked: list[str] = []
    generate = type(tiny_musiclm).generate

    def listen(self, prompts, **settings):
        asked.extend(prompts)
        return generate(self, prompts, **settings)

    monkeypatch.setattr(type(tiny_musiclm), "generate", listen)
    return asked


def run(model, manifest, work, **changes):
    settings = {"model_sha256": "a model", "clips": CLIPS, "seed": 3, "work": work} | changes
    return evaluate_held_out(model, manifest, **settings)


def different_sounds(work: Path) -> int:
    """Among all candidates and the clips of the test split that were asked for."""
    candidates = {path.read_bytes() for path in (work / "candidates").glob("*.flac")}
    return len(candidates) + CLIPS


def test_an_evaluation_cut_short_goes_on(tiny_musiclm, manifest, generated, tmp_path) -> None:
    whole = run(tiny_musiclm, manifest, tmp_path / "whole")
    captions = list(generated)
    assert captions == whole["captions"] and len(set(captions)) == CLIPS
    judged = StandIn.judged
    # Four candidates and the true clip of each caption; some tiny candidates sound alike.
    assert judged == different_sounds(tmp_path / "whole") > 3 * CLIPS
    StandIn.judged = 0
    generated.clear()

    def stop_at(what: str, number: int):
        def stop(name: str, done: int, total: int) -> None:
            assert 0 <= done <= total
            if name == what and done >= number:
                raise KeyboardInterrupt

        return stop

    for what, number in (("generated", 8), ("judged", 7), ("codec", 1), ("tokens", 2)):
        with pytest.raises(KeyboardInterrupt):
            run(tiny_musiclm, manifest, tmp_path / "cut", on_progress=stop_at(what, number))
    assert generated == captions  # each once, though it was stopped four times
    assert run(tiny_musiclm, manifest, tmp_path / "cut") == whole
    assert generated == captions and StandIn.judged == judged

    assert run(tiny_musiclm, manifest, tmp_path / "cut") == whole  # all of it is there
    assert generated == captions and StandIn.judged == judged
    run(tiny_musiclm, manifest, tmp_path / "cut", clips=4)  # the first of the same
    assert generated == captions and StandIn.judged == judged
    run(tiny_musiclm, manifest, tmp_path / "cut", model_sha256="another model")
    assert generated == captions * 2
    assert StandIn.judged == judged  # it sounds the same, and so was judged before


def test_parts_make_the_whole(tiny_musiclm, manifest, generated, tmp_path) -> None:
    parts = tmp_path / "parts"
    assert run(tiny_musiclm, manifest, parts, part=(2, 2)) is None
    assert len(generated) == 2  # the second batch
    assert run(tiny_musiclm, manifest, parts, part=(1, 2)) is None
    figures = run(tiny_musiclm, manifest, parts)
    assert len(generated) == CLIPS and sorted(generated) == sorted(figures["captions"])
    assert StandIn.judged == different_sounds(parts)
    assert figures == run(tiny_musiclm, manifest, tmp_path / "at once")
    for part in ((0, 2), (3, 2)):
        with pytest.raises(
            ValueError, match=rf"part is {part[0]}/2, wanted k/n with k from 1 to n"
        ):
            run(tiny_musiclm, manifest, parts, part=part)


def test_all_figures_are_there_and_in_the_report(tiny_musiclm, manifest, tmp_path) -> None:
    figures = run(tiny_musiclm, manifest, tmp_path)
    figures = json.loads(json.dumps(figures))
    chosen = {caption: int(caption.split()[1]) for caption in figures["captions"]}
    states = [STATED[n % 3] for n in chosen.values()]
    counts = {name: row["num_judged"] for name, row in figures["measures"].items()}
    assert figures["facts_are_stated"] is True
    assert counts["instrument"] == counts["key_exact"] == sum("key" in s for s in states)
    assert counts["mode"] == sum("key" in s or "mode" in s for s in states)
    assert counts["tempo_accuracy2"] == sum("tempo_bpm" in s for s in states)
    frechet = figures["frechet"]
    assert (frechet["num_clips"], frechet["num_others"]) == (
        10,
        5,
    )  # 3 to validate, 2 not asked for
    assert (frechet["num_patches"], frechet["num_patches_of_others"]) == (30, 15)
    assert frechet["ratio"] == pytest.approx(frechet["generated"] / frechet["codec"])
    assert frechet["codec_levels"] == 3
    assert [row["levels"] for row in figures["codec"]["levels"]] == [1, 2, 3]
    known = figures["memorisation"]
    assert (known["num_trained"], known["num_held_out"], known["num_searched"]) == (5, 15, 5)
    assert known["num_generated"] == 4 * CLIPS and len(known["rows"]) == 4
    assert figures["mulan_similarity"]["best"] >= figures["mulan_similarity"]["any"]
    report = markdown_table(figures)
    for words in ("best of 4", "| codec levels |", "Fréchet distance to 5 real", "Memorisation"):
        assert words in report


def test_without_stated_facts_all_are_judged_and_the_report_says_so(
    tiny_musiclm, manifest, tmp_path
) -> None:
    plain = tmp_path / "manifest.jsonl"
    clips = [replace(c, stated=()) for c in load_manifest(manifest)]
    figures = run(tiny_musiclm, write_manifest(plain, clips), tmp_path / "work")
    assert figures["facts_are_stated"] is False
    assert {row["num_judged"] for row in figures["measures"].values()} == {CLIPS}
    assert "The manifest does not say what captions state" in markdown_table(figures)


def test_the_command_prints_and_writes_the_figures(tiny_folder, manifest, tmp_path) -> None:
    def musiclm(*arguments: object):
        words = [
            "eval",
            "--model",
            tiny_folder,
            "--manifest",
            manifest,
            "--work",
            tmp_path / "work",
        ]
        return CliRunner().invoke(app, [str(word) for word in [*words, *arguments]])

    part = musiclm("--clips", 3, "--part", "1/2")
    assert part.exit_code == 0, part.output
    assert part.stdout.startswith("part 1/2 is in")
    out = tmp_path / "figures.json"
    result = musiclm("--clips", 3, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == markdown_table(json.loads(out.read_text())).strip()
    for arguments, message in (
        (("--clips", 13), f"clips is 13, {manifest} has 12 in its test split"),
        (("--part", "two"), "--part two: wanted K/N"),
    ):
        refused = musiclm(*arguments)
        assert refused.exit_code == 1 and message in refused.stderr


def test_calibration_writes_what_is_usual_into_the_folder(tiny_folder, manifest, tmp_path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)

    def calibrate(*arguments: object):
        words = ["eval", "--model", folder, "--manifest", manifest, "--work", tmp_path / "work"]
        words += ["--clips", 3, "--calibrate", *arguments]
        return CliRunner().invoke(app, [str(word) for word in words])

    refused = calibrate("--part", "1/2")
    assert refused.exit_code == 1 and "leave out --part" in refused.stderr
    result = calibrate("--out", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    records = [json.loads(p.read_text()) for p in (tmp_path / "work" / "candidates").glob("*.json")]
    assert len(records) == 3
    worst, middle, _ = sorted(record["similarity"][0] for record in records)
    usual = MusicLM.from_pretrained(folder).usual_similarity
    assert usual == pytest.approx(worst + 0.1 * (middle - worst))  # a twentieth of two steps
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["mulan_similarity"]["usual"] == usual
    again = calibrate()
    assert again.exit_code == 0 and again.stdout == result.stdout
    assert len([*(tmp_path / "work" / "candidates").glob("*.json")]) == 3  # it is the same model


def test_the_command_for_codecs_alone(tiny_folder, manifest, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("musiclm_engine.evaluation.codec_judgement.Judges", StandIn)

    def musiclm(*arguments: object):
        words = ["eval-codec", "--manifest", manifest, "--clips", 3, *arguments]
        return CliRunner().invoke(app, [str(word) for word in words])

    result = musiclm("--model", tiny_folder)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n| ") == 4 and "3 held-out clips" in result.stdout
    run_dir = tmp_path / "run" / "codec"
    run_dir.mkdir(parents=True)
    for suffix in (".json", ".safetensors"):
        (run_dir / f"model{suffix}").write_bytes((tiny_folder / f"codec{suffix}").read_bytes())
    assert musiclm("--run-dir", run_dir.parent).stdout == result.stdout
    refused = musiclm("--run-dir", run_dir.parent, "--model", tiny_folder)
    assert refused.exit_code == 1 and "leave one out" in refused.stderr
    missing = musiclm("--run-dir", tmp_path / "nowhere")
    assert missing.exit_code == 1 and "is missing" in missing.stderr


def test_a_missing_judge_is_told_before_anything_is_generated(
    tiny_musiclm, manifest, generated, tmp_path, monkeypatch
) -> None:
    def missing() -> None:
        raise ModuleNotFoundError("pip install basic-pitch")

    monkeypatch.setattr(held_out, "Judges", missing)
    with pytest.raises(ModuleNotFoundError, match="basic-pitch"):
        run(tiny_musiclm, manifest, tmp_path)
    assert not generated and not list(tmp_path.iterdir())


def test_facts_that_the_judges_do_not_know_cost_no_generation(
    tiny_musiclm, manifest, generated, tmp_path
) -> None:
    strange = tmp_path / "manifest.jsonl"
    clips = [replace(c, facts={**c.facts, "instrument": "kazoo"}) for c in load_manifest(manifest)]
    with pytest.raises(ValueError, match="got 'kazoo'"):
        run(tiny_musiclm, write_manifest(strange, clips), tmp_path / "work")
    assert not generated


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"piece": "one"}, "no clips of other pieces to compare 10 test clips with"),
        ({"seconds": 0.3}, r"has clips of 0.3 s, wanted 0.4 s or more"),
    ],
)
def test_what_would_fail_in_the_end_costs_no_generation(
    tiny_musiclm, manifest, generated, tmp_path, changes, message
) -> None:
    clips = [replace(c, **changes) for c in load_manifest(manifest)]
    with pytest.raises(ValueError, match=message):
        run(tiny_musiclm, write_manifest(tmp_path / "manifest.jsonl", clips), tmp_path / "work")
    assert not generated


def test_clips_of_several_lengths_are_judged_to_the_end(tiny_musiclm, tones, tmp_path) -> None:
    """And files that end a little before their manifest says."""
    clips = []
    for n, split in enumerate(["train"] * 4 + ["validation"] * 3 + ["test"] * 3):
        path, seconds = tmp_path / f"{n}.wav", (0.4, 0.6)[n % 2]
        audio = tones(seconds, 200.0 + 30 * n)
        save_audio(path, audio[: len(audio) - 50 * (n % 3)], 16_000)
        clips.append(Clip(path, seconds, (f"tune {n}",), split, f"piece {n}", FACTS))
    manifest = write_manifest(tmp_path / "manifest.jsonl", clips)
    figures = run(tiny_musiclm, manifest, tmp_path / "work", clips=3)
    assert figures["memorisation"]["num_generated"] == 12
    assert figures["memorisation"]["num_searched"] == 4


def test_the_distance_is_to_clips_of_other_pieces(tiny_musiclm, manifest, tmp_path) -> None:
    """Another rendering of a caption's own piece would lie nearer than music of its kind."""
    clips = [replace(c, piece="one") if c.split == "test" else c for c in load_manifest(manifest)]
    figures = run(
        tiny_musiclm, write_manifest(tmp_path / "manifest.jsonl", clips), tmp_path / "work", clips=3
    )
    assert figures["frechet"]["num_others"] == 3  # those to validate


def test_music_that_training_knows_under_another_name_is_left_out(
    tiny_musiclm, manifest, tmp_path
) -> None:
    tune = [[0.3 * n, 0.3, 60 + n * n % 11] for n in range(20)]
    higher_and_faster = [[0.2 * n, 0.2, 65 + n * n % 11] for n in range(20)]
    clips = load_manifest(manifest)
    clips[0] = replace(clips[0], facts=FACTS | {"notes": tune})
    clips[-1] = replace(clips[-1], facts=FACTS | {"notes": higher_and_faster})
    known = write_manifest(tmp_path / "manifest.jsonl", clips)
    figures = run(tiny_musiclm, known, tmp_path / "work")
    assert figures["num_known_left_out"] == 1
    assert clips[-1].captions[0] not in figures["captions"]
    assert figures["frechet"]["num_others"] == 4
    assert "Left out: 1 held-out clips" in markdown_table(figures)
    with pytest.raises(ValueError, match="has 11 in its test split of music that is not in train"):
        run(tiny_musiclm, known, tmp_path / "work", clips=12)


def test_what_is_judged_is_what_lies_on_disk(tiny_musiclm, manifest, tmp_path) -> None:
    """Four files a caption that can be played, best first."""
    figures = run(tiny_musiclm, manifest, tmp_path, clips=2)
    records = sorted((tmp_path / "candidates").glob("*.json"))
    assert len(records) == 2 and len(list((tmp_path / "candidates").glob("*.flac"))) == 8
    for record in records:
        content = json.loads(record.read_text())
        assert content["caption"] in figures["captions"]
        assert content["similarity"] == sorted(content["similarity"], reverse=True)
        assert torch.tensor(content["semantic"]).shape == (4, 10)
