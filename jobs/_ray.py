"""The only file that knows Ray Data's keyword names: from stages and a Placement to a running pipeline.

One Ray row is one shard, its columns packed in ``payload``. Ray Data may merge or split blocks as it likes; a row it
never touches, so a shard's prompts stay together, which is what makes results independent of the cluster.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import logging
import os
import pickle
import secrets
import shutil
import sys
import tempfile
import traceback
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ip2p.config import Placement, Recipe
from ip2p.dataset.shards import Shard, ShardStats, commit_shard
from ip2p.errors import DeviceError, InputError, Ip2pError, JobError
from ip2p.storage import open_folder
from ip2p.triplets.captions import as_batch
from jobs._stdout import keep_stdout

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, typing.Any]
Columns = dict[str, typing.Any]
T = typing.TypeVar("T")

WORKER_DEATHS = 4  # deaths of its worker after which a shard is given up: it may be what kills them
FAILURES_IN_A_ROW = 5  # shards that met a bug, without a good one between them, after which the job stops
# What a window may lose with its workers before the job stops; Ray tells of them at its end, all together. One shard in
# a hundred is bad captions or nodes that went; more of them is a stage that does not fit into its machine.
LOST_SHARE = 0.01
LOST_AT_LEAST = 5  # of small windows
# Shards handed to Ray at a time. Each costs the driver 15 kB while Ray knows it; between windows actors load anew.
WINDOW = 4096
# Until the cluster has missed a node that was lost (15 to 65 s), calls of its actors fail. Ray waits 0.1 s before it
# tries again, then twice that: all WORKER_DEATHS tries would be spent within a second, and the shards given up. With
# these they last for 70 s. Ray reads them when it is imported.
PATIENCE = {
    "RAY_task_actor_unavailable_retry_delay_base_ms": "10000",
    "RAY_task_actor_unavailable_retry_max_delay_ms": "60000",
}
# Addresses, never keys: what a runtime environment holds can be read on the dashboard.
PASSED_ON = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@dataclasses.dataclass(frozen=True)
class FailedShard:
    """A shard that came to nothing for a reason that no Ip2pError foresaw. Running again tries it again."""

    name: str
    why: str
    worker_died: bool = False


def good_shards(finished: Iterable[T | FailedShard], say: Callable[[str], object]) -> Iterator[T]:
    """The shards of ``finished`` that came to something; of the others ``say`` is told as they come.

    Raises JobError at the end if there were any, and at once after FAILURES_IN_A_ROW of them: what fails again and
    again is not one shard's fault. Those whose workers died are in no row: they come together at a window's end,
    whatever lay between them, and have a limit of their own (``losses_allowed``).
    """
    failed: list[FailedShard] = []
    in_a_row = 0
    for done in finished:
        if not isinstance(done, FailedShard):
            in_a_row = 0
            yield done
            continue
        failed.append(done)
        in_a_row += not done.worker_died
        say(f"error: shard {done.name}: {done.why}")
        if in_a_row == FAILURES_IN_A_ROW:
            break
    if failed:
        raise JobError(
            f"{len(failed)} shards failed, the first of them {failed[0].name}: {failed[0].why}; "
            "what is finished stays; run the same command again to go on with the others"
        )


class WriteShard:
    """``ip2p.triplets.stage.WriteTriplets`` on packed shards. The name is what process lists and dashboards show."""

    def __init__(self, recipe: Recipe, device: str = "cpu"):
        from ip2p.triplets.stage import WriteTriplets  # here: only this actor needs what it imports

        self.stage = loaded(lambda: WriteTriplets(recipe, device, threads=1))

    def __call__(self, row: Row) -> Row:
        return on_shard(row, lambda batch: self.stage()(batch))


class PaintShard:
    """``ip2p.pairs.painter.PaintPairs`` on packed shards; adds the ids of the weights that painted."""

    def __init__(self, recipe: Recipe, device: str = "cpu", threads: int = 1):
        from ip2p.pairs.painter import PaintPairs

        self.stage = loaded(lambda: PaintPairs(recipe, device, threads))

    def __call__(self, row: Row) -> Row:
        return on_shard(row, self.paint)

    def paint(self, batch: Columns) -> Columns:
        painter = self.stage()
        weights = {**painter.model.sha256, "clip": painter.clip.sha256}
        return {**painter(batch), **{f"{name}_sha256": sha256 for name, sha256 in weights.items()}}


class CommitShard:
    """Writes a shard's files; what goes back to the driver is a few hundred bytes."""

    def __init__(self, output: str, recipe: Recipe, run_id: str):
        self.folder = loaded(lambda: open_folder(output))
        self.recipe, self.run_id = recipe, run_id

    def __call__(self, row: Row) -> Row:
        return on_shard(row, lambda batch: commit_shard(self.folder(), row["name"], batch, self.recipe, self.run_id))


def loaded(load: Callable[[], T]) -> Callable[[], T]:
    """Load once, now; an error is kept for the first shard to carry home.

    Raised in an actor's constructor it would reach the driver as a dead actor and a page of Ray's words.
    """
    try:
        thing = load()
    except Exception as error:
        kept = error

        def fail() -> T:
            raise kept

        return fail
    return lambda: thing


def on_shard(row: Row, work: Callable[[typing.Any], typing.Any]) -> Row:
    """Unpack, work, pack. What goes wrong becomes the payload: it travels to the driver whole, past the later stages.

    An Ip2pError stays what it is, any other exception becomes a FailedShard. After a DeviceError nothing can be done
    in this process any more, so it ends; Ray starts another and gives it the shard.
    """
    held = unpack(row["payload"])
    if isinstance(held, Ip2pError | FailedShard):
        return row
    try:
        done = work(held)
    except DeviceError:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    except Ip2pError as error:
        done = type(error)(f"shard {row['name']}: {error}")
    except Exception as error:
        traceback.print_exc()
        done = FailedShard(row["name"], described(error))
    return {"name": row["name"], "payload": pack(done)}


def described(error: BaseException) -> str:
    """``ZeroDivisionError: division by zero (painter.py, line 12, in paint)``"""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno}, in {frames[-1].name})" if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}{place}"


def pack(columns: typing.Any) -> bytes:
    """Columns, stats or an error as bytes, for the way from one of our own workers to the next."""
    return pickle.dumps(columns, protocol=5)


def unpack(payload: bytes) -> typing.Any:
    return pickle.loads(payload)


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names, or start a private one that ends, with its folder, when we do."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    private = not os.environ.get("RAY_ADDRESS")
    # A token of its own in the environment, before Ray is imported and reads it: left to itself Ray writes one into the
    # home folder.
    if private and os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    if ray.is_initialized():
        return
    keep_stdout()
    quiet: dict[str, typing.Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if private:
        folder = tempfile.mkdtemp(prefix="ip2p-ray-", dir="/tmp")  # a short path: Ray's sockets must fit into 107 bytes
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        ray.init(address="local", include_dashboard=False, _temp_dir=folder, **quiet)
    else:
        _join(quiet)
    atexit.register(_leave)  # registered last, so it runs before the folder goes


def _leave() -> None:
    import ray

    with contextlib.redirect_stdout(sys.stderr):  # Ray now prints what it held back as a repetition
        ray.shutdown()


def _join(quiet: dict[str, typing.Any]) -> None:
    import ray

    # A submitted job's workers already have the job's environment, and Ray refuses to be told of it twice.
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if not submitted:
        quiet["runtime_env"] = {"env_vars": {name: os.environ[name] for name in PASSED_ON if name in os.environ}}
    try:
        ray.init(**quiet)
    except (ConnectionError, TimeoutError, ray.exceptions.RayError) as error:
        raise JobError(
            f"cannot join the cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']}: {described(error)}; start it, "
            "correct the address (and RAY_AUTH_TOKEN), or unset RAY_ADDRESS to work without a cluster"
        ) from error


class Step(typing.NamedTuple):
    """One stage as Ray Data is to run it: a class called with rows, in a pool of ``pool`` (min, max) actors."""

    stage: type
    args: tuple[typing.Any, ...]
    pool: tuple[int, int]
    cpus: float
    gpus: float = 0.0


def run_shards(
    shards: Sequence[Shard],
    recipe: Recipe,
    placement: Placement,
    output: str,
    run_id: str,
    stages: tuple[type, type] = (WriteShard, PaintShard),
) -> Iterator[ShardStats | FailedShard]:
    """Write, paint and commit ``shards`` on the cluster; yields each one's stats as soon as it is on disk.

    ``stages`` are the writer and the painter. Raises the Ip2pError of a worker as it was raised there, and JobError
    where Ray itself cannot go on. A shard that failed in another way, or whose workers died WORKER_DEATHS times, is
    yielded as FailedShard, the latter at the end.
    """
    writer, painter = stages
    writing = (recipe, device_of(placement.lm_gpus))
    painting = (recipe, device_of(placement.painter_gpus), placement.threads)
    steps = [
        Step(writer, writing, placement.lm_actors, placement.lm_cpus, placement.lm_gpus),
        Step(painter, painting, placement.painter_actors, placement.painter_cpus, placement.painter_gpus),
        Step(CommitShard, (output, recipe, run_id), (1, 4), 0.05),
    ]
    for start in range(0, len(shards), WINDOW):
        window = shards[start : start + WINDOW]
        for _, done in run_steps(steps, {shard.name: as_batch(shard.rows) for shard in window}):
            yield done


def run_steps(steps: Sequence[Step], work: Mapping[str, typing.Any]) -> Iterator[tuple[str, typing.Any]]:
    """Each of ``work`` (by name) through all ``steps``; yields name and result as they come out, in any order.

    Raises the Ip2pError of a worker, and JobError where Ray itself cannot go on. What failed in another way, or killed
    its workers, comes out as a FailedShard.
    """
    import ray

    dataset = _pipeline(steps, [{"name": name, "payload": pack(content)} for name, content in work.items()])
    lost = set(work)
    try:
        for row in dataset.iter_rows():
            lost.discard(row["name"])
            done = unpack(row["payload"])
            if isinstance(done, Ip2pError):
                raise done
            yield row["name"], done
    except ray.exceptions.RayError as error:
        cause = str(error).strip().splitlines()[-1]  # above it stand the workers' tracebacks
        raise JobError(
            f"Ray cannot go on: {type(error).__name__}: {cause}; run the same command again, or read Ray's logs"
        ) from error
    for name in sorted(lost):
        why = f"its worker died {WORKER_DEATHS} times (out of memory, or killed)"
        yield name, FailedShard(name, why, worker_died=True)


def losses_allowed(shards: int) -> int:
    """How many of a window's ``shards`` may be lost with their workers; one more, and Ray ends window and job."""
    return max(LOST_AT_LEAST, int(LOST_SHARE * shards))


def _pipeline(steps: Sequence[Step], rows: list[Row]) -> typing.Any:
    """The Ray Dataset of what comes out of the last of ``steps``."""
    import ray

    context = ray.data.DataContext.get_current()
    _silence(context)
    context.max_errored_blocks = losses_allowed(len(rows))
    dataset: typing.Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    # Ray 2.60 has no other way to say it, yet warns at each use; requirements.lock pins that version.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")
    for step in steps:
        dataset = dataset.map(
            step.stage, fn_constructor_args=step.args, compute=_pool(step.pool), num_cpus=step.cpus,
            num_gpus=step.gpus or None, max_task_retries=WORKER_DEATHS - 1,
        )  # fmt: skip
    return dataset


def _silence(context: typing.Any) -> None:
    """Our own progress says what a user wants to know; Ray Data's notes would bury it."""
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []
    # Not earlier: importing ray.data sets these levels itself.
    for name in ("ray.data", "ray.data._internal"):
        logging.getLogger(name).setLevel(logging.ERROR)


def device_of(gpus: float) -> str:
    """Where an actor with this share of GPUs computes. Ray does not hide the GPUs from actors that asked for none."""
    return "auto" if gpus else "cpu"


def _pool(size: tuple[int, int]) -> typing.Any:
    from ray.data import ActorPoolStrategy

    # One shard being worked on and one waiting: more would only queue behind a slow actor while others idle.
    return ActorPoolStrategy(min_size=size[0], max_size=size[1], max_tasks_in_flight_per_actor=2)


def default_placement(**overrides: typing.Any) -> Placement:
    """Pools that fit the cluster in sight: a painter a GPU where there are any, else a painter a core.

    GPUs that are not in sight are asked for where nodes may come and the pool's size is given; InputError elsewhere.
    """
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
    if gpus:
        placement = Placement(lm_gpus=0.2, painter_gpus=0.8, painter_actors=(1, gpus), lm_actors=(1, gpus))
    elif overrides.get("painter_gpus") or overrides.get("lm_gpus"):
        _check_gpus_to_come(overrides)
        placement = Placement()
    else:
        # Cores are shared: the logical CPUs of the writer and of the committer must leave room for every painter.
        share = max(0.5, (cpus - 0.5) / cpus)
        placement = Placement(painter_actors=(1, cpus), painter_cpus=share, lm_cpus=0.2)
    placement = dataclasses.replace(placement, **overrides)
    # One thread on a CPU: the order of arithmetic then never depends on how many cores a machine has.
    return placement if placement.painter_gpus else dataclasses.replace(placement, threads=1)


def _check_gpus_to_come(overrides: Mapping[str, typing.Any]) -> None:
    """Raise InputError where GPUs are asked for that cannot come, or nobody says how many actors shall share them."""
    pools = (("painter_gpus", "--painter-gpus", "painter_actors", "--painters"),
             ("lm_gpus", "--writer-gpus", "lm_actors", "--writers"))  # fmt: skip
    for gpus, flag, size, size_flag in pools:
        if not overrides.get(gpus):
            continue
        if not os.environ.get("RAY_ADDRESS"):  # a private cluster is this machine, and stays so
            raise InputError(f"{flag} asks for GPUs, but this machine has none; leave it out")
        if size not in overrides:
            raise InputError(
                f"{flag} asks for GPUs, but the cluster has none yet from which the size of the pool could be told; "
                f"give {size_flag} MIN:MAX too, or leave {flag} out"
            )


def waits_for(placement: Placement) -> str:
    """What people should know of a cluster without the GPUs that its pools want; "" where there are some."""
    import ray

    if not (placement.painter_gpus or placement.lm_gpus) or ray.cluster_resources().get("GPU"):
        return ""
    return "no GPU is there yet: waiting for nodes that have some; `ray status` shows what comes"
