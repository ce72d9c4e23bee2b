"""The private local Ray: jobs run as the README says, nobody gets in without the token, and nothing stays behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from cluster import head, local, processes
from cluster.head import Cluster, ClusterError, Size, clusters, environment, start, stop

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
SMALL = Size(num_cpus=1, num_gpus=0, object_store_mb=100)
SMALL_OPTIONS = ["--num-cpus", "1", "--num-gpus", "0", "--object-store-mb", "100"]
TOY = """#!/usr/bin/env python3
import os, sys
import ray
ray.init()
print("ran in", os.getcwd(), "on", int(ray.cluster_resources()["CPU"]), "slot,", sys.executable)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "jobs").mkdir()
    (folder / "jobs" / "toy.py").write_text(TOY)
    (folder / "jobs" / "toy.py").chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def running(project: Path) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        cluster = start(SMALL)
    yield cluster
    stop(cluster)


@pytest.fixture
def bystander() -> Iterator[psutil.Process]:
    """A process of the same user that no cluster may touch."""
    child = subprocess.Popen(["sleep", "600"])
    yield psutil.Process(child.pid)
    child.kill()
    child.wait()


def _folders() -> set[Path]:
    return {cluster.folder for cluster in clusters()}


def _wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_job_given_as_a_bare_path_runs_in_the_folder_of_the_head(running: Cluster, project: Path) -> None:
    submitted = subprocess.run(
        ["ray", "job", "submit", "jobs/toy.py"],
        env=environment(running),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    python = Path(sys.executable).parent / "python3"
    assert f"ran in {project} on 1 slot, {python}" in submitted.stdout


def test_without_the_token_nobody_gets_in(running: Cluster) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError, match="401"):
        direct.open(f"{running.dashboard}/api/jobs/", timeout=10)


def test_folder_and_token_are_the_users_own(running: Cluster) -> None:
    assert stat.S_IMODE(running.folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((running.folder / "token").stat().st_mode) == 0o600
    assert len((running.folder / "token").read_text()) == 64


def test_status_shows_the_cluster_and_where_to_look(running: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert local.main(["status"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if str(running.folder) in line)
    assert line.split() == [str(running.folder), str(running.pid), "up", running.dashboard]


def test_env_file_gives_a_shell_what_a_client_needs(running: Cluster) -> None:
    show = 'echo "$RAY_ADDRESS $RAY_AUTH_MODE$RAY_AUTH_TOKEN"; command -v ray; echo "$PATH"'
    before = {"PATH": "/usr/bin:/bin", "RAY_AUTH_TOKEN": "of another cluster"}
    script = f". {running.folder}/env.sh; {show}"
    shell = subprocess.run(["sh", "-c", script], env=before, capture_output=True, text=True)
    here = Path(sys.executable).parent
    assert shell.stdout.splitlines() == [f"127.0.0.1:{running.gcs_port} token", f"{here}/ray", f"{here}:/usr/bin:/bin"]


def test_run_gives_the_exit_code_and_leaves_only_the_others(running: Cluster, bystander: psutil.Process) -> None:
    before = _folders()
    command = f'test "$RAY_ADDRESS" != 127.0.0.1:{running.gcs_port} && ray status >/dev/null && exit 7'
    assert local.main(["run", *SMALL_OPTIONS, "--", "sh", "-c", command]) == 7
    assert _folders() == before
    assert running.alive
    assert processes.is_alive(bystander)


def test_terminated_run_ends_its_command_and_its_cluster(tmp_path: Path) -> None:
    before = _folders()
    command = ["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 600"]
    running_it = subprocess.Popen(
        [sys.executable, "-m", "cluster.local", "run", *SMALL_OPTIONS, "--", *command], cwd=ROOT
    )
    _wait_for((tmp_path / "pid").exists)
    (folder,) = _folders() - before
    running_it.terminate()
    assert running_it.wait(timeout=60) == 128 + signal.SIGTERM
    assert not folder.exists()
    assert not [p for p in processes.strays(folder) if processes.is_alive(p)]
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_head_that_was_killed_is_cleaned_up_by_down() -> None:
    cluster = start(SMALL)
    members = processes.family(psutil.Process(cluster.pid))
    assert len(members) > 5
    os.kill(cluster.pid, signal.SIGKILL)
    _wait_for(lambda: not cluster.alive)
    assert local.main(["down", str(cluster.folder)]) == 0
    assert not [p for p in members if processes.is_alive(p)]
    assert not cluster.folder.exists()


def test_variables_of_another_cluster_reach_neither_head_nor_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in head.FOREIGN:
        monkeypatch.setenv(name, "of another cluster")
    assert "of another cluster" not in head._head_environment(tmp_path, SMALL).values()
    assert "of another cluster" not in environment(Cluster(tmp_path, 1, 2.0, 3, 4)).values()
    assert "RAY_AUTH_TOKEN" not in environment(Cluster(tmp_path, 1, 2.0, 3, 4))


def test_head_that_does_not_start_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def broken(folder: Path, *_: object) -> list[str]:
        tries.append(folder)
        return ["sh", "-c", "sleep 600 & echo no luck today; exit 3"]

    monkeypatch.setattr(head, "_head_command", broken)
    with pytest.raises(ClusterError, match="ended with 3:\nno luck today"):
        start(SMALL)
    assert len(tries) == 2
    assert not tries[0].exists()
    assert not [p for p in processes.strays(tries[0]) if processes.is_alive(p)]


def test_later_process_of_the_same_pid_is_left_alone(bystander: psutil.Process, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    stop(Cluster(folder, bystander.pid, bystander.create_time() - 60, 1, 2))
    assert processes.is_alive(bystander)
    assert not folder.exists()


def test_process_that_ignores_the_polite_signal_is_forced() -> None:
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert processes.end([psutil.Process(child.pid)], grace_s=0.3) == set()
    assert child.wait() == -signal.SIGKILL


def test_orphan_is_found_by_the_mark_of_its_cluster(bystander: psutil.Process, tmp_path: Path) -> None:
    marked = {**os.environ, processes.MARK: str(tmp_path)}
    orphan = subprocess.run(
        ["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"], env=marked, capture_output=True, text=True
    )
    found = processes.strays(tmp_path)
    assert {process.pid for process in found} == {int(orphan.stdout)}
    assert processes.end(found, grace_s=5) == set()


def test_process_whose_pid_another_had_before_is_ended_too(
    bystander: psutil.Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = subprocess.Popen(["sleep", "600"], env={**os.environ, processes.MARK: str(tmp_path)})
    former = psutil.Process(child.pid)  # whom psutil listed under this pid
    former._ident = (child.pid, former.create_time() - 60)
    assert not former.is_running()
    monkeypatch.setattr(psutil, "_pmap", {child.pid: former})
    assert processes.end(processes.strays(tmp_path), grace_s=5) == set()
    assert child.wait(5) == -signal.SIGTERM
    assert bystander.is_running()


def test_state_of_another_version_does_not_hide_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "PARENT", tmp_path)
    for name, text in (("ip2p-old", '{"colour": 3}'), ("ip2p-torn", "{"), ("other-1", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text(text)
    cluster = Cluster(tmp_path / "ip2p-new", 1, 2.0, 3, 4)
    cluster.folder.mkdir()
    head._write_state(cluster)
    assert clusters() == [cluster]
    assert not dataclasses.replace(cluster, started=1.0).alive


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run"], "no command; write: python -m cluster.local run -- COMMAND"),
        (["down"], "a local cluster is not up"),
        (["down", "/tmp/ip2p-none"], "/tmp/ip2p-none is not up"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head, "PARENT", tmp_path)
    assert local.main(words) == 1
    assert message in capsys.readouterr().err


def test_down_among_several_asks_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head, "PARENT", tmp_path)
    for number in (1, 2):
        cluster = Cluster(tmp_path / f"ip2p-{number}", 2**22 + number, 2.0, 3, 4)
        cluster.folder.mkdir()
        head._write_state(cluster)
    assert local.main(["down"]) == 1
    assert "2 local clusters; name one" in capsys.readouterr().err
    assert local.main(["down", "--all"]) == 0
    assert list(tmp_path.iterdir()) == []


NODES_TOY = """
import time
import ray
ray.init(log_to_driver=False, logging_level="ERROR")
alive = lambda: sum(node["Alive"] for node in ray.nodes())
before = alive()

@ray.remote(num_cpus=2)
class Held:
    def here(self):
        return ray.get_runtime_context().get_node_id()

held = [Held.remote() for _ in range(2)]
places = set(ray.get([one.here.remote() for one in held], timeout=120))
print("nodes", before, len(places), alive())
del held
deadline = time.monotonic() + 120
while alive() > 1 and time.monotonic() < deadline:
    time.sleep(0.5)
print("left", alive())
"""


@pytest.mark.timeout(400)
def test_nodes_come_for_work_that_finds_no_room_and_go_when_it_is_done(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(NODES_TOY)
    flags = ["--num-cpus", "1", "--num-gpus", "0", "--object-store-mb", "100", "--nodes", "2", "--node-cpus", "2"]
    command = [sys.executable, "-m", "cluster.local", "run", *flags, "--node-idle-s", "3", "--", sys.executable]
    done = subprocess.run([*command, str(tmp_path / "toy.py")], cwd=ROOT, capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stderr
    assert "nodes 1 2 3" in done.stdout
    assert "left 1" in done.stdout
