"""One compiled mask kernel serves every seed: a seed that Triton took for another type would compile another."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import json

import torch

from msm_kernels import backend
from msm_kernels.patch_drawing import launch_random_masking
from tests.aot import Compiler, Variant

assert not backend.INTERPRETED
compiler = Compiler("cuda:90")
ids = torch.empty(3, 3, dtype=torch.int64, device="meta")
plans = []
for seed in (0, 1, 16, 2**31, 2**32, 2**64 - 1):
    launches = compiler.plan(Variant("", torch.int64, lambda: launch_random_masking(seed, ids, 65, 16), True))
    plans.append([launch.key for launch in launches])
print(json.dumps(plans))
"""


def test_all_seeds_run_the_same_compiled_kernel(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    plans = json.loads(done.stdout.splitlines()[-1])
    assert len(plans[0]) == 1
    assert plans == plans[:1] * 6
