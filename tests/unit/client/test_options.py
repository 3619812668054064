from typing import Any

import pytest

from tenuto_client import AsyncRemotePolicy, AsyncRemoteVectorPolicy, RemotePolicy, RemoteVectorPolicy
from tenuto_client.options import PolicyOptions


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": -1}, "version: got -1"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"timeout_s": 0}, "timeout_s: got 0"),
        ({"timeout_s": float("nan")}, "timeout_s: got nan"),
        ({"wait_for_policy_s": -1}, "wait_for_policy_s: got -1"),
        ({"outputs": ["values"]}, r"outputs: got \['values'\]"),
        ({"outputs": "values"}, r"outputs: got \['values'\]"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemotePolicy("localhost:1", **arguments)


def test_a_vector_policy_checks_its_own_arguments() -> None:
    bad: Any
    for bad in (0, 1.5, "2", None):
        with pytest.raises(ValueError, match=f"num_envs: got {bad!r}, expected a whole number"):
            RemoteVectorPolicy("localhost:1", bad)
    with pytest.raises(ValueError, match="transport: got 'udp'"):
        RemoteVectorPolicy("localhost:1", 1, transport="udp")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "address",
    ["localhost", "", "http://localhost:50051", "localhost:99999", "localhost:0", ":50051", "localhost:port", "a b:1",
     "::1:50051", "unix:", "localhost:50051/", None],
)  # fmt: skip
def test_an_address_at_which_nobody_can_be_is_refused_at_once(address: Any) -> None:
    for policy in (RemotePolicy, AsyncRemotePolicy):
        with pytest.raises(ValueError) as caught:
            policy(address)
        assert str(caught.value) == f"address: got {address!r}, expected host:port"
    for policy in (RemoteVectorPolicy, AsyncRemoteVectorPolicy):
        with pytest.raises(ValueError, match="address: got"):
            policy(address, 2)


@pytest.mark.parametrize(
    "address",
    ["localhost:50051", "10.0.0.1:1", "[::1]:65535", "robot_arm.lab:50051", "unix:/tmp/x", "unix:///tmp/x",
     "dns:///policies:50051", "dns:policies:50051", "ipv4:10.0.0.1:1", "ipv6:[::1]:1"],
)  # fmt: skip
def test_the_targets_of_grpc_are_addresses(address: str) -> None:
    RemotePolicy(address).close()


def test_one_output_may_be_named_without_a_list() -> None:
    assert PolicyOptions.build("", 0, None, False, "value", 5.0, 0.0).outputs == {"value"}
