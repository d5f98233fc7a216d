"""docs/data.md cannot rot unnoticed: its links, commands, options, reasons, and the table of resamplers."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer

from msm_dist.config import Config
from msm_dist.data import audioset
from msm_dist.data.commands import app
from tests.test_operations_doc import parse

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "data.md"
TEXT = PAGE.read_text(encoding="utf-8")
PAGES = [PAGE, ROOT / "docs" / "sources.md", ROOT / "docs" / "order.md"]
PLACEHOLDERS = {"CONFIG": "configs/quickstart.yaml", "N": "8", "SRC": "a", "SOURCE": "a", "OUT": "b", "FOLDER": "a"}


def commands(page: Path) -> list[list[str]]:
    """Every `msm-dist ...` of a page: in its blocks, continued lines joined, and in its inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = "\n".join(line.strip() for line in text.splitlines() if line.startswith("    ")).replace("\\\n", " ")
    inline = [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`", text)]
    lines = [line for line in [*blocks.splitlines(), *inline] if line.startswith("msm-dist ")]
    found = [shlex.split(line, comments=True)[1:] for line in lines]
    return [[PLACEHOLDERS.get(word, word) for word in words] for words in found if words != ["data"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_parse(page: Path) -> None:
    found = commands(page)
    assert {words[0] for words in found} & {"data", "pretrain", "plan"}
    for words in found:
        context = parse(words)
        for override in context.params.get("overrides") or []:
            assert override.partition("=")[0].split(".")[-1] in named_settings(), words


def named_settings() -> set[str]:
    """The last word of every key of a configuration."""
    return {name for part in Config.model_fields.values() for name in getattr(part.annotation, "model_fields", ())}


def test_every_command_for_data_is_told() -> None:
    told = {words[1] for words in commands(PAGE) if words[0] == "data"}
    assert told == set(typer.main.get_command(app).commands) - {"stats"}


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option: --labls"):
        parse(["data", "pack", "a", "b", "--labls", "c"])
    with pytest.raises(Exception, match="logmel"):
        parse(["data", "pack", "a", "b", "--features", "logmell"])


def test_options_named_in_the_text_exist() -> None:
    known = {
        option
        for command in typer.main.get_command(app).commands.values()
        for parameter in command.params
        for option in parameter.opts
    }
    named = set(re.findall(r"`(--[a-z-]+)", TEXT))
    assert len(named) >= 5
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_files_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    named = re.findall(r"\b(?:benchmarks|configs|tests|docs)/[\w./-]*\w", text)
    assert named
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_extras_exist() -> None:
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    extras = set(re.findall(r"msm-dist\[(\w+)\]", TEXT))
    assert extras >= {"video", "parquet"}
    assert all(f'"{extra}": ' in setup for extra in extras)


def test_reasons_are_those_of_the_code() -> None:
    paragraph = TEXT.partition("with its reason: ")[2].partition("\n\n")[0]
    told = set(re.findall(r"`([a-z_]+)`", paragraph))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "msm_dist" / "data").glob("*.py"))
    assert len(told) >= 12
    assert [reason for reason in told if f'"{reason}"' not in sources] == []
    left_out = set(re.findall(r'LeftOut\([^"]*?, 0\.0, "([a-z_]+)"', sources))
    raised = set(re.findall(r'BadClip\(\s*"([a-z_]+)"', sources))
    assert {"evaluation", "duplicate"} <= left_out and {"truncated", "no_segment"} <= raised
    # Audio of at most an hour never meets the limits of one decoding; "changed" happens after packing.
    assert (left_out | raised) - told == {"too_long", "changed"}


def test_rule_for_the_statistics_is_that_of_the_code() -> None:
    text = " ".join(TEXT.split())
    rule = (
        f"more than {audioset.MEAN_TOLERANCE} from {audioset.USUAL_MEAN} or the standard deviation more than "
        f"{audioset.STD_TOLERANCE} from {audioset.USUAL_STD}"
    )
    assert rule in text


def test_table_of_resamplers_is_the_committed_result() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "resampling-cpu.json").read_text())["found"]
    rows = re.findall(r"^\| (torchaudio[^|]*|soxr[^|]*?) \| (\d+) \| (\S+) \| (\S+) \| (\d+) \|$", TEXT, re.MULTILINE)
    expected = [
        (name, rate, f"{v['flatness_db']:.2f}", f"{v['alias_db']:.0f}", f"{v['speed']:.0f}")
        for name, rates in found.items()
        for rate, v in rates.items()
    ]
    assert [tuple(row) for row in rows] == expected
