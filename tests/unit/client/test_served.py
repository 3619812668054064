"""What a user sees of the policy that the server describes."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces

from scripted import OBSERVATIONS, Outside
from tenuto_client import MissingExtraError, ObservationError, ServedPolicy

POPGYM = spaces.Tuple((spaces.Discrete(4), spaces.Discrete(2)))


def served(space: Any = OBSERVATIONS) -> ServedPolicy:
    return ServedPolicy.from_wire(Outside(space).policy)


def test_it_prints_as_one_short_line() -> None:
    text = repr(served())
    assert text.startswith("ServedPolicy(policy_name='walker', version=3, versions=(2, 3), ")
    assert len(text) < 250 and "\n" not in text


def test_a_space_without_gymnasium_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = served()
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for read in (policy.observation_space, policy.action_space):
        with pytest.raises(MissingExtraError, match=r"pip install 'tenuto\[gym\]', or pip install '\.\[gym\]' in a"):
            read()


@pytest.mark.parametrize(("observation", "num_rows"), [(2, None), (np.int64(2), None), (np.array([2, 3]), 2)])
def test_a_bare_popgym_observation_is_refused_with_a_hint(observation: Any, num_rows: int | None) -> None:
    with pytest.raises(ObservationError, match=r"expected a tuple .*must be made with tenuto_envs\.make") as caught:
        served(POPGYM).pack_row(observation) if num_rows is None else served(POPGYM).pack(observation, num_rows)
    assert caught.value.reason == "OBSERVATION_FIELDS"


def test_other_observations_are_refused_without_a_hint() -> None:
    for space, observation in ((POPGYM, "no"), (OBSERVATIONS, 2)):
        with pytest.raises(ObservationError) as caught:
            served(space).pack_row(observation)
        assert "tenuto_envs" not in str(caught.value)


def test_a_refused_observation_has_one_traceback() -> None:
    with pytest.raises(ObservationError) as caught:
        served().pack_row(2)
    assert "".join(traceback.format_exception(caught.value)).count("Traceback") == 1
