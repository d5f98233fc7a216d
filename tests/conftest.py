"""What every test module shares: which tests this machine can run, and a word about those it can't."""

import contextlib
import importlib.util
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.cluster import lab as cluster
from tests.cluster.lab import lab  # noqa: F401 - a fixture
from tests.forking import Forker

# Triton reads this when a kernel is defined: without a GPU the kernels' tests run in its interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()

# A slow machine is no defect: no test of ours fails for taking long.
settings.register_profile("msm_dist", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("msm_dist")


def pytest_configure() -> None:
    """Stop at once, with the remedy, where the package isn't installed."""
    if importlib.util.find_spec("msm_kernels") is None:
        pytest.exit("msm_kernels is not importable: run `make setup`, then `make test`", returncode=2)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m gpu`, don't even import modules without GPU tests: a GPU image may lack what they need."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return "mark.gpu" not in collection_path.read_text(encoding="utf-8") or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this machine can't run, and remember it for the summary; the rest in an order that ends early."""
    left_out: dict[str, list[str]] = defaultdict(list)
    for mark, lack in (("gpu", _no_gpu), ("slurm", cluster.lacks), ("hear", _no_hear_tools)):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and (reason := lack()):
            left_out[f"{mark} ({reason})"] = [item.nodeid for item in marked]
            items[:] = [item for item in items if item not in marked]
            config.hook.pytest_deselected(items=marked)
    config.stash[LEFT_OUT] = dict(left_out)
    # Files that start ranks take minutes: at the end of `-n` nobody is to wait for the last of them.
    with_ranks = {item.path for item in items if item.get_closest_marker("distributed")}
    items.sort(key=lambda item: item.path not in with_ranks)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of `-n` tells what was left out: all collect the same."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Hear it."""
    node.config.stash.setdefault(LEFT_OUT, {}).update(getattr(node, "workeroutput", {}).get("left_out", {}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Name what was left out and why."""
    left_out = config.stash.get(LEFT_OUT, {})
    for kind, tests in left_out.items():
        terminalreporter.write_line(f"left out: {kind}: {len(tests)} tests")
        for name in sorted({test.partition("[")[0] for test in tests}):
            terminalreporter.write_line(f"    {name}")
    if not left_out:
        terminalreporter.write_line("left out: nothing")


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    """For ranks that start in a second."""
    with contextlib.closing(Forker(tmp_path_factory.mktemp("forker"))) as forker:
        yield forker


@pytest.fixture(scope="module")
def bounded() -> Iterator[Any]:
    """A tests.hostile.Bounded, whose children have one thread."""
    from tests import hostile  # what it imports is not on every GPU image

    with hostile.one_thread():
        yield hostile.Bounded()


def _no_gpu() -> str | None:
    return None if torch.cuda.is_available() else "no GPU on this machine"


def _no_hear_tools() -> str | None:
    # Never without being asked for, also where their environment is there: they take minutes.
    return None if os.environ.get("HEAR_VENV") else "make test-hear makes their tools' environment and runs them"
