"""docs/operations.md cannot rot unnoticed: its links, commands, settings, exit codes and the table of costs."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import typer
import yaml
from deepspeed.launcher.runner import _parse_hostfile
from deepspeed.launcher.runner import parse_args as parse_deepspeed

from msm_dist.allocation import MEANINGS
from msm_dist.cli import app, spread_sweep
from msm_dist.config import Config, batch_layout, load_config
from msm_dist.data.commands import app as data_app
from msm_dist.site import Site

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "operations.md"
TEXT = PAGE.read_text(encoding="utf-8")
PLACEHOLDERS = {"CONFIG": "configs/quickstart.yaml", "N": "8", "RANK": "0"}
COST_ROW = re.compile(r"^\| (configs/\S+\.yaml) \| (\S+) \| (\S+) \| (\S+) \|$", re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """Every use of a program: in the page's blocks, continued lines joined, and in its inline code."""
    blocks = "\n".join(line for line in TEXT.splitlines() if line.startswith("    ")).replace("\\\n", " ")
    lines = [*blocks.splitlines(), *re.findall(r"`([^`\n]+)`", TEXT)]
    found = [shlex.split(line, comments=True) for line in lines if line.split()[:1] == [program]]
    return [[PLACEHOLDERS.get(word, word) for word in words] for words in found]


def parse(words: list[str]) -> typer.Context:
    """The command that these words call, with its options checked; typer raises for what it does not know."""
    known = {**typer.main.get_command(app).commands, "data": typer.main.get_command(data_app)}
    while words and hasattr(command := known[words[0]], "commands"):
        known, words = command.commands, words[1:]
    # Named alone, in a sentence: what it requires may be missing.
    return command.make_context(command.name, list(words[1:]), resilient_parsing=len(words) == 1)


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 3
    assert [link for link in links if not (PAGE.parent / link).exists()] == []
    named = set(re.findall(r"\b(?:configs|slurm|tests)/[\w./-]*\w", TEXT))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_commands_of_msm_dist_parse() -> None:
    found = commands("msm-dist")
    assert {words[1] for words in found} >= {"submit", "plan", "pretrain"}
    for words in found:
        context = parse(spread_sweep(words[1:]))
        config, overrides = context.params.get("config"), context.params.get("overrides") or []
        assert config is None or config.endswith(".yaml"), words
        assert all("=" in override for override in overrides), words


def test_runs_that_are_submitted_spread_over_their_ranks() -> None:
    jobs = []
    for words in commands("msm-dist"):
        if words[1] == "submit" and len(words) > 3:
            given = parse(spread_sweep(words[1:])).params
            ranks = given["nodes"] * (given["gpus_per_node"] or given["tasks_per_node"] or 1)
            jobs.append((given["config"], given["overrides"] or [], ranks))
    for words in commands("sbatch"):
        if "slurm/pretrain.sh" in words and len(words) > 2:
            options = dict(word.split("=") for word in words[1 : words.index("slurm/pretrain.sh")])
            config, *overrides = words[words.index("slurm/pretrain.sh") + 1 :]
            ranks = int(options.get("--nodes", 1)) * int(options.get("--gpus-per-node", 1))
            jobs.append((config, overrides, ranks))
    assert max(ranks for _, _, ranks in jobs) == 16
    for config, overrides, ranks in jobs:
        assert batch_layout(load_config(config, overrides), ranks).world_size == ranks


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(Exception, match="No such option: --wurld"):
        parse(["plan", "configs/quickstart.yaml", "--wurld", "8"])


def test_commands_of_deepspeed_and_the_hostfile_parse() -> None:
    for words in commands("deepspeed"):
        if words[1:]:
            assert "msm_dist.pretrain" in (parsed := parse_deepspeed(words[1:])).user_args + [parsed.user_script]
    lines = (ROOT / "docs" / "hostfile.example").read_text().splitlines()
    assert dict(_parse_hostfile(lines)) == {"n1": 8, "n2": 8}


def test_settings_named_exist() -> None:
    sections = {
        name: field.annotation.model_fields
        for name, field in Config.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    named = set(re.findall(rf"(?<![\w/.])({'|'.join(sections)})\.(?!md\b)(\w+)\b(?!\.\w)", TEXT))
    assert ("engine", "timeout_minutes") in named
    assert [f"{section}.{key}" for section, key in sorted(named) if key not in sections[section]] == []


def test_lines_of_a_profile_are_accepted() -> None:
    keys = "|".join(Site.model_fields)
    found = [line for line in re.findall(r"`([^`\n]+)`", TEXT) if re.match(rf"(?:{keys}): ", line)]
    assert len(found) >= 3
    for line in found:
        Site.model_validate(yaml.safe_load(line))


def test_exit_codes_are_those_of_a_log() -> None:
    table = TEXT.partition("| exit code | what ")[2].partition("\n\n")[0]
    told = {int(code) for cells in re.findall(r"^\| ([\d, ]+) \|", table, re.MULTILINE) for code in cells.split(",")}
    assert told == set(MEANINGS)


def test_scripts_of_the_page_are_bash() -> None:
    block = re.search(r"^    #!/usr/bin/env bash\n(?:    .*\n)+", TEXT, re.MULTILINE)
    assert subprocess.run(["bash", "-n"], input=block[0], text=True).returncode == 0


def test_costs_are_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = [words for words in commands("msm-dist") if words[1] == "plan" and "--device" in words]
    rows = COST_ROW.findall(TEXT)
    assert command[2] == rows[0][0]
    assert len(rows) >= 3
    for config, minutes, hours, gpu_hours in rows:
        app([command[1], config, *command[3:]], standalone_mode=False)
        (chosen,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("* ")]
        printed = chosen.partition("|")[0].split()[-1]
        in_hours = float(printed) * 200 / 60
        assert (minutes, hours, gpu_hours) == (printed, f"{in_hours:.1f}", f"{in_hours * 8:.0f}"), config
