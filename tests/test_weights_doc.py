"""docs/weights.md and docs/pictures.md cannot rot unnoticed: every command and every block of code runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.main import get_command

from msm_dist.cli import app
from msm_dist.evaluate.weights_commands import app as weights_app
from msm_dist.model.weights import load
from tests.published import BASE, PAPER, RERUN, TINY, random_state, shapes
from tests.test_evaluate_pictures import write_sound
from tests.test_weights_commands import run  # noqa: F401 - a fixture

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS, PICTURES = ROOT / "docs" / "weights.md", ROOT / "docs" / "pictures.md"


def commands(page: Path) -> list[list[str]]:
    """Every `msm-dist ...` in a block, in order."""
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("    msm-dist ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def call(words: list[str]) -> None:
    command, words = (weights_app, words[1:]) if words[0] == "weights" else (app, words)
    get_command(command).main(words, standalone_mode=False)


@pytest.fixture
def place(run, tmp_path, monkeypatch):  # noqa: F811
    """A folder with what the pages speak of."""
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs" / "first")
    torch.save({"model": random_state(208, (16, 16), PAPER, TINY), "epoch": 3}, tmp_path / "published.pth")
    write_sound(tmp_path / "dog.wav")
    write_sound(tmp_path / "cat.flac.wav", 1.2).rename(tmp_path / "cat.flac")
    rows = []
    for number in range(4):
        name = f"{'ab'[number % 2]}/{number}.wav"
        write_sound(tmp_path / "sounds" / name, 0.4, number)
        rows.append(f"sounds/{name},{'ab'[number % 2]},{'train' if number < 2 else 'test'}")
    (tmp_path / "task.csv").write_text("\n".join(["file,label,split", *rows]) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def code_of(page: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return code


def test_commands_and_code_of_the_weights_page_run(place, capsys):
    for words in commands(WEIGHTS):
        call(words)
    said = capsys.readouterr().out
    assert said.count("model card") == 4
    assert {path.name for path in Path().iterdir()} >= {"early", "converted", "encoder", "again.pth"}
    assert load("runs/first")[1].origin["step"] == 6
    assert load("early")[1].origin["step"] == 4
    assert load("encoder")[1].origin["untrained"] == ["decoder"]
    first, again = (torch.load(name, weights_only=True)["model"] for name in ("published.pth", "again.pth"))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    exec(compile(code_of(WEIGHTS), "docs/weights.md", "exec"), {})
    by_hand, converted = (load(name)[0].state_dict() for name in ("by-hand", "converted"))
    assert all(torch.equal(by_hand[name], converted[name]) for name in converted)


def test_commands_and_code_of_the_pictures_page_run(place, capsys):
    call(["weights", "export", "runs/first"])
    names: dict = {}
    exec(compile(code_of(PICTURES), "docs/pictures.md", "exec"), names)
    assert names["maps"].shape == (1, 1, 2, 31, 31)
    for words in commands(PICTURES):
        if "--layer" in words and words[words.index("--layer") + 1] == "2":
            words = ["1" if word == "2" else word for word in words]  # the run here has one layer
        call(words)
    made = {path.name for path in Path("pictures").iterdir()}
    assert made == {
        *(f"{name}.{kind}" for name in ("dog", "dog-2", "cat") for kind in ("png", "original.wav", "masked.wav")),
        *(f"{name}.reconstruction.wav" for name in ("dog", "dog-2", "cat")),
        # All layers are the last one here.
        *(f"{name}.attention.png" for name in ("dog", "dog-2", "dog-3")),
        *("map.png", "map.csv", "task.png", "task.csv"),
    }
    assert capsys.readouterr().out.count("without a model: corpus mean") == 1 + 3 + 1


def test_table_of_generations_counts_the_tensors_of_base():
    row = next(
        line for line in WEIGHTS.read_text(encoding="utf-8").splitlines() if line.startswith("| tensors of base")
    )
    told = [int(number) for number in re.findall(r"\d+", row)]
    tables = 2
    assert told == [len(shapes((16, 16), generation, BASE)) + tables for generation in (PAPER, RERUN)]


def test_links_and_tests_that_are_named_exist():
    for page in (WEIGHTS, PICTURES):
        text = page.read_text(encoding="utf-8")
        assert all((page.parent / link).exists() for link in re.findall(r"\]\(([^)#:]+)\)", text))
        assert all((ROOT / name).exists() for name in re.findall(r"`(tests/\w+\.py)`", text))
        options = set(re.findall(r"`(--[a-z-]+)`", text))
        known = {
            option
            for group in (weights_app, app)
            for command in get_command(group).commands.values()
            for parameter in command.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert options <= known
