"""One rank of tests/test_host_syncs.py and tests/test_gpu_engine.py: the host syncs of real runs, and who asked.

Arguments: the corpus, a folder, where rank 0 leaves syncs.json, and cases such as 1/bf16 (stage/precision).

On a GPU torch warns of what waits for it, and waits for streams and events are caught at their functions. On a CPU
the calls that would wait tell: reading a value (`item`, `bool`, `nonzero`, ...) comes by torch's dispatcher, a copy to
the host by torch's function calls. DeepSpeed's waits for streams and events hide behind its accelerator, which on a CPU
says that nothing is asynchronous: here it says the opposite, and hands out streams and events that are never done, so
that every wait there is gets called.
"""

import contextlib
import json
import sys
import traceback
import warnings
from collections import Counter
from pathlib import Path
from unittest import mock

import torch
import yaml
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from msm_dist import pretrain
from msm_dist.config import load_config
from msm_dist.engine.world import join_world, leave_world
from tests.sync_attribution import attribute

SETTINGS = {
    "data": {"num_workers": 1, "block": 4, "crop_frames": 96, "shuffle_window": 16},
    "model": {"embed_dim": 64, "depth": 2, "num_heads": 2}
    | {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2},
    "optim": {"lr": 1e-3, "warmup_steps": 1, "clip_norm": 3.0},
    "train": {"steps": 4, "global_batch": 16, "micro_batch": 4, "log_every": 2},
}
# Parameters as small as here would all stay gathered.
STAGE_3 = {"stage": 3, "stage3_param_persistence_threshold": 200, "reduce_bucket_size": 2000}
READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2", "unique_dim", "unique_consecutive")
COPIES = (torch.Tensor.cpu, torch.Tensor.tolist, torch.Tensor.numpy)
found: Counter[str] = Counter()
results: list[dict[str, int]] = []


def record(besides=None):
    when, whose, where = attribute(traceback.extract_stack())
    if whose != besides:
        found[f"{when}|{whose}|{where}"] += 1


class Reads(TorchDispatchMode):
    """Values that the host asks for, also from inside torch."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            ids is not None and ids.dtype in (torch.bool, torch.uint8) for ids in args[1]
        )
        if name in READS or by_mask:
            record()
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Copies to the host, which on a CPU are none and reach no dispatcher."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in COPIES:
            record()
        elif function is torch.Tensor.to and args[1:2] == ("cpu",):
            # Ours says "cpu" for the host only; DeepSpeed calls its accelerator so here.
            record(besides="deepspeed")
        return function(*args, **(kwargs or {}))


class Pending:
    """A stream or an event whose work is never done."""

    def __init__(self, *_, **__):
        pass

    def record(self, *_):
        pass

    wait_stream = wait_event = wait = record

    def query(self):
        return False

    def synchronize(self):
        record()


def pretend_to_be_asynchronous():
    kind, stream = type(get_accelerator()), Pending()
    kind.is_synchronized_device = lambda self: False
    kind.synchronize = lambda self, device_index=None: record()
    kind.Stream = kind.Event = property(lambda self: Pending)
    kind.current_stream = kind.default_stream = lambda self, device_index=None: stream
    kind.stream = lambda self, _: contextlib.nullcontext()
    torch.Tensor.record_stream = lambda self, _: None


def wrapped(function):
    def waiting(*args, **kwargs):
        record()
        return function(*args, **kwargs)

    return waiting


@contextlib.contextmanager
def watching_the_gpu():
    with contextlib.ExitStack() as stack:
        for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event):
            stack.enter_context(mock.patch.object(owner, "synchronize", wrapped(owner.synchronize)))
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("always", message="called a synchronizing CUDA operation")
        show = warnings.showwarning
        warnings.showwarning = lambda message, *rest: (
            record() if "synchronizing CUDA" in str(message) else show(message, *rest)
        )
        torch.cuda.set_sync_debug_mode("warn")
        yield
        torch.cuda.set_sync_debug_mode("default")


def watched(run):
    """The training loop and nothing before or after it."""
    found.clear()
    with contextlib.ExitStack() as stack:
        if run.world.device.type == "cuda":
            stack.enter_context(watching_the_gpu())
        else:
            stack.enter_context(Copies())
            stack.enter_context(Reads())
        reason = train(run)
    results.append(dict(found))
    return reason


def main():
    shards, folder, cases = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
    # As pretrain.main does; hundreds of them would fill the pipe to the test.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    config, stage_3 = folder / "run.yaml", folder / "zero3.json"
    world = join_world(10)
    if world.is_main:
        config.write_text(yaml.safe_dump(SETTINGS))
        stage_3.write_text(json.dumps({"zero_optimization": STAGE_3}))
    world.barrier()
    pretrain.join_world, pretrain.leave_world, pretrain.train = lambda _: world, lambda: None, watched
    if world.device.type != "cuda":
        pretend_to_be_asynchronous()
    for case in cases:
        stage, precision = case.split("/")
        engine = f"engine.deepspeed={stage_3}" if stage == "3" else f"engine.zero_stage={stage}"
        settings = [engine, f"train.precision={precision}", f"run.name=zero{stage}-{precision}", f"run.dir={folder}"]
        pretrain.pretrain(load_config(config, [*settings, f"data.shards={shards}"]))
    if world.is_main:
        (folder / "syncs.json").write_text(json.dumps(dict(zip(cases, results, strict=True))))
    leave_world()


train = pretrain.train
main()
