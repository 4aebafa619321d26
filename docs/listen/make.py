"""Writes the page of clips: what a model makes of each line of prompts.txt, to hear and to see.

    python docs/listen/make.py

makes docs/listen.md, docs/listen/index.html (with players) and docs/listen/clips anew with the
bundled model. Needs the extra `plot`. Nothing that was there changes until all of it is made.
"""

import argparse
import html
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from musiclm_engine import MusicLM
from musiclm_engine.audio import save_audio
from musiclm_engine.checkpoint import write_json
from musiclm_engine.doubts import doubt_of_length, doubt_of_similarity, doubt_of_words
from musiclm_engine.musiclm import check_prompts, fingerprint, model_folder
from musiclm_engine.output import draw_spectrogram

DOCS = Path(__file__).parents[1]
PROMPTS = DOCS / "listen" / "prompts.txt"
SEED, NUM_SAMPLES = 0, 4  # the command's own, so that the commands on the page are short
PICTURE_PIXELS = (600, 240)
PICTURE_COLOURS = 32  # a third of the bytes of a full-colour picture, and it looks the same
STYLE = (
    "body{max-width:40em;margin:2em auto;padding:0 1em;font-family:sans-serif}"
    "audio,img{display:block;width:100%}pre{white-space:pre-wrap}"
)

Record = dict[str, Any]


def read_prompts(path: Path) -> list[str]:
    """One a line; empty lines and those that begin with # are for the reader."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return check_prompts([line for line in lines if line and not line.startswith("#")])


def make_clips(prompts: list[str], folder: Path, *, model: Path | None, seconds: float) -> Record:
    """The best candidate of each prompt as .ogg and .png.

    Returns:
        all that the pages tell; also in the folder, as record.json.
    """
    musiclm = MusicLM.from_pretrained(model)
    rows = []
    for number, prompt in enumerate(_with_progress(prompts), start=1):
        # One at a time, as the command on the page does it.
        made = musiclm.generate(prompt, seconds=seconds, num_samples=NUM_SAMPLES, seed=SEED)
        audio, similarity = made.audio[0, 0], made.scores[0, 0].item()
        name = f"{number:02d}-{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')}"
        save_audio(folder / f"{name}.ogg", audio, made.sample_rate)
        _draw(audio, made.sample_rate, folder / f"{name}.png")
        doubts = (
            doubt_of_words(prompt, musiclm.mulan.unseen_words(prompt)),
            doubt_of_length(musiclm.unread(prompt)),
            doubt_of_similarity(prompt, similarity, musiclm.usual_similarity),
        )
        said = [doubt for doubt in doubts if doubt is not None]
        rows.append({"prompt": prompt, "name": name, "similarity": similarity, "doubts": said})
    record = {
        "model_sha256": fingerprint(model_folder(model)),
        "usual_similarity": musiclm.usual_similarity,
        "seconds": seconds,
        "clips": rows,
    }
    write_json(folder / "record.json", record)
    return record


def markdown_page(record: Record) -> str:
    """The page for a reader of the repository."""
    parts = [
        "<!-- Written by docs/listen/make.py: `make listen`. -->",
        "# Listen",
        _about(record) + " What judges that took no part in training say of the model is in its "
        "[card](../engine/musiclm_engine/assets/MODEL_CARD.md). In a checkout, "
        "[listen/index.html](listen/index.html) is this page with players.",
    ]
    for clip in record["clips"]:
        stem = f"listen/clips/{clip['name']}"
        parts += [
            f"## {clip['prompt']}",
            f"[![Spectrogram]({stem}.png)]({stem}.ogg)",
            f"[Listen]({stem}.ogg). MuLaN similarity {clip['similarity']:.3f}.",
            f"```sh\n{_command(clip, record)}\n```",
            *(f"The command says: {doubt}" for doubt in clip["doubts"]),
        ]
    return "\n\n".join(parts) + "\n"


def html_page(record: Record) -> str:
    """The page with players; it needs nothing from elsewhere."""
    parts = [
        "<!DOCTYPE html>",
        "<!-- Written by docs/listen/make.py: `make listen`. -->",
        '<html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        "<title>MusicLM engine: listen</title>",
        f"<style>{STYLE}</style>",
        f"<h1>Listen</h1>\n<p>{html.escape(_about(record))}</p>",
    ]
    for clip in record["clips"]:
        stem = f"clips/{clip['name']}"
        parts += [
            f"<h2>{html.escape(clip['prompt'])}</h2>",
            f'<audio controls preload="none" src="{stem}.ogg"></audio>',
            f'<img src="{stem}.png" alt="Spectrogram" loading="lazy">',
            f"<p>MuLaN similarity {clip['similarity']:.3f}.</p>",
            f"<pre>{html.escape(_command(clip, record))}</pre>",
            *(f"<p>The command says: {html.escape(doubt)}</p>" for doubt in clip["doubts"]),
        ]
    return "\n".join([*parts, "</html>\n"])


def publish(made: Path, docs: Path) -> None:
    """Put the clips and pages of one folder in the place of those that are in another."""
    clips, replaced = docs / "listen" / "clips", made / "replaced"
    clips.parent.mkdir(parents=True, exist_ok=True)
    if clips.exists():
        os.rename(clips, replaced)
    try:
        os.rename(made / "clips", clips)
    except OSError:
        if replaced.exists():
            os.rename(replaced, clips)
        raise
    os.replace(made / "index.html", docs / "listen" / "index.html")
    os.replace(made / "listen.md", docs / "listen.md")


def _about(record: Record) -> str:
    usual = record["usual_similarity"]
    return (
        f"The best of {NUM_SAMPLES} candidates by MuLaN similarity, seed {SEED}, "
        f"{record['seconds']:g} s, default settings, for a fixed list of prompts; the last are of "
        "music that the model does not know. MuLaN similarity is the model's own opinion: the "
        "cosine of its embeddings of prompt and audio."
    ) + ("" if usual is None else f" Of held-out captions, 95 % reach {usual:.3f}.")


def _command(clip: Record, record: Record) -> str:
    length = "" if record["seconds"] == 10 else f" --seconds {record['seconds']:g}"
    return (
        f"musiclm generate {shlex.quote(clip['prompt'])}{length} --seed {SEED} "
        f"--out {clip['name'][:2]}.ogg --spectrogram"
    )


def _draw(audio: torch.Tensor, sample_rate_hz: int, path: Path) -> None:
    draw_spectrogram(audio, sample_rate_hz, path, "", size_pixels=PICTURE_PIXELS)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(PICTURE_COLOURS)
    small.save(path, optimize=True)


def _with_progress(prompts: list[str]) -> Iterator[str]:
    yield from track(prompts, description="clips", console=Console(stderr=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", type=Path, help="folder of a model; the bundled one if not given"
    )
    parser.add_argument("--prompts", type=Path, default=PROMPTS, help="one a line (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each clip (%(default)s)")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of the pages (%(default)s)")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # as the command, whose sums are then rounded alike
    try:
        prompts = read_prompts(given.prompts)
        given.out.mkdir(parents=True, exist_ok=True)
        # Beside the old ones, so that they can be replaced by renaming.
        with tempfile.TemporaryDirectory(dir=given.out, prefix=".listen-") as folder:
            made = Path(folder)
            (made / "clips").mkdir()
            record = make_clips(prompts, made / "clips", model=given.model, seconds=given.seconds)
            (made / "listen.md").write_text(markdown_page(record))
            (made / "index.html").write_text(html_page(record))
            publish(made, given.out)
    except (ValueError, OSError, MemoryError) as error:
        print(f"listen: {error}", file=sys.stderr)
        return 1
    print(given.out / "listen.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
