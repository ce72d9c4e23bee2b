"""The rules of the house that no single file shows: who may import whom, what is pinned, what is portable."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("ip2p", "jobs", "cluster", "serve")
GROUND_FLOOR = ("__init__", "schema", "config", "errors", "seeds", "storage", "images", "row_files", "pictures")
HEAVY = {
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip",
    "datasets",
    "ray",
    "boto3",
    "pyarrow",
    "numpy",
}


def _sources(*packages: str) -> list[Path]:
    return sorted(path for package in packages for path in (ROOT / package).rglob("*.py"))


def _imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Top-level names of the packages that ``nodes`` import; a relative import stays inside and is left out."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").partition(".")[0])
    return names


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """What runs when the file is imported: everything but the bodies of functions and of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def _project_files() -> list[Path]:
    """What belongs to the project, whether committed yet or not; in a tarball, everything that is not built."""
    listing = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"], capture_output=True
    )
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    built = {".venv", ".git", "build", "out", "__pycache__"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not built & set(path.relative_to(ROOT).parts)]


@pytest.mark.parametrize("path", _sources("ip2p"), ids=lambda path: str(path.relative_to(ROOT)))
def test_library_never_imports_what_runs_it(path: Path) -> None:
    assert not _imported(ast.walk(_tree(path))) & {"ray", "jobs", "serve", "cluster"}


def test_web_application_never_imports_ray() -> None:
    for path in _sources("serve"):
        if path.name == "http.py":
            assert not _imported(ast.walk(_tree(path))) & {"ray"}


def _light_modules() -> list[Path]:
    drawn_world = sorted((ROOT / "ip2p" / "postcards").glob("*.py"))
    ground_floor = [ROOT / "ip2p" / f"{name}.py" for name in GROUND_FLOOR]
    return ground_floor + [path for path in drawn_world if path.stem != "reader"]  # the reader is a model


def test_ground_floor_and_the_drawn_world_import_no_torch() -> None:
    for path in _light_modules():
        assert "torch" not in _imported(_at_import(_tree(path))), path


def test_importing_the_ground_floor_and_the_drawn_world_loads_nothing_heavy() -> None:
    paths = [path.relative_to(ROOT).with_suffix("") for path in _light_modules()]
    names = [".".join(path.parts).removesuffix(".__init__") for path in paths]
    program = f"import sys, {', '.join(names)}; print(sorted({HEAVY - {'numpy', 'pyarrow'}} & set(sys.modules)))"
    assert _python("-c", program).stdout.strip() == "[]"


def test_help_of_the_command_line_answers_without_loading_anything_heavy() -> None:
    answer = _python("-X", "importtime", "-m", "ip2p", "--help")
    loaded = {line.rpartition("|")[2].strip() for line in answer.stderr.splitlines() if line.startswith("import time:")}
    assert "usage" in answer.stdout.lower()
    assert "ip2p" in loaded
    assert not loaded & HEAVY


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def _requirements() -> list[str]:
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_every_locked_requirement_is_one_version_with_hashes() -> None:
    shape = re.compile(r"[a-z0-9._-]+(\[[a-z0-9,_-]+\])?==[^\s;]+( ; [^#]+?)?(\s+--hash=sha256:[0-9a-f]{64})+")
    assert [line[:80] for line in _requirements() if not shape.fullmatch(line)] == []


def test_lock_names_no_index_and_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert not re.search(r"://|\s@\s|--(extra-)?index-url|--find-links|--trusted-host", text)


def test_lock_holds_every_dependency_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {_normal_name(text) for group in wanted for text in group} - {project["name"]}
    assert names <= {_normal_name(line) for line in _requirements()}


def _normal_name(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=~! ;]", requirement)[0]).lower()


def test_there_is_one_lock_file() -> None:
    assert [path.name for path in _project_files() if path.name in {"uv.lock", "poetry.lock", "Pipfile.lock"}] == []


def test_no_file_names_a_folder_of_somebodys_machine() -> None:
    # /home/ray is the home of Ray's published container images.
    private = re.compile(rb"(?<![\w.~-])/(?:home/(?!ray\b)|root/|work/|Users/)\w")
    found = [
        f"{path.relative_to(ROOT)}: {hit.group()!r}" for path in _project_files() if (hit := _first(private, path))
    ]
    assert found == []


def _first(pattern: re.Pattern[bytes], path: Path) -> re.Match[bytes] | None:
    data = path.read_bytes()
    return None if b"\0" in data[:1024] else pattern.search(data)


def test_functions_can_be_seen_whole() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in _sources(*PACKAGES)
        for node in ast.walk(_tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _length(node) > 80
    ]
    assert long == []


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def _ci(folder: Path, readme: str) -> subprocess.CompletedProcess[str]:
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(readme)
    return subprocess.run([folder / ".ci" / "run"], cwd="/", capture_output=True, text=True, timeout=30)


def test_ci_runs_the_block_that_the_readme_marks_in_the_project_folder(tmp_path: Path) -> None:
    blocks = "```sh\necho first\n```\n<!-- test command -->\n\n```sh\necho marked; ls -A\n```\n```sh\necho last\n```\n"
    done = _ci(tmp_path, blocks)
    assert done.returncode == 0
    assert done.stdout.splitlines()[1:] == ["marked", ".ci", "README.md"]


def test_ci_fails_as_the_marked_command_fails(tmp_path: Path) -> None:
    done = _ci(tmp_path, "<!-- test command -->\n```sh\nfalse\nexit 0\n```\n")
    assert done.returncode == 1


def test_ci_without_a_marked_block_says_what_is_missing(tmp_path: Path) -> None:
    done = _ci(tmp_path, "# ip2p\n```sh\nmake test\n```\n")
    assert done.returncode == 1
    assert "<!-- test command -->" in done.stderr
