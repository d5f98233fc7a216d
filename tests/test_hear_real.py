"""The real hear-validator and hear-eval-kit over our encoder and three tiny tasks: `make test-hear`.

They run unmodified, in the environment that HEAR_VENV names (tools/hear_env.py makes it), on the weights that
HEAR_MODEL names, else on random ones of the quickstart's geometry: these tasks need no training.
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from msm_dist.config import Features, load_config
from msm_dist.evaluate.encoder import Encoder
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save
from tests.hear_tasks import write_tasks
from tools.hear_env import ROOT, environment

pytestmark = [pytest.mark.hear, pytest.mark.timeout(1800)]

MODULE = "msm_dist.evaluate.hear"
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
def embeddings(tasks, weights):
    run_tool(tasks.parent, "-m", "heareval.embeddings.runner", MODULE, "--model", weights, "--tasks-dir", tasks)
    return tasks.parent / "embeddings" / MODULE


@pytest.fixture(scope="module")
def scores(embeddings, tasks):
    folders = sorted(folder.relative_to(tasks.parent) for folder in embeddings.iterdir())
    run_tool(tasks.parent, ROOT / "tests" / "hear" / "predict.py", "--grid-points", 2, *folders)
    return {folder.name: read_json(embeddings / folder.name / "test.predicted-scores.json") for folder in folders}


def test_hear_validator_finds_no_fault(weights, tmp_path):
    report = validate(MODULE, tmp_path, "--model", str(weights))
    assert report.returncode == 0, report.stdout + report.stderr
    assert "Looks good!" in report.stdout


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


def test_the_kit_scores_every_task_well_above_chance(scores):
    values = {}
    for task, of_task in scores.items():
        folds = [of_fold["test_score"] for name, of_fold in of_task.items() if name.startswith(("test", "fold"))]
        assert len(folds) == (3 if task.startswith("layers") else 1)
        values[task] = np.mean(folds)
    print(values)
    assert values.keys() == BETTER_THAN_CHANCE.keys()
    assert all(BETTER_THAN_CHANCE[task] < value <= 1 for task, value in values.items()), values
    events = scores["events-v1-tiny"]["test"]
    assert events["test_segment_1s_er"] < 0.5


def validate(module: str, folder: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """hear-validator's report on a module, from a folder that may hold it."""
    tool = Path(os.environ["HEAR_VENV"]) / "bin" / "hear-validator"
    own = environment() | {"CUDA_VISIBLE_DEVICES": ""} | variables
    own["PYTHONPATH"] += f"{os.pathsep}{folder}"
    command = [str(tool), module, *options, "-d", "cpu"]
    return subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True)


def run_tool(folder: Path, *arguments: object) -> None:
    """A script or module with the interpreter of the HEAR tools. Fails with its output."""
    python = Path(os.environ["HEAR_VENV"]) / "bin" / "python"
    own = environment() | {"CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run([str(python), *map(str, arguments)], cwd=folder, env=own, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-4000:]


def stamps_of(folder: Path, split: str, name: str) -> list[float]:
    return read_json(folder / split / f"{name}.timestamps.json")


def read_json(path: Path):
    return json.loads(path.read_text())
