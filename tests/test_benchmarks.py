"""The benchmarks without a GPU: their checks, arithmetic, tables and files. Speed is measured elsewhere."""

import contextlib
import json
import os
import subprocess
import sys
import types

import pytest
import torch

from benchmarks import attention, eager, kernels, masking, measure, step, training, tune
from benchmarks.measure import Budget, Ceilings, Check, Target
from msm_dist.monitor import flops_per_clip
from msm_kernels import configurations, reference
from msm_kernels.attention_short import Short
from tests.kernel_checks import ON_GPU
from tests.processes import HERE

CPU = torch.device("cpu")
TINY = masking.Shape("tiny", 16, 40, (8, 8), 32, 16, 5)
CEILINGS = Ceilings(copy=4e12, matrix=8e14)

without_gpu = pytest.mark.skipif(ON_GPU, reason="there is a GPU: benchmarks run, and kernels are compiled for it")


# --- where there is no GPU


@without_gpu
@pytest.mark.parametrize("script", ["benchmarks.kernels", "benchmarks.step", "benchmarks.training"])
def test_scripts_say_in_one_line_that_there_is_no_gpu(script):
    child = subprocess.run([sys.executable, "-m", script], cwd=HERE.parent, capture_output=True, text=True)
    assert child.returncode == 0
    assert child.stdout == f"{script}: there is no GPU: skipped\n"


@without_gpu
def test_session_says_that_there_is_no_gpu(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path / "out"), "PYTHON": sys.executable}
    command = [HERE.parent / "benchmarks" / "gpu_session.sh"]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (child.returncode, child.stdout) == (0, "gpu-session: there is no GPU: skipped\n")


# --- wrong kernels are not timed


def wrong_attention(qkv, num_heads, key_mask=None, backend="auto"):
    out = reference.attention(qkv, num_heads, key_mask)
    return out * torch.linspace(1.0, 1.001, out.shape[1])[None, :, None]


def half_written_attention(qkv, num_heads, key_mask=None, backend="auto"):
    """Leaves the last clip as it found it."""
    out = reference.attention(qkv, num_heads, key_mask)
    written = torch.empty_like(out)
    written[:-1] = out[:-1]
    return written + 0 * out.sum()


@without_gpu
@pytest.mark.parametrize("tokens, head_dim", [(5, 32), (66, 32)])
def test_attention_passes_its_check_in_the_interpreter(tokens, head_dim):
    checks = attention.check(attention.Shape(tokens, 2, head_dim, "tiny"), 3, torch.float32, CPU, seed=1)
    assert len(checks) == 2
    assert not kernels.report_wrong(checks)


@without_gpu
@pytest.mark.parametrize("ours, error", [(wrong_attention, 5e-4), (half_written_attention, float("inf"))])
def test_wrong_attention_is_refused(ours, error, monkeypatch):
    monkeypatch.setattr(attention, "OUR_ATTENTION", ours)
    forward, _ = attention.check(attention.Shape(5, 2, 32, "tiny"), 3, torch.float32, CPU, seed=1)
    assert forward.wrong
    assert forward.error == pytest.approx(error, rel=0.5)


@without_gpu
def test_masking_path_passes_its_checks_in_the_interpreter():
    checks = masking.check(TINY, TINY.clips, torch.float32, CPU, seed=1)
    assert len(checks) == 5
    assert not kernels.report_wrong(checks)


@without_gpu
@pytest.mark.parametrize("op", ["random_masking", "restore_tokens", "select_masked_tokens", "masked_patch_loss"])
def test_wrong_op_of_the_masking_path_is_refused_and_nothing_timed(op, monkeypatch, tmp_path, capsys):
    right = getattr(masking, op)

    def wrong(*args):
        result = right(*args)
        if args[-1] == "reference":
            return result
        if op == "random_masking":
            return result._replace(ids_keep=result.ids_keep.flip(1))
        if op == "select_masked_tokens":  # its gradient alone
            return result.detach() + 1.0001 * (result - result.detach())
        return result * 1.0001

    monkeypatch.setattr(masking, op, wrong)
    monkeypatch.setattr(masking, "SHAPES", (TINY,))
    monkeypatch.setattr(attention, "SHAPES", ())
    monkeypatch.setattr(kernels, "measure_ceilings", lambda: pytest.fail("timed although wrong"))
    assert kernels.compare(Budget(60), tmp_path, CPU, torch.float32) == 1
    said = capsys.readouterr().out
    assert said.count("WRONG") == 1
    names = {"random_masking": "mask", "select_masked_tokens": "select", "masked_patch_loss": "loss"}
    assert f"WRONG: {names.get(op, 'restore')}" in said
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_clock(monkeypatch):
    """Run each function once, and say that all took 1 ms and 1 byte."""

    def once(variants, repeat_ms=0.0):
        return {name: measure.Timing(1.0, 0.0) for name, function in variants.items() if function() is not None}

    for module in (attention, masking):
        monkeypatch.setattr(module, "take_turns", once)
    monkeypatch.setattr(masking, "peak_bytes", lambda function: function() and 1)
    monkeypatch.setattr(kernels, "measure_ceilings", lambda: CEILINGS)
    monkeypatch.setattr(step, "measure_ceilings", lambda: CEILINGS)


@without_gpu
def test_whole_comparison_of_kernels_runs_in_the_interpreter(no_clock, monkeypatch, tmp_path, capsys):
    short = attention.Shape(5, 1, 32, "tiny")
    monkeypatch.setattr(attention, "QKV_BYTES", 6 * 5 * 32 * 3)
    monkeypatch.setattr(attention, "SHAPES", (short,))
    monkeypatch.setattr(attention, "COMPILED", ())
    monkeypatch.setattr(masking, "SHAPES", (TINY,))
    monkeypatch.setattr(masking, "COMPILED", ())
    assert kernels.compare(Budget(60), tmp_path, CPU, torch.float32) == 0
    said = capsys.readouterr().out
    content = json.loads(next(tmp_path.iterdir()).read_text())
    rows = {(row["subject"], row["implementation"], row["phase"]): row for row in content["rows"]}
    for phase in ("forward", "backward", "both"):
        assert rows["attention", "triton", phase]["share"] == rows["attention", "eager", phase]["share"]
    assert rows["attention", "SDPA cudnn", "any"]["note"].startswith("not available")
    for op in (masking.WHOLE, "mask", *masking.DIFFERENTIABLE):
        assert rows["masking", "triton", op]["peak_bytes"] == 1
    assert [target["reached"] for target in content["targets"][:3]] == [1.0, 1.0, 1.0]
    assert content["ceilings"] == CEILINGS._asdict()
    assert "NOT met" in said and "written:" in said


def test_outputs_are_poisoned_while_a_kernel_is_checked():
    original = torch.empty
    like = torch.zeros(2, dtype=torch.int64)
    with measure.poisoned_outputs():
        assert torch.empty(3).isnan().all()
        assert torch.empty_strided((2, 2), (2, 1)).isnan().all()
        assert (torch.empty_like(like) == torch.iinfo(torch.int64).min).all()
    assert torch.empty is original


def test_nan_is_wrong():
    assert Check("a kernel", float("nan"), 1.0).wrong
    assert measure.relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


@without_gpu
def test_models_of_the_step_are_compared_and_a_wrong_one_is_seen(monkeypatch):
    monkeypatch.setattr(step, "CHECK_CLIPS", 2)
    monkeypatch.setattr(eager, "masked_loss", lambda x, *_: x.square().mean())
    checks = {check.what: check.wrong for check in step.check_all(CPU, step.config("tiny", 208))}
    assert checks.pop("eager: loss in float32")
    assert len(checks) == 4
    assert not any(checks.values())


@without_gpu
def test_whole_comparison_of_steps_runs_on_a_cpu(no_clock, monkeypatch, tmp_path):
    """With plain AdamW in the place of DeepSpeed, which wants a process group, and the reference in Triton's."""
    for name, value in (("memory_allocated", 0), ("max_memory_allocated", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    model = step.our_model
    monkeypatch.setattr(step, "our_model", lambda cfg, backend: model(cfg, "reference"))
    monkeypatch.setattr(step, "has_deepspeed", lambda: False)
    monkeypatch.setattr(step, "SIZE", "tiny")
    monkeypatch.setattr(step, "SETTINGS", (step.Setting(208, (2, 1), False),))
    monkeypatch.setattr(step, "TURN_SECONDS", 0.01)
    assert step.compare(Budget(60), tmp_path, CPU) == 0
    content = json.loads(next(tmp_path.iterdir()).read_text())
    assert content["engine"] == "plain AdamW"
    assert [(row["micro_batch"], row["implementation"]) for row in content["rows"]] == [
        (size, name) for size in (2, 1) for name in (step.OURS, step.REFERENCE, step.EAGER)
    ]
    row = content["rows"][0]
    assert row["clips_per_second"] == pytest.approx(2e3 / row["ms"])
    assert row["mfu"] == pytest.approx(3 * step.forward_flops(step.config("tiny", 208)) * 2e3 / row["ms"] / 8e14)
    assert content["targets"][0]["verdict"] in ("met", "NOT met")


def test_eager_model_is_ours():
    cfg = step.config("tiny", 208)
    spectrogram, sample_ids = step.draw(cfg, 3, 0, CPU)
    output = step.our_model(cfg, "reference").double()(spectrogram.double(), sample_ids)
    loss = step.eager_model(cfg).double()(spectrogram.double(), output.masking.ids_restore.double())
    torch.testing.assert_close(loss, output.loss)


def test_plain_steps_train_the_rounded_weights():
    cfg = step.config("tiny", 208)
    model = step.our_model(cfg, "reference")
    before = [parameter.detach().clone() for parameter in model.parameters()]
    train = step.plain_step(model, cfg)
    train(*step.draw(cfg, 2, 0, CPU))
    after = list(model.parameters())
    assert all(parameter.dtype == torch.bfloat16 and parameter.grad is None for parameter in after)
    assert not any(torch.equal(one.bfloat16(), other) for one, other in zip(before, after, strict=True) if one.ndim > 1)


# --- floors


def test_flops_are_those_of_the_floor_of_the_base_model():
    cfg = step.config("base", 208)
    parts = step.gflop_parts(cfg)
    assert [round(part, 2) for part in parts.values()] == [2.90, 0.96, 0.03]
    assert round(3 * step.forward_flops(cfg) / 1e9, 1) == 11.7
    assert round(3 * step.forward_flops(step.config("base", 608)) / 1e9) == 34
    for frames in (208, 608):
        cfg = step.config("base", frames)
        counts = (cfg.num_patches, cfg.num_keep, cfg.num_patches - cfg.num_keep)
        assert 3 * step.forward_flops(cfg) == pytest.approx(flops_per_clip(cfg.model.geometry, *counts, 256, True))


def test_bytes_are_those_of_the_floor_of_attention():
    forward, backward = attention.bytes_to_move(2048, 17, 12, 64)
    assert (round(forward / 1e6), round(backward / 1e6)) == (214, 428)
    ceilings = Ceilings(copy=4.3e12, matrix=7.9e14)
    assert ceilings.floor_ms(forward) == pytest.approx(0.050, abs=0.001)
    assert ceilings.floor_ms(backward) == pytest.approx(0.100, abs=0.001)
    qkv = attention.Shape(17, 12, 64, "")
    assert 0.99 < 6 * qkv.clips * 17 * 12 * 64 / attention.QKV_BYTES <= 1


def test_floor_is_the_longer_of_bytes_and_arithmetic():
    assert CEILINGS.floor_ms(4e9, 8e9) == pytest.approx(1.0)
    assert CEILINGS.floor_ms(4e9, 8e12) == pytest.approx(10.0)


def test_bytes_of_the_masking_path_are_those_of_its_tensors():
    shape = masking.SHAPES[0]
    x = masking.draw(shape._replace(clips=2), 2, torch.bfloat16, CPU, seed=0)
    moved = masking.bytes_to_move(shape, 2)

    def size(*tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    ids = 2 * 8
    visible = 2 * 4 * shape.num_keep * shape.pixels
    assert moved["embed"] == 2 * (visible + size(x.d_tokens) + ids * shape.num_keep)
    assert moved["restore"] == 2 * (size(x.latent, x.d_restored) + ids * shape.num_patches)
    assert moved["select"] == 3 * size(x.d_selected) + size(x.decoded) + 2 * ids * shape.num_masked
    targets = 2 * 4 * shape.num_masked * shape.pixels
    assert moved["loss"] == 3 * size(x.prediction) + 2 * (targets + ids * shape.num_masked)


# --- targets


@pytest.mark.parametrize(
    "tokens, ratio, floor",
    [
        (16, 3, 1.5),
        (32, 3, 1.5),
        (33, 2, 1.5),
        (48, 2, 1.5),
        (66, 2, 2),
        (67, 1.5, None),
        (128, 1.5, None),
        (1024, 1, None),
    ],
)
def test_what_attention_is_to_reach_depends_on_its_length(tokens, ratio, floor):
    assert attention.wanted_ratio(tokens) == ratio
    assert attention.wanted_floor(tokens) == floor


def attention_rows(ours, flash, cudnn):
    """(forward, backward) ms of three implementations; the floor is 1 and 2."""
    rows = []
    for name, times in ((attention.OURS, ours), ("SDPA flash", flash), ("SDPA cudnn", cudnn)):
        for phase, ms, least in zip(("forward", "backward"), times, (1.0, 2.0), strict=True):
            rows.append({"implementation": name, "phase": phase, "ms": ms, "floor_ms": least, "share": least / ms})
    rows.append({"implementation": "SDPA math", "phase": "any", "ms": None, "note": "not available"})
    return rows


def test_attention_is_held_against_the_best_of_each_phase():
    shape = attention.Shape(17, 12, 64, "")
    rows = attention_rows(ours=(1.0, 3.0), flash=(5.0, 20.0), cudnn=(6.0, 8.0))
    ratio, floor = attention.targets(shape, rows)
    assert ratio.reached == pytest.approx((5 + 8) / 4)
    assert ratio.verdict == "met"
    assert "flash 5.000" in ratio.note and "cudnn 8.000" in ratio.note
    assert floor.reached == pytest.approx(4 / 3)
    assert floor.verdict == "met"
    slower = attention_rows(ours=(2.0, 4.0), flash=(5.0, 20.0), cudnn=(6.0, 8.0))
    assert [target.verdict for target in attention.targets(shape, slower)] == ["NOT met", "NOT met"]
    nothing = [row for row in rows if not row["implementation"].startswith("SDPA")]
    assert attention.targets(shape, nothing)[0].verdict == "not measured"


def test_target_that_could_not_be_measured_is_not_met():
    assert Target("speed", 3.0, None).verdict == "not measured"
    assert Target("speed", 3.0, float("nan")).verdict == "NOT met"
    assert Target("memory", 0.5, 0.5, at_most=True).verdict == "met"
    assert Target("memory", 0.5, 0.51, at_most=True).verdict == "NOT met"


def test_masking_path_is_held_against_the_eager_chain():
    rows = [
        {"phase": phase, "implementation": name, "ms": ms, "peak_bytes": peak}
        for phase, name, ms, peak in (
            (masking.WHOLE, masking.OURS, 1.0, 30),
            (masking.WHOLE, masking.EAGER, 3.5, 100),
            (masking.WHOLE, masking.EAGER_COMPILED, 2.0, 10),
            ("loss", masking.OURS, 0.1, 1),
        )
    ]
    speed, memory = masking.targets(TINY, rows)
    assert (speed.reached, speed.verdict) == (3.5, "met")
    assert (memory.reached, memory.verdict) == (0.3, "met")
    assert masking.targets(TINY, rows[:1])[0].verdict == "not measured"


def test_step_is_held_against_others_at_its_largest_micro_batch():
    def row(name, ms, micro_batch=2048, frames=208):
        return {"frames": frames, "micro_batch": micro_batch, "implementation": name, "ms": ms, "mfu": 20 / ms}

    rows = [row(step.OURS, 40.0), row(step.EAGER, 160.0), row(step.SDPA_COMPILED, 48.0), row(step.OURS, 1.0, 256)]
    rows.append({"frames": 608, "micro_batch": 4096, "implementation": step.OURS, "ms": 1.0, "mfu": 1.0})
    fp16, sdpa, mfu, *compiled = step.all_targets(rows)
    assert (fp16.reached, fp16.verdict) == (4.0, "met")
    assert (sdpa.reached, sdpa.verdict) == (1.2, "NOT met")
    assert (mfu.reached, mfu.verdict) == (0.5, "met")
    assert {target.verdict for target in compiled} == {"not measured"}


# --- the eager chain is what it is compared as


def test_eager_chain_computes_the_same_loss_and_gradients():
    shape, dtype = TINY, torch.float64
    x = masking.draw(shape, 3, dtype, CPU, seed=2)
    chosen = reference.random_masking(3, x.sample_ids, shape.num_patches, shape.num_keep)
    masked = torch.ones(3, shape.num_patches, dtype=dtype).scatter(1, chosen.ids_keep, 0)
    shuffle = eager.Shuffle(chosen.ids_keep, chosen.ids_restore, masked)
    usual = masking.eager_ops(shape, x, shuffle)
    ours = masking.our_ops(shape, x, chosen, "reference")
    for name in ("embed", "restore"):
        (out, gradients), (expected, expected_gradients) = usual[name](), ours[name]()
        for one, other in zip((out, *gradients), (expected, *expected_gradients), strict=True):
            torch.testing.assert_close(one, other)
    every = x.prediction_of_all.detach()
    predicted = reference.select_rows(every, chosen.ids_masked)
    expected = reference.masked_patch_loss(predicted, x.spectrogram, chosen, shape.patch, False)
    torch.testing.assert_close(usual["loss"].forward(), expected, check_dtype=False)


def test_shuffle_keeps_the_smallest_noise():
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2]])
    chosen = eager.shuffle(noise, 2)
    assert chosen.ids_keep.tolist() == [[1, 3]]
    assert chosen.mask.tolist() == [[1, 0, 1, 0]]
    assert chosen.ids_restore.tolist() == [[2, 0, 3, 1]]


# --- files and tables


def test_results_name_device_versions_and_commit(tmp_path):
    target = Target("speed", 3.0, 4.0)
    path = measure.write_results(tmp_path / "new", "kernels", {"targets": [target.record()], "rows": [{"ms": 1.5}]})
    content = json.loads(path.read_text())
    assert path.name == f"kernels-{measure.slug(content['device'])}.json"
    assert {"device", "driver", "cuda", "torch", "triton", "commit", "dirty", "date"} <= content.keys()
    assert content["targets"][0]["verdict"] == "met"
    assert content["rows"] == [{"ms": 1.5}]
    assert measure.slug("NVIDIA H200") == "nvidia-h200"
    assert [file.name for file in (tmp_path / "new").iterdir()] == [path.name]


def test_commit_is_unknown_outside_a_clone_unless_it_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("MSM_COMMIT", raising=False)
    assert measure.source_state(tmp_path) == ("unknown", None)
    monkeypatch.setenv("MSM_COMMIT", "abc")
    assert measure.source_state(tmp_path) == ("abc", None)


def test_commit_of_a_clone_says_whether_files_differ(tmp_path):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-qm", "one")
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    assert measure.source_state(tmp_path) == (git("rev-parse", "HEAD"), False)
    (tmp_path / "file").write_text("two")
    assert measure.source_state(tmp_path) == (git("rev-parse", "HEAD"), True)


def test_tables_show_what_is_missing():
    text = measure.targets_table([Target("a", 3.0, None), Target("b", 0.5, 0.25, at_most=True)])
    assert text.splitlines()[1].split() == ["a", ">=", "3", "-", "not", "measured"]
    assert text.splitlines()[2].split() == ["b", "<=", "0.5", "0.250", "met"]
    rows = attention_rows((1.0, 3.0), (5.0, 20.0), (6.0, 8.0))
    rows += [
        {"implementation": name, "phase": "both", "ms": 4.0, "floor_ms": 3.0, "share": 0.75}
        for name in (attention.OURS, "SDPA flash", "SDPA cudnn")
    ]
    lines = kernels.attention_table(rows).splitlines()
    assert lines[1].split() == ["triton", "1.000", "100%", "3.000", "67%", "4.000", "75%"]
    assert lines[-1].split() == ["SDPA", "math", "not", "available"]


def test_timing_is_the_median_of_the_turns():
    assert measure.summarize([1.0, 4.0, 2.0]) == (2.0, 1.5)


def test_budget_names_what_it_leaves_out(capsys):
    now = [0.0]
    budget = Budget(1.0, clock=lambda: now[0])
    assert budget.allows("first", 30)
    now[0] = 40.0
    assert not budget.allows("second", 30)
    assert budget.allows("third", 10)
    assert budget.left_out == ["second"]
    assert "second" in capsys.readouterr().out


def test_curves_are_compared_at_the_same_steps():
    def lines(*losses):
        rates = {name: float(len(losses)) for name in training.RATES}
        return [{"step": 5 * n, "loss": loss, **rates} for n, loss in enumerate(losses, start=1)]

    compared = training.compare(lines(2.0, 1.1, 1.0), lines(2.0, 1.0, 1.0))
    assert compared["largest"] == pytest.approx(0.1)
    assert compared["rates"]["triton"]["mfu"] == 3.0
    assert training.curves_table(compared).splitlines()[2].split() == ["10", "1.1000", "1.0000"]


# --- the tuner


@without_gpu
def test_tuner_finds_every_kernel_by_what_the_launchers_ask(monkeypatch):
    monkeypatch.setattr(masking, "SHAPES", (TINY,))
    monkeypatch.setattr(attention, "SHAPES", (attention.Shape(5, 1, 32, "short"), attention.Shape(131, 1, 32, "tiled")))
    monkeypatch.setattr(tune, "DEVICE", CPU)
    monkeypatch.setattr(tune, "DTYPE", torch.float32)
    monkeypatch.setattr(tune, "CHECKED_CLIPS", 2)
    found = tune.subjects()
    assert {subject.asked.kernel.replace("_forward", "").replace("_backward", "") for subject in found} == {
        "attention_short",
        "attention_tiled",
        "random_masking",
        "embed",
        "restore",
        "select",
        "masked_loss",
    }
    assert len({subject.asked.key for subject in found}) == len(found)
    for subject in found:
        options = tune.candidates(
            subject.asked.default, max((n for c in subject.cases for n in tune.lengths(c)), default=0)
        )
        assert options[0] == subject.asked.default
        assert len(options) == len(set(options)) <= tune.MOST_CANDIDATES


def test_every_tile_that_is_tried_holds_the_longest_sequence_of_its_class():
    shape = attention.Shape(66, 6, 64, "")
    least, longest = tune.lengths(tune.Case(shape, "attention", "forward"))
    assert (least, longest) == (65, 80)
    options = tune.candidates(Short(rows=64, tail=16, loops=1, num_warps=4, num_stages=1), longest)
    assert all(option.rows + option.tail >= 80 for option in options)
    assert {(option.rows, option.tail) for option in options} >= {(64, 16), (128, 0)}


@without_gpu
def test_a_candidate_is_used_and_a_wrong_one_is_refused(monkeypatch):
    case = tune.Case(attention.Shape(5, 1, 32, "short"), "attention", "forward")
    monkeypatch.setattr(tune, "DEVICE", CPU)
    monkeypatch.setattr(tune, "DTYPE", torch.float32)
    monkeypatch.setattr(tune, "CHECKED_CLIPS", 2)
    monkeypatch.setattr(tune, "lengths", lambda case: [])
    heard = []

    def listen(asked):
        heard.append(asked)
        return asked.default

    with tune.answering(listen):
        tune.prepare(case, 2)()
    (asked,) = set(heard)
    assert tune.wrong(asked, asked.default._replace(rows=16), [case]) is None
    assert "ZeroDivisionError" in tune.wrong(asked, asked.default._replace(rows=4, tail=0), [case])
    monkeypatch.setattr(attention, "OUR_ATTENTION", wrong_attention)
    assert "error" in tune.wrong(asked, asked.default, [case])


@without_gpu
def test_tuner_writes_what_was_fastest_of_what_is_right(monkeypatch, tmp_path, capsys):
    class InThisProcess(contextlib.nullcontext):
        def __init__(self, *_):
            super().__init__(self)

        map = map

    def clock(variants, repeat_ms):
        """The more rows in a tile, the faster."""
        return {name: measure.Timing(1.0 / getattr(name, "rows", 1), 0.0) for name in variants}

    path = tmp_path / "configurations.json"
    path.write_text("{}")
    monkeypatch.setattr(configurations, "TABLE", path)
    monkeypatch.setattr(attention, "SHAPES", (attention.Shape(5, 1, 32, "short"),))
    monkeypatch.setattr(attention, "QKV_BYTES", 6 * 5 * 32 * 2)
    monkeypatch.setattr(masking, "SHAPES", ())
    monkeypatch.setattr(tune, "DEVICE", CPU)
    monkeypatch.setattr(tune, "DTYPE", torch.float32)
    monkeypatch.setattr(tune, "CHECKED_CLIPS", 2)
    monkeypatch.setattr(tune, "MOST_CANDIDATES", 6)
    monkeypatch.setattr(tune, "lengths", lambda case: [case.shape.tokens])
    monkeypatch.setattr(tune, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(tune, "take_turns", clock)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(total_memory=1e11))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    configurations.table.cache_clear()
    tried = tune.candidates

    def and_one_that_does_not_compile(default, longest):
        return [*tried(default, longest), default._replace(rows=4096)]

    monkeypatch.setattr(tune, "candidates", and_one_that_does_not_compile)
    try:
        assert tune.tune(Budget(60), path) == 0
        table = configurations.table()
    finally:
        configurations.table.cache_clear()
    assert table["cpu"]["measured"]["torch"] == torch.__version__
    default = Short(**table["cpu"]["attention_short_forward"]["n16_d32"]["float32"])
    for phase in ("forward", "backward"):
        entry = table["cpu"][f"attention_short_{phase}"]["n16_d32"]["float32"]
        assert entry["rows"] == max(config.rows for config in tried(default, 5))
    assert "4096" in capsys.readouterr().out.partition("skipped")[0]


def test_default_stays_unless_another_is_clearly_faster():
    default, other = Short(32, 0, 1, 2, 1), Short(64, 0, 1, 4, 1)
    assert tune.fastest(default, {default: 1.0, other: 0.995}) == default
    assert tune.fastest(default, {default: 1.0, other: 0.9}) == other


def test_table_of_the_tuner_is_what_launchers_read(tmp_path, monkeypatch):
    path = tmp_path / "configurations.json"
    other_gpu = {"measured": {"device": "another"}, "embed": {"16x16": {"bfloat16": {"rows": 1}}}}
    path.write_text(json.dumps({"8.0": other_gpu}))
    monkeypatch.setattr(configurations, "TABLE", path)
    configurations.table.cache_clear()
    default, chosen = Short(32, 0, 1, 2, 1), Short(64, 0, 4, 4, 2)
    entries = {("attention_short_forward", "n32_d64", torch.bfloat16): chosen}
    about = {"device": "a device", "triton": "3.6.0", "torch": "2.11", "commit": "abc", "date": "today"}
    old = configurations.table()
    table = tune.merged(old, "cpu", about, entries)
    tune.write_table(table, path)
    try:
        ask = configurations.configuration
        assert ask("attention_short_forward", "n32_d64", torch.bfloat16, CPU, default) == chosen
        assert ask("attention_short_forward", "n32_d64", torch.float32, CPU, default) == default
        assert ask("attention_short_backward", "n32_d64", torch.bfloat16, CPU, default) == default
        assert configurations.table()["8.0"] == other_gpu
        assert configurations.table()["cpu"]["measured"] == about
        assert "cpu" not in old
    finally:
        configurations.table.cache_clear()
