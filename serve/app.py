"""The Ray Serve application: replicas that each hold engines and the web application, as many as the work asks for.

    serve run serve.app:app                                   # the shipped model, on this machine
    serve run serve.app:app models=night=/models/night,day=/models/day max_replicas=4
    serve deploy serve/config.yaml

Ingress and engine are one deployment: a picture crosses one process less, and a client that goes away ends its edit.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import typing
from pathlib import Path

import ray
from ray import serve
from ray.serve.config import AutoscalingContext

from ip2p.doctor.finding import ERROR, WARNING
from ip2p.doctor.start import check_served, start_findings, told
from ip2p.errors import CheckpointError, DeviceError, InputError
from serve.edit_board import EditBoard, Record
from serve.engines import Engines
from serve.http import create_app
from serve.settings import Settings, load_check, named_model, read_keys

log = logging.getLogger("ip2p.serve")
BOARD = "ip2p-edit-board"
WORK = "queued_s"  # the name under which replicas tell the autoscaler of their work


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What ``serve run`` and the YAML's ``args`` may say; all but the first few are Settings of the same meaning."""

    models: str = ""  # NAME=DIR,NAME=DIR; empty: the shipped one
    min_replicas: int = 1  # 0: none while nobody asks, and tens of seconds for the one who then does
    max_replicas: int = 4
    target_s: float = 2.0  # seconds of work that a replica may have before there should be another
    upscale_delay_s: float = 3.0
    downscale_delay_s: float = 120.0
    num_gpus: float = 0.0  # of a replica
    num_cpus: float = 1.0  # of a replica; also its torch threads where it has no GPU
    dtype: str = "float32"
    device: str = "auto"
    models_held: int = 2
    default_steps: int = 20
    max_steps: int = 100
    queue_limit_s: float = 30.0  # of a replica
    keys: str = ""  # file, on every node; besides the environment
    check: str = ""  # module:function


class EditReplica:
    """One replica: its engines, and what Ray Serve asks of it."""

    async def __init__(self, arguments: Arguments):  # type: ignore[misc]  # Serve awaits it
        if arguments.num_gpus == 0:
            import torch

            torch.set_num_threads(max(1, math.floor(arguments.num_cpus)))
        self.settings = settings_of(arguments)
        look_around(self.settings, gpu=arguments.num_gpus > 0)
        announce = serve.multiplexed(max_num_models_per_replica=self.settings.models_held)(_held)
        self.engines = Engines(self.settings, announce)
        # Ready means warm: Serve sends nothing here before this returns.
        await self.engines.get(self.settings.default_model)

    def __serve_build_asgi_app__(self) -> typing.Any:
        return create_app(self.settings, self.engines, typing.cast(EditBoard, ClusterBoard(self.settings.job_kept_s)))

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For the policy below."""
        return {WORK: self.engines.queued_s()}

    def check_health(self) -> None:
        """Raises where this replica must be replaced."""
        if not self.engines.work():
            raise RuntimeError("an engine has stopped or lost its device")


def look_around(settings: Settings, gpu: bool) -> None:
    """The quick part of `ip2p doctor` on a replica's node. Raises CheckpointError or DeviceError before any load."""
    for one in [check_served(settings.models.values()), *start_findings(gpu=gpu)]:
        if one.level == WARNING:
            log.warning(told(one))
        if one.level == ERROR:
            raise (CheckpointError if one.name == "edit model" else DeviceError)(told(one))


async def _held(model_id: str) -> str:
    """Known to Ray Serve as a model that this replica holds, so that its router sends more of the same here."""
    return model_id


def replicas_for_work(ctx: AutoscalingContext, target_s: float) -> tuple[float, dict[str, typing.Any]]:
    """As many replicas as bring the work that waits down to ``target_s`` seconds each."""
    told = (ctx.aggregated_metrics or {}).get(WORK, {})
    waiting_s = sum(told.values())
    busy = 1 if waiting_s > 0 or ctx.total_num_requests > 0 else 0
    return max(busy, waiting_s / target_s), {}


class WorkPolicy:
    """``replicas_for_work`` as Ray Serve makes policies: from the keywords of a configuration."""

    def __init__(self, target_s: float):
        self.target_s = target_s

    def __call__(self, ctx: AutoscalingContext) -> tuple[float, dict[str, typing.Any]]:
        return replicas_for_work(ctx, self.target_s)


class ClusterBoard:
    """EditBoard for all replicas: the same methods, asked of one actor."""

    def __init__(self, kept_s: float):
        actor = ray.remote(EditBoard).options(
            name=BOARD, namespace="ip2p", lifetime="detached", get_if_exists=True, num_cpus=0, max_restarts=-1
        )
        self.actor: typing.Any = actor.remote(kept_s)

    async def put(self, record: Record, files: list[bytes] | None = None) -> bool:
        return await self.actor.put.remote(record, files)

    async def get(self, name: str) -> Record | None:
        return await self.actor.get.remote(name)

    async def files(self, name: str) -> list[bytes]:
        return await self.actor.files.remote(name)

    async def events(self, name: str, after: int) -> list[tuple[int, str, Record]]:
        return await self.actor.events.remote(name, after)

    async def cancel(self, name: str) -> None:
        await self.actor.cancel.remote(name)


def read_arguments(args: typing.Mapping[str, typing.Any]) -> Arguments:
    """Texts or numbers by name to Arguments. Raises InputError for a name or value that is not known."""
    known: dict[str, type] = {field.name: type(field.default) for field in dataclasses.fields(Arguments)}
    values = {}
    for name, value in args.items():
        if name not in known:
            raise InputError(f"unknown argument {name!r}; known: {', '.join(known)}")
        try:
            values[name] = known[name](value)
        except ValueError as error:
            raise InputError(f"{name}={value}: expected {known[name].__name__}") from error
    return Arguments(**values)


def settings_of(arguments: Arguments) -> Settings:
    """The Settings of a replica. Raises InputError for what cannot be used."""
    names = {field.name for field in dataclasses.fields(Settings)} & {f.name for f in dataclasses.fields(Arguments)}
    chosen = {name: getattr(arguments, name) for name in names - {"models"}}
    if arguments.models:
        complaint = f"models={arguments.models}: expected NAME=DIR,NAME=DIR"
        chosen["models"] = dict(named_model(one, complaint) for one in arguments.models.split(","))
    return Settings(
        **chosen,
        key_digests=read_keys(Path(arguments.keys) if arguments.keys else None),
        picture_check=load_check(arguments.check) if arguments.check else None,
    )


def app(args: dict[str, str]) -> serve.Application:
    """What ``serve run`` and ``serve deploy`` build."""
    arguments = read_arguments(args)
    settings_of(arguments)  # a slip is told here, not in a replica's log
    deployment = serve.deployment(
        name="EditReplica",
        ray_actor_options={"num_cpus": arguments.num_cpus, "num_gpus": arguments.num_gpus},
        # The engine takes in what it can do and answers 429 for the rest; these only bound what reaches it.
        max_ongoing_requests=512,
        max_queued_requests=512,
        backpressure_config={"status_code": 429, "retry_after_s": 5},
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=120,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": arguments.max_replicas,
            "upscale_delay_s": arguments.upscale_delay_s,
            "downscale_delay_s": arguments.downscale_delay_s,
            "look_back_period_s": 4,
            "metrics_interval_s": 1,
            "policy": {"policy_function": WorkPolicy, "policy_kwargs": {"target_s": arguments.target_s}},
        },
    )(serve.ingress()(EditReplica))
    return deployment.bind(arguments)
