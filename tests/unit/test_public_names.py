"""The names that others may import; a change here is a change for them."""

import tenuto_envs
import tenuto_models
import tenuto_proto
import tenuto_trainer

PUBLIC = {
    tenuto_proto: ["ObservationCodec", "WireError", "array_from_wire", "array_to_wire", "space_from_wire",
                   "space_to_wire", "write_array"],
    tenuto_models: ["Checkpoint", "CheckpointError", "ConfigError", "DNCConfig", "DNCCore", "Evaluation",
                    "FrameconvConfig", "FrameconvCore", "MemoryCore", "ModelError", "Policy", "PolicyConfig",
                    "PolicyOutput", "State", "StateSpec", "TensorSpec", "TrainingProgress", "import_popgym"],
}  # fmt: skip


def test_public_names_are_these() -> None:
    for module, names in PUBLIC.items():
        assert sorted(module.__all__) == sorted(names)
    for module in (tenuto_envs, tenuto_trainer, *PUBLIC):
        assert all(hasattr(module, name) for name in module.__all__)
