"""docs/hear.md cannot rot unnoticed. Its longer commands run in tests/test_hear_real.py."""

import inspect
import json
import re
import shlex
from pathlib import Path

from msm_dist.config import load_config
from msm_dist.evaluate import hear
from tests.test_operations_doc import parse

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "hear.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_links_and_files_of_the_page_are_there():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("https://")]
    named = re.findall(r"\b(?:configs|tests|build/hear)/[\w./-]*\w", TEXT)
    assert len(links) >= 1 and {"tests/hear/predict.py", "tests/hear/requirements.txt"} <= set(named)
    kept = [name for name in named if not name.startswith("build/")]
    assert [name for name in [*kept, *(f"docs/{link}" for link in links)] if not (ROOT / name).exists()] == []


def test_options_of_the_page_are_those_of_load_model():
    told = [json.loads(option) for option in re.findall(r"\{\"[^}]*\}", TEXT)]
    takes = inspect.signature(hear.load_model).parameters.keys() - {"model_file_path"}
    assert {name for option in told for name in option} == takes


def test_the_sizes_and_hops_of_the_page_are_the_encoders():
    assert hear.VARIABLE in TEXT
    for name, said in (("base_audioset", "{} for base"), ("quickstart", "{} for the quickstart")):
        config = load_config(ROOT / "configs" / f"{name}.yaml")
        rows = config.features.n_mels // config.model.patch[0]
        assert said.format(rows * config.model.geometry.embed_dim) in TEXT
    finer = load_config(ROOT / "configs" / "base_80x208_p16x4.yaml")
    hop_ms = finer.model.patch[1] * 1000 * finer.features.hop // finer.features.sample_rate
    assert f"base_80x208_p16x4.yaml ({hop_ms} ms)" in TEXT


def test_targets_and_commands_of_the_page_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"`?make ([\w-]+)", TEXT))
    assert "test-hear" in targets
    assert all(re.search(rf"(?m)^{target}:", makefile) for target in targets)
    assert "HEAR_MODEL ?=" in makefile
    commands = [shlex.split(code)[1:] for code in re.findall(r"`(msm-dist [^`]+)`", TEXT)]
    assert commands
    for words in commands:
        parse(words)
