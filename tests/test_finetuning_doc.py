"""docs/finetuning.md cannot rot unnoticed: its commands, settings, defaults, recipes, links and its Python."""

import re
import shlex
from pathlib import Path

import pytest
import soundfile
import torch

from msm_dist.evaluate import classifier
from msm_dist.evaluate.finetune_config import FinetuneConfig, read_config
from msm_dist.settings import flat_items
from tests.labelled import INFO, RATE, new_model
from tests.test_classifier import HEAD, trained_classifier

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8")
STARTS = ("msm-dist finetune ", "deepspeed --module msm_dist.evaluate.finetune ")
RECIPE = re.compile(r"^\| (\w+\.yaml) \| (.*) \|$", re.MULTILINE)


def commands() -> list[list[str]]:
    """The words behind each start of a run in the page's blocks."""
    lines = TEXT.replace("\\\n", " ").replace("$k", "1").splitlines()
    found = [(line, start) for line in lines if line.startswith("    ") for start in STARTS if start in line]
    return [shlex.split(line.partition(start)[2].partition(";")[0]) for line, start in found]


def test_commands_are_valid_starts_of_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands()
    assert len(found) == 7
    for words in found:
        assert read_config(words[0], words[1], words[2:]).run.name.startswith(("base-", "quickstart-")), words


def test_settings_exist_and_have_the_defaults_that_the_page_says():
    known = flat_items(FinetuneConfig.model_construct().model_dump())
    rows = re.findall(r"^\| `(\w+)\.(\w+)`(?:, `(?:\w+\.)?(\w+)`)? \| (.*?) \|", TEXT, re.MULTILINE)
    assert len(rows) == 10
    for section, *names, said in rows:
        for name, value in zip([name for name in names if name], said.split(", "), strict=False):
            default = known[f"{section}.{name}"]
            assert value.startswith("1e-3") if default is None else value == str(default).lower().removesuffix(".0"), (
                name
            )


def test_recipes_are_the_files():
    rows = RECIPE.findall(TEXT)
    assert {name for name, _ in rows} == {path.name for path in (ROOT / "configs" / "finetune").glob("*.yaml")}
    for name, cells in rows:
        cfg = read_config("runs/base", "task.csv", [str(ROOT / "configs" / "finetune" / name)])
        shown = [
            f"{cfg.data.seconds:.0f} s",
            f"{cfg.train.epochs:.0f}, {cfg.optim.warmup_epochs:.0f}",
            str(cfg.train.global_batch),
            f"{cfg.optim.base_lr:.0e}".replace("e-0", "e-"),
            str(cfg.augment.mixup),
            f"{cfg.augment.frequency_mask}, {cfg.augment.time_mask}",
            f"{cfg.augment.frequency_drop}, {cfg.augment.time_drop}",
            "yes" if cfg.data.weighted else "no",
        ]
        assert cells.split(" | ") == shown


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = trained_classifier()
    decoder = {name: value for name, value in new_model().state_dict().items() if name.startswith("decoder.")}
    classifier.save(tmp_path / "runs/base-task/export", model.state_dict(), decoder, INFO, HEAD)
    noise = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    soundfile.write("dog.wav", noise.numpy(), RATE)
    source = re.search(r"In Python:\n\n((?:    .*\n|\n)+)", TEXT).group(1)
    exec(re.sub(r"^    ", "", source, flags=re.MULTILINE), {})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == list(HEAD.labels)
    assert sum(float(line.split()[1]) for line in printed) == pytest.approx(1, abs=0.002)
