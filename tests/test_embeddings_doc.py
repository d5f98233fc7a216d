"""docs/embeddings.md works as printed: its commands and its Python run, in order, over a small encoder."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

from msm_dist.cli import main
from msm_dist.data.pack import PackSettings, pack
from msm_dist.evaluate.embed import SECONDS_AT_ONCE
from msm_dist.evaluate.embedding_file import __doc__ as layout
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_dist.model.weights import save
from tests.audio_files import noise, write_audio
from tests.test_embed import INFO

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "embeddings.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Embed a file")[2].partition("\n## ")[0]


def blocks(text: str) -> list[str]:
    """The indented blocks of a page."""
    found = re.findall(r"(?:^    .*\n(?:\n(?=    ))?)+", text, re.MULTILINE)
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in found]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the page's examples name."""
    monkeypatch.chdir(tmp_path)
    model = MaskedSpectrogramModel(INFO.model.model_copy(update={"depth": 3}), 80, 208, seed=3)
    info = type(INFO)(model.config, INFO.features, INFO.crop_frames)
    save("runs/quickstart/export", model.state_dict(), info)
    write_audio(tmp_path / "recordings/dog.wav", noise(50000), "wav")
    write_audio(tmp_path / "recordings/cat.mp3", noise(30000, 1), "mp3")
    pack(tmp_path / "recordings", tmp_path / "data/mine", PackSettings())
    return tmp_path


def run(text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, dict[str, object]]:
    """How many commands of a page ran, and the names that its code has made."""
    names: dict[str, object] = {}
    commands = 0
    for block in blocks(text):
        if not block.startswith("msm-dist "):
            exec(block, names)
            continue
        for line in block.splitlines():
            monkeypatch.setattr(sys, "argv", shlex.split(line, comments=True))
            with pytest.raises(SystemExit) as end:
                main()
            assert not end.value.code, line
            commands += 1
    return commands, names


def test_commands_and_code_run_as_printed(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    commands, names = run(TEXT, monkeypatch)
    assert commands == 4
    assert names["keys"].tolist() == ["recordings/cat.mp3", "recordings/dog.wav"]
    assert names["embeddings"].shape == (2, 160)
    assert names["every"].shape[2] == 4
    assert torch.equal(names["centres"][:3], torch.tensor([75.0, 235.0, 395.0]))
    assert names["nothing"].sum() == 3
    assert "dataset" in capsys.readouterr().out


def test_the_readme_s_example_runs_as_printed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "recordings/dog.wav").rename("dog.wav")
    commands, names = run(README, monkeypatch)
    assert commands == 1
    assert names["frames"].shape == (1, 20, 160)


def test_the_page_says_how_much_a_batch_is() -> None:
    assert f"`--batch-size` clips or {SECONDS_AT_ONCE} s of audio" in TEXT


def test_the_page_names_what_is_in_the_file() -> None:
    table = TEXT.partition("| in the file | what it is |")[2].partition("\n\n")[0]
    told = set(re.findall(r"\w+", " ".join(re.findall(r"^\| ([a-z_, ]+) \|", table, re.MULTILINE))))
    assert told == set(re.findall(r"^    (\w+) +(?:str|float|int)", layout, re.MULTILINE))
