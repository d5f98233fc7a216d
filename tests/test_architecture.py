"""The shape of the code: who imports whom, and what must not be imported at all."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    {"errors", "files", "plain", "redact"},
    {"settings"},
    {"config"},
    {"data", "features", "kernels"},
    {"model"},
    {"engine", "monitor", "pictures", "profile_summary", "profiling", "references"},
    {"changed", "corpus", "environment", "feed", "summary", "validate", "planning", "compare", "pretrain", "evaluate"}
    | {"allocation", "extension", "guard", "initial", "costs", "memory", "sweep"}
    | {"jobs", "traces", "runs", "corpus_report", "study", "study_results"},
    {"launch", "site", "snapshot", "admission", "submission"},
    {"doctor"},
    {"cli"},
    {"__main__"},
)
"""A part imports from its own layer and from those above it in this list, never from those below."""
ENCODER_MODULES = (
    "msm_dist.features",
    "msm_dist.model.mae",
    "msm_dist.model.weights",
    "msm_dist.evaluate.encoder",
    "msm_dist.evaluate.embed",
)
TRAINING_PACKAGES = ("deepspeed", "triton", "webdataset", "submitit", "tensorboard", "matplotlib")


def test_every_part_has_a_layer() -> None:
    parts = {part for part, _ in python_files()}
    assert parts - {"__init__"} <= set().union(*LAYERS), "give the new part a place in LAYERS"


def test_imports_run_one_way() -> None:
    layer = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for part, path in python_files()
        for target in our_imports(path)
        if part != "__init__" and layer[target] > layer[part]
    ]
    assert not wrong


def test_no_two_parts_import_each_other() -> None:
    graph: dict[str, set[str]] = {}
    for part, path in python_files():
        graph.setdefault(part, set()).update(our_imports(path) - {part})
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circular imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize(
    ("part", "forbidden"),
    [("engine", {"model", "data"}), ("kernels", set().union(*LAYERS) - {"kernels"})],
)
def test_part_stays_clear_of(part: str, forbidden: set[str]) -> None:
    wrong = {path.name: our_imports(path) & forbidden for name, path in python_files() if name == part}
    assert not {name: targets for name, targets in wrong.items() if targets}


@pytest.mark.parametrize("module", ["plan.py", "mix.py"])
def test_plan_is_numpy_alone(module: str) -> None:
    modules = {name.partition(".")[0] for name in imported_modules(ROOT / "msm_dist" / "data" / module)}
    assert modules - set(sys.stdlib_module_names) <= {"numpy", "msm_dist"}


def test_there_is_no_utils_module() -> None:
    assert not [path for _, path in python_files() if path.stem in {"utils", "util", "helpers", "common", "misc"}]


def test_help_is_shown_without_importing_torch() -> None:
    source = (
        "import sys\n"
        "sys.argv = ['msm-dist', '--help']\n"
        "from msm_dist.cli import main\n"
        "try:\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "heavy = {'torch', 'deepspeed', 'numpy', 'tensorboard'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert "pretrain" in child.stdout


def test_encoder_imports_without_training_packages() -> None:
    present = [name for name in ENCODER_MODULES if importlib.util.find_spec(name)]
    assert present
    source = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {TRAINING_PACKAGES!r}:\n"
        "            raise ImportError(f'{name} is blocked by this test')\n"
        "sys.meta_path.insert(0, Blocked())\n"
    ) + "\n".join(f"import {name}" for name in present)
    child = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr


def python_files() -> Iterator[tuple[str, Path]]:
    """Every module of ours with the part it belongs to: a module or folder of msm_dist, or "kernels"."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path
    for path in sorted((ROOT / "msm_dist").rglob("*.py")):
        relative = path.relative_to(ROOT / "msm_dist")
        yield relative.parts[0].removesuffix(".py"), path


def our_imports(path: Path) -> set[str]:
    """The parts that a file imports, anywhere in it."""
    parts = set()
    for name in imported_modules(path):
        package, _, rest = name.partition(".")
        if package == "msm_kernels":
            parts.add("kernels")
        elif package == "msm_dist" and rest:
            parts.add(rest.partition(".")[0])
    return parts & set().union(*LAYERS)


def imported_modules(path: Path) -> set[str]:
    """The absolute names of all modules that a file imports; `from a import b` counts as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names
