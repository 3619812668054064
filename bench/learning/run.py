"""Trains one algorithm on one environment and writes a line of JSON per iteration.

    python bench/learning/run.py --algorithm dnc --env popgym-RepeatPreviousEasy-v0 --seed 0 --out run.jsonl

The file appears when the run is complete, so that one which was cut off is begun again. Returns are means over the last
100 episodes, as RLlib counts them, with actions drawn as in training; the last line holds the whole run's figures.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
from algorithms import ALGORITHMS, algorithm_config, memory_of
from settings import settings_for

from tenuto_trainer.ppo import local_ray


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", required=True, choices=ALGORITHMS)
    parser.add_argument("--env", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=300_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=JSON", help="override a setting")
    options = parser.parse_args()

    overrides = {name: json.loads(text) for name, _, text in (item.partition("=") for item in options.set)}
    settings = settings_for(options.env, options.algorithm, memory_of(options.algorithm), options.seed, **overrides)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with local_ray(settings):
        algorithm = algorithm_config(options.algorithm, settings).build_algo()
        began, cpu_began, steps = time.perf_counter(), time.process_time(), 0
        while steps < options.steps:
            result = algorithm.train()
            steps = int(result["num_env_steps_sampled_lifetime"])
            mean = float(result["env_runners"].get("episode_return_mean", math.nan))
            rows.append({
                "steps": steps,
                "return_mean": None if math.isnan(mean) else mean,
                "wall_s": round(time.perf_counter() - began, 3),
                "cpu_s": round(time.process_time() - cpu_began, 3),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
        algorithm.stop()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    whole = options.out.with_suffix(".partial")
    whole.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole.replace(options.out)


if __name__ == "__main__":
    main()
