"""Which implementation runs where, what is said when it can't, and the table of launch configurations."""

import os
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch

from msm_dist.config import Model
from msm_dist.errors import ConfigError
from msm_dist.model.mae import MaskedSpectrogramModel
from msm_kernels import (
    attention_short,
    attention_tiled,
    backend,
    configurations,
    masked_loss,
    patch_drawing,
    patch_embedding,
    patch_rows,
)
from msm_kernels.attention import attention
from msm_kernels.backend import BackendUnavailable, capability, describe, require, resolve
from msm_kernels.configurations import configuration
from msm_kernels.masked_loss import masked_patch_loss
from msm_kernels.patch_masking import (
    embed_visible_patches,
    masking_from_keep,
    random_masking,
    restore_tokens,
    select_masked_tokens,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch):
    """A function that makes the backend believe in a machine: GPU capability or none, Triton or none."""

    def make(gpu: tuple[int, int] | None = None, hip: str | None = None, triton=backend.triton, interpreted=False):
        backend._asked_once_too_old.cache_clear()
        capability.cache_clear()
        monkeypatch.setattr(backend, "triton", triton)
        monkeypatch.setattr(backend, "INTERPRETED", interpreted)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: gpu)
        monkeypatch.setattr(torch.version, "hip", hip)

    yield make
    backend._asked_once_too_old.cache_clear()
    capability.cache_clear()


@pytest.mark.parametrize("interpreted", [False, True])
def test_on_a_cpu_auto_is_the_reference(machine, interpreted):
    machine(interpreted=interpreted)
    assert resolve("auto", CPU) == resolve("reference", CPU) == "reference"
    assert describe("auto", CPU) == "reference kernels"


def test_on_a_gpu_auto_is_triton(machine):
    machine(gpu=(8, 0))
    for dtype in (None, torch.float32, torch.float16, torch.bfloat16):
        assert resolve("auto", GPU, dtype) == resolve("triton", GPU, dtype) == "triton"
        assert resolve("reference", GPU, dtype) == "reference"
    require("triton")
    assert describe("auto", GPU) == f"Triton {backend.triton.__version__} kernels"
    assert describe("reference", GPU) == "reference kernels"


def test_the_interpreter_runs_the_kernels_on_a_cpu_when_asked(machine):
    machine(interpreted=True)
    require("triton")
    assert resolve("triton", CPU) == "triton"
    assert describe("triton", CPU) == f"Triton {backend.triton.__version__} kernels (interpreted)"


# What stands in the way of Triton: (machine, device, dtype, reason).
OBSTACLES = [
    ({}, CPU, torch.float32, "Triton compiles for GPUs and the tensors are on cpu"),
    ({"gpu": (9, 0)}, CPU, torch.float32, "the tensors are on cpu"),
    ({"triton": None}, CPU, torch.float32, "Triton is not installed"),
    ({"gpu": (9, 0), "triton": None}, GPU, torch.float32, "Triton is not installed"),
    ({"gpu": (7, 5)}, GPU, torch.float16, r"the GPU has compute capability 7\.5; the kernels need 8\.0"),
    ({"gpu": (9, 0)}, GPU, torch.float64, "take float32, float16 and bfloat16, not float64"),
    ({"interpreted": True}, CPU, torch.float64, "not float64"),
]


@pytest.mark.parametrize("found, device, dtype, reason", OBSTACLES)
def test_where_triton_can_not_run_asking_for_it_raises_and_auto_takes_the_reference(
    machine, found, device, dtype, reason
):
    machine(**found)
    assert resolve("auto", device, dtype) == "reference"
    with pytest.raises(BackendUnavailable, match=f"^backend = 'triton': .*{reason}; use 'auto' or 'reference'$"):
        resolve("triton", device, dtype)


@pytest.mark.parametrize(
    "found, reason",
    [
        ({"gpu": (7, 5)}, "the GPU has compute capability 7.5; the kernels need 8.0"),
        ({"gpu": (9, 0), "triton": None}, "Triton is not installed"),
    ],
)
def test_the_log_says_why_a_gpu_runs_the_reference(machine, found, reason):
    machine(**found)
    assert describe("auto", GPU) == f"reference kernels ({reason})"


def test_before_any_tensor_exists_a_machine_that_can_never_run_triton_is_refused(machine):
    machine(triton=None)
    with pytest.raises(BackendUnavailable, match="Triton is not installed; use 'auto' or 'reference'"):
        require("triton")
    machine()
    with pytest.raises(BackendUnavailable, match="use 'auto' or 'reference'"):
        require("triton")
    machine(gpu=(9, 0), triton=None)
    with pytest.raises(BackendUnavailable, match="Triton is not installed"):
        require("triton")
    machine(gpu=(7, 0))
    with pytest.raises(BackendUnavailable, match="compute capability 7.0"):
        require("triton")
    for wish in ("auto", "reference"):
        require(wish)


def test_a_capability_is_written_as_in_the_table(machine):
    machine(gpu=(9, 0))
    assert (capability(GPU), capability(CPU)) == ("9.0", "cpu")
    machine(gpu=(10, 0))
    assert capability(GPU) == "10.0"


def test_an_amd_gpu_is_named_by_its_architecture(machine, monkeypatch):
    class Properties(NamedTuple):
        gcnArchName: str = "gfx942:sramecc+:xnack-"

    machine(gpu=(7, 0), hip="6.4")  # AMD's numbers are its own: no bound of NVIDIA's holds for them
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties())
    assert capability(GPU) == "gfx942"
    assert resolve("auto", GPU) == "triton"


@pytest.mark.parametrize("check", [require, lambda wish: resolve(wish, CPU), lambda wish: describe(wish, CPU)])
def test_an_unknown_backend_is_refused(check):
    with pytest.raises(ValueError, match="backend = 'cutlass': must be 'auto', 'triton' or 'reference'"):
        check("cutlass")


def test_the_choice_is_traceable_on_a_gpu(machine, monkeypatch, recwarn):
    """Neither a graph break nor a call into the driver in the graph."""
    machine()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph.forward

    def choose(x):
        return x + (resolve("auto", GPU, x.dtype) == "triton")

    assert torch.equal(torch.compile(choose, fullgraph=True, backend=keep)(torch.zeros(2)), torch.ones(2))
    assert not [warning for warning in recwarn if "lru_cache" in str(warning.message)]
    assert [node.op for node in graphs[0].graph.nodes] == ["placeholder", "call_function", "output"]


def test_the_choice_is_traceable():
    def choose(x):
        return x + (resolve("auto", x.device, x.dtype) == "reference")

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(2)), choose(torch.zeros(2)))


def calls():
    """Every public function once, on the CPU: name -> function of the backend."""
    ids = torch.zeros(1, 3, dtype=torch.int64)
    masking = masking_from_keep(torch.tensor([[1, 3]]), 4)
    spectrogram = torch.zeros(1, 1, 4, 4)
    embedding = (torch.zeros(16, 4), torch.zeros(16), torch.zeros(4, 16))
    return {
        "random_masking": lambda wish: random_masking(0, ids, 4, 2, backend=wish),
        "embed_visible_patches": lambda wish: embed_visible_patches(
            spectrogram, masking, *embedding, (2, 2), backend=wish
        ),
        "restore_tokens": lambda wish: restore_tokens(
            torch.zeros(1, 2, 16), masking, torch.zeros(1, 1, 16), torch.zeros(4, 16), 0, backend=wish
        ),
        "select_masked_tokens": lambda wish: select_masked_tokens(torch.zeros(1, 4, 16), masking, 0, backend=wish),
        "masked_patch_loss": lambda wish: masked_patch_loss(
            torch.zeros(1, 2, 4), spectrogram, masking, (2, 2), False, backend=wish
        ),
        "attention": lambda wish: attention(torch.zeros(1, 2, 96), 1, backend=wish),
    }


@pytest.mark.parametrize("name", list(calls()))
def test_no_op_falls_back_silently(machine, monkeypatch, name):
    """Asked for Triton every op raises where it can't run, and launches a kernel where it can."""
    machine()
    with pytest.raises(BackendUnavailable):
        calls()[name]("triton")

    launched = []
    for module in (attention_short, attention_tiled, masked_loss, patch_drawing, patch_embedding, patch_rows):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: launched.append(kernel))
    for wish in ("auto", "reference"):
        calls()[name](wish)
    assert not launched
    machine(interpreted=True)
    calls()[name]("triton")
    assert launched


def test_a_model_that_asks_for_what_the_machine_lacks_is_a_config_error(machine):
    machine()
    with pytest.raises(ConfigError, match="model.backend: backend = 'triton': .*use 'auto' or 'reference'"):
        MaskedSpectrogramModel(Model(size="tiny", backend="triton"), 80, 208)
    MaskedSpectrogramModel(Model(size="tiny", backend="auto"), 80, 208)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which Triton runs on")
def test_without_gpu_and_interpreter_triton_is_refused_in_a_process_of_its_own():
    script = """
import torch
from msm_kernels.attention import attention
from msm_kernels.backend import BackendUnavailable, require
for call in (lambda: require("triton"), lambda: attention(torch.zeros(1, 2, 96), 1, backend="triton")):
    try:
        call()
    except BackendUnavailable as error:
        print(error)
print(attention(torch.zeros(1, 2, 96), 1, backend="auto").shape)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    reason = "backend = 'triton': Triton compiles for GPUs and the tensors are on cpu; use 'auto' or 'reference'"
    assert done.stdout.splitlines() == [reason, reason, "torch.Size([1, 2, 32])"]


def test_the_package_works_where_triton_is_not_installed():
    script = """
import sys
sys.modules["triton"] = None  # what makes `import triton` raise ImportError
import torch
from msm_kernels import attention, backend, masked_loss, patch_masking
assert backend.triton is None and backend.tl is None and not backend.INTERPRETED
print(attention.attention(torch.zeros(1, 2, 96), 1).shape)
try:
    attention.attention(torch.zeros(1, 2, 96), 1, backend="triton")
except backend.BackendUnavailable as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    reason = "backend = 'triton': Triton is not installed; use 'auto' or 'reference'"
    assert done.stdout.splitlines() == ["torch.Size([1, 2, 32])", reason]


class Rows(NamedTuple):
    rows: int
    num_warps: int


DEFAULT = Rows(16, 4)


@pytest.fixture
def table(monkeypatch):
    def install(entries: dict) -> None:
        monkeypatch.setattr(configurations, "table", lambda: entries)

    return install


def ask(kernel="loss", shape_class="16x16", dtype=torch.bfloat16) -> Rows:
    return configuration(kernel, shape_class, dtype, GPU, DEFAULT)


def test_a_measured_entry_wins_field_by_field(machine, table):
    machine(gpu=(9, 0))
    table({"9.0": {"loss": {"16x16": {"bfloat16": {"rows": 32, "num_warps": 8}, "float16": {"rows": 8}}}}})
    assert ask() == Rows(32, 8)
    assert ask(dtype=torch.float16) == Rows(8, 4)


def test_an_entry_of_another_gpu_kernel_shape_or_dtype_does_not(machine, table):
    machine(gpu=(9, 0))
    entry = {"rows": 32}
    table(
        {
            "8.0": {"loss": {"16x16": {"bfloat16": entry}}},
            "9.0": {
                "measured": {"device": "some GPU"},
                "other": {"16x16": {"bfloat16": entry}},
                "loss": {"8x8": {"bfloat16": entry}, "16x16": {"float32": entry}},
            },
        }
    )
    assert ask() == DEFAULT
    table({})
    assert ask() == DEFAULT
    machine(gpu=(8, 0))
    table({"9.0": {"loss": {"16x16": {"bfloat16": entry}}}})
    assert ask() == DEFAULT


def test_an_entry_with_an_unknown_field_raises(machine, table):
    machine(gpu=(9, 0))
    table({"9.0": {"loss": {"16x16": {"bfloat16": {"rows": 32, "num_warp": 8}}}}})
    place = "configurations.json: 9.0: loss: 16x16: bfloat16"
    with pytest.raises(ValueError, match=f"^{place}: unknown num_warp: fields are rows, num_warps$"):
        ask()


def test_the_committed_table_reads():
    for gpu, kernels in configurations.table().items():
        assert kernels["measured"]["device"], gpu
