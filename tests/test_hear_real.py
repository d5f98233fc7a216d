"""The real hear-validator and hear-eval-kit over our encoder and three tiny tasks: `make test-hear`.

They run unmodified, in the environment that HEAR_VENV names (tools/hear_env.py makes it), on the weights that
HEAR_MODEL names, else on random ones of the quickstart's geometry: these tasks need no training.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import textwrap
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from msm_dist.config import Features, load_config
from msm_dist.evaluate.encoder import Encoder
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save
from tests.kit_tasks import write_tasks
from tools.hear_env import ROOT, environment

pytestmark = [pytest.mark.hear, pytest.mark.timeout(1800)]

MODULE = "msm_dist.evaluate.hear"
PAGE = ROOT / "docs" / "hear.md"
# What a predictor gets that learned nothing: a third of the clips, half of the labels, no onset.
BETTER_THAN_CHANCE = {"tones-v1-tiny": 0.7, "layers-v1-tiny": 0.75, "events-v1-tiny": 0.5}
BROKEN = f"""
from {MODULE} import *
from {MODULE} import get_timestamp_embeddings as embed

def get_timestamp_embeddings(audio, model):
    embeddings, stamps = embed(audio, model)
    return embeddings, stamps + 30 * (stamps > 1000)
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    if named := os.environ.get("HEAR_MODEL"):
        return ROOT / named
    config = load_config(ROOT / "configs" / "quickstart.yaml")
    info = WeightsInfo(config.model, Features(mean=-7.1, std=4.2), config.data.crop_frames)
    model = MaskedSpectrogramModel(info.model, info.features.n_mels, info.crop_frames)
    return save(tmp_path_factory.mktemp("weights"), model.state_dict(), info)


@pytest.fixture(scope="module")
def encoder(weights):
    return Encoder.load(weights)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, encoder):
    return write_tasks(tmp_path_factory.mktemp("hear") / "tasks", encoder.features.sample_rate)


@pytest.fixture(scope="module")
def report(tasks, weights):
    """What the page's commands for the full task set print, over the tiny tasks and with a shorter search."""
    block = re.search(r"(?m)^    MSM=.*\n((?:    .*\n)+)", PAGE.read_text(encoding="utf-8"))[1]
    script = block.replace("$MSM/build/hear/venv", os.environ["HEAR_VENV"])
    script = script.replace("predict.py ", "predict.py --grid-points 2 ")
    places = {"MSM": ROOT, "MODEL": weights, "TASKS": tasks, "OUT": tasks.parent / "out", "CUDA_VISIBLE_DEVICES": ""}
    return run_block(script, **{name: str(place) for name, place in places.items()})


@pytest.fixture(scope="module")
def embeddings(tasks, report):
    return tasks.parent / "out" / "embeddings" / MODULE


def test_hear_validator_finds_no_fault(report):
    assert "Looks good!" in report


def test_hear_validator_takes_the_weights_that_a_variable_names(weights, tmp_path):
    report = validate(MODULE, tmp_path, MSM_DIST_HEAR_MODEL=str(weights))
    assert report.returncode == 0, report.stdout + report.stderr


def test_hear_validator_finds_the_fault_of_a_broken_module(weights, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    report = validate("broken", tmp_path, "--model", str(weights))
    assert report.returncode == 1
    assert "regular intervals" in report.stderr


def test_the_kit_stores_the_embeddings_of_the_encoder(embeddings, tasks, encoder):
    for task in tasks.iterdir():
        whole = read_json(task / "task_metadata.json")["embedding_type"] == "scene"
        for split in read_json(task / "task_metadata.json")["splits"]:
            names = read_json(task / f"{split}.json")
            for name in names:
                samples, rate = soundfile.read(task / str(encoder.features.sample_rate) / split / name, dtype="float32")
                frames = encoder.encode(torch.from_numpy(samples)[None], rate)[0]
                stored = torch.from_numpy(np.load(embeddings / task.name / split / f"{name}.embedding.npy"))
                expected = frames.mean(dim=0) if whole else frames[: len(stored)]
                assert stored.dtype == torch.float32
                assert torch.allclose(stored, expected, atol=1e-4), name
            rows = len(names) if whole else sum(len(stamps_of(embeddings / task.name, split, name)) for name in names)
            dimensions = read_json(embeddings / task.name / f"{split}.embedding-dimensions.json")
            assert dimensions == [rows, encoder.embedding_size]


def test_the_kit_labels_every_time_step_by_its_centre(embeddings, tasks, encoder):
    task = "events-v1-tiny"
    labelled = 0
    for name, events in read_json(tasks / task / "test.json").items():
        stamps = stamps_of(embeddings / task, "test", name)
        labels = read_json(embeddings / task / "test" / f"{name}.target-labels.json")
        assert stamps == encoder.timestamps_ms(len(stamps)).tolist()
        assert stamps[-1] <= 8000
        inside = [[event["label"] for event in events if event["start"] <= at <= event["end"]] for at in stamps]
        assert labels == inside
        labelled += sum(map(bool, labels))
    assert labelled > 100


def test_the_kit_scores_every_task_well_above_chance(embeddings, report):
    tasks = BETTER_THAN_CHANCE.keys()
    scores = {task: read_json(embeddings / task / "test.predicted-scores.json") for task in tasks}
    values = {}
    for task, of_task in scores.items():
        folds = [of_fold["test_score"] for name, of_fold in of_task.items() if name.startswith(("test", "fold"))]
        assert len(folds) == (3 if task.startswith("layers") else 1)
        values[task] = np.mean(folds)
        assert f"{task}/test.predicted-scores.json:" in report
    print(values)
    assert all(BETTER_THAN_CHANCE[task] < value <= 1 for task, value in values.items()), values
    events = scores["events-v1-tiny"]["test"]
    assert events["test_segment_1s_er"] < 0.5


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="no ffmpeg")
def test_the_page_resamples_what_is_published_at_48_khz(tmp_path):
    task = write_tasks(tmp_path / "tasks", 48000) / "tones-v1-tiny"
    for other in ("layers", "events"):
        shutil.rmtree(tmp_path / "tasks" / f"{other}-v1-tiny")
    block = re.search(r"(?m)^    cd /data/hear/tasks\n((?:    .*\n)+)", PAGE.read_text(encoding="utf-8"))[1]
    run_block(f"cd {shlex.quote(str(tmp_path / 'tasks'))}\n{block}")
    for split, count in (("train", 30), ("valid", 12), ("test", 24)):
        made = [soundfile.info(path) for path in (task / "16000" / split).iterdir()]
        found = {(info.samplerate, info.frames, info.channels, info.subtype) for info in made}
        assert len(made) == count and found == {(16000, 16000, 1, "PCM_16")}


def validate(module: str, folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """hear-validator's report on a module, from a folder that may hold it."""
    tool = Path(os.environ["HEAR_VENV"]) / "bin" / "hear-validator"
    own = environment() | {"CUDA_VISIBLE_DEVICES": ""} | variables
    own["PYTHONPATH"] += f"{os.pathsep}{folder}"
    command = [str(tool), module, *options, "-d", "cpu"]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)


def run_block(script: str, **variables: str) -> str:
    """What commands of the page print. Fails with it."""
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    command = ["bash", "-euo", "pipefail", "-c", textwrap.dedent(script)]
    child = subprocess.run(command, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.returncode == 0, child.stdout[-6000:]
    return child.stdout


def stamps_of(folder: Path, split: str, name: str) -> list[float]:
    return read_json(folder / split / f"{name}.timestamps.json")


def read_json(path: Path):
    return json.loads(path.read_text())
