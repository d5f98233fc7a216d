"""Make the virtual environment in which the real HEAR tools run: hear-validator and hear-eval-kit with our encoder.

In: `--venv FOLDER`, run by a Python 3.11. Out: FOLDER with both tools in the versions of their last release, what they
need (tests/hear/requirements.txt), the base packages of msm_dist in the versions of constraints.txt, and at the end
FOLDER/.setup-done. The encoder itself is taken from the clone. Fails with exit code 2 and what to do. Runs before
anything is installed: the standard library only.
"""

import argparse
import importlib.util
import os
import re
import sys
import time
from pathlib import Path

from msm_dist.doctor.machine import OWN_VENV_MARK, requirements, tested_versions
from tools.setup_env import ROOT, disk_bytes, make_links, run, say, stop

NEEDS = ROOT / "tests" / "hear" / "requirements.txt"
TOOLS = ("heareval==2021.1.3", "hearvalidator==2021.0.2")
DONE = ".setup-done"
PYTHON = (3, 11)
CHECK = """
import sys
from msm_dist.doctor.machine import check_torchaudio
failed = [finding for finding in check_torchaudio(fix=True) if finding.status == "fail"]
import heareval.embeddings.runner, heareval.predictions.runner, hearvalidator
import msm_dist.evaluate.encoder
sys.exit("; ".join(finding.detail for finding in failed) or 0)
"""


def main() -> None:
    """Read the command line; make the environment, or bring it up to what is asked for today."""
    parser = argparse.ArgumentParser(description="Make the environment of the HEAR tools.")
    parser.add_argument("--venv", required=True, type=Path, help="folder to make")
    parser.add_argument("--torch-index", help="wheel index to take torch from")
    args = parser.parse_args()
    make_links()
    recipe = "\n".join([*asked_for(), *TOOLS]) + "\n"
    done = args.venv / DONE
    if done.is_file() and done.read_text(encoding="utf-8") == recipe:
        say(f"{args.venv} holds the HEAR tools already; to begin anew remove it")
        return
    done.unlink(missing_ok=True)
    install(args.venv, args.torch_index)
    done.write_text(recipe, encoding="utf-8")


def asked_for() -> list[str]:
    """What the tools need and what our base installation needs, in tested versions."""
    lines = NEEDS.read_text(encoding="utf-8").splitlines()
    needed = [line for line in lines if line and not line.startswith("#")]
    tested, named = tested_versions(), {name_of(line) for line in needed}
    ours = sorted({r.name for r in requirements() if not r.extra and r.name.lower() not in named})
    return [*needed, *(f"{name}=={tested[name.lower()]}" for name in ours)]


def install(venv: Path, torch_index: str | None) -> None:
    """Create `venv` if need be, install into it and try both tools."""
    start = time.monotonic()
    python = venv / "bin" / "python"
    if sys.version_info[:2] != PYTHON:
        found = ".".join(map(str, sys.version_info[:2]))
        stop(f"{sys.executable} is Python {found}: the HEAR tools were made to run on 3.11 (HEAR_PYTHON=python3.11)")
    if venv.exists() and not python.exists():
        stop(f"{venv} is there but holds no working Python: remove it and start again")
    if not python.exists():
        say(f"1/3 create {venv}")
        if missing := [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]:
            stop(f"{sys.executable} has no module {missing[0]}: apt-get install python3-venv, then start again")
        run([sys.executable, "-m", "venv", str(venv)])
        (venv / OWN_VENV_MARK).touch()
    say("2/3 install both tools and what they and the encoder need (2 to 10 minutes; 1.7 GB, with CUDA gigabytes more)")
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    if torch_index:
        say(f"    torch from {torch_index}")
        torch = f"torch=={tested_versions()['torch']}"
        run([*pip, "--no-deps", "--index-url", torch_index, torch])
    others = venv / "constraints.txt"
    others.write_text("".join(f"{line}\n" for line in constraints()), encoding="utf-8")
    run([*pip, "-c", str(others), *asked_for()])
    run([*pip, "--no-deps", *TOOLS])
    say("3/3 check, and repair what does not fit together")
    run([str(python), "-c", CHECK], env=environment())
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    say(f"made {venv} in {minutes} min {seconds} s, {disk_bytes(venv) / 1e9:.1f} GB on disk")


def constraints() -> list[str]:
    """constraints.txt without what the tools need in another version."""
    named = {name_of(line) for line in asked_for()}
    return [f"{name}=={version}" for name, version in tested_versions().items() if name not in named]


def environment() -> dict[str, str]:
    """What the tools' interpreter needs to find: our packages and the stand-in for TensorFlow."""
    places = [ROOT, ROOT / "build" / "importable", ROOT / "tests" / "hear" / "stand_in"]
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, places)), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}


def name_of(line: str) -> str:
    """The distribution that a line of requirements is about."""
    return re.match(r"[\w.-]+", line)[0].lower()


if __name__ == "__main__":
    main()
