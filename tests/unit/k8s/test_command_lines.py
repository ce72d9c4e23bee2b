"""Every command that a manifest gives, and those of its settings, against the parser that will read it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import yaml

from tests.command_lines import problem, shell_commands
from tests.unit.k8s.rendering import RENDERINGS, Object, named, pods, render

OURS = ("python", "serve")
SETTINGS_OF = {name: name.split()[0] for name in RENDERINGS}  # the overlay whose settings.env the pods read


def commands(name: str) -> Iterator[list[str]]:
    """The words of every command of ours in RENDERINGS[name], with the settings put where their names stand."""
    settings = named(render(SETTINGS_OF[name]), "ConfigMap", "ip2p-settings")["data"]

    def filled(text: str) -> str:
        return re.sub(r"\$(\w+)|\$\((\w+)\)", lambda found: settings.get(found[1] or found[2], found[0]), text)

    objects = render(name)
    for pod in pods(objects):
        for container in pod.containers:
            words = [filled(word) for word in (*container.get("command", []), *container.get("args", []))]
            yield from [words] if words and words[0] in OURS else []
    for obj in objects:
        if obj["kind"] == "RayJob":
            yield from (words for words in shell_commands(filled(obj["spec"]["entrypoint"])) if words[0] in OURS)


def serve_arguments(obj: Object) -> Iterator[list[str]]:
    """What the endpoint is given, as `serve run` would be."""
    for app in yaml.safe_load(obj["spec"]["serveConfigV2"])["applications"]:
        yield ["serve", "run", app["import_path"], *(f"{key}={value}" for key, value in app["args"].items())]


@pytest.mark.parametrize("name", RENDERINGS)
def test_every_command_of_a_manifest_is_one_that_its_parser_takes(name):
    given = list(commands(name))
    given += [words for obj in render(name) if obj["kind"] == "RayService" for words in serve_arguments(obj)]
    found = {" ".join(words): problem(words) for words in given}
    assert {line: said for line, said in found.items() if said != ""} == {}
    assert len(given) >= 1


def test_the_commands_are_found_at_all():
    assert [words[1] for words in commands("a100 jobs") if words[1].startswith("jobs/")] == [
        f"jobs/{job}.py" for job in ("batch_edit", "datagen", "evaluate", "train")
    ]
    fetches = [words for words in commands("a100 jobs") if words[1:3] == ["-m", "ip2p"]]
    assert {words[5] for words in fetches} == {"s3://BUCKET/models"}
    assert len(fetches) == 8  # the head and the workers of each job


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("python -m ip2p weights fetch s3://b/models --output /models", "unrecognized arguments: --output"),
        ("python -m ip2p weight fetch s3://b/models /models", "no command 'weight'"),
        ("python jobs/datagen.py --output x --painter 1:4 || [ $? -eq 3 ]", "ambiguous option: --painter"),
        ("python jobs/datagen.py --recipe sd15 --set pairs.candidate=4", "pairs.candidate"),
        ("python jobs/train.py --output x", "required: --pairs"),
        ("serve run serve.app:app max_replica=4", "unknown argument 'max_replica'"),
        ("ray job submit --working-dir . -- python jobs/evaluate.py --modell x", "unrecognized arguments: --modell"),
        ("python -m cluster.local run --node 2 -- true", "ambiguous option: --node"),
        ("A=1 .venv/bin/python -m cluster.local_s3 run -- python jobs/train.py > log", "required: --pairs"),
    ],
)
def test_a_word_that_a_command_does_not_know_is_told(line, said):
    assert said in (problem(next(shell_commands(line))) or "")


def test_what_is_not_ours_is_let_pass():
    assert [problem(words) for words in shell_commands('kubectl get pods | grep "a b" && ray status')] == [None] * 3
