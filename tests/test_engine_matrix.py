"""Every stage, precision and offload against plain AdamW and against each other, on real processes.

The plain run takes a diagonal of the matrix; `make test-engine` takes all of it.
"""

import pytest

from tests.engine_matrix import (
    BOUNDS,
    CASES,
    DIAGONAL,
    as_deep_as_giant,
    name_of,
    run,
    unreadable_for_one,
    without_our_precision,
)

pytestmark = [pytest.mark.distributed, pytest.mark.engine, pytest.mark.timeout(3000)]


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        cases = CASES if metafunc.config.option.markexpr == "engine" else DIAGONAL
        metafunc.parametrize("case", cases, ids=[name_of(case) for case in cases])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def rows(request, folder):
    cases = CASES if request.config.option.markexpr == "engine" else DIAGONAL
    return {row.case: row for row in run(cases, folder)}


def test_twenty_steps_equal_a_plain_adamw_loop(rows, case):
    assert rows[case].trained["error"] < BOUNDS[case[1]]


def test_dry_run_leaves_no_trace(rows, case):
    assert rows[case].trained["start_exact"]
    assert rows[case].trained["rng_untouched"]


def test_resumed_engine_equals_one_that_never_stopped(rows, case):
    assert rows[case].trained["resumed_exact"]


def test_checkpoint_read_at_another_stage_offload_and_world_size_is_bit_equal(rows, case):
    assert rows[case].moved["state_exact"]
    assert rows[case].moved["scale_exact"]


def test_run_continued_elsewhere_ends_at_the_same_weights(rows, case):
    assert rows[case].moved["error"] < BOUNDS[case[1]]


def test_non_finite_gradient_of_one_rank_is_seen_and_not_applied(rows, case):
    if case[1] == "fp16":
        # The loss scale was above its smallest: an update is left out, and that is no divergence.
        assert rows[case].trained["counters"]["step"] < 20
        assert rows[case].trained["counters"]["loss_scale"]["cur_scale"] < 2**16
    else:
        assert rows[case].trained["refused"]
        assert rows[case].trained["unchanged_by_nan"]


def test_narrow_model_of_giants_depth_trains_at_stage_3(tmp_path):
    result = as_deep_as_giant(tmp_path)
    assert result["share"] < 0.52  # a rank holds half of the weights, and a little padding
    before, after = result["losses"]
    assert after < before
    assert result["error"] < BOUNDS["bf16"]


def test_checkpoint_that_one_rank_can_not_open_is_an_error_of_all(tmp_path):
    said = unreadable_for_one(tmp_path)
    assert len(said) == 2
    assert all("rank 1: " in text and "stale file handle" in text for text in said)


def test_deepspeeds_own_precision_would_not_pass(tmp_path):
    assert without_our_precision(tmp_path) > BOUNDS["bf16"]
