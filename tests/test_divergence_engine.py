"""An update that is left out changes nothing: under DeepSpeed, at every stage, precision and offload."""

import json
import math

import pytest

from tests.engine_matrix import CASES, DIAGONAL, name_of
from tests.processes import HERE, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.engine]


# fp16 leaves out updates by itself, to find its loss scale.
GUARDED = [case for case in CASES if case[1] != "fp16"]


@pytest.fixture(scope="module")
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("guard")
    cases = GUARDED if request.config.option.markexpr == "engine" else DIAGONAL
    (folder / "guard-2.json").write_text(json.dumps([[case] for case in cases]))
    run_ranks([str(HERE / "divergence_worker.py"), str(folder), "guard"], 2, timeout=1200)
    return dict(zip(cases, json.loads((folder / "guard-2-results.json").read_text()), strict=True))


def test_run_with_updates_left_out_equals_one_without_those_steps(results):
    for case, kinds in results.items():
        for kind, result in kinds.items():
            assert result["unchanged"], f"{name_of(case)}: {kind}"
            assert result["skipped"] == ([[], []] if kind == "both" else [[3, 6], [3, 6]]), f"{name_of(case)}: {kind}"
            assert all(math.isinf(norm) for norm in result["norms"])
