"""Make the interpreter that the Makefile uses ready: a virtual environment of our own, or the one given.

In: `--venv FOLDER` to make, or `--venv 0` to use the running interpreter and its packages without a network.
Out: FOLDER with what setup.py asks for in the versions of constraints.txt, and FOLDER/.setup-done at the end;
or, with 0, build/importable, which PYTHONPATH needs for the packages that setup.py maps. Fails with exit code
2 and what to do. Runs before anything is installed: the standard library only.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import time
from pathlib import Path

from msm_dist.doctor.machine import OWN_VENV_MARK, requirements, unmet

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"msm_kernels": "kernels", "msm_configs": "configs"}
"""setup.py's package_dir: importable without installation through links of these names."""


def main() -> None:
    """Read the command line and do one of the two."""
    parser = argparse.ArgumentParser(description="Prepare the interpreter that the Makefile uses.")
    parser.add_argument("--venv", required=True, help="folder to make, or 0 for the running interpreter")
    parser.add_argument("--torch-index", help="wheel index to take torch from")
    parser.add_argument("--needs", nargs="*", help="with --venv 0: check these packages only")
    args = parser.parse_args()
    if args.venv == "0":
        use_given_interpreter(args.needs)
    else:
        make_environment(Path(args.venv), args.torch_index)


def use_given_interpreter(needs: list[str] | None) -> None:
    """Check the floors of the running interpreter's packages and make ours importable."""
    required = [r for r in requirements() if (r.name in needs if needs else r.extra in ("", "train", "dev"))]
    faults = unmet(required)
    if faults:
        lines = [f"  {r.name} >= {r.floor}: {found or 'none'} is here" for r, found in faults]
        stop(f"{sys.executable} lacks packages:\n" + "\n".join(lines) + "\ninstall them, or leave out VENV=0")
    make_links()


def make_links() -> None:
    """build/importable: what PYTHONPATH needs for the packages that setup.py maps."""
    folder = ROOT / "build" / "importable"
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in MAPPED.items():
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(Path("..", "..", source), target_is_directory=True)


def make_environment(venv: Path, torch_index: str | None) -> None:
    """Create `venv` if need be, install into it, repair and report."""
    start = time.monotonic()
    python = venv / "bin" / "python"
    if venv.exists() and not python.exists():
        stop(f"{venv} is there but holds no working Python: remove it and start again")
    if not python.exists():
        say(f"1/3 create {venv} with Python {sys.version.split()[0]}")
        if missing := [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]:
            stop(f"{sys.executable} has no module {missing[0]}: apt-get install python3-venv, then start again")
        run([sys.executable, "-m", "venv", str(venv)])
        (venv / OWN_VENV_MARK).touch()
    say("2/3 install the packages of setup.py in the versions of constraints.txt (2 to 10 minutes)")
    pip = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        "-c",
        str(ROOT / "constraints.txt"),
    ]
    if torch_index:
        say(f"    torch from {torch_index}")
        run([*pip, "--no-deps", "--index-url", torch_index, "torch"])
    elif shutil.which("nvidia-smi") is None:
        say("    no GPU here: if pip fetches gigabytes of CUDA, stop and give TORCH_INDEX=<CPU wheel index>")
    run([*pip, "-e", f"{ROOT}[train,video,parquet,s3,gcs,eval,dev]"])
    say("3/3 check, and repair what does not fit together (make doctor shows it again)")
    run([str(python), "-m", "msm_dist.doctor", "--fix"])
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    summary = f"set up {venv} in {minutes} min {seconds} s, {disk_bytes(venv) / 1e9:.1f} GB on disk"
    say(summary)
    done = f"nothing to do: {summary}; to begin anew remove {venv}\n"
    (venv / ".setup-done").write_text(done, encoding="utf-8")


def disk_bytes(folder: Path) -> int:
    """Bytes that a folder takes on disk."""
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def run(command: list[str], env: dict[str, str] | None = None) -> None:
    """Run one step; when it fails, say which and stop."""
    if subprocess.run(command, cwd=ROOT, env=env).returncode:
        stop("this step failed: " + " ".join(command) + "\nput right what it says above, then start again")


def say(text: str) -> None:
    """Print a line of our own, told apart from pip's."""
    print(f"set-up: {text}", flush=True)


def stop(text: str) -> None:
    """End with a message and exit code 2."""
    print(f"set-up: {text}", file=sys.stderr, flush=True)
    sys.exit(2)


if __name__ == "__main__":
    main()
