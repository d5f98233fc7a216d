"""Whole fine-tuning runs in real processes: labels are learnt, nothing is lost by a kill, ranks share the work."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from msm_dist.evaluate.classifier import Tagger
from msm_dist.evaluate.encoder import Encoder
from tests.labelled import INFO, KINDS, RATE, new_model, write_sounds, write_weights
from tests.processes import HERE, free_port, rank_environment
from tests.test_pretrain import finish

pytestmark = pytest.mark.distributed

STEPS = 30
SETTINGS = [
    "data.seconds=0.64",
    "data.weighted=true",
    "data.num_workers=1",
    f"train.steps={STEPS}",
    "train.global_batch=12",
    "train.micro_batch=3",
    "train.precision=fp32",
    "train.log_every=1",
    "train.valid_every=15",
    "checkpoint.every=10",
    "checkpoint.keep=2",
    "optim.lr=1e-2",
    "optim.warmup_steps=4",
    "augment.mixup=0.2",
    "augment.frequency_mask=4",
    "augment.time_mask=4",
    "augment.frequency_drop=0.2",
    "augment.time_drop=0.25",
]


ENDS = {
    "pause:5": (signal.SIGUSR1, 75),
    "valid": (signal.SIGUSR1, 75),
    "test": (signal.SIGTERM, 128 + signal.SIGTERM),
    "step:24": (None, -signal.SIGKILL),
    "nan:18": (None, 3),
}
"""How a run is ended where it waits (tests/finetune_worker.py), and its exit code; without a signal it ends itself."""


def pytest_generate_tests(metafunc):
    """The plain run takes some of these, `make test-engine` all of them."""
    is_whole = metafunc.config.option.markexpr == "engine"
    if "kills" in metafunc.fixturenames:
        kills = [("pause:5", "step:24", "test"), *([("valid", "nan:18", "step:24")] if is_whole else [])]
        metafunc.parametrize("kills", kills, ids="-".join)
    if "stage" in metafunc.fixturenames:
        metafunc.parametrize(("ranks", "stage"), [(2, 3), *([(2, 2), (1, 0)] if is_whole else [])])


class Runs:
    """Starts fine-tuning runs on one task, in one folder of runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.weights_folder = write_weights(folder / "weights")
        self.task = write_sounds(folder / "sounds")

    def start(self, name: str, *settings: str, ranks: int = 1, **environment: str) -> list[subprocess.Popen]:
        port = free_port()
        words = [str(self.weights_folder), str(self.task), f"run.dir={self.folder}", f"run.name={name}"]
        return [
            subprocess.Popen(
                [sys.executable, str(HERE / "finetune_worker.py"), *words, *SETTINGS, *settings],
                env=rank_environment(rank, ranks, port) | {"PYTHONPATH": str(HERE.parent)} | environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=HERE.parent,
            )
            for rank in range(ranks)
        ]

    def run(self, name: str, *settings: str, ranks: int = 1, **environment: str) -> tuple[list[int], str]:
        return finish(self.start(name, *settings, ranks=ranks, **environment))

    def metrics(self, name: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def losses(self, name: str) -> list[tuple]:
        kept = ("step", "loss", "lr", "grad_norm", "valid_loss", "valid_top1_acc", "valid_mAP")
        return [tuple(line.get(key) for key in kept) for line in self.metrics(name)]

    def results(self, name: str) -> dict:
        return json.loads((self.folder / name / "results.json").read_text())

    def exported(self, name: str) -> dict[str, bytes]:
        """The weights of encoder and head; the other files hold the run's name."""
        folder = self.folder / name / "export"
        return {file: (folder / file).read_bytes() for file in ("model.safetensors", "head.safetensors", "head.json")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    runs = Runs(tmp_path_factory.mktemp("finetuning"))
    codes, output = runs.run("undisturbed")
    assert codes == [0], output
    assert "top1_acc" in output
    return runs


def test_labels_are_learnt_far_better_than_chance(runs):
    results = runs.results("undisturbed")
    assert results["test_top1_acc"] >= 0.9  # chance is a third
    assert results["test_mAP"] >= 0.9
    assert (results["test_clips"], results["classes"], results["classes_judged"]) == (24, 3, 3)


def test_run_leaves_what_pre_training_leaves(runs):
    folder = runs.folder / "undisturbed"
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "plan.json", "environment.json", "metrics.jsonl", "results.json"),
        *("tensorboard", "checkpoints", "export"),
    }
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000020", "step-00000030"]
    card = (folder / "export" / "README.md").read_text()
    assert f"| test: top-1 accuracy at step {STEPS} | {runs.results('undisturbed')['test_top1_acc']:.4f} |" in card
    lines = runs.metrics("undisturbed")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if "valid_loss" in line] == [15, 30]
    assert set(lines[0]) >= {"lr", "grad_norm", "clips_per_second", "data_wait_share", "mfu"}


def test_classifier_gives_the_scores_that_the_run_reported(runs):
    tagger = Tagger.load(runs.folder / "undisturbed")
    assert tagger.labels == KINDS
    rows = [line.split(",") for line in runs.task.read_text().splitlines()]
    right = []
    for file, label, split in rows[1:]:
        if split == "test":
            waveform = torch.from_numpy(soundfile.read(runs.task.parent / file, dtype="float32")[0])[None]
            right.append(tagger.labels[int(tagger.predict(waveform, RATE).argmax())] == label)
    assert np.mean(right) == runs.results("undisturbed")["test_top1_acc"]


def test_encoder_reads_the_fine_tuned_weights(runs):
    tuned = Encoder.load(runs.folder / "undisturbed")
    waveform = 0.1 * torch.randn(1, RATE, generator=torch.Generator().manual_seed(0))
    before = Encoder(new_model(), tuned.info).embed(waveform, RATE)
    assert tuned.info.crop_frames == 64
    assert tuned.info.origin["finetuned_from"] == INFO.origin
    assert tuned.info.origin["untrained"] == ["decoder"]
    assert not torch.allclose(tuned.embed(waveform, RATE), before, atol=1e-2)


@pytest.mark.engine
def test_run_that_is_stopped_and_killed_equals_one_never_disturbed(runs, kills):
    name = "-".join(["disturbed", *(kill.partition(":")[0] for kill in kills)])
    for kill in kills:
        number, code = ENDS[kill]
        processes = runs.start(name, KILL=kill)
        while number and (line := processes[0].stdout.readline()) != "waits\n":
            assert line, finish(processes)
        if number:
            processes[0].send_signal(number)
        codes, output = finish(processes)
        assert codes == [code], output
        assert ("the same command continues" in output) == bool(number)
        assert not (runs.folder / name / "results.json").exists()
        if code == 3:
            diverged = json.loads((runs.folder / name / "diverged.json").read_text())
            assert (diverged["step"], len(diverged["clips"])) == (18, 12)
            assert all(clip.startswith("train") for clip in diverged["clips"])
    codes, output = runs.run(name)
    assert codes == [0], output
    assert "continued from" in output
    assert runs.losses(name) == runs.losses("undisturbed")
    assert runs.exported(name) == runs.exported("undisturbed")
    assert runs.results(name) == runs.results("undisturbed")


@pytest.mark.engine
def test_ranks_and_zero_stages_learn_the_same_from_the_same_clips(runs, ranks, stage):
    name = f"world-{ranks}-{stage}"
    codes, output = runs.run(name, f"engine.zero_stage={stage}", "checkpoint.every=100", ranks=ranks)
    assert codes == [0] * ranks, output
    for mine, theirs in zip(runs.metrics(name), runs.metrics("undisturbed"), strict=True):
        for part in mine.keys() & {"loss", "lr", "grad_norm", "valid_loss"}:
            # Rounding grows from step to step; another clip or learning rate is off by far more from the first on.
            bound = 1e-5 if mine["step"] <= 3 else 1e-2
            assert mine[part] == pytest.approx(theirs[part], rel=bound), f"step {mine['step']}, {part}"
    assert runs.results(name)["test_loss"] == pytest.approx(runs.results("undisturbed")["test_loss"], rel=1e-2)
