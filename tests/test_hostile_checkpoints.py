"""Random damage to the metadata of a checkpoint whose digests are true, and all code of a resume that reads it."""

import copy
import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from hypothesis import given
from hypothesis import strategies as st

from msm_dist.config import BatchLayout, Optim
from msm_dist.data.clips import quiet
from msm_dist.doctor.checkpoints import State, findings, look_at, next_start, place_fault
from msm_dist.engine import checkpoint, state
from msm_dist.engine.divergence import UpdateGuard
from msm_dist.engine.meta import PretrainingMeta, RunMeta
from msm_dist.engine.resume import newest_of_run
from msm_dist.engine.stored import COMPLETE, newest_complete, open_checkpoint, read_masters
from tests.fuzzing import altered, as_json, fresh, fuzzing, survives
from tests.test_checkpoint import Alone

STEP, BLOCKS_PER_STEP = 7, 8
LAYOUT = BatchLayout(1, 8, 1, BLOCKS_PER_STEP, BLOCKS_PER_STEP)
FINETUNED = {"cursor": STEP * BLOCKS_PER_STEP, "skipped_updates": [3, 5]}
"""What fine-tuning saves beside the engine's state: tests/test_doctor_finetune.py compares it with a run's."""
SOURCE = {"name": "x", "kind": "audio", "shards": 2, "clips": 64, "seconds": 640.5, "digest": "c" * 64, "share": 1.0}
SOURCE |= {"missing_shards": 0, "made_from": None, "official": None}
PRETRAINED = FINETUNED | {"bad_samples": 4, "missing_samples": 0, "mean": -7.0, "std": 4.0, "corpus": [SOURCE]}
"""What pre-training saves beside the engine's state: tests/test_doctor_run.py compares it with a run's."""
RUNS = {"pre-training": (PretrainingMeta, PRETRAINED), "fine-tuning": (RunMeta, FINETUNED)}


def new_engine(fp16: bool) -> SimpleNamespace:
    """As much of an engine of ZeRO stage 0 as its state consists of, after its dry run."""
    module = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.loss_scaler = DynamicLossScaler(2**16, 1000, 1.0, 2, False) if fp16 else None
    settings = SimpleNamespace(float16_config=SimpleNamespace(initial_dynamic_scale=lambda: 2**16))
    return SimpleNamespace(
        module=module, optimizer=optimizer, _config=settings, zero_optimization_stage=lambda: 0, device="cpu"
    )


def write(root: Path, extra: dict, fp16: bool) -> Path:
    """A checkpoint as a run saves it."""
    return checkpoint.save(new_engine(fp16), fresh(root), STEP, copy.deepcopy(extra), Alone())


def resume(root: Path, kind: type[RunMeta], fp16: bool) -> None:
    """All that a start does with the metadata of the checkpoint it takes."""
    engine = new_engine(fp16)
    saved = newest_of_run(root, STEP, LAYOUT, Alone(), kind)
    checkpoint.load(engine, saved, Alone())
    guard = UpdateGuard(engine, Optim(), Alone(), root, saved.step, saved.skipped_updates)
    assert len(guard.skipped) == guard.counts.get("skipped_updates", 0)
    assert saved.step == STEP and state.optimizer_step(engine) == saved.meta["optimizer_step"]
    if fp16 and saved.meta["loss_scale"]:
        engine.optimizer.loss_scaler.update_scale(overflow=False)
    if kind is PretrainingMeta:
        # As the ranks sum them.
        assert torch.tensor([saved.bad_samples, saved.missing_samples], dtype=torch.float64).isfinite().all()


def is_foretold(root: Path, kind: type[RunMeta]) -> bool:
    """Whether the doctor says that a start goes through; in either case in words."""
    seen = look_at(root, False, quiet, kind)
    assert all(finding.detail for finding in findings(seen, is_alive=False))
    start = next_start(seen)
    return start is not None and start.state is State.GOOD and not place_fault(start.saved, BLOCKS_PER_STEP)


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("room")


@pytest.mark.parametrize("fp16", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("kind", "extra"), RUNS.values(), ids=RUNS)
def test_what_a_run_saved_is_taken(room, kind, extra, fp16):
    write(room / "run", extra, fp16)
    assert is_foretold(room / "run", kind)
    resume(room / "run", kind, fp16)


@pytest.mark.parametrize(("kind", "extra"), RUNS.values(), ids=RUNS)
@given(fp16=st.booleans(), into_fp16=st.booleans(), data=st.data())
@fuzzing(200)
def test_altered_metadata_with_true_digests(room, kind, extra, fp16, into_fp16, data):
    saved = room / f"{kind.__name__}-{fp16}"
    if not saved.exists():
        write(saved, extra, fp16)
    root = fresh(room / "run")
    folder = shutil.copytree(saved, root, dirs_exist_ok=True) / checkpoint.checkpoint_name(STEP)
    text = as_json(data.draw(altered(json.loads((folder / "meta.json").read_text()))))
    (folder / "meta.json").write_bytes(text)
    (folder / COMPLETE).write_text(hashlib.sha256(text).hexdigest())
    foretold = []
    survives(room, lambda: foretold.append(is_foretold(root, kind)))
    survives(room, lambda: newest_complete(root), lambda: read_masters(open_checkpoint(folder)))
    assert survives(room, lambda: resume(root, kind, into_fp16)) is foretold[0]
