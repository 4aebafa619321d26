"""What may import what, how quick the first import is, and what may lie in the repository."""

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import musiclm_engine
import musiclm_kernels

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / "engine" / "musiclm_engine"
KERNELS = ROOT / "kernels" / "musiclm_kernels"
STANDARD = frozenset(sys.stdlib_module_names)
MAX_FILE_BYTES = 16 * 2**20

# Each module or package of the engine, and what of the engine it may import besides itself.
LEAVES = {"attention", "audio", "checkpoint", "kmeans", "quantize", "whole_file"}
MODELS = LEAVES | {"codec", "mulan", "audiolm", "tempo_reader", "components"}
MAY_IMPORT = {
    "attention": set(),
    "audio": {"whole_file"},
    "checkpoint": {"whole_file"},
    "kmeans": set(),
    "quantize": {"kmeans"},
    "whole_file": set(),
    "doubts": set(),
    "info": {"musiclm"},
    "codec": LEAVES,
    "mulan": LEAVES,
    "audiolm": LEAVES,
    "tempo_reader": {"mulan", "audiolm"},
    "components": LEAVES | {"codec", "mulan", "audiolm", "tempo_reader"},
    "generation": MODELS,
    "interop": LEAVES | {"generation"},
    "data": {"audio", "whole_file"},
    "training": MODELS | {"data"},
    "training.bundle": MODELS | {"generation", "musiclm"},
    "musiclm": MODELS | {"generation"},
    "output": LEAVES | {"musiclm"},
    "evaluation": {"audio", "checkpoint", "data"},
    "evaluation.bench": {"audio", "checkpoint", "data", "musiclm"},
    "evaluation.candidates": {"audio", "checkpoint", "data", "musiclm"},
    "evaluation.codec_judgement": {"audio", "codec", "components", "data"},
    "evaluation.held_out": {"audio", "checkpoint", "data", "musiclm"},
    "evaluation.clip_tokens": {"checkpoint", "data", "generation"},
    "evaluation.memorisation": {"generation", "musiclm"},
    # A command takes what it needs; nothing takes the commands.
    "commands": LEAVES | {"data", "training", "evaluation", "musiclm", "output", "doubts"},
    "cli": {"commands", "data", "info"},
}


def imports(file: Path) -> Iterator[tuple[str, str | None]]:
    """Each import anywhere in a file: the module's full name, and the name taken from it."""
    package = file.relative_to(ROOT).parts[1:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield module, alias.name


def part_of_engine(module: str, name: str | None) -> str:
    """The part of MAY_IMPORT that an import of something in musiclm_engine reaches."""
    path = module.split(".")[1:] or [name or ""]
    return path[0]


def rule_for(file: Path) -> tuple[str, set[str]]:
    own = file.relative_to(ENGINE).with_suffix("").parts
    for depth in (2, 1):
        rule = ".".join(own[:depth])
        if rule in MAY_IMPORT:
            return own[0], MAY_IMPORT[rule]
    pytest.fail(f"{file.relative_to(ROOT)}: say in MAY_IMPORT what it may import")


def engine_files() -> list[Path]:
    return sorted(file for file in ENGINE.rglob("*.py") if file != ENGINE / "__init__.py")


def test_the_code_that_runs_is_the_code_that_is_read():
    assert Path(musiclm_engine.__file__).is_relative_to(ENGINE)
    assert Path(musiclm_kernels.__file__).is_relative_to(KERNELS)


def test_kernels_import_torch_triton_and_themselves():
    allowed = STANDARD | {"musiclm_kernels", "torch", "triton"}
    strangers = {
        (str(file.relative_to(ROOT)), module)
        for file in KERNELS.rglob("*.py")
        for module, _ in imports(file)
        if module.split(".")[0] not in allowed
    }
    assert not strangers


def is_reference(file: Path) -> bool:
    return file.stem == "reference" or file.stem.endswith("_reference")


def test_references_import_torch_alone():
    files = [file for file in sorted(KERNELS.rglob("*.py")) if is_reference(file)]
    assert len(files) > 6  # one an op, and the one that gathers them
    for file in files:
        for module, _ in imports(file):
            top = module.split(".")[0]
            assert top in STANDARD | {"musiclm_kernels", "torch"}, (file, module)


def may_reach(file: Path, module: str, name: str | None) -> bool:
    """Whether an import keeps to the rule on a folder with an op: what is not its op.py, its
    __init__.py or a reference is taken by the folder's own modules alone, and by no reference."""
    package, *path = [*module.split("."), *([name] if name else [])]
    reached = KERNELS.joinpath(*path[:2]).with_suffix(".py")
    if package != "musiclm_kernels" or len(path) < 2 or not reached.is_file():
        return True
    if reached.stem in {"op", "__init__"} or is_reference(reached):
        return True
    return file.parent == reached.parent and not is_reference(file)


def test_only_an_ops_own_folder_imports_its_kernels():
    strangers = {
        (str(file.relative_to(ROOT)), module, name)
        for file in KERNELS.rglob("*.py")
        for module, name in imports(file)
        if not may_reach(file, module, name)
    }
    assert not strangers


@pytest.mark.parametrize(
    ("file", "module", "name", "allowed"),
    [
        ("attention/op.py", "musiclm_kernels.attention", "forward", True),
        ("attention/backward.py", "musiclm_kernels.attention.tile", "LOG2_E", True),
        ("attention/reference.py", "musiclm_kernels.attention", "tile", False),
        ("attention/made_up_reference.py", "musiclm_kernels.attention.launch", "Problem", False),
        ("attention/forward.py", "musiclm_kernels.qk_l2norm.kernel", "EPSILON", False),
        ("decode/op.py", "musiclm_kernels.attention.launch", "Problem", False),
        ("decode/op.py", "musiclm_kernels.attention", "stray_gradient", False),
        ("registry.py", "musiclm_kernels.qk_l2norm.kernel", None, False),
        ("reference.py", "musiclm_kernels.attention.blocked", None, False),
        ("decode/op.py", "musiclm_kernels.attention", "reference", True),
        ("decode/op.py", "musiclm_kernels.attention.op", "biased_attention", True),
        ("decode/op.py", "musiclm_kernels.attention", "biased_attention", True),
        ("decode/op.py", "musiclm_kernels.checks", "FLOATS", True),
    ],
)
def test_the_rule_on_kernels_can_fail(file, module, name, allowed):
    """No file breaks the rule, so it is tried on imports made up here."""
    assert may_reach(KERNELS / file, module, name) is allowed


def test_the_engine_takes_only_what_the_kernels_export():
    taken = [
        (file, module, name)
        for file in ENGINE.rglob("*.py")
        for module, name in imports(file)
        if module.split(".")[0] in ("musiclm_kernels", "triton")
    ]
    assert taken
    for file, module, name in taken:
        assert module == "musiclm_kernels", f"{file}: {module}"
        assert name in musiclm_kernels.__all__, f"{file}: {name}"


@pytest.mark.parametrize("file", engine_files(), ids=lambda file: str(file.relative_to(ENGINE)))
def test_the_engine_imports_in_one_direction(file):
    own, allowed = rule_for(file)
    for module, name in imports(file):
        if module.split(".")[0] == "musiclm_engine":
            reached = part_of_engine(module, name)
            assert reached == own or reached in allowed, f"{own} imports {module} ({name})"


def test_the_public_names_are_there():
    for package in (musiclm_engine, musiclm_kernels):
        for name in package.__all__:
            assert hasattr(package, name), f"{package.__name__}.{name}"


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        env={"PYTHONPATH": f"{ENGINE.parent}:{KERNELS.parent}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def cpu_seconds(*arguments: str) -> float:
    """Processor time, since the wall clock would measure what else is running."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run_python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def runs_within(limit_s: float, *arguments: str) -> bool:
    """The best of three runs: the first one also compiles and reads from disk."""
    return any(cpu_seconds(*arguments) <= limit_s for _ in range(3))


def test_kernels_import_without_triton_and_without_the_engine():
    code = (
        "import sys; sys.modules['triton'] = None; sys.modules['musiclm_engine'] = None\n"
        "import musiclm_kernels, torch\n"
        "print(musiclm_kernels.rvq_decode(torch.tensor([[0]]), torch.ones(1, 2, 3)).tolist())"
    )
    result = run_python("-c", code)
    assert result.stdout == "[[1.0, 1.0, 1.0]]\n", result.stderr


def test_importing_the_engine_is_quick():
    assert runs_within(3.0, "-c", "from musiclm_engine import MusicLM")


def test_help_is_quick():
    assert runs_within(1.5, "-m", "musiclm_engine.cli", "--help")


def repository_files() -> list[Path]:
    """What git holds or would take in."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_too_large_for_git():
    sizes = {str(file): file.stat().st_size for file in repository_files()}
    assert sizes
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_the_folder_names_shadow_no_package():
    """An importable `kernels` or `tests.kernels` breaks transformers: see docs/decisions."""
    assert not (ROOT / "engine" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert not (ROOT / "tests" / "kernels").exists()


def test_no_path_of_someones_machine():
    homes = re.compile(r"(?<![\w.])/(work|root|home|Users|mnt|tmp)/\w")
    text = {".py", ".toml", ".md", ".txt", ".json", ".jsonl", ".yml", ".cfg", ""}
    found = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in repository_files()
        if file.suffix in text
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), start=1)
        if homes.search(line)
    ]
    assert not found
