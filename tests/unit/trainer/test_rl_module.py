import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.evaluation.postprocessing import Postprocessing

import tiny_training
from tenuto_models import TrainingProgress, checkpoint
from tenuto_trainer.rl_module import PolicyModule, model_config_for

# RLlib registers its environment anew for every runner in a process, and gymnasium warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*Overriding environment rllib-single-agent-env-v0")
MEMORIES = ("dnc", "frameconv")


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_tensor_of_the_core_changes_in_one_ppo_update(memory: str):
    """In POPGym the DNC's core is built after the optimizer, so that it is never trained."""
    training = tiny_training.Training(tiny_training.config(memory))
    before = training.weights()
    training.update(training.sample())
    after = training.weights()
    core = [name for name in before if name.startswith("policy.core.")]
    assert len(core) == {"dnc": 6, "frameconv": 2}[memory]
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


@pytest.mark.parametrize("memory", MEMORIES)
def test_every_parameter_is_in_the_optimizer(memory: str):
    training = tiny_training.Training(tiny_training.config(memory))
    ((_, optimizer),) = training.learner.get_optimizers_for_module(training.module_id)
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in training.module.named_parameters() if id(p) not in optimized} == set()
    assert set(training.weights()) == {f"policy.{name}" for name in training.module.policy.state_dict()}


@pytest.mark.parametrize("memory", MEMORIES)
def test_learner_recomputes_the_logits_that_were_sampled(memory: str):
    """Also in rows that begin in the middle of an episode or of a fragment: PPO's ratio is 1 before an update."""
    training = tiny_training.Training(tiny_training.config(memory))
    with torch.no_grad():
        for parameter in training.module.parameters():
            parameter.mul_(2)  # A fresh policy is so close to uniform that a lost state would hardly show.
    training.runner.module.load_state_dict(training.module.state_dict())
    training.sample()
    batch = training.learner_batch(training.sample())
    mask, sampled = batch[Columns.LOSS_MASK], batch[Columns.ACTION_DIST_INPUTS]
    starts = batch[Columns.STATE_IN]["t"][:, 0]
    assert mask.sum() == 256
    assert (starts % 16 != 0).any()  # A row that goes on with the fragment before.

    recomputed = training.module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    torch.testing.assert_close(recomputed[mask], sampled[mask], rtol=0, atol=2e-6)
    distribution = training.module.get_train_action_dist_cls().from_logits(recomputed)
    ratio = torch.exp(distribution.logp(batch[Columns.ACTIONS]) - batch[Columns.ACTION_LOGP])
    torch.testing.assert_close(ratio[mask], torch.ones(256), rtol=0, atol=1e-5)

    batch[Columns.STATE_IN] = {name: torch.zeros_like(x) for name, x in batch[Columns.STATE_IN].items()}
    forgetful = training.module.forward_train(batch)[Columns.ACTION_DIST_INPUTS]
    assert (forgetful - sampled)[mask].abs().max() > 1e-3


def test_the_learner_trains_on_the_steps_that_were_played_and_no_others():
    """RLlib adds one to every episode, for the value of its last observation; here also as a row of its own."""
    settings = tiny_training.config(
        env_id="tiny_training:bits", num_envs=1, batch_size=64, minibatch_size=32, max_seq_len=5
    )
    training = tiny_training.Training(settings)
    batch = training.learner_batch(training.sample())
    lengths = batch[Columns.SEQ_LENS]
    assert lengths.sum() == 64
    assert lengths.min() > 0
    assert torch.equal(batch[Columns.LOSS_MASK], torch.arange(5) < lengths.unsqueeze(1))
    assert {len(x) for x in (*batch[Columns.STATE_IN].values(), batch[Columns.OBS])} == {len(lengths)}

    training = tiny_training.Training(tiny_training.config(batch_size=256, minibatch_size=64, num_epochs=2))
    training.update(training.sample())
    ((_, optimizer),) = training.learner.get_optimizers_for_module(training.module_id)
    assert {int(state["step"]) for state in optimizer.state.values()} == {8}


@pytest.mark.parametrize("memory", MEMORIES)
def test_sampling_forward_is_exactly_the_policys_step(memory: str):
    training = tiny_training.Training(tiny_training.config(memory))
    module, policy = training.runner.module, training.runner.module.policy
    observation = torch.rand(5, 10)
    state = {name: torch.rand_like(x.float()).to(x.dtype) for name, x in policy.initial_state(5).items()}
    state["t"] += 7
    with torch.no_grad():
        expected, after = policy.step(observation, state)
    batch = {Columns.OBS: observation.unsqueeze(1), Columns.STATE_IN: module.pack_state(state)}
    out = module.forward_exploration(batch)
    got = module.unpack_state(out[Columns.STATE_OUT])
    assert torch.equal(out[Columns.ACTION_DIST_INPUTS], expected.logits.unsqueeze(1))
    assert got.keys() == after.keys()
    assert all(torch.equal(got[name], x) for name, x in after.items())


@pytest.mark.parametrize("memory", MEMORIES)
def test_initial_state_is_the_policys_without_a_batch_dimension(memory: str):
    module = tiny_training.Training(tiny_training.config(memory)).module
    leaves = module.get_initial_state()
    assert leaves["t"].dtype == np.int32
    state = module.unpack_state({name: torch.from_numpy(x).unsqueeze(0) for name, x in leaves.items()})
    assert {name: x.shape for name, x in state.items()} == {s.name: (1, *s.shape) for s in module.policy.state_spec}
    assert not any(x.any() for x in state.values())


@pytest.mark.parametrize(
    "settings",
    [
        {"memory": "dnc"},
        {"memory": "frameconv"},
        # Of a fragment as long as a row, the step that RLlib adds is a row of its own.
        {"max_seq_len": 13},
    ],
    ids=str,
)
def test_advantages_are_those_of_values_that_the_learner_computes_itself(settings: dict[str, Any]):
    training = tiny_training.Training(tiny_training.config(**settings))
    training.sample()  # So that fragments begin in the middle of an episode.
    episodes = training.sample()
    batch = training.learner_batch(copy.deepcopy(episodes))

    def values_of_all_steps(columns: dict[str, Any]) -> torch.Tensor:
        return training.module.forward_train(columns)[Columns.EMBEDDINGS].detach()

    training.module.compute_values = values_of_all_steps
    expected = training.learner_batch(episodes)
    played = batch[Columns.LOSS_MASK]
    targets, advantages = (
        b[played] for b in (expected[Postprocessing.VALUE_TARGETS], batch[Postprocessing.ADVANTAGES])
    )
    torch.testing.assert_close(batch[Postprocessing.VALUE_TARGETS][played], targets, rtol=0, atol=1e-6)
    raw = targets - values_of_all_steps(batch)[played]
    torch.testing.assert_close(advantages, (raw - raw.mean()) / raw.std(correction=0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "env_id", ["popgym-PositionOnlyPendulumEasy-v0", "popgym-MineSweeperEasy-v0", "tiny_training:bits"]
)
def test_every_kind_of_action_is_sampled_and_trained(env_id: str):
    training = tiny_training.Training(tiny_training.config(env_id=env_id, batch_size=64, minibatch_size=32))
    before = training.weights()
    training.update(training.sample())
    after = training.weights()
    assert [name for name in before if np.array_equal(before[name], after[name])] == []


def test_training_starts_from_the_weights_of_a_published_version(tmp_path: Path):
    module = tiny_training.Training(tiny_training.config()).module
    policy = module.policy
    folder = checkpoint.write(tmp_path, "p", policy, TrainingProgress())
    config = model_config_for(policy.observation_space, policy.action_space, policy.config, 16, folder)
    restarted = PolicyModule(
        observation_space=module.observation_space, action_space=module.action_space, model_config=config
    )
    assert all(torch.equal(x, restarted.policy.state_dict()[name]) for name, x in policy.state_dict().items())


@pytest.mark.parametrize(("num_rows", "rows_each"), [(49, 1), (49, 7)])
def test_minibatches_are_as_large_as_asked(num_rows: int, rows_each: int):
    """49 (16 / 784) is a little less than 1 in floating point."""
    settings = tiny_training.config(
        env_id="tiny_training:endless", num_envs=1, batch_size=num_rows * 16, minibatch_size=rows_each * 16
    )
    training = tiny_training.Training(settings)
    training.update(training.sample())
    ((_, optimizer),) = training.learner.get_optimizers_for_module(training.module_id)
    assert {int(state["step"]) for state in optimizer.state.values()} == {num_rows // rows_each}


def test_a_minibatch_whose_gradients_are_not_finite_is_left_out():
    training = tiny_training.Training(tiny_training.config())
    training.update(training.sample())
    before = training.weights()
    gradients = {name: torch.ones_like(p) for name, p in training.learner._params.items()}
    next(iter(gradients.values())).view(-1)[3] = torch.inf
    training.learner.apply_gradients(gradients)
    assert [name for name, value in training.weights().items() if not np.array_equal(value, before[name])] == []
