"""The only file that knows Ray Train's names: from a recipe and a folder to a group of workers that train.

Everything that a worker needs is in a ``Work``, plain data. What it has to tell goes to the driver through a ``Board``,
an actor without a CPU share: the driver shows progress and feeds trackers, workers compute. Checkpoints are
``ip2p.training``'s own, in the run's folder, and Ray Train is told of none: whoever is started anew looks there.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ip2p.errors import InputError, Ip2pError, JobError, TrainingError
from ip2p.storage import Folder, open_folder
from jobs._ray import FailedShard, Row, Step, device_of, loaded, on_shard, pack, run_steps, unpack

if typing.TYPE_CHECKING:
    import numpy as np

    from ip2p.models.components import EditModel
    from ip2p.training.latent_cache import CacheIdentity, PlannedPart
    from ip2p.training.loss import NoiseSchedule
    from ip2p.training.pair_columns import PairSource
    from ip2p.training.pair_index import ShardRows
    from ip2p.training.recipe import TrainingRecipe
    from ip2p.training.state import TrainingState

METRICS = "metrics.jsonl"
CACHE_PARTS_AT_ONCE = 4096
RETRIES = 4  # restarts of the group of workers before a run is given up
LISTEN_EVERY_S = 0.5
SILENCE_S = 90.0  # without a word of the workers, which may wait for nodes for ever, people are told why
RESIZE_EVERY_S = 30.0  # seconds between looks for nodes that came; a larger group starts from the last checkpoint


@dataclass(frozen=True)
class Work:
    """What all workers of a run are given."""

    recipe: TrainingRecipe
    output: str  # uri of the run's folder
    splits: dict[str, list[ShardRows]]  # train, and val where there are held-out pairs
    about: dict[str, str]  # ids of the base and the pairs
    cache: str = ""  # uri of the latent cache; empty: pictures are encoded at each use
    identity: CacheIdentity | None = None
    gradient_checkpointing: bool = False
    shard: bool = False  # weights and all that belongs to them lie in parts, one a worker
    report_every: int = 50
    look_every: int = 0  # steps between looks at held-out pairs; 0: never
    threads: int = 1  # of a CPU worker


@dataclass(frozen=True)
class Team:
    """How many train, and on what. Decides nothing but the speed."""

    workers: tuple[int, int]
    gpus: float  # a worker
    cpus: float  # a worker
    cores: int  # of the cluster


# ---- the latent cache, by Ray Data


class EncodePart:
    """``ip2p.training.latent_cache.make_part`` on packed lists of shards."""

    def __init__(self, base: str, cache: str, identity: CacheIdentity, device: str):
        from ip2p.models.components import load_base
        from ip2p.training.encoding import PairEncoder

        def load() -> PairEncoder:
            import torch

            torch.set_num_threads(1)  # as many actors as cores
            model = load_base(base, device)
            return PairEncoder(model.vae, model.text_encoder, model.tokenizer)

        self.encoder, self.folder, self.identity = loaded(load), open_folder(cache), identity

    def __call__(self, row: Row) -> Row:
        return on_shard(row, self.encode)

    def encode(self, part: PlannedPart) -> dict[str, typing.Any]:
        from ip2p.training.latent_cache import make_part

        return make_part(self.folder, self.identity, **part, encoder=self.encoder())


def encode_parts(
    work: Work, parts: Mapping[str, PlannedPart], team: Team, told: Callable[[str], None]
) -> dict[str, typing.Any]:
    """Make the ``parts`` of the latent cache on the cluster; returns the manifest's entries of all their files."""
    assert work.identity is not None
    arguments = (work.recipe.base, work.cache, work.identity, device_of(team.gpus))
    # One thread each: on CPUs as many as there are cores, whatever the training's share of them is.
    at_most = team.workers[1] if team.gpus else max(1, team.cores)
    step = Step(EncodePart, arguments, (1, at_most), min(team.cpus, 0.9), team.gpus)
    files: dict[str, typing.Any] = {}
    names = list(parts)
    for first in range(0, len(names), CACHE_PARTS_AT_ONCE):
        window = {name: parts[name] for name in names[first : first + CACHE_PARTS_AT_ONCE]}
        for name, done in run_steps([step], window):
            if isinstance(done, FailedShard):
                raise JobError(f"part {name} of the latent cache: {done.why}; run the same command again to go on")
            files |= done
            told(name)
    return files


# ---- what a worker does


def worker_loop(settings: dict[str, typing.Any]) -> None:
    """Ray Train's loop per worker."""

    def smaller(work: Work) -> str:
        half = max(1, work.recipe.micro_batch // 2)
        return f"with micro_batch={work.recipe.micro_batch}; `--set micro_batch={half}` or --gradient-checkpointing"

    run_worker(settings, _train, smaller)


def run_worker(
    settings: dict[str, typing.Any],
    train: Callable[[typing.Any, typing.Any], None],
    smaller: Callable[[typing.Any], str],
) -> None:
    """``train(work, board)``. An error that the user can mend is told, then raised so that all workers stop.

    ``smaller`` says of a work whose device ran out of memory how much it asked for, and how to ask for less.
    """
    import ray
    import torch

    board, work = settings["board"], unpack(settings["work"])
    if ray.get(board.failure.remote()) is not None:
        return  # the run has ended; Ray only does not know yet that trying again is of no use
    try:
        train(work, board)
    except torch.OutOfMemoryError as error:
        said = TrainingError(f"the device's memory is full {smaller(work)}")
        ray.get(board.fail.remote(pack(said)))
        raise said from error
    except Ip2pError as error:
        ray.get(board.fail.remote(pack(error)))
        raise


def _train(work: Work, board: typing.Any) -> None:
    import torch
    from ray.train import get_context
    from ray.train.torch import get_device

    from ip2p.training.averaging import mean_over_workers
    from ip2p.training.lanes import lanes_for
    from ip2p.training.loop import train
    from ip2p.training.loss import noise_schedule
    from ip2p.training.sharding import check_shards

    context = get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(work.threads)
    if work.shard:
        check_shards(work.recipe.global_batch, (world, world))
    told = (lambda text: board.tell.remote("note", text)) if rank == 0 else (lambda text: None)
    base, state = begin(work, device, told, work.shard)
    check_same_step(state.step, world)
    schedule = noise_schedule(base.scheduler_config, base.vae.config, base.image_latent_scaled).to(device)
    # A UNet in parts is run by all workers at the same time, so each of them runs it once at a time.
    side_by_side = device.type == "cpu" and not work.shard
    lanes = lanes_for(state.parameters.values(), work.threads) if side_by_side else 1
    # A UNet in parts only runs where all workers run it.
    look = look_at_held_out(work, base, state, schedule, rank) if rank == 0 or work.shard else None
    metrics = MetricsFile(open_folder(work.output), state.step) if rank == 0 else None
    if rank == 0:
        board.tell.remote("begun", {"step": state.step, "workers": world})

    def report(told: dict[str, typing.Any]) -> None:
        told = over_workers(told, world)
        if look is not None and (told["step"] % work.look_every == 0 or told["step"] == work.recipe.steps):
            told |= look(told["step"])
        if metrics is not None:
            metrics.add(told)
            board.tell.remote("metrics", told)

    train(
        state, source_of(work, base, device, "train"), schedule, checkpoints=open_folder(f"{work.output}/checkpoints"),
        about=work.about, report=report, report_every=work.report_every, report_also_every=work.look_every,
        average=mean_over_workers if world > 1 and not work.shard else None, rank=rank, world=world, lanes=lanes,
    )  # fmt: skip


class MetricsFile:
    """``metrics.jsonl``: what was reported, once a step. Rows after ``step`` belong to a start that came to nothing.

    Written before the checkpoint of the same step, so that no row is lost that a resumed training does not make again.
    """

    def __init__(self, folder: Folder, step: int):
        self.folder, self.rows = folder, [row for row in read_metrics(folder) if row["step"] <= step]

    def add(self, told: dict[str, typing.Any]) -> None:
        self.rows.append(told)
        self.folder.write(METRICS, "".join(json.dumps(row) + "\n" for row in self.rows).encode())


def read_metrics(folder: Folder) -> list[dict[str, typing.Any]]:
    """The rows of a training's ``metrics.jsonl``, oldest first; none where there is no such file."""
    if not folder.exists(METRICS):
        return []
    return [json.loads(line) for line in folder.read(METRICS).splitlines()]


def begin(
    work: Work, device: typing.Any, told: Callable[[str], typing.Any] = lambda text: None, shard: bool = False
) -> tuple[EditModel, TrainingState]:
    """Base and state on ``device``, at the newest whole checkpoint; ``told`` hears of damaged ones."""
    from ip2p.models.components import load_base
    from ip2p.training.checkpoints import latest_whole
    from ip2p.training.state import restore, start_training

    # A UNet that no one device holds is cut up on the CPU.
    base = load_base(work.recipe.base, "cpu" if shard else device)
    state = start_training(base.unet, work.recipe, work.gradient_checkpointing, device if shard else None)
    if shard:
        base = dataclasses.replace(base, vae=base.vae.to(device), text_encoder=base.text_encoder.to(device))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = latest_whole(open_folder(f"{work.output}/checkpoints"))
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning):
            told(f"warning: {warning.message}")
    if found is not None:
        restore(state, found, work.about)
    return base, state


def check_same_step(step: int, world: int) -> None:
    """Raise InputError where workers found different checkpoints: their gradients would be averaged all the same."""
    if world == 1:
        return
    import torch.distributed as dist

    steps: list[typing.Any] = [None] * world
    dist.all_gather_object(steps, step)
    if len(set(steps)) > 1:
        raise InputError(
            f"the workers found checkpoints of different steps ({', '.join(map(str, steps))}): --output must be on "
            "storage that every machine sees, s3://… or a shared folder"
        )


def source_of(work: Work, base: EditModel, device: typing.Any, split: str) -> PairSource:
    """The pairs of ``split``, from the cache where there is one."""
    from ip2p.training.encoding import PairEncoder
    from ip2p.training.latent_cache import CachedRows
    from ip2p.training.pair_columns import PictureRows

    if work.cache:
        assert work.identity is not None
        return CachedRows(open_folder(work.cache), work.identity, split, device)
    encoder = PairEncoder(base.vae, base.text_encoder, base.tokenizer)
    return PictureRows(work.splits[split], encoder, work.recipe.resolution, threads=work.threads)


def over_workers(told: dict[str, typing.Any], world: int) -> dict[str, typing.Any]:
    """``told`` with its losses averaged over the samples of all workers, each of which saw its own share."""
    if world == 1:
        return told
    import torch.distributed as dist

    everyone: list[typing.Any] = [None] * world
    dist.all_gather_object(everyone, (told["loss_by_band"], told["samples_by_band"]))
    return {**told, **mean_of_shares(everyone)}


def mean_of_shares(shares: Sequence[tuple[Sequence[float], Sequence[int]]]) -> dict[str, typing.Any]:
    """loss, loss_by_band and samples_by_band of all samples, from each worker's means and counts by band."""
    import numpy as np

    means, counts = (np.array(column, dtype=float) for column in zip(*shares, strict=True))
    sums, seen = np.where(counts > 0, means, 0.0) * counts, counts.sum(axis=0)
    bands = np.divide(sums.sum(axis=0), seen, out=np.full(len(seen), np.nan), where=seen > 0)
    return {
        "loss": float(sums.sum() / seen.sum()),
        "loss_by_band": bands.tolist(),
        "samples_by_band": seen.astype(int).tolist(),
    }


def look_at_held_out(
    work: Work, base: EditModel, state: TrainingState, schedule: NoiseSchedule, rank: int
) -> Callable[[int], dict[str, typing.Any]] | None:
    """A function of the step that measures and draws what the averaged weights do on held-out pairs, if any.

    Where several workers look together, the one of rank 0 writes.
    """
    if not work.look_every or not work.splits.get("val"):
        return None
    from ip2p.training.edit_grid import draw_grid, grid_pairs
    from ip2p.training.edit_model import with_scales
    from ip2p.training.held_out import held_out_losses

    device = next(iter(state.parameters.values())).device
    source = source_of(work, base, device, "val")
    pairs = grid_pairs(work.splits["val"])
    folder = open_folder(work.output)

    def look(step: int) -> dict[str, typing.Any]:
        with state.ema.in_place_of(state.parameters):
            state.unet.eval()
            losses: np.ndarray = held_out_losses(
                state.unet, source, schedule, limit=256, precision=work.recipe.precision
            )
            grid = draw_grid(with_scales(base, state.unet, work.recipe), pairs, work.recipe.resolution)
            state.unet.train()
        name = f"grids/step-{step:08d}.png"
        if rank == 0:
            folder.write(name, grid)
        return {"held_out_loss": float(losses.mean()), "held_out_by_band": losses.mean(axis=0).tolist(), "grid": name}

    return look


# ---- the driver's side


class Board:
    """Where workers leave what the driver should know. Runs as an actor on the driver's node."""

    def __init__(self) -> None:
        self.told: list[tuple[str, typing.Any]] = []
        self.error: bytes | None = None

    def tell(self, kind: str, content: typing.Any) -> None:
        self.told.append((kind, content))

    def fail(self, error: bytes) -> None:
        self.error = self.error or error

    def failure(self) -> bytes | None:
        return self.error

    def take(self) -> list[tuple[str, typing.Any]]:
        taken, self.told = self.told, []
        return taken


def train_on_cluster(
    work: typing.Any,
    team: Team,
    run_name: str,
    heard: Callable[[str, typing.Any], None],
    loop: Callable[[dict[str, typing.Any]], None] = worker_loop,
) -> None:
    """Train to the recipe's last step; ``heard`` gets what workers tell (begun, metrics, note), in the calling thread.

    ``work`` is what ``loop`` unpacks; all that is used of it here is ``output``, the uri of the run's folder.

    A worker that dies costs the steps since the last checkpoint: the group is started anew, up to RETRIES times, with
    as many workers as there is room for. Raises the Ip2pError of a worker, or JobError.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    _quiet()
    # An actor that asks for nothing may be put anywhere, and would go with the first node that does.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: typing.Any = ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
    ended: list[BaseException | None] = []

    def fit() -> None:
        try:
            _trainer(work, team, run_name, board, loop).fit()
            ended.append(None)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    silent_until: float | None = time.monotonic() + SILENCE_S
    while thread.is_alive():
        thread.join(LISTEN_EVERY_S)
        for kind, content in ray.get(board.take.remote()):
            silent_until = None
            heard(kind, content)
        if silent_until is not None and time.monotonic() > silent_until:
            silent_until = None
            heard("note", f"waiting for room for {describe(team)}; `ray status` shows what there is")
    failure = ray.get(board.failure.remote())
    if failure is not None:
        raise unpack(failure)
    if ended[0] is not None:
        cause = str(ended[0]).strip().splitlines()[-1]
        raise JobError(
            f"training stopped {RETRIES + 1} times, the last time by: {cause}; the last checkpoint is whole, "
            "run the same command again to go on from it"
        ) from ended[0]


def _trainer(
    work: typing.Any, team: Team, run_name: str, board: typing.Any, loop: Callable[[dict[str, typing.Any]], None]
) -> typing.Any:
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    # Ray's annotations are still those of its first trainer.
    api: typing.Any = ray.train

    low, high = team.workers
    resources = {"CPU": team.cpus, **({"GPU": team.gpus} if team.gpus else {})}
    return TorchTrainer(
        loop,
        train_loop_config={"work": pack(work), "board": board},
        scaling_config=api.ScalingConfig(
            num_workers=high if low == high else (low, high),
            use_gpu=bool(team.gpus),
            resources_per_worker=resources,
            elastic_resize_monitor_interval_s=RESIZE_EVERY_S,
        ),
        run_config=api.RunConfig(
            name=run_name,  # never that of an earlier start: Ray Train would take up what it knows of that
            storage_path=f"{work.output}/ray",
            failure_config=api.FailureConfig(max_failures=RETRIES),
            logging_config=api.LoggingConfig(log_level="ERROR"),
        ),
        torch_config=TorchConfig(backend="nccl" if team.gpus else "gloo"),
    )


def _quiet() -> None:
    for name in ("ray.train", "ray.train.v2"):
        logging.getLogger(name).setLevel(logging.ERROR)


def team_of(workers: tuple[int, int] | None, gpus_each: float | None) -> Team:
    """As many workers as the GPUs allow; without GPUs one worker with the CPUs that its node has left.

    Raises InputError where the smallest team asked for does not fit into a Ray of our own. A cluster may grow.
    """
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus, cpus = (int(sum(node.get(name, 0) for node in nodes)) for name in ("GPU", "CPU"))
    cpus = max(1, cpus)
    if gpus_each and not gpus:
        raise InputError("--gpus-per-worker asks for GPUs, but this cluster has none; leave it out")
    share = 1.0 if gpus_each is None and gpus else gpus_each or 0.0
    chosen = workers or ((max(1, int(gpus / share)),) * 2 if share else (1, 1))
    each = 1.0 if share else cpu_share([node.get("CPU", 0) for node in nodes], chosen[0])
    team = Team(chosen, share, each, cpus)
    needs = chosen[0] * (share or team.cpus)
    if not os.environ.get("RAY_ADDRESS") and needs > (gpus if share else cpus):
        there = f"{gpus} GPU{'s' if gpus != 1 else ''}" if share else f"{cpus} CPU cores"
        raise InputError(
            f"{chosen[0]} workers of {describe_share(team)} each do not fit on {there}; use fewer --workers"
        )
    return team


def cpu_share(cores: Sequence[float], workers: int) -> float:
    """The most CPUs that each of ``workers`` can have, none of them cut in two, on nodes of so many ``cores``.

    Half a core of every node is left to whatever else runs there. At least 0.5, whether that fits or not.
    """
    left = [max(0.0, count - 0.5) for count in cores]
    shares = (count / some for count in left for some in range(1, workers + 1))
    fitting = (share for share in shares if share and sum(int(count / share + 1e-9) for count in left) >= workers)
    return max(0.5, max(fitting, default=0.5))


def threads_of(team: Team) -> int:
    """Of a CPU worker: all cores that its share is cut from, the half that is left to others included."""
    return max(1, int(team.cpus + 0.5))


def describe_share(team: Team) -> str:
    return f"{team.gpus:g} GPU" if team.gpus else f"{team.cpus:g} CPU"


def describe(team: Team) -> str:
    low, high = team.workers
    count = str(high) if low == high else f"{low} to {high}"
    return f"{count} worker{'s' if high > 1 else ''} of {describe_share(team)} each"
