"""What a GPU says of a run's steps: torch's own warnings of host syncs (tests/test_host_syncs.py guesses on a CPU)."""

import json

import pytest
import torch

from tests.processes import run_ranks
from tests.sync_attribution import CASES, documented

pytestmark = pytest.mark.gpu


def test_no_step_waits_for_the_gpu_but_where_the_page_says(tmp_path):
    for package in ("deepspeed", "webdataset", "soundfile"):
        pytest.importorskip(package)
    from tests.corpus import write_corpus

    corpus = write_corpus(tmp_path / "corpus", count=48, num_shards=2)
    size = min(2, torch.cuda.device_count())
    run_ranks(["-m", "tests.host_syncs_worker", str(corpus), str(tmp_path), *CASES], size=size)
    unlisted = {}
    for case, found in json.loads((tmp_path / "syncs.json").read_text()).items():
        in_steps = {tuple(name.split("|")[1:]) for name in found if name.startswith("step|")}
        listed = {("deepspeed", where) for where in documented()[case]}
        if case == "0/fp32":
            listed.add(("msm_dist", "zero.py:before_step"))
        # What a hook of the backward waits for is told at backward(): torch warns in another thread.
        unlisted[case] = sorted(in_steps - listed)
    assert not any(unlisted.values()), unlisted
