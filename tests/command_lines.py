"""Command lines of people and manifests, told apart and given to the parsers that the commands themselves use."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import re
import shlex
from collections.abc import Callable, Iterator, Sequence

from ip2p.cli import COMMANDS
from ip2p.config import load_recipe
from ip2p.errors import Ip2pError
from ip2p.training.recipe import load_training_recipe

PYTHON = re.compile(r"(\S*/)?python3?")
JOB = re.compile(r"(?:\./)?jobs/(\w+)\.py")
BETWEEN = re.compile(r"[;&|()<>]+")  # what ends a command's own words in a shell
# Options of `ray job submit` that take a word.
SUBMIT_TAKES = {"--address", "--runtime-env", "--submission-id", "--working-dir"}


def shell_commands(text: str) -> Iterator[list[str]]:
    """The words of each simple command in lines of shell, without redirections and variables that are set before it."""
    # $(NAME), as make and Kubernetes have it, is one word.
    for line in re.sub(r"\$\((\w+)\)", r"\1", text.replace("\\\n", " ")).splitlines():
        split = shlex.shlex(line, posix=True, punctuation_chars=True)
        split.whitespace_split = True
        words: list[str] = []
        for word in [*split, ";"]:
            if not BETWEEN.fullmatch(word):
                words.append(word)
                continue
            while words and re.fullmatch(r"\w+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []


def problem(words: Sequence[str]) -> str | None:
    """What the command's own parser says against ``words``; "" where it takes them, None for a command not ours."""
    check = _check(list(words))
    if check is None:
        return None
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            return check() or ""
    except SystemExit as ended:
        return told.getvalue().strip() or f"ended with {ended.code}" if ended.code else ""
    except Ip2pError as error:
        return str(error)


def _check(words: list[str]) -> Callable[[], str | None] | None:
    if words[0] == "ip2p":
        return lambda: _library(words[1:])
    if words[:2] == ["serve", "run"]:
        return lambda: _served(words[2:])
    if words[:3] == ["ray", "job", "submit"]:
        return lambda: _submitted(words[3:])
    if not PYTHON.fullmatch(words[0]) or len(words) < 2:
        return None
    if words[1:3] == ["-m", "ip2p"]:
        return lambda: _library(words[3:])
    if words[1] == "-m" and words[2] in ("cluster.local", "cluster.local_s3"):
        return lambda: _around(words[2], words[3:])
    if script := JOB.fullmatch(words[1]):
        return lambda: _job(script[1], words[2:])
    return None


def _library(words: list[str]) -> str | None:
    if not words or words[0] not in COMMANDS:
        return None if words[:1] in ([], ["--help"], ["--version"]) else f"no command {words[0]!r}"
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[words[0]][0]).configure(parser)
    parser.parse_args(words[1:])
    return None


def _job(name: str, words: list[str]) -> None:
    args = importlib.import_module(f"jobs.{name}").arguments(words)
    if name == "train":
        load_training_recipe(args.recipe, args.set)
    elif name in ("datagen", "evaluate"):
        # Of writing triplets alone, which is no part of a recipe.
        load_recipe(args.recipe, [each for each in args.set if not each.startswith("writing.")])


def _served(words: list[str]) -> str | None:
    from serve.app import read_arguments

    places = [word for word in words if ":" in word and "=" not in word]
    if places != ["serve.app:app"]:
        return f"{places}: not the application"
    read_arguments(dict(word.split("=", 1) for word in words if "=" in word))
    return None


def _submitted(words: list[str]) -> str | None:
    if "--" in words:
        return problem(words[words.index("--") + 1 :])
    while words and words[0].startswith("-"):
        words = words[2:] if words[0] in SUBMIT_TAKES else words[1:]
    return problem(["python", *words])  # a job's path as it stands


def _around(module: str, words: list[str]) -> str | None:
    """A cluster's command line, then the one that runs inside of it."""
    cut = words.index("--") if "--" in words else len(words)
    importlib.import_module(module)._parser().parse_args(words[:cut])
    return problem(words[cut + 1 :]) if words[cut + 1 :] else None
