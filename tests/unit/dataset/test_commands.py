"""``ip2p export`` and ``ip2p import`` through their own parsers, as the command line calls them."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys

import pytest

from ip2p.dataset import export_command, import_command
from ip2p.dataset.run_folder import count_pairs, verify
from ip2p.errors import DatasetError, InputError, StorageError
from ip2p.storage import open_folder


def call(command, *words):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize(
    ("format_name", "proof", "told"),
    [
        ("original", "seeds.json", "4 prompts, 7 pairs, 7 train, 0 val, 0 test, 1 in another split"),
        ("hf", "data/train-00000-of-00001.parquet", "4 prompts, 7 pairs, 7 train, 0 val, 0 test"),
        ("webdataset", "shard-000000.tar", "4 prompts, 7 pairs, 1 tars"),
    ],
)
def test_export_writes_the_format_and_prints_the_counts(run, tmp_path, capsys, format_name, proof, told):
    output = tmp_path / "out"
    assert call(export_command, "--run", run.uri, "--output", output, "--format", format_name) == 0
    assert (output / proof).is_file()
    printed = capsys.readouterr()
    assert printed.out == f"{output}: {told}\n"
    assert printed.err == ""  # no bar where stderr is no terminal


def test_export_of_one_pair_a_prompt(run, tmp_path, capsys):
    call(export_command, "--run", run.uri, "--output", tmp_path / "o", "--format", "hf", "--pairs-per-prompt", "one")
    assert "4 prompts, 4 pairs" in capsys.readouterr().out


@pytest.mark.parametrize("format_name", ["original", "hf"])
def test_import_reads_back_what_export_wrote(run, tmp_path, capsys, format_name):
    call(export_command, "--run", run.uri, "--output", tmp_path / "out", "--format", format_name)
    assert (
        call(import_command, "--input", tmp_path / "out", "--output", tmp_path / "back", "--format", format_name) == 0
    )
    back = open_folder(str(tmp_path / "back"))
    assert (verify(back), count_pairs(back)) == ([], 7)
    assert capsys.readouterr().out.splitlines()[1] == f"{tmp_path / 'back'}: 4 prompts, 7 pairs, 0 problems"


def test_import_names_what_was_left_out_up_to_twenty(run, tmp_path, capsys):
    call(export_command, "--run", run.uri, "--output", tmp_path / "out", "--format", "original")
    listing = json.loads((tmp_path / "out/seeds.json").read_text())
    listing[0][1] += [str(n) for n in range(25)]
    (tmp_path / "out/seeds.json").write_text(json.dumps(listing))
    assert call(import_command, "--input", tmp_path / "out", "--output", tmp_path / "b", "--format", "original") == 0
    printed = capsys.readouterr()
    assert printed.out.endswith("7 pairs, 25 problems\n")
    lines = printed.err.splitlines()
    assert lines[0] == "  left out: 0000000: seed 0: 0_0.jpg is missing"
    assert len(lines) == 21
    assert lines[20] == "  and 5 more; the error column of the ledger has all"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_a_bar_unless_it_asks_for_quiet(run, tmp_path, monkeypatch):
    shown = {}
    for flags in ((), ("--quiet",)):
        monkeypatch.setattr(sys, "stderr", Terminal())
        out = tmp_path / f"out{len(flags)}"
        call(export_command, "--run", run.uri, "--output", out, "--format", "original", *flags)
        back = tmp_path / f"back{len(flags)}"
        call(import_command, "--input", out, "--output", back, "--format", "original", *flags)
        shown[flags] = sys.stderr.getvalue()
    assert "7/7" in shown[()]
    assert "4prompt" in shown[()]
    assert shown["--quiet",] == ""


def test_wrong_input_is_an_error_with_a_remedy(run, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DatasetError, match="not the folder of a run; pass the folder"):
        call(export_command, "--run", tmp_path / "no", "--output", out, "--format", "hf")
    with pytest.raises(InputError, match="--pairs-per-prompt belongs to --format hf"):
        call(export_command, "--run", run.uri, "--output", out, "--format", "original", "--pairs-per-prompt", "one")
    with pytest.raises(StorageError, match="only local paths and s3://"):
        call(import_command, "--input", "gs://x/y", "--output", out, "--format", "hf")
    assert not out.exists()


@pytest.mark.parametrize("name", ["export_command", "import_command"])
def test_a_command_is_light_to_import_and_has_help(name):
    code = (
        f"import sys, ip2p.dataset.{name} as c; assert c.HELP;"
        "heavy = {'pyarrow', 'torch', 'numpy', 'tqdm', 'PIL'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
