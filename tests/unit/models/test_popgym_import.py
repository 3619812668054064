"""Importing POPGym's tensors is strict: what is missing, extra or mis-shaped is named."""

import numpy as np
import pytest

from golden import GoldenCase
from tenuto_models import ConfigError, import_popgym


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("core.output.bias"), r"missing \['core.output.bias'\]"),
        (lambda p: p.update(surprise=np.ones(1)), r"not expected \['surprise'\]"),
        (lambda p: p.update({"core.output.bias": np.ones(3)}), r"core.output.bias: got shape \(3,\), expected \(32,\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(change: object, message: str) -> None:
    case = GoldenCase("dnc_small", "small_zero")
    change(case.parameters)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=message):
        case.policy()


def test_a_sine_table_of_another_period_is_refused() -> None:
    case = GoldenCase("frameconv_small", "small_zero")
    case.config["max_seq_len"] = 1024
    with pytest.raises(ConfigError, match=r"embedding\.weight: got a table"):
        case.policy()


def test_other_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="cls: got 'GRU'"):
        import_popgym({"cls": "GRU", "cfg": {"hidden_size": 1}}, {})
