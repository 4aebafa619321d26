"""The wheel, as a stranger gets it: built from a clean copy, run from another folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

ROOT = Path(__file__).parents[1]
PROMPT = "a slow hymn on a church organ in G minor"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    # Without PYTHONPATH, and with what `ensurepip` and `pip` need of the rest.
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | environment
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        check=False,
        env=clean,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, f"{command}:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git holds or would take in: a leftover build/ would show in the wheel."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    # The environment's own setuptools, which torch requires, rather than one from the network.
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation")
    run(*pip, "--wheel-dir", dist, source, cwd=dist)
    (built,) = dist.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bin folder of an environment with the wheel, and behind it the packages of this one.

    A path in a .pth file comes after the environment's own packages, and .pth files found there
    are not read: an editable install of this repository is out of sight.
    """
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    scripts = folder / "bin"
    run(
        *(sys.executable, "-m", "pip", "--python", scripts / "python", "install"),
        *("--no-deps", "--no-index", wheel),
        cwd=folder.parent,
    )
    (site_packages,) = folder.glob("lib/python*/site-packages")
    outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site_packages / "outer.pth").write_text("\n".join(outer) + "\n")
    return scripts


def test_the_wheel_holds_what_it_needs_and_no_more(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"musiclm_engine", "musiclm_kernels"}
    data = {
        "musiclm_engine/py.typed",
        "musiclm_kernels/py.typed",
        "musiclm_engine/data/scores/chorales.jsonl.gz",
        "musiclm_engine/data/scores/tunes.jsonl.gz",
        "musiclm_engine/data/soundfonts/musescore_general_eight.sf3",
        "musiclm_engine/data/soundfonts/COPYRIGHT",
        "musiclm_engine/training/configs/recordings.toml",
        "musiclm_engine/training/configs/soundstream.toml",
        "musiclm_engine/training/configs/tiny.toml",
        "musiclm_engine/training/configs/tiny-h100.toml",
    }
    for package in ("engine", "kernels"):
        folder = ROOT / package
        data |= {file.relative_to(folder).as_posix() for file in folder.glob("musiclm_*/**/*.py")}
    assert data <= names, sorted(data - names)
    for legal in ("LICENSE", "NOTICE"):
        assert any(name.endswith(f".dist-info/licenses/{legal}") for name in names), legal


def test_the_wheel_holds_the_bundled_model(wheel: Path):
    assets = ROOT / "engine" / "musiclm_engine" / "assets"
    wanted = {f"musiclm_engine/assets/{file.name}" for file in assets.iterdir()}
    assert "musiclm_engine/assets/musiclm.json" in wanted
    assert "musiclm_engine/assets/MODEL_CARD.md" in wanted
    assert wanted <= set(zipfile.ZipFile(wheel).namelist())


def test_imports_come_from_the_wheel(installed: Path, tmp_path: Path):
    code = "import musiclm_engine, musiclm_kernels as k; print(musiclm_engine.__file__, k.__file__)"
    for file in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(installed.parent)


def test_the_command_is_there(installed: Path, tmp_path: Path):
    assert "generate" in run(installed / "musiclm", "--help", cwd=tmp_path, NO_COLOR="1")


def test_the_installed_command_makes_music(installed: Path, tmp_path: Path):
    run(
        *(installed / "musiclm", "generate", PROMPT, "--seconds", "1", "--num-samples", "1"),
        *("--out", "x.wav", "--threads", "2"),
        cwd=tmp_path,
    )
    audio, rate_hz = soundfile.read(tmp_path / "x.wav", dtype="float32")
    assert audio.shape == (rate_hz,)
    assert np.isfinite(audio).all() and 0.01 < np.abs(audio).max() <= 1
    assert json.loads((tmp_path / "x.json").read_text())["request"]["prompts"] == [PROMPT]


def test_a_spectrogram_needs_only_the_plot_extra(installed: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="in the plot extra")
    run(
        *(installed / "musiclm", "generate", PROMPT, "--seconds", "1", "--num-samples", "1"),
        *("--out", "x.wav", "--spectrogram", "--threads", "2"),
        cwd=tmp_path,
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
