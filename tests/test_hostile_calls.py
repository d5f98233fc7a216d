"""Every call by which data could become code, or a file land outside of its folder, stands in the list below.

Found are the calls themselves, by their names in the syntax tree, however they are imported. Whoever adds one adds a
line here, and says who is trusted and why.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("msm_dist", "kernels", "slurm", "tools", "benchmarks")

ALLOWED = {
    ("msm_dist/model/published.py", "torch.load"): "weights_only=True: a published checkpoint may be anybody's",
    ("msm_dist/evaluate/probe_vectors.py", "numpy.load"): "allow_pickle=False: vectors of our own cache",
    ("msm_dist/evaluate/probe_vectors.py", "numpy.lib.format.open_memmap"): "writes the same cache",
    ("msm_dist/engine/runfolder.py", "yaml.safe_load"): "config.yaml of a run folder, whose owner is trusted",
    ("msm_dist/traces.py", "yaml.load"): "a SafeLoader, depth counted before: run folders of a shared disk",
    ("msm_dist/data/repack.py", "tarfile.open"): "writes",
    ("msm_dist/data/shard_writer.py", "tarfile.open"): "writes",
    ("msm_dist/data/split.py", "tarfile.open"): "writes",
    ("msm_dist/data/tar_members.py", "tarfile.open"): "reads headers only, through a file that bounds them",
    ("benchmarks/data_checks.py", "numpy.load"): "corpora that the benchmark has made itself",
    ("benchmarks/data_readers.py", "numpy.load"): "the same",
    ("benchmarks/data_corpora.py", "tarfile.open"): "writes",
}

SHELLS = {
    "msm_dist/data/pipe_store.py": "runs what data.allow_pipe permits, and only that",
}
ALWAYS = {
    *(
        "torch.load",
        "torch.jit.load",
        "torch.package.PackageImporter",
        "torch.hub.load",
        "torch.hub.load_state_dict_from_url",
    ),
    *(
        "numpy.load",
        "numpy.fromfile",
        "numpy.genfromtxt",
        "numpy.lib.format.read_array",
        "numpy.lib.format.open_memmap",
    ),
    *("yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.safe_load"),
    *("os.system", "os.popen", "os.exec", "os.execv", "os.execve", "os.execvp", "os.spawnv", "os.posix_spawn"),
    *("subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn", "runpy.run_path", "runpy.run_module"),
    *("tarfile.open", "shutil.unpack_archive", "zipfile.ZipFile.extractall", "marshal.loads", "marshal.load"),
    *("safetensors.torch.load_model", "pandas.read_pickle", "joblib.load", "shelve.open", "tempfile.mktemp"),
}
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "jsonpickle"}
BUILT_IN = {"eval", "exec", "compile", "__import__"}
METHODS = {"extract", "extractall", "unpack_archive"}
SAFE_NAMES = {("msm_dist/model/published.py", "pickle")}
"""Modules that are imported for a name alone: the exception that torch raises."""


def calls(path: Path) -> Iterator[tuple[ast.Call | ast.AST, str]]:
    """What is called in a file, by its full name, and the modules of MODULES that it imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
                if alias.name.partition(".")[0] in MODULES:
                    yield node, alias.name.partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            if node.module.partition(".")[0] in MODULES:
                yield node, node.module.partition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := _full_name(node.func, names)):
            yield node, name


def _full_name(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = _full_name(node.value, names)
        return f"{before or '?'}.{node.attr}"
    return ""


def is_shell(call: ast.Call) -> bool:
    """Whether a process is started by a shell, or it is not written down whether."""
    for keyword in call.keywords:
        if keyword.arg == "shell" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
            return True
    first = call.args[0] if call.args else None
    words = first.elts if isinstance(first, ast.List) else []
    return any(
        isinstance(word, ast.Constant) and str(word.value).rpartition("/")[2] in ("sh", "bash") for word in words
    )


def suspects(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """The calls of a file that the list must hold."""
    for node, name in calls(path):
        owner, _, last = name.rpartition(".")
        is_named = name in MODULES | ALWAYS | BUILT_IN or name.partition(".")[0] in MODULES
        # A regular expression's match has an `extract` of its own nowhere; pandas' .str.extract has.
        is_archive = (
            last in METHODS and owner and (last != "extract" or any(a in owner for a in ("tar", "zip", "archive")))
        )
        if is_named or is_archive or (name.startswith("subprocess.") and is_shell(node)):
            yield node, name


FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def found() -> list[tuple[str, str, ast.AST]]:
    return [(str(path.relative_to(ROOT)), name, node) for path in FILES for node, name in suspects(path)]


def test_every_call_that_could_run_data_is_listed_and_every_line_of_the_list_is_in_use():
    seen = {(file, name) for file, name, _ in found()} - SAFE_NAMES
    assert seen == set(ALLOWED), "say in ALLOWED who is trusted and why, or do without"


def test_what_is_loaded_is_loaded_without_pickles():
    options = {"torch.load": ("weights_only", True), "numpy.load": ("allow_pickle", False)}
    for file, name, node in found():
        if name in options:
            keyword, value = options[name]
            given = [
                word.value.value
                for word in node.keywords
                if word.arg == keyword and isinstance(word.value, ast.Constant)
            ]
            # numpy's default is the same; where data may be anybody's it is written down.
            by_default = name == "numpy.load" and file.startswith("benchmarks/") and not given
            assert given == [value] or by_default, f"{file}, line {node.lineno}"
        if name == "yaml.load":
            loaders = [ast.unparse(word.value) for word in node.keywords if word.arg == "Loader"]
            assert loaders == ["LOADER"], f"{file}, line {node.lineno}"


def test_yaml_loaders_are_safe_ones():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr in {
                "Loader",
                "FullLoader",
                "UnsafeLoader",
                "CLoader",
                "CFullLoader",
            }:
                assert not (isinstance(node.value, ast.Name) and node.value.id == "yaml"), f"{path}, line {node.lineno}"


def test_only_these_name_a_shell():
    found = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in ("/bin/sh", "/bin/bash", "sh", "bash")
    }
    assert found == set(SHELLS)


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load('x')",
        "from torch import load as read\nread('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import pickle",
        "from pickle import loads",
        "import yaml as y\ny.unsafe_load('x')",
        "eval('x')",
        "import os\nos.system('x')",
        "from subprocess import run\nrun('x', shell=True)",
        "import subprocess\nsubprocess.run(['/bin/sh', '-c', x])",
        "import subprocess\nsubprocess.run(x, shell=y)",
        "import tarfile\ntar = tarfile.open('x')",
        "def f(tar):\n    tar.extractall()",
    ],
)
def test_the_search_finds(tmp_path, source):
    (tmp_path / "x.py").write_text(source)
    assert list(suspects(tmp_path / "x.py"))


@pytest.mark.parametrize(
    "source", ["model.eval()", "import re\nre.compile('x')", "import subprocess\nsubprocess.run(['ls'])"]
)
def test_the_search_passes_over(tmp_path, source):
    (tmp_path / "x.py").write_text(source)
    assert not list(suspects(tmp_path / "x.py"))
