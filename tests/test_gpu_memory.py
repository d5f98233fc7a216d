"""Predicted memory against torch.cuda.max_memory_allocated, on one GPU and on as many as there are."""

import json

import pytest
import torch

from benchmarks import memory as bench

pytestmark = pytest.mark.gpu
BOUNDS = {"steady": 0.1, "accumulating": 0.1, "peak": 0.1}


@pytest.mark.parametrize("ranks", ["one", "all"])
def test_predictions_agree_with_a_gpu_s_memory(ranks, tmp_path):
    pytest.importorskip("deepspeed")
    world_size = 1 if ranks == "one" else min(8, torch.cuda.device_count())
    if (ranks == "all") == (world_size == 1):
        pytest.skip("there is one GPU: the other case covers it")
    output = tmp_path / "rows.json"
    bench.run(bench.GPU_CASES, world_size, output)
    rows = json.loads(output.read_text())
    assert len(rows) == len(bench.GPU_CASES)
    assert not bench.wrong(rows, BOUNDS), bench.table(rows)
