"""Predicted memory, communication and time: against measured ones, and against sums worked out by hand."""

import json

import pytest

from benchmarks import memory as bench
from msm_dist import costs
from msm_dist.config import parse_config
from msm_dist.costs import Device, Part, Spread, Traffic, Zero
from msm_dist.memory import Memory, memory_of
from msm_dist.planning import parameter_shapes, tensor_bytes
from tests.processes import run_ranks

STATES, PEAK, MESSAGES = 0.05, 0.1, 0.02
"""How far a prediction may be off."""
TWO = Part("two", ((4, 5), (4,)), saved=1000, kept=100, working=10)
MODEL = [TWO, Part("one", ((6, 6),), saved=300, kept=300, working=0)]
P = 24 + 36


def zero(stage: int, offload: str = "none", **sizes: int) -> Zero:
    given = {"reduce_bucket": 7, "prefetch_bucket": 10**6, "persistence_threshold": 4, "max_live": 10**9}
    return Zero(stage, offload, **given | {"max_reuse": 10**9} | sizes)


@pytest.mark.distributed
def test_predictions_agree_with_measured_memory_and_messages(tmp_path):
    plain = [case for case in bench.CASES if case.zero == bench.BUCKETS]
    states = [case for case in plain if case.micro_batch == 8 and case.offload in ("none", "parameters")]
    activations = [next(c for c in plain if c.micro_batch > 8), next(c for c in plain if c.checkpointing)]
    chosen = states + activations
    assert {(case.stage, case.precision) for case in chosen} >= {(0, "fp32")} | {
        (stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16")
    }
    numbers = ",".join(str(bench.ALL_CASES.index(case)) for case in chosen)
    output = tmp_path / "rows.json"
    run_ranks(["-m", "benchmarks.memory", "--as-rank", numbers, "--json", str(output)], 2, timeout=400)
    rows = json.loads(output.read_text())
    assert [row["case"] for row in rows] == [case.name for case in chosen]
    bounds = {"steady": STATES, "accumulating": STATES, "peak": PEAK} | dict.fromkeys(bench.LOGGED.values(), MESSAGES)
    assert not bench.wrong(rows, bounds), bench.table(rows)


def test_states_of_every_stage_add_up():
    def of(stage: int, precision: str) -> Memory:
        return memory_of(MODEL, zero(stage), Spread(2, 2, precision), inputs=11)

    whole = of(0, "fp32")
    assert (whole.weights, whole.optimizer, whole.gradients) == (4 * P, 8 * P, 4 * P)
    assert (whole.steady, whole.accumulating) == (12 * P + 11, 16 * P + 11)
    first = of(1, "bf16")
    assert (first.weights, first.optimizer, first.gradients) == (2 * P, 12 * P / 2, (4 + 2) * P)
    assert (first.steady, first.accumulating) == ((2 + 6 + 4) * P + 11, (2 + 6 + 4 + 2) * P + 11)
    second = of(2, "bf16")
    assert (second.weights, second.optimizer, second.gradients) == (2 * P, 12 * P / 2, 4 * P / 2)
    third = of(3, "bf16")
    # The parameter of 4 elements stays whole beside its share.
    assert (third.weights, third.optimizer, third.gradients) == (2 * (P / 2 + 4), 12 * P / 2, 4 * P / 2)
    assert third.steady == third.accumulating == 2 * (P / 2 + 4) + 6 * P + 2 * P + 4 * 7 + 11


def test_offload_moves_states_to_the_host():
    spread = Spread(2, 2, "bf16")
    kept, moved = (memory_of(MODEL, zero(3, offload), spread, 0) for offload in ("none", "optimizer"))
    assert kept.offloaded == 0
    assert moved.optimizer == moved.gradients == 0
    assert moved.offloaded == kept.optimizer + 2 * kept.gradients
    weights_too = memory_of(MODEL, zero(3, "parameters"), spread, 0)
    assert weights_too.offloaded - moved.offloaded == moved.weights - weights_too.weights == 2 * P / 2


def test_a_start_takes_the_whole_model_in_fp32_on_every_rank():
    bare = [Part("bare", ((100, 100),), saved=0, kept=0, working=0)]
    assert (
        memory_of(
            bare, zero(3, "parameters", reduce_bucket=1, max_live=1, prefetch_bucket=1), Spread(10**4, 1, "bf16"), 0
        ).peak
        == 4 * 10**4
    )


def test_the_host_holds_the_start_or_a_checkpoint_beside_what_is_offloaded():
    def host(world: int, offload: str = "none") -> Memory:
        return memory_of(MODEL, zero(3, offload), Spread(world, 1, "bf16"), 0)

    # Two whole fp32 models at the start; a checkpoint's masters and moments by a rank alone.
    assert (host(8).host, host(1).host) == (8 * P, 12 * P)
    moved = host(1, "optimizer")
    assert moved.host == moved.offloaded + 12 * P
    moved = host(8, "optimizer")
    assert moved.host == max(8 * P, moved.offloaded + 4 * P)


def test_checkpointing_keeps_inputs_and_the_inside_of_one_part():
    plain, kept = (memory_of(MODEL, zero(1), Spread(2, 1, "bf16", checked), 0) for checked in (False, True))
    assert plain.activations == 1300
    assert kept.activations == 100 + 300 + 900
    many = [TWO] * 5
    plain, kept = (memory_of(many, zero(1), Spread(2, 1, "bf16", checked), 0) for checked in (False, True))
    assert (plain.activations, kept.activations) == (5000, 5 * 100 + 900)
    assert plain.peak - kept.peak == 5000 - 1400 - 0


def test_a_larger_micro_batch_needs_more_and_more_ranks_need_less():
    def peak(stage: int, world: int, micro_batch: int) -> float:
        cfg = parse_config(
            {"train": {"steps": 1, "global_batch": 4096, "micro_batch": micro_batch}, "model": {"size": "base"}}, "test"
        )
        parts = costs.parts(cfg, parameter_shapes(cfg), gpu=True)
        return memory_of(parts, zero(stage), Spread(world, 1, "bf16"), tensor_bytes(cfg)).peak

    for stage in (1, 2, 3):
        assert peak(stage, 8, 64) < peak(stage, 8, 512)
        assert peak(stage, 64, 64) < peak(stage, 8, 64) < peak(stage, 2, 64)


def test_what_collectives_carry_by_stage_and_accumulation():
    def of(stage: int, accumulation: int, **sizes: int) -> Traffic:
        return costs.traffic(MODEL, zero(stage, **sizes), Spread(2, accumulation, "bf16"))

    assert of(1, 3) == Traffic(all_reduce=4 * P, all_gather=2 * P / 2)
    assert of(2, 3) == Traffic(all_reduce=3 * 4 * P, all_gather=2 * P / 2)
    # Stage 3: what is not kept whole is gathered in every micro-batch, what is kept whole after the update.
    assert of(3, 3) == Traffic(reduce_scatter=3 * 4 * P, all_gather=3 * 2 * (P - 4) / 2 + 2 * 4 / 2)
    # Weights that can't stay until their backward are gathered twice.
    twice = of(3, 1, max_reuse=0, prefetch_bucket=0)
    assert twice.all_gather == 2 * 2 * (P - 4) / 2 + 2 * 4 / 2


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_rank_by_itself_sends_nothing(stage):
    alone = costs.traffic(MODEL, zero(stage), Spread(1, 1, "fp32" if stage == 0 else "bf16"))
    assert alone.all_gather == alone.sent(1) == 0


def test_a_ring_sends_almost_twice_what_it_reduces():
    assert Traffic(all_reduce=800).sent(1) == 0
    assert Traffic(all_reduce=800).sent(8) == 2 * 700
    assert Traffic(reduce_scatter=800).sent(8) == 700
    assert Traffic(all_gather=100).sent(8) == 700


def test_time_is_arithmetic_and_rings_and_update_at_the_device_s_rates():
    device = Device("made up", 1000.0, 100.0, 10.0, 2.0, 1.0, 1e9, "")
    few = costs.seconds(MODEL, zero(0), Spread(2, 3, "fp32"), device, flops_per_micro_batch=50)
    assert few.compute == pytest.approx(3 * 50 / (100 * costs.MFU))
    assert few.communication == pytest.approx(4 * P / 2.0)
    assert few.update == pytest.approx((P * 32 + 3 * 12 * P) / 10)
    assert few.step == few.compute + few.communication + few.update
    half = costs.seconds(MODEL, zero(1), Spread(2, 3, "bf16", checkpointing=True), device, 50)
    assert half.compute == pytest.approx(4 / 3 * 3 * 50 / (1000 * costs.MFU))


def test_between_machines_every_network_card_carries_a_part():
    def communication(link_rate: float, network_rate: float) -> float:
        device = Device("made up", 1000.0, 100.0, 10.0, link_rate, network_rate, 1e9, "")
        return costs.seconds(MODEL, zero(0), Spread(16, 3, "fp32"), device, 50).communication

    sent = 2 * 15 / 16 * 4 * P
    assert communication(20.0, 1.0) == pytest.approx(sent / 8)
    # The links inside a machine are passed too.
    assert communication(5.0, 1.0) == pytest.approx(sent / 5)


def test_settings_come_from_deepspeed_s_file():
    values = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert costs.zero_settings(values).offload == "parameters"
    assert costs.zero_settings({"stage": 2, "offload_optimizer": {"device": "cpu"}}).offload == "optimizer"
    plain = costs.zero_settings({"stage": 1, "reduce_bucket_size": 5e7})
    assert (plain.offload, plain.reduce_bucket) == ("none", 50_000_000)


def test_deepspeed_s_defaults_are_those_assumed():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(stage=3), costs.zero_settings({"stage": 3})
    assert (ours.reduce_bucket, ours.prefetch_bucket, ours.max_live, ours.max_reuse, ours.persistence_threshold) == (
        theirs.reduce_bucket_size,
        theirs.prefetch_bucket_size,
        theirs.max_live_parameters,
        theirs.max_reuse_distance,
        theirs.param_persistence_threshold,
    )


def test_a_log_with_an_unknown_collective_is_no_comparison():
    assert bench.logged({"all_reduce": {4: [9, []], 2048: [3, []]}})["all_reduce"] == 3 * 2048
    with pytest.raises(KeyError):
        bench.logged({"broadcast": {2048: [1, []]}})
