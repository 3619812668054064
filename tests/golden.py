"""The golden cases: one step of POPGym's own classes, recorded with their weights and states."""

import json
from pathlib import Path

import numpy as np
import torch

from tenuto_models import Policy, import_popgym

DATA = Path(__file__).parent / "data"
CASES = [
    ("dnc_small", "small_zero"),
    ("dnc_small", "small_rand"),
    ("dnc_small", "b1_zero"),
    ("frameconv_small", "small_zero"),
    ("frameconv_small", "small_rand"),
]


class GoldenCase:
    def __init__(self, file: str, case: str) -> None:
        with np.load(DATA / f"{file}.npz") as archive:
            arrays = {k.removeprefix(f"{case}/"): archive[k] for k in archive.files if k.startswith(f"{case}/")}
        self.config = json.loads(str(arrays.pop("config")))
        self.parameters = {k.removeprefix("param/"): v for k, v in arrays.items() if k.startswith("param/")}
        self.arrays = {k: torch.from_numpy(v) for k, v in arrays.items()}
        self.starts_from_ties = case.endswith("_zero")
        self.obs = self.arrays["obs"]
        self.initial = self.state("init/")
        self.length = self.obs.shape[1]

    def policy(self) -> Policy:
        return import_popgym(self.config, self.parameters)

    def state(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def state_before(self, t: int) -> dict[str, torch.Tensor]:
        return self.initial if t == 0 else self.state_after(t - 1)

    def state_after(self, t: int) -> dict[str, torch.Tensor]:
        return {k: v[t] for k, v in self.state("step/state/").items()}
