"""The description of a cluster on AWS, as Ray reads it and by the parameters that EC2 takes; nothing is asked."""

from __future__ import annotations

import copy
import ipaddress
import re
import socket
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.command_lines import problem, shell_commands

ROOT = Path(__file__).parents[3]
FILE = ROOT / "cluster" / "aws-a100.yaml"
COMMANDS = ("setup_commands", "head_setup_commands", "worker_setup_commands", "head_start_ray_commands",
            "worker_start_ray_commands", "initialization_commands")  # fmt: skip


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_: object) -> None:
        raise AssertionError("something was asked over the network")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def asked() -> dict:
    return yaml.safe_load(FILE.read_text())


@pytest.fixture
def prepared(asked) -> dict:
    """With Ray's defaults, as `ray up` goes on with it."""
    return prepare_config(asked)


def ec2_problems(operation: str, parameters: dict) -> str:
    shape = get_session().get_service_model("ec2").operation_model(operation).input_shape
    return ParamValidator().validate(parameters, shape).generate_report()


def test_ray_takes_it_and_reads_the_groups_that_are_meant(prepared):
    validate_config(prepared)
    types = prepared["available_node_types"]
    found = {name: (one["resources"], one["min_workers"], one["max_workers"]) for name, one in types.items()}
    assert found == {"head": ({"CPU": 0}, 0, 0), "a100": ({"CPU": 96, "GPU": 8}, 0, 2)}
    assert prepared["head_node_type"] == "head"
    assert prepared["max_workers"] == 2
    assert 1 <= prepared["idle_timeout_minutes"] <= 30


SLIPS = [
    (("idle_timeout_minute",), 10, "idle_timeout_minute"),
    (("available_node_types", "a100", "max_worker"), 2, "max_worker"),
    (("available_node_types", "a100", "min_workers"), "0", "is not of type 'integer'"),
    (("docker", "images"), "x", "images"),
    (("head_node_type",), "a100s", "must be one of"),
    (("available_node_types", "a100", "min_workers"), 3, "max_workers"),
]


@pytest.mark.parametrize(("path", "value", "said"), SLIPS)
def test_a_field_that_ray_does_not_know_or_that_does_not_fit_is_refused(asked, path, value, said):
    place = asked
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, ValueError), match=said):
        validate_config(prepare_config(asked))


def test_ec2_knows_every_parameter_of_the_machines(asked):
    for kind in asked["available_node_types"].values():
        assert ec2_problems("RunInstances", {**kind["node_config"], "MinCount": 1, "MaxCount": 1}) == ""
    wrong = copy.deepcopy(asked["available_node_types"]["a100"]["node_config"])
    wrong["InstanceMarketOption"] = wrong.pop("InstanceMarketOptions")
    assert "InstanceMarketOption" in ec2_problems("RunInstances", {**wrong, "MinCount": 1, "MaxCount": 1})
    rules = asked["provider"]["security_group"]["IpPermissions"]
    assert ec2_problems("AuthorizeSecurityGroupIngress", {"GroupId": "x", "IpPermissions": rules}) == ""


def test_a100s_are_bought_on_the_spot_market_and_the_head_is_not(asked):
    head, a100 = (asked["available_node_types"][name]["node_config"] for name in ("head", "a100"))
    assert a100["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head
    assert (head["InstanceType"], a100["InstanceType"]) == ("m7i.2xlarge", "p4d.24xlarge")
    assert head["IamInstanceProfile"] != a100["IamInstanceProfile"]  # only the head may start machines


def test_nobody_but_one_address_gets_in_and_only_by_ssh(asked):
    (rule,) = asked["provider"]["security_group"]["IpPermissions"]
    assert (rule["FromPort"], rule["ToPort"]) == (22, 22)
    assert [ipaddress.ip_network(one["CidrIp"]).num_addresses for one in rule["IpRanges"]] == [1]
    (start,) = [line for line in asked["head_start_ray_commands"] if "ray start" in line]
    assert "--dashboard-host=127.0.0.1" in start


def test_every_process_of_ray_asks_for_the_token_which_is_a_private_file(asked, tmp_path):
    (mounted,) = asked["file_mounts"]
    options = asked["docker"]["run_options"]
    assert {"--env RAY_AUTH_MODE=token", f"--env RAY_AUTH_TOKEN_PATH={mounted}"} <= set(options)
    # Before anything that needs it, and so that nobody else on the machine reads it.
    first = asked["setup_commands"][0]
    assert first == f"chmod 600 {mounted}"
    token = tmp_path / "token"
    token.write_text("secret")
    subprocess.run(["sh", "-c", first.replace(mounted, str(token))], check=True)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert not re.search(r"RAY_AUTH_TOKEN=", FILE.read_text())
    machines = [kind["node_config"] for kind in asked["available_node_types"].values()]
    assert {one["MetadataOptions"]["HttpTokens"] for one in machines} == {"required"}
    assert all(disk["Ebs"]["Encrypted"] for one in machines for disk in one["BlockDeviceMappings"])


def test_the_commands_are_ones_that_are_there(asked):
    lines = [line for name in COMMANDS for line in asked[name]]
    ours = [words for line in lines for words in shell_commands(line) if problem(words) is not None]
    assert [words[:5] for words in ours] == [["python", "-m", "ip2p", "weights", "fetch"]]
    assert [problem(words) for words in ours] == [""]
    volumes = [option.split()[1].split(":")[1] for option in asked["docker"]["run_options"] if "--volume" in option]
    assert Path(ours[0][6]).parent == Path(volumes[0])  # one below: a fetched folder appears by a rename
