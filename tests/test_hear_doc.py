"""docs/hear.md cannot rot unnoticed. Its longer commands run in tests/test_hear_real.py."""

import inspect
import json
import os
import re
import shlex
import subprocess
import textwrap
from pathlib import Path

from msm_dist.config import load_config
from msm_dist.evaluate import hear
from tests.test_operations_doc import parse

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "hear.md"
TEXT = PAGE.read_text(encoding="utf-8")
FFMPEG = """#!/bin/bash
# Copies the file after -i to the one named last; fails halfway on what a file `bad` names.
for new; do [ "$old" = -i ] && from=$new; old=$new; done
echo "$from" >> calls
head -c 5 "$from" > "$new"
if [ -e bad ] && grep -q "$(cat bad)" <<< "$from"; then exit 1; fi
cp "$from" "$new"
"""


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


def test_the_page_s_loop_leaves_nothing_half_made_and_goes_on_where_it_ended(tmp_path):
    places = [f"{task}/{{}}/{name}.wav" for task in ("one", "two") for name in ("train/a b", "test/c")]
    for place in places:
        write(tmp_path / place.format(48000), f"samples of {place}")
    write(tmp_path / "bin" / "ffmpeg", FFMPEG).chmod(0o755)
    bad = write(tmp_path / "bad", "two/48000/test")
    script = textwrap.dedent(re.search(r"(?m)^    cd /data/hear/tasks\n((?:    .*\n)+)", TEXT)[1])
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    for made in (places[:-1], places):
        subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=600)
        found = {path: path.read_text() for path in tmp_path.rglob("16000/*/*.wav")}
        assert found == {tmp_path / place.format(16000): f"samples of {place}" for place in made}
        bad.unlink(missing_ok=True)
    assert len((tmp_path / "calls").read_text().splitlines()) == 4 + 1
    assert not list(tmp_path.rglob("*.part"))


def test_the_page_and_the_tool_say_the_same_of_the_environment():
    said = (ROOT / "tools" / "hear_env.py").read_text(encoding="utf-8")
    for text in (TEXT, said):
        assert re.findall(r"\w+ to \w+ minutes", text) == ["2 to 10 minutes"]
        assert re.findall(r"[\d.]+ GB", text) == ["1.7 GB"]


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


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path
