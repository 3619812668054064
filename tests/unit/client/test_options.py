from typing import Any

import pytest

from tenuto_client import RemotePolicy, RemoteVectorPolicy


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": -1}, "version: got -1"),
        ({"seed": 2**64}, "seed: got 18446744073709551616"),
        ({"timeout_s": 0}, "timeout_s: got 0"),
        ({"timeout_s": float("nan")}, "timeout_s: got nan"),
        ({"wait_for_policy_s": -1}, "wait_for_policy_s: got -1"),
        ({"outputs": ["values"]}, r"outputs: got \['values'\]"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RemotePolicy("localhost:1", **arguments)


def test_a_vector_policy_checks_its_own_arguments() -> None:
    with pytest.raises(ValueError, match="num_envs: got 0"):
        RemoteVectorPolicy("localhost:1", 0)
    with pytest.raises(ValueError, match="transport: got 'udp'"):
        RemoteVectorPolicy("localhost:1", 1, transport="udp")  # type: ignore[arg-type]
