"""The page of clips: what is on it, that it is whole or as it was, and that it is not stale."""

import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import soundfile
import torch

from musiclm_engine import MusicLM
from musiclm_engine.audio import load_audio, save_audio
from musiclm_engine.musiclm import fingerprint, model_folder, write_usual_similarity

pytest.importorskip("matplotlib")
DOCS = Path(__file__).parents[2] / "docs"
PROMPTS = ["slow a hymn on church organ", "rock & <roll>, $5_"]

spec = importlib.util.spec_from_file_location("make_listen", DOCS / "listen" / "make.py")
assert spec is not None and spec.loader is not None
listen = importlib.util.module_from_spec(spec)
spec.loader.exec_module(listen)


@pytest.fixture(scope="module")
def folder(tiny_folder, tmp_path_factory) -> Path:
    """The tiny model, for which a similarity of 1 would be usual."""
    copy = tmp_path_factory.mktemp("usual")
    for path in tiny_folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    write_usual_similarity(copy, 1.0)
    return copy


def make(model: Path, work: Path) -> int:
    prompts = work / "prompts.txt"
    prompts.write_text("# For the reader.\n" + "\n\n".join(PROMPTS) + "\n")
    asked = ("--model", model, "--prompts", prompts, "--out", work / "docs", "--seconds", 0.2)
    return listen.main([str(word) for word in asked])


@pytest.fixture(scope="module")
def docs(folder, tmp_path_factory) -> Path:
    work = tmp_path_factory.mktemp("listen")
    assert make(folder, work) == 0
    return work / "docs"


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_prompt_has_its_best_candidate_and_a_small_picture(docs, folder, tmp_path):
    record = json.loads((docs / "listen" / "clips" / "record.json").read_text())
    assert [clip["prompt"] for clip in record["clips"]] == PROMPTS
    names = [clip["name"] for clip in record["clips"]]
    assert names == ["01-slow-a-hymn-on-church-organ", "02-rock-roll-5"]
    clips = {f"listen/clips/{name}.{kind}" for name in names for kind in ("ogg", "png")}
    pages = {"listen.md", "listen/index.html", "listen/clips/record.json"}
    assert files(docs).keys() == clips | pages
    model = MusicLM.from_pretrained(folder)
    for clip in record["clips"]:
        stem = docs / "listen" / "clips" / clip["name"]
        made = model.generate(clip["prompt"], seconds=0.2)  # the command's own settings
        assert clip["similarity"] == made.scores[0, 0].item()
        save_audio(tmp_path / "best.ogg", made.audio[0, 0], 16_000)
        wanted = load_audio(tmp_path / "best.ogg", 16_000)
        assert torch.equal(load_audio(stem.with_suffix(".ogg"), 16_000), wanted)
        assert soundfile.info(stem.with_suffix(".ogg")).subtype == "VORBIS"
        picture = stem.with_suffix(".png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) <= 60_000


def test_the_pages_tell_all_and_name_only_files_that_are_there(docs):
    record = json.loads((docs / "listen" / "clips" / "record.json").read_text())
    page = (docs / "listen.md").read_text()
    players = (docs / "listen" / "index.html").read_text()
    for clip in record["clips"]:
        assert f"## {clip['prompt']}\n" in page and f"{clip['similarity']:.3f}" in page
        (doubt,) = clip["doubts"]
        assert f"for {clip['prompt']!r} has a MuLaN similarity of" in doubt and doubt in page
    assert "musiclm generate 'rock & <roll>, $5_' --seconds 0.2 --seed 0 --out 02.ogg" in page
    links = re.findall(r"\]\((listen/[^)]*)\)", page)
    assert len(links) == 1 + 3 * len(PROMPTS)
    assert all((docs / link).is_file() for link in links)

    sources: list[tuple[str, str]] = []
    texts: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            sources.extend((tag, value) for name, value in attributes if name in ("src", "href"))

        def handle_data(self, data):
            texts.append(data)

    Reader().feed(players)
    assert [tag for tag, _ in sources] == ["audio", "img"] * len(PROMPTS)
    assert all((docs / "listen" / source).is_file() for _, source in sources)
    assert {*PROMPTS} <= {*texts}


def test_made_again_it_is_the_same_and_what_is_gone_is_gone(docs, folder, tmp_path):
    (tmp_path / "docs" / "listen" / "clips").mkdir(parents=True)
    (tmp_path / "docs" / "listen" / "clips" / "old.ogg").write_bytes(b"an earlier prompt")
    assert make(folder, tmp_path) == 0
    again, first = files(tmp_path / "docs"), files(docs)
    assert again.keys() == first.keys()
    # An Ogg stream has a serial number drawn at random.
    differs = {name for name in first if again[name] != first[name]}
    assert all(name.endswith(".ogg") for name in differs)


@pytest.mark.parametrize("breaks", ["generate", "publish", "html_page"])
def test_what_fails_leaves_the_pages_as_they_were(breaks, folder, tmp_path, monkeypatch, capsys):
    clips = tmp_path / "docs" / "listen" / "clips"
    clips.mkdir(parents=True)
    (clips / "01.ogg").write_bytes(b"an earlier clip")
    (tmp_path / "docs" / "listen.md").write_text("an earlier page")
    before = files(tmp_path / "docs")
    own = MusicLM.generate

    def second_fails(self, prompt, **settings):
        if prompt == PROMPTS[1]:
            raise OSError("the disk is full")
        return own(self, prompt, **settings)

    def fails(*_):
        raise OSError("the disk is full")

    if breaks == "generate":
        monkeypatch.setattr(MusicLM, "generate", second_fails)
    elif breaks == "html_page":
        monkeypatch.setattr(listen, "html_page", fails)
    else:
        rename = listen.os.rename
        new = re.compile(r"\.listen-[^/]*/clips$")

        def moves_all_but_new(source, target):
            if new.search(str(source)):
                fails()
            rename(source, target)

        monkeypatch.setattr(listen.os, "rename", moves_all_but_new)
    assert make(folder, tmp_path) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "listen: the disk is full"
    assert files(tmp_path / "docs") == before


def test_without_prompts_it_refuses(tiny_folder, tmp_path, capsys):
    (tmp_path / "none.txt").write_text("# nothing\n")
    asked = ("--model", tiny_folder, "--prompts", tmp_path / "none.txt", "--out", tmp_path / "docs")
    assert listen.main([str(word) for word in asked]) == 1
    assert "prompts is empty" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def test_the_page_in_the_repository_is_of_the_bundled_model():
    """If it fails: `make listen`."""
    record = json.loads((DOCS / "listen" / "clips" / "record.json").read_text())
    bundled = model_folder(None)
    assert record["model_sha256"] == fingerprint(bundled)
    settings = json.loads((bundled / "musiclm.json").read_text())
    assert record["usual_similarity"] == settings.get("usual_similarity")
    assert [c["prompt"] for c in record["clips"]] == listen.read_prompts(listen.PROMPTS)
    assert (DOCS / "listen.md").read_text() == listen.markdown_page(record)
    assert (DOCS / "listen" / "index.html").read_text() == listen.html_page(record)
    sizes = {path.name: path.stat().st_size for path in (DOCS / "listen" / "clips").iterdir()}
    assert all(size <= 120_000 for size in sizes.values()), sizes
