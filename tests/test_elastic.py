"""A run saved at any world size, ZeRO stage, offload and precision goes on at any other by the same command.

The samples are the same; the losses are those of a run that was never moved but for rounding, and exactly those where
world size and stage stay.
"""

from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from msm_dist.engine.stored import open_checkpoint, read_masters
from tests.test_preempt import ForkedRuns
from tests.test_pretrain import finish

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(3000)]

STEPS_A_START = 2
BOUNDS = {"fp32": 1e-5, "bf16": 1e-3}
"""Relative distance of losses. Measured: 1.9e-7 over the chain in fp32, 3.6e-5 with bf16 in every other start."""


class State(NamedTuple):
    """How a start trains."""

    ranks: int
    stage: int
    offload: bool

    @property
    def settings(self) -> tuple[str, ...]:
        """At stage 3 the parameters move to the host too."""
        offload = "none" if not self.offload else "parameters" if self.stage == 3 else "optimizer"
        return (f"engine.zero_stage={self.stage}", f"engine.offload={offload}")


ALL = {State(ranks, stage, offload) for ranks in (1, 2, 4) for stage in (1, 2, 3) for offload in (False, True)}
# In this order world size, stage and offload all change at every start, also from the last one to the first.
CHAIN = [State((1, 2, 4)[i % 3], 1 + (i + i // 3) % 3, bool(i % 2)) for i in range(18)]
UNMOVED = State(1, 1, False)


class Elastic(ForkedRuns):
    """Runs of which every start trains a few steps at a state of its own."""

    def move(self, name: str, starts: list[tuple[State, tuple[str, ...]]]) -> list[str]:
        """What each start printed; all but the last are stopped by a signal, which saves."""
        outputs = []
        for number, (state, settings) in enumerate(starts):
            step, last = number * STEPS_A_START, number + 1 == len(starts)
            # It is heard after that step and agreed on one step later.
            stop = {} if last else {"KILL": f"both:{step + STEPS_A_START - 1}", "KILL_RANK": "nobody"}
            length = f"train.steps={len(starts) * STEPS_A_START}"
            # A rank that has stopped is no reason to end the others.
            ranks = self.start(name, length, *state.settings, *settings, ranks=state.ranks, **stop)
            codes, output = finish(ranks, end_peers=False)
            assert codes == [0 if last else 75] * state.ranks, f"{state}: {output}"
            assert f"ZeRO {state.stage}" in output and f"machine    {state.ranks} x" in output
            if number:
                assert f"continued from {self.folder / name}/checkpoints/step-{step:08d}" in output
            outputs.append(output)
        return outputs

    def stay(self, name: str, num_starts: int, state: State, *settings: str) -> None:
        """As long a run in one start."""
        codes, output = self.run(
            name, f"train.steps={num_starts * STEPS_A_START}", *state.settings, *settings, ranks=state.ranks
        )
        assert codes == [0] * state.ranks, output

    def command(self, name: str, *settings: str) -> list[str]:
        return super().command(name, "data.valid_shards=null", "data.num_workers=0", "checkpoint.every=1000", *settings)

    def distance(self, name: str, other: str) -> float:
        """The largest relative difference of a step's loss; steps and learning rates are the same."""
        pairs = list(zip(self.losses(name), self.losses(other), strict=True))
        assert all((mine[0], mine[2]) == (theirs[0], theirs[2]) for mine, theirs in pairs)
        return max(abs(mine[1] / theirs[1] - 1) for mine, theirs in pairs)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, forker):
    return Elastic(tmp_path_factory.mktemp("runs"), forker)


def test_every_state_is_once_a_source_and_once_a_target_and_the_run_is_the_same(runs):
    starts = [*CHAIN, CHAIN[0]]
    moves = list(zip(starts, starts[1:], strict=False))
    assert {source for source, _ in moves} == {target for _, target in moves} == ALL
    assert len(moves) == len(ALL)
    runs.move("moved", [(state, ("train.precision=fp32",)) for state in starts])
    runs.stay("unmoved", len(starts), UNMOVED, "train.precision=fp32")
    assert runs.trace("moved") == runs.trace("unmoved")
    assert 0 < runs.distance("moved", "unmoved") < BOUNDS["fp32"]


def test_precision_may_change_between_starts_and_fp32_goes_on_from_the_masters_of_bf16(runs):
    bf16, fp32 = ("train.precision=bf16",), ("train.precision=fp32",)
    first, second, third = State(2, 2, False), State(4, 3, True), State(1, 1, True)
    outputs = runs.move("precisions", [(first, bf16), (second, fp32), (third, bf16), (first, fp32)])
    told = "note       train.precision: bf16 until now, fp32 from here on"
    assert [told in output for output in outputs] == [False, True, False, True]
    runs.stay("fp32", 4, first, *fp32)
    assert runs.trace("precisions") == runs.trace("fp32")
    assert runs.distance("precisions", "fp32") < BOUNDS["bf16"]

    # The end of a bf16 run, finished again in fp32 elsewhere: the weights are the masters, not what bf16 computed with.
    runs.stay("masters", 2, first, *bf16)
    saved = read_masters(open_checkpoint(runs.folder / "masters/checkpoints" / f"step-{2 * STEPS_A_START:08d}"))
    assert any((value != value.bfloat16()).any() for value in saved.values())
    export = runs.folder / "masters/export/model.safetensors"
    export.unlink()
    runs.stay("masters", 2, second, *fp32)
    assert all(torch.equal(value, saved[name]) for name, value in load_file(export).items())


# At stage 2 it does not enter where the optimiser's state lies; at stage 3 the gradient's norm is summed otherwise.
@pytest.mark.parametrize(
    ("state", "between"), [(State(2, 3, True), State(2, 3, True)), (State(4, 2, False), State(4, 2, True))]
)
def test_where_world_size_and_stage_stay_nothing_differs_by_a_bit(runs, state, between):
    name, other = f"stopped-{state.ranks}", f"unstopped-{state.ranks}"
    runs.move(name, [(state, ()), (between, ()), (state, ())])
    runs.stay(other, 3, state)
    runs.is_as_undisturbed(name, other)
