"""Nodes that come and go on one machine: Ray's own autoscaler, and a provider that starts raylets instead of machines.

What is asked of the autoscaler is what a cloud or KubeRay is asked for, so replicas and jobs can be watched as they
wait for nodes, get them and give them back.
"""

from __future__ import annotations

import dataclasses
import typing

HEAD_NODE_ID = "f" * 51 + "00000"  # by which Ray's provider of local nodes knows the head
NODE = "worker"


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Worker nodes that the autoscaler may start, all alike."""

    most: int = 0
    cpus: int = 1
    gpus: int = 0  # slots only; nobody looks whether there is a device
    object_store_mb: int = 100
    idle_s: float = 10.0  # after so long without work a node is ended


def configuration(nodes: Nodes, gcs_address: str, head_cpus: int) -> dict[str, typing.Any]:
    """The file for ``ray start --autoscaling-config``."""
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": gcs_address, "head_node_id": HEAD_NODE_ID, "use_node_id_as_ip": True, "launch_multiple": True,
        "disable_node_updaters": True, "disable_launch_config_check": True,
    }  # fmt: skip
    worker = {"CPU": nodes.cpus, "GPU": nodes.gpus, "object_store_memory": nodes.object_store_mb * 2**20}
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "ip2p-local", "provider": provider, "max_workers": nodes.most,
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            NODE: {"resources": worker, "node_config": {}, "min_workers": 0, "max_workers": nodes.most},
        },
        "head_node_type": "ray.head.default", "upscaling_speed": 1.0, "idle_timeout_minutes": nodes.idle_s / 60,
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [], "rsync_exclude": [],
        "rsync_filter": [], "file_mounts_sync_continuously": False,
        **{f"{name}_commands": [] for name in commands},
    }  # fmt: skip


def environment() -> dict[str, str]:
    """What the head needs beside the configuration."""
    return {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_NODE_ID,
    }
