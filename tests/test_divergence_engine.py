"""An update that is left out changes nothing: under DeepSpeed, at every stage, precision and offload."""

import json

import pytest

from tests.engine_matrix import CASES, DIAGONAL, name_of
from tests.processes import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.engine, pytest.mark.timeout(3600)]

# fp16 leaves out updates by itself, to find its loss scale.
GUARDED = [case for case in CASES if case[1] != "fp16"]
REASONS = {
    "nan": "the loss is not finite",
    "inf": "the loss is not finite",
    "loss": "the loss ",
    "norm": "the gradient norm ",
}


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    cases = GUARDED if request.config.option.markexpr == "engine" else DIAGONAL
    (folder / "guard-2.json").write_text(json.dumps([[case] for case in cases]))
    run_ranks(["-m", "tests.divergence_worker", str(folder), "guard"], 2, timeout=3000)
    return dict(zip(cases, json.loads((folder / "guard-2-results.json").read_text()), strict=True))


def test_run_with_updates_left_out_equals_one_without_those_steps(results):
    for case, kinds in results.items():
        for kind, start in REASONS.items():
            said = f"{name_of(case)}, {kind}: {kinds[kind]}"
            assert kinds[kind]["unchanged"], said
            assert kinds[kind]["skipped"] == [[3, 6], [3, 6]], said
            assert kinds[kind]["finite"] == [0, 1, 3, 4, 6], said
            assert [reason.startswith(start) for reason in kinds[kind]["reasons"]] == [True, True], said


def test_bounds_that_nothing_reaches_change_nothing(results):
    for case, kinds in results.items():
        assert kinds["idle"], name_of(case)
