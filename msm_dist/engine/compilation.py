"""What the engine does to transformer blocks: one unit each for ZeRO-3 and, with engine.compile, one compiled graph.

In: a model, some of whose modules have an attribute `in_training`: the function (module, tensors) that they run while
gradients are wanted. Out: the same modules, parameters and names. A compiler that is missing is a ConfigError.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils import set_z3_leaf_module
from torch import nn

from msm_dist.errors import ConfigError

COMPILER: dict[str, Any] = {
    "backend": "inductor",
    # Nothing is chosen by timing it, as a restarted run might then choose, and round, otherwise.
    "options": {"deterministic": True},
}


def prepare_blocks(model: nn.Module, compiled: bool) -> None:
    """Ready `model`'s blocks, before deepspeed.initialize. Raises ConfigError if there are none to compile.

    Their one graph per shape is made in the first step. Without gradients blocks run as written: a validation batch
    of another size compiles nothing.
    """
    blocks = [module for module in model.modules() if hasattr(module, "in_training")]
    if compiled and not blocks:
        raise ConfigError(
            "engine.compile = true: the model has no block to compile, that is no module with an attribute "
            "in_training; set engine.compile=false"
        )
    for block in blocks:
        # ZeRO-3 then gathers a block's weights before it and has no hooks inside. Those would break the graph, gather
        # again for activation checkpointing, and lose count where its recomputation stops early.
        set_z3_leaf_module(block, True)
        if compiled:
            block.in_training = torch.compile(block.in_training, fullgraph=True, dynamic=False, **COMPILER)


@contextlib.contextmanager
def explaining_compiler() -> Iterator[None]:
    """Turn the failure of a compiler into a ConfigError that says what to do."""
    try:
        yield
    except RuntimeError as error:
        from torch._dynamo.exc import BackendCompilerFailed  # here, as it takes seconds and most runs never need it

        if not isinstance(error, BackendCompilerFailed):
            raise
        reason = f"{type(error.inner_exception).__name__}: {error.inner_exception}".splitlines()[0]
        raise ConfigError(
            f"engine.compile = true: torch.compile failed ({reason}); on a CPU it needs a working C++ compiler, g++ or "
            "the one that CXX names: install one, or set engine.compile=false"
        ) from None
