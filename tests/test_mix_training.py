"""A run on two corpora: shares and statistics of a mix, the same at any world size, and nothing lost by a kill."""

import shutil
import signal
from collections import Counter

import pytest

from tests.corpus import write_corpus
from tests.test_pretrain import Runs

pytestmark = pytest.mark.distributed


class MixedRuns(Runs):
    """Runs on the corpus of Runs and a smaller one."""

    def __init__(self, folder):
        super().__init__(folder)
        self.own = write_corpus(folder / "own", count=64, num_shards=2, seed=2)

    def command(self, name, *settings):
        mix = f"data.mix={{{self.train}: 2, {self.own}: 1}}"
        return super().command(name, "data.shards=null", mix, "train.steps=8", *settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = MixedRuns(tmp_path_factory.mktemp("mixed"))
    codes, output = runs.run("undisturbed")
    assert codes == [0, 0], output
    assert f"source     {runs.own}: 33.3% of the crops, 64 clips" in output
    assert f"note       {runs.train} and {runs.own} both have 2 shards of the same names" in output
    return runs


def test_crops_come_by_weight_each_once(runs):
    records = runs.trace("undisturbed")
    assert len(records) == 8 * 16
    own = [record for record in records if record["clip"] >= 192]
    # 32 blocks of 8 lanes: each lane's 4 places hold one or two of the smaller source.
    assert 4 * 8 <= len(own) <= 4 * 16
    samples = Counter((record["epoch"], record["clip"], record["crop"]) for record in records)
    assert set(samples.values()) == {1}
    both = {record["key"] for record in own} & {record["key"] for record in records if record["clip"] < 192}
    assert all(record["key"].startswith("clip") for record in records) and both


def test_mixed_run_killed_and_continued_equals_one_never_killed(runs):
    for kill, rank in (("step:2", 0), ("torn:1", 1), ("step:7", 1)):
        codes, output = runs.run("killed", KILL=kill, KILL_RANK=str(rank))
        assert codes[rank] == -signal.SIGKILL, output
    codes, output = runs.run("killed")
    assert codes == [0, 0] and "continued from" in output, output
    assert runs.trace("killed") == runs.trace("undisturbed")
    assert runs.losses("killed") == runs.losses("undisturbed")
    assert runs.weights("killed") == runs.weights("undisturbed")


def test_world_size_and_workers_do_not_change_the_samples_of_a_mix(runs):
    codes, output = runs.run("alone", "data.num_workers=2", "train.micro_batch=8", ranks=1)
    assert codes == [0], output
    assert runs.trace("alone") == runs.trace("undisturbed")


def test_other_weights_are_refused_and_a_source_may_move(runs, tmp_path):
    codes, output = runs.run("moving", "train.steps=3", ranks=1)
    assert codes == [0], output

    def again(*sources, steps):
        mix = ", ".join(f"{folder}: {weight}" for folder, weight in sources)
        return runs.run("moving", f"data.mix={{{mix}}}", f"train.steps={steps}", ranks=1)

    codes, output = again((runs.train, 1), (runs.own, 1), steps=4)
    assert codes == [2]
    assert "began with a mix of [667, 333] blocks in 1000, data.mix now gives [500, 500]" in output
    moved = shutil.copytree(runs.own, tmp_path / "moved")
    codes, output = again((runs.train, 0.5), (moved, 0.25), steps=4)
    assert codes == [0] and "continued from" in output, output
    codes, output = again((moved, 2), (runs.train, 1), steps=5)
    assert codes == [2]
    assert "this run began with index_digest" in output
