"""The card beside weights: facts only, as Markdown that the Hub reads, with code that runs."""

import re

import numpy as np
import pytest
import soundfile
import yaml

from msm_dist.config import Features, Model, parse_config
from msm_dist.evaluate.model_card import model_card
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import WeightsInfo, save

MODEL = Model(size="tiny", patch_size="16x8", mask_ratio=0.6)
FEATURES = Features(mean=-7.25, std=4.5)
OFFICIAL = {"tables": ["eval_segments.csv"], "clips": 20371, "found": 3600, "manifest": "f" * 64}
CORPUS = [
    {"name": "a|b", "clips": 1200, "seconds": 7200.0, "digest": "d" * 64, "share": 0.25, "official": None},
    {"name": "audioset", "clips": 3600, "seconds": 36000.0, "digest": "e" * 64, "share": 0.75, "official": OFFICIAL},
]
RECORDS = [
    {"step": 10, "loss": 0.75},
    {"step": 20, "loss": 0.5, "lr": 1e-3},
    {"step": 20, "valid_loss": 0.625, "reference_mel_mean": 0.875},
    {"step": 30, "loss": 0.125},
]
CFG = parse_config({"train": {"steps": 30, "global_batch": 64, "precision": "fp32"}, "seed": 5}, "test")


@pytest.fixture(scope="module")
def state():
    return MaskedSpectrogramModel(MODEL, 80, 208).state_dict()


def card(state, origin, cfg=CFG, records=RECORDS):
    return model_card(state, WeightsInfo(MODEL, FEATURES, 208, origin), "0123abcd", cfg, records)


def test_front_matter_is_what_the_hub_reads_and_names_no_licence(state):
    _, front, text = card(state, {"run": "mine"}).split("---\n", 2)
    values = yaml.safe_load(front)
    assert values["library_name"] == "msm-dist"
    assert values["pipeline_tag"] == "feature-extraction"
    assert "license" not in values
    assert "whoever publishes these weights chooses it" in text
    hub = pytest.importorskip("huggingface_hub")
    parsed = hub.ModelCard(card(state, {"run": "mine"}))
    assert parsed.data.library_name == "msm-dist"
    assert parsed.text.strip().startswith("# mine")


def test_card_states_geometry_data_and_figures_of_its_step(state):
    text = card(state, {"run": "mine", "step": 20, "corpus": CORPUS})
    total = sum(value.numel() for value in state.values())
    for row in (
        "| encoder | 4 blocks, width 192, 3 heads, query and value biases, CLS token |",
        "| patches | 16x8 (bands x frames): 5 x 26 of them, 60% masked |",
        "| embedding | 960 numbers every 80 ms |",
        "| statistics | mean -7.25, deviation 4.5 |",
        f"all {total:,} |",
        "| steps | 20 |",
        "| sha256 of model.safetensors | 0123abcd |",
        "| a\\|b | 1,200 | 2.00 | 25.0% | dddddddddddd |",
        "| audioset | 3,600 | 10.00 | 75.0% | eeeeeeeeeeee |",
        "| | 3,600 of 20,371 clips of eval\\_segments.csv | | | |",
        "| seen | 1,280 crops, 0.74 h |",
        "| training loss at step 20 | 0.5000 |",
        "| held-out loss at step 20 | 0.6250 |",
        "| reference: mean per mel band at step 20 | 0.8750 |",
    ):
        assert row in text, row
    assert "step 10 " not in text
    assert "step 30 " not in text


def test_what_is_not_known_is_not_said(state):
    text = card(state, {}, cfg=None, records=())
    assert "## Training" not in text
    assert "## Data" not in text
    assert "steps" not in text.partition("## What it is")[2]
    assert "None" not in text.partition("## What it is")[2]


def test_converted_weights_keep_the_published_licence(state):
    origin = {"published_file": "p.pth", "sha256": "77", "epoch": None, "statistics": "assumed", "notes": ["no CLS"]}
    text = card(state, origin | {"untrained": ["decoder"]}, None, ())
    assert "the licence of the published checkpoint holds" in text
    assert "| statistics | assumed |" in text
    assert "No CLS." in text
    assert "| not trained | decoder" in text
    assert "masked" not in text.partition("## What it is")[2]


@pytest.mark.parametrize("name", ["a`b", "[x](javascript:y)", "<b>", "# h", "a\nb", "x" * 500])
def test_names_do_not_change_the_markdown(state, name):
    title = next(line for line in card(state, {"run": name}).splitlines() if line.startswith("# "))
    assert not re.search(r"(?<!\\)[`<\[]", title)
    assert len(title) < 220


def test_code_of_the_card_runs(state, tmp_path, monkeypatch):
    info = WeightsInfo(MODEL, FEATURES, 208, {"run": "mine"})
    save(tmp_path / "FOLDER", state, info)
    soundfile.write(tmp_path / "sound.wav", np.zeros((8000, 2), np.float32), 16000)
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", card(state, info.origin), re.DOTALL)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["clip"].shape == (1, 960)
    assert names["frames"].shape[2] == 960
