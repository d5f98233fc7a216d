"""engine.compile: few graphs, the numbers of eager blocks, exact resume, and a clear word where it can't be."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from benchmarks import compile as benchmark
from benchmarks import step
from benchmarks.measure import Budget
from msm_dist.config import Model, parse_config
from msm_dist.engine import compilation
from msm_dist.errors import ConfigError
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import load
from tests.checkpointing_worker import FRAMES, SMALL
from tests.corpus import write_corpus
from tests.processes import run_ranks


def build():
    return MaskedSpectrogramModel(Model(**SMALL), 80, FRAMES, seed=5)


def batch(clips):
    spectrogram = torch.randn(clips, 1, 80, FRAMES, generator=torch.Generator().manual_seed(1))
    return spectrogram, torch.tensor([[0, clip, 0] for clip in range(clips)])


@pytest.fixture
def captured(monkeypatch):
    """Blocks run as they were captured: all but the code that Inductor would write, in no time."""
    monkeypatch.setattr(compilation, "COMPILER", {"backend": "aot_eager"})
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def test_encoder_and_decoder_blocks_are_a_graph_each(captured):
    plain, model = build(), build()
    compilation.prepare_blocks(model, compiled=True)
    assert list(model.state_dict()) == list(plain.state_dict())
    for _ in range(2):
        expected, loss = plain(*batch(3)).loss, model(*batch(3)).loss
        expected.backward()
        loss.backward()
    assert counters["stats"]["unique_graphs"] == 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, parameter), other in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, rtol=1e-4, atol=1e-7), name


def test_validation_compiles_nothing(captured):
    model = build()
    compilation.prepare_blocks(model, compiled=True)
    model.eval()
    with torch.no_grad():
        for clips in (3, 2, 1):
            model(*batch(clips))
        model.encoder.features(batch(1)[0][..., :16])
    assert counters["stats"]["unique_graphs"] == 0


def test_a_model_without_blocks_can_not_be_compiled():
    with pytest.raises(ConfigError, match="engine.compile = true: the model has no block"):
        compilation.prepare_blocks(nn.Linear(2, 2), compiled=True)
    compilation.prepare_blocks(nn.Linear(2, 2), compiled=False)


def pretrain(folder, *settings, code="", **environment):
    """A small run in its own process, `code` first."""
    (folder / "empty.yaml").write_text("")
    words = [str(folder / "empty.yaml"), f"run.dir={folder}", f"data.shards={write_corpus(folder / 'shards', seed=0)}"]
    words += [f"model.{name}={value}" for name, value in SMALL.items()]
    words += ["train.steps=2", "train.global_batch=4", "train.micro_batch=4", "train.precision=fp32"]
    words += [f"data.crop_frames={FRAMES}", "data.block=4", "data.shuffle_window=16", "data.num_workers=0", *settings]
    return subprocess.run(
        [
            sys.executable,
            "-c",
            f"{code}\nimport sys, msm_dist.pretrain as run\nsys.exit(run.main(sys.argv[1:]))",
            *words,
        ],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.distributed
def test_a_run_without_a_compiler_says_so_in_one_line(tmp_path):
    cache = str(tmp_path / "cache")
    run = pretrain(tmp_path, "engine.compile=true", CXX="/nonexistent", TORCHINDUCTOR_CACHE_DIR=cache)
    assert run.returncode == 2, run.stderr
    assert "Traceback" not in run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("msm-dist: ")]
    assert len(said) == 1
    assert "engine.compile = true: torch.compile failed (InvalidCxxCompiler" in said[0]
    assert "set engine.compile=false" in said[0]


@pytest.mark.distributed
def test_a_compiled_run_says_what_its_start_took_and_exports_plain_weights(tmp_path):
    code = 'from msm_dist.engine import compilation\ncompilation.COMPILER = {"backend": "aot_eager"}'
    run = pretrain(tmp_path, "engine.compile=true", "model.activation_checkpointing=true", code=code)
    assert run.returncode == 0, run.stderr
    assert re.search(r"^note +engine.compile: engine and first step took \d+\.\d s$", run.stdout, re.MULTILINE)
    _, info = load(tmp_path / "run" / "export")
    assert not info.model.activation_checkpointing


def small_config():
    train = {"steps": 1, "global_batch": 8, "micro_batch": 8}
    return parse_config({"model": SMALL, "data": {"crop_frames": FRAMES}, "train": train}, "test")


@pytest.fixture
def on_a_cpu(monkeypatch):
    """The benchmark with small blocks as they were captured, and plain AdamW in the place of DeepSpeed."""
    monkeypatch.setattr(benchmark, "COMPILERS", {benchmark.EAGER: None, "captured": {"backend": "aot_eager"}})
    monkeypatch.setattr(step, "config", lambda size, frames: small_config())
    monkeypatch.setattr(benchmark, "MICRO_BATCHES", (2,))
    for name, value in (("has_deepspeed", lambda: False), ("TURN_SECONDS", 0.01), ("CHECK_CLIPS", 2)):
        monkeypatch.setattr(step, name, value)
    for name, value in (("memory_allocated", 0), ("max_memory_allocated", 1)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)


def test_benchmark_measures_every_variant_in_model_and_engine(on_a_cpu, tmp_path, capsys):
    assert benchmark.compare(Budget(60), tmp_path, torch.device("cpu")) == 0
    content = json.loads(next(tmp_path.iterdir()).read_text())
    found = [(row["subject"], row["blocks"]) for row in content["rows"]]
    assert found == [(subject, name) for subject in ("model", "engine") for name in benchmark.COMPILERS]
    assert all(row["first_step_s"] > 0 and row["ms"] > 0 for row in content["rows"])
    assert "times faster" in capsys.readouterr().out


def test_benchmark_refuses_to_time_what_is_wrong(on_a_cpu, tmp_path, capsys, monkeypatch):
    def doubling(graph, inputs):
        return lambda *values: [2 * value for value in graph(*values)]

    monkeypatch.setattr(benchmark, "COMPILERS", {benchmark.EAGER: None, "doubling": {"backend": doubling}})
    assert benchmark.compare(Budget(60), tmp_path, torch.device("cpu")) == 1
    assert "WRONG: doubling: loss" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_other_errors_are_not_taken_for_the_compilers():
    with pytest.raises(RuntimeError, match="shapes"), compilation.explaining_compiler():
        raise RuntimeError("shapes do not match")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if not shutil.which("g++"):
        pytest.skip("torch.compile needs g++ on a CPU")
    folder = tmp_path_factory.mktemp("compile")
    for phase in ("start", "resume"):
        run_ranks(["-m", "tests.compile_worker", str(folder), phase], size=2, timeout=500)
    return {phase: json.loads((folder / f"{phase}.json").read_text()) for phase in ("start", "resume")}


STAGES = pytest.mark.parametrize("stage", ["1", "3"])


@pytest.mark.distributed
@STAGES
def test_compiled_blocks_train_as_eager_ones_within_rounding(results, stage):
    found = results["start"][stage]
    # Inside a compiled kernel bfloat16 is rounded less often.
    assert found["compiled"] == pytest.approx(found["eager"], rel={"1": 1e-5, "3": 5e-3}[stage])
    assert found["compiled"][-1] < found["compiled"][0]
    assert not found["renamed"]


@pytest.mark.distributed
@STAGES
def test_all_blocks_are_one_graph_under_deepspeed(results, stage):
    assert results["start"][stage]["graphs"] == 1


@pytest.mark.distributed
@STAGES
def test_checkpointing_around_compiled_blocks_changes_no_bit(results, stage):
    found = results["start"][stage]
    assert found["thrifty"] == found["compiled"]
    assert found["thrifty_weights"] == found["weights"]


@pytest.mark.distributed
def test_compiled_run_resumes_to_the_same_bits(results):
    found, again = results["start"]["3"], results["resume"]["3"]
    assert again["compiled"] == found["compiled"][-len(again["compiled"]) :]
    assert again["weights"] == found["weights"]
