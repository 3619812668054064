"""Importing POPGym's tensors is strict: what is missing, extra or mis-shaped is named."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

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


def test_rllibs_model_configuration_is_refused_with_the_keys_that_are_expected() -> None:
    message = (
        r"missing \['cls', 'obs_dim', 'n_act', 'cfg'\], expected the keys cls, obs_dim, n_act, max_seq_len, cfg; "
        r"RLlib's config\['model'\] holds cfg as custom_model_config"
    )
    with pytest.raises(ConfigError, match=message):
        import_popgym({"max_seq_len": 64, "custom_model": "DiffNC", "custom_model_config": {}}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embedding": "base2"}, "embedding: got 'base2', expected 'sine' or None"),
        ({"embedding_mode": "cat"}, "embedding_mode: got 'cat', expected 'add'"),
        ({"embedding_size": 8}, "embedding_size: got 8, expected None or "),
        ({"scale_embedding": False}, "scale_embedding: got False, expected True"),
        ({"embedding": None}, r"not expected \['embedding.weight'\]"),
    ],
)
def test_embeddings_that_policies_do_not_compute_are_refused_by_name(changes: dict[str, object], message: str) -> None:
    case = GoldenCase("frameconv_small", "small_zero")
    case.config["cfg"] |= changes
    with pytest.raises(ConfigError, match=message):
        case.policy()


def test_a_sine_without_its_table_is_refused() -> None:
    case = GoldenCase("frameconv_small", "small_zero")
    del case.parameters["embedding.weight"]
    with pytest.raises(ConfigError, match=r"missing \['embedding.weight'\]"):
        case.policy()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_the_example_in_the_documentation_makes_the_policy_of_a_live_model() -> None:
    page = (Path(__file__).parents[3] / "docs" / "popgym.md").read_text()
    [example] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import_popgym(" in code]
    names: dict[str, Any] = {}
    exec(example, names)
    observations = torch.rand(6, 10)
    with torch.no_grad():
        state = [tensor.float()[None] for tensor in names["model"].get_initial_state()]
        logits, _ = names["model"]({"obs": observations, "obs_flat": observations}, state, torch.tensor([6]))
        output, _ = names["policy"].unroll(observations[None], names["policy"].initial_state(1))
    torch.testing.assert_close(output.logits[0], logits, rtol=0, atol=1e-5)
