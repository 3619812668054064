"""``tenuto-train import-popgym``: old RLlib checkpoints of POPGym's classes, read without running anything in them."""
