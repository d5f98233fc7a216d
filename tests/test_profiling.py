"""train.profile: which steps are recorded, where their time is said to go, and that a run doesn't change by it."""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.config import PROFILED_AT_MOST, load_config, parse_config
from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.profile_summary import CLASSES, read_trace, report, summarize
from msm_dist.profiling import part, profiling
from tests.test_pretrain import Runs

HOST, OTHER = 1, 2

# --- the setting


def test_unquoted_steps_mean_the_same_on_the_command_line_and_in_a_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 100, profile: 20:25}\n")
    assert load_config(path).profiled_steps == (20, 25)
    for written in ("20:25", "'20:25'", "9:80", "1:59", "2:60", "100:105"):
        start, stop = written.strip("'").split(":")
        assert load_config(path, [f"train.profile={written}"]).profiled_steps == (int(start), int(stop))


@given(start=st.integers(1, 10**6), length=st.integers(1, PROFILED_AT_MOST))
def test_any_steps_survive_yaml(start, length):
    read = yaml.safe_load(f"profile: {start}:{start + length}")
    cfg = parse_config({"train": {"steps": 1, **read}}, "test")
    assert cfg.profiled_steps == (start, start + length)


@pytest.mark.parametrize("wrong", ["5:5", "0:5", "9:3", "1:2:3", "x", "true", "7"])
def test_steps_that_are_none_are_refused(tmp_path, wrong):
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 100}\n")
    with pytest.raises(ConfigError, match=r"train\.profile = "):
        load_config(path, [f"train.profile={wrong}"])


# --- the summary, of traces made by hand


def event(name, start, end, tid=HOST, cat="cpu_op", launched=None, **more):
    """An event from `start` to `end`; `launched` is the id by which a kernel names the op that launched it."""
    args = {} if launched is None else {"External id": launched}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, "tid": tid, "args": args, **more}


def range_(name, start, end):
    return event(name, start, end, cat="user_annotation")


def times(events, steps=range(1, 2)):
    """Microseconds of each class that has any."""
    summary = summarize(events, steps)
    assert sum(summary.shares.values()) == pytest.approx(1)
    times = {name: share * summary.seconds * 1e6 for name, share in summary.shares.items()}
    return {name: pytest.approx(time) for name, time in times.items() if time}


def test_host_time_belongs_to_the_innermost_op_and_none_is_left_over():
    events = [
        range_("ProfilerStep#1", 0, 1000),
        range_("msm_dist::data", 0, 50),
        range_("msm_dist::log-mel", 50, 150),
        event("aten::mm", 60, 140),
        range_("msm_dist::forward", 150, 400),
        event("aten::linear", 160, 220),
        event("aten::addmm", 170, 210),
        event("aten::layer_norm", 230, 250),
        event("aten::gelu", 250, 300),
        event("aten::matmul", 300, 360),
        event("aten::copy_", 310, 320),
        event("aten::bmm", 330, 350),
        event("aten::matmul", 360, 390),
        event("aten::mm", 365, 385),
        range_("msm_dist::backward", 400, 700),
        event("autograd::engine::evaluate_function: AddmmBackward0", 400, 500),
        event("AddmmBackward0", 410, 490),
        event("aten::sum", 420, 430),
        event("autograd::engine::evaluate_function: NativeLayerNormBackward0", 500, 520),
        event("c10d::allreduce_", 600, 620),
        event("aten::copy_", 605, 615),
        range_("msm_dist::update", 700, 900),
        event("aten::linalg_vector_norm", 710, 750),
        range_("Optimizer.step#AdamW.step", 760, 800),
        event("c10d::_allgather_base_", 850, 870),
    ]
    assert times(events) == {
        "waiting for data": 50,
        "log-mel": 100,
        "matrix products": 60 + 30 + 100,
        "attention": 60,
        "normalisation": 20 + 20,
        "communication": 20 + 20,
        "optimiser": 200 - 20,
        "the rest": 10 + 10 + 50 + 10 + (300 - 100 - 20 - 20) + 100,
    }


def test_linear_maps_of_zero_stage_3_are_products_with_their_biases():
    events = [
        range_("ProfilerStep#1", 0, 1000),
        range_("msm_dist::forward", 10, 500),
        event("LinearFunctionForZeroStage3", 20, 120),
        event("aten::matmul", 30, 90),
        event("aten::mm", 40, 80),
        event("aten::add_", 95, 110),
        range_("msm_dist::backward", 500, 900),
        event("autograd::engine::evaluate_function: LinearFunctionForZeroStage3Backward", 510, 700),
        event("LinearFunctionForZeroStage3Backward", 520, 690),
        event("aten::sum", 600, 650),
    ]
    assert times(events)["matrix products"] == 100 + 190


def test_host_that_waits_for_gloo_is_communicating_but_not_while_it_works():
    events = [
        range_("ProfilerStep#1", 0, 100),
        range_("msm_dist::backward", 0, 100),
        event("aten::mm", 10, 40),
        event("gloo:all_reduce", 30, 70, tid=OTHER, cat="user_annotation"),
    ]
    assert times(events) == {"matrix products": 30, "communication": 30, "the rest": 10 + 30}


def test_what_is_outside_of_steps_is_left_out_and_told():
    events = [
        range_("ProfilerStep#1", 0, 100),
        range_("msm_dist::outside", 20, 90),
        event("aten::mm", 30, 80),
        range_("ProfilerStep#2", 100, 150),
        event("aten::mm", 140, 160),
        range_("ProfilerStep#3", 150, 400),
    ]
    assert times(events, range(1, 3)) == {"matrix products": 10, "the rest": 30 + 40}
    summary = summarize(events, range(1, 3))
    assert (summary.first_step, summary.last_step, summary.clock) == (1, 2, "host")
    assert summary.outside_seconds == pytest.approx(70e-6)
    with pytest.raises(ValueError, match="none of the steps 8 to 9"):
        summarize(events, range(8, 10))


def test_device_time_belongs_to_the_op_that_launched_the_kernel():
    launches = [
        range_("ProfilerStep#1", 0, 1000),
        range_("msm_dist::data", 0, 100),
        range_("msm_dist::log-mel", 100, 120),
        event("aten::mm", 105, 110, launched=1),
        range_("msm_dist::forward", 120, 300),
        event("msm_kernels::attention", 130, 140, launched=2),
        event("aten::linear", 150, 160, launched=3),
        event("aten::addmm", 152, 158, launched=4),
        event("aten::gelu", 160, 170, launched=5),
        range_("msm_dist::backward", 300, 500),
        event("autograd::engine::evaluate_function: AddmmBackward0", 310, 330, tid=OTHER),
        event("aten::sum", 315, 320, tid=OTHER, launched=6),
        event("c10d::reduce_scatter_tensor_coalesced_", 330, 340, tid=OTHER, launched=7),
        range_("msm_dist::update", 500, 600),
        event("aten::mul_", 510, 520, launched=8),
    ]
    kernels = [
        ("some_gemm", 110, 130, 1),
        ("short_forward", 140, 200, 2),
        ("cutlass_gemm", 200, 300, 4),
        ("elementwise", 300, 330, 5),
        ("reduce_kernel", 340, 400, 6),
        ("ncclDevKernel_ReduceScatter", 380, 500, 7),
        ("elementwise", 480, 500, 5),
        ("elementwise", 520, 560, 8),
        ("triton_per_fused_native_layer_norm_0", 560, 570, None),
        ("tiled_backward_keys", 570, 590, None),
        ("nvjet_tst", 590, 600, None),
        ("triton_poi_fused_gelu_1", 600, 700, None),
    ]
    launches.append(event("ProfilerStep#1", 110, 700, tid=7, cat="gpu_user_annotation"))
    events = launches + [event(name, a, b, tid=7, cat="kernel", launched=by) for name, a, b, by in kernels]
    assert times(events) == {
        "log-mel": 20,
        "attention": 60 + 20,
        "matrix products": 100 + 60 + 10,
        "normalisation": 10,
        "communication": 80,
        "optimiser": 40,
        "waiting for data": 100,
        "the rest": 30 + 20 + 100,
        "idle": 10 + 10 + 10 + 20 + 300,
    }
    idle = summarize(events, range(1, 2)).idle
    assert {name: share * 1000 for name, share in idle.items()} == {
        "log-mel": pytest.approx(10),
        "forward": pytest.approx(10),
        "backward": pytest.approx(10),
        "update": pytest.approx(20),
        "between": pytest.approx(300),
    }


def test_kernels_of_a_validation_are_no_part_of_a_step():
    events = [
        range_("ProfilerStep#1", 0, 100),
        event("aten::mm", 10, 20, launched=1),
        range_("msm_dist::outside", 40, 80),
        event("aten::mm", 45, 50, launched=2),
        event("gemm", 20, 50, tid=7, cat="kernel", launched=1),
        event("gemm", 60, 90, tid=7, cat="kernel", launched=2),
    ]
    assert times(events) == {"matrix products": 30, "idle": 20 + 10}
    assert summarize(events, range(1, 2)).outside_seconds == pytest.approx(40e-6)


def test_report_fits_a_screen_and_adds_up():
    text = report(summarize([range_("ProfilerStep#1", 0, 100), event("aten::mm", 0, 25)], range(1, 2)))
    lines = text.splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 120
    assert lines[-1].split() == ["sum", "100.0%"]
    assert "  matrix products     25.0%" in lines


# --- what is recorded, and when


def world(is_main=True):
    return SimpleNamespace(is_main=is_main, device=torch.device("cpu"), on_main=lambda action: action())


def train(folder: Path, steps, first=1, total=6, stopped_after=None, is_main=True):
    """Steps of one product each, as the loop of pretrain.train makes them."""
    with profiling(steps, folder, world(is_main), first - 1, total) as step_done:
        for step in range(first, total + 1):
            with part("data"):
                batch = torch.ones(64, 64)
            if step - 1 == stopped_after:
                break
            with part("forward"):
                batch @ batch
            with part("outside"):
                batch.sum()
            step_done(step)


def recorded(folder: Path) -> dict[str, list[str]]:
    """File name to the steps in it, of each trace."""
    found = {}
    for path in sorted(folder.glob("*.pt.trace.json.gz")):
        names = {entry["name"] for entry in read_trace(path)}
        found[path.name] = sorted(name for name in names if name.startswith("ProfilerStep#"))
    return found


def test_steps_from_start_to_before_stop_are_recorded(tmp_path, capsys):
    train(tmp_path, (3, 5))
    assert recorded(tmp_path) == {"steps-3-4.pt.trace.json.gz": ["ProfilerStep#3", "ProfilerStep#4"]}
    text = (tmp_path / "steps-3-4.txt").read_text()
    assert text in capsys.readouterr().out
    summary = json.loads((tmp_path / "steps-3-4.json").read_text())
    assert (summary["first_step"], summary["last_step"]) == (3, 4)
    assert sum(summary["shares"].values()) == pytest.approx(1)


def test_recording_can_begin_with_the_first_step_of_a_start_and_ends_at_once(tmp_path):
    with profiling((1, 2), tmp_path, world(), 0, 9) as step_done:
        step_done(1)
        assert recorded(tmp_path) == {"steps-1-1.pt.trace.json.gz": ["ProfilerStep#1"]}
        assert not torch.autograd._profiler_enabled()


def test_step_ends_before_the_next_one_begins(tmp_path):
    train(tmp_path, (2, 6))
    events = read_trace(tmp_path / "steps-2-5.pt.trace.json.gz")
    ranges = [entry for entry in events if entry["name"].startswith(("ProfilerStep#", "aten::mm"))]
    ranges.sort(key=lambda entry: (entry["name"].startswith("aten"), entry["ts"]))
    steps, products = ranges[:4], ranges[4:]
    assert [step["name"] for step in steps] == [f"ProfilerStep#{number}" for number in range(2, 6)]
    for step, product in zip(steps, products, strict=True):
        assert step["ts"] <= product["ts"] and product["ts"] + product["dur"] <= step["ts"] + step["dur"]
    for step, following in zip(steps, steps[1:], strict=False):
        assert step["ts"] + step["dur"] <= following["ts"]


def test_steps_past_the_end_or_before_a_resume_are_left_out_and_told(tmp_path, capsys):
    train(tmp_path / "end", (5, 9))
    assert list(recorded(tmp_path / "end")) == ["steps-5-6.pt.trace.json.gz"]
    assert "train.profile = 5:9: only steps 5 to 6 are recorded" in capsys.readouterr().out
    train(tmp_path / "resumed", (2, 5), first=4)
    assert list(recorded(tmp_path / "resumed")) == ["steps-4-4.pt.trace.json.gz"]
    assert "only steps 4 to 4 are recorded, as this start runs from step 4 to 6" in capsys.readouterr().out
    for steps, first in (((7, 9), 1), ((2, 4), 5), ((2, 4), 4)):
        train(tmp_path / "none", steps, first=first)
        assert "nothing is recorded" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_run_that_is_stopped_keeps_the_whole_steps(tmp_path):
    train(tmp_path, (2, 6), stopped_after=3)
    assert list(recorded(tmp_path)) == ["steps-2-3.pt.trace.json.gz"]
    assert json.loads((tmp_path / "steps-2-3.json").read_text())["last_step"] == 3
    train(tmp_path / "none", (4, 6), stopped_after=3)
    assert not (tmp_path / "none").exists()


def test_run_that_fails_ends_the_recording_and_writes_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="broken"), profiling((1, 9), tmp_path, world(), 0, 9) as step_done:
        step_done(1)
        raise RuntimeError("broken")
    assert not list(tmp_path.iterdir())
    assert not torch.autograd._profiler_enabled()
    train(tmp_path, (1, 2))  # torch lets one profiler run at a time


def test_only_the_rank_that_writes_records(tmp_path, monkeypatch):
    monkeypatch.setattr("msm_dist.profiling.profile", lambda **_: pytest.fail("rank 1 records"))
    with profiling((1, 3), tmp_path, SimpleNamespace(is_main=False, on_main=lambda _: None), 0, 5) as step_done:
        for step in range(1, 6):
            step_done(step)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "profile").write_text("a file")
    with pytest.raises(CheckpointError, match="profile.*can't be written.*without train.profile"):
        train(tmp_path / "profile", (1, 2))


def test_without_the_setting_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("msm_dist.profiling.profile", lambda **_: pytest.fail("records"))
    train(tmp_path, None)
    assert not list(tmp_path.iterdir())


# --- whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("profiled"))
    short = ("train.steps=6", "train.valid_every=4", "checkpoint.every=4", "optim.clip_norm=1")
    for name, more in (("plain", ()), ("profiled", ("train.profile=3:6",))):
        codes, output = runs.run(name, *short, *more)
        assert codes == [0, 0], output
    runs.output = output
    return runs


@pytest.mark.distributed
def test_profiled_run_equals_one_that_is_not(runs):
    assert runs.losses("profiled") == runs.losses("plain")
    assert runs.trace("profiled") == runs.trace("plain")
    assert runs.weights("profiled") == runs.weights("plain")


@pytest.mark.distributed
def test_trace_of_a_run_is_a_chrome_trace_of_those_steps(runs):
    folder = runs.folder / "profiled" / "profile"
    assert recorded(folder) == {"steps-3-5.pt.trace.json.gz": [f"ProfilerStep#{step}" for step in (3, 4, 5)]}
    assert sorted(path.name for path in folder.iterdir()) == [
        "steps-3-5.json",
        "steps-3-5.pt.trace.json.gz",
        "steps-3-5.txt",
    ]
    with gzip.open(folder / "steps-3-5.pt.trace.json.gz", "rt") as file:
        trace = json.load(file)
    names = {entry.get("name") for entry in trace["traceEvents"]}
    parts = {f"msm_dist::{name}" for name in ("data", "log-mel", "forward", "backward", "update", "outside")}
    assert parts | {"aten::addmm", "Optimizer.step#AdamW.step"} <= names
    assert trace["distributedInfo"]["world_size"] == 2


@pytest.mark.distributed
def test_shares_of_a_run_add_up_to_its_steps(runs):
    folder = runs.folder / "profiled" / "profile"
    summary = json.loads((folder / "steps-3-5.json").read_text())
    assert sum(summary["shares"].values()) == pytest.approx(1)
    assert all(summary["shares"][name] > 0 for name in CLASSES)
    ranges = [entry for entry in read_trace(folder / "steps-3-5.pt.trace.json.gz") if entry.get("ph") == "X"]
    whole = sum(entry["dur"] for entry in ranges if entry["name"].startswith("ProfilerStep#"))
    outside = sum(entry["dur"] for entry in ranges if entry["name"] == "msm_dist::outside")
    assert summary["seconds"] * 1e6 == pytest.approx(whole - outside)
    assert summary["outside_seconds"] * 1e6 == pytest.approx(outside)
    assert (folder / "steps-3-5.txt").read_text() in runs.output
