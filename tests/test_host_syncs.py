"""No step of ours waits for the device; DeepSpeed's waits are those that docs/profiling.md lists."""

import json

import pytest

from tests.corpus import write_corpus
from tests.processes import run_ranks
from tests.sync_attribution import CASES, documented

pytestmark = pytest.mark.distributed

LOG_POINTS = 2
# It reads a tensor that gloo has filled in host memory, at any device.
AGREEMENT = "preempt.py:agreed"
# DeepSpeed makes no check at stage 0, so that the optimiser's hook makes it.
CHECK_OF_STAGE_0 = "zero.py:before_step"


@pytest.fixture(scope="module")
def syncs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("syncs")
    corpus = write_corpus(folder / "corpus", count=48, num_shards=2)
    run_ranks(["-m", "tests.host_syncs_worker", str(corpus), str(folder), *CASES], size=2)
    return json.loads((folder / "syncs.json").read_text())


def by(found: dict[str, int], when: str, whose: str) -> dict[str, int]:
    """Where, and how often, somebody asked for a sync at some time of the run."""
    split = {tuple(name.split("|")): count for name, count in found.items()}
    return {where: count for (at, who, where), count in split.items() if (at, who) == (when, whose)}


@pytest.mark.parametrize("case", CASES)
def test_no_step_of_ours_waits_for_the_device(syncs, case):
    expected = {AGREEMENT, CHECK_OF_STAGE_0} if case == "0/fp32" else {AGREEMENT}
    assert by(syncs[case], "step", "msm_dist").keys() == expected
    assert not by(syncs[case], "step", "nobody")


@pytest.mark.parametrize("case", CASES)
def test_deepspeed_waits_where_the_page_says(syncs, case):
    assert by(syncs[case], "step", "deepspeed").keys() == documented()[case]


@pytest.mark.parametrize("case", CASES)
def test_adamw_reads_no_more_than_its_own_counter(syncs, case):
    # In host memory, and on a GPU not read at all: there AdamW is fused.
    assert by(syncs[case], "step", "torch").keys() == {"optimizer.py:_get_value"}


@pytest.mark.parametrize("case", CASES)
def test_log_point_reads_the_loss_and_the_gradient_norm(syncs, case):
    reads = by(syncs[case], "log point", "msm_dist")
    assert reads.pop("pretrain.py:log_training") == 2 * LOG_POINTS
    assert reads.keys() == {"world.py:sum"}  # over gloo
    assert not by(syncs[case], "log point", "deepspeed")
