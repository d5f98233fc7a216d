"""What a run writes for those who watch it: metrics.jsonl, TensorBoard and the console.

In: numbers and pictures that the training loop hands over at its log points, on the host already. Out:
`<run>/metrics.jsonl`, `<run>/tensorboard/` and a printed line per log point, complete on disk when a call
returns. A resumed run first removes what lies past the step it resumes from (TensorBoard's fast loader, its
default, ignores such a mark and hides a tag's stale points only at its first new one). Also here: the
stopwatch behind throughput and data-wait share, and the two halves of MFU (arithmetic of a clip, matrix
rate of the device). Fails with CheckpointError where the folder can't be written, with DataError on a
damaged jsonl file.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from msm_dist.config import Geometry
from msm_dist.errors import CheckpointError, DataError
from msm_dist.pictures import Picture, stack, write_png

RATE_SECONDS = 0.2
REFERENCES = {
    "reference_mel_mean": "corpus mean per band",
    "reference_visible_mean": "visible mean per band",
    "reference_nearest_patch": "nearest visible patch",
}
BASELINES = {"random_weights": "random weights", "logmel": "log-mel statistics"}


class Monitor:
    """The written record of a run; every method does nothing where `writes` is False (all ranks but one)."""

    def __init__(self, folder: Path, start_step: int, total_steps: int, writes: bool):
        """Open the run folder's record after removing what lies past `start_step`.

        Raises CheckpointError where it can't be written and DataError where metrics.jsonl is damaged.
        """
        self.folder = folder
        self.total_steps = total_steps
        self.writes = writes
        if not writes:
            return
        # Only the rank that writes needs TensorBoard.
        from torch.utils.tensorboard import SummaryWriter

        path = folder / "metrics.jsonl"
        with _reporting(path):
            folder.mkdir(parents=True, exist_ok=True)
            truncate_jsonl(path, start_step)
            self._lines = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=start_step + 1)
            self._board.flush()

    def train(self, step: int, values: Mapping[str, float]) -> None:
        """Record a training log point: `values` as floats of the units their names carry, unrounded."""
        if self.writes:
            self._record("train", step, values)
            self._print(step, [*self._progress(step, values)])

    def valid(self, step: int, values: Mapping[str, float]) -> None:
        """Record a validation: valid_loss and its references, in the units of the training loss; valid_SCORE."""
        if not self.writes:
            return
        self._record("valid", step, values)
        beside = [f"{label} {values[name]:.4f}" for name, label in REFERENCES.items() if name in values]
        against = f"  (against: {', '.join(beside)})" if beside else ""
        scores = [f"{name.removeprefix('valid_')} {value:.4f}" for name, value in values.items() if _is_score(name)]
        self._print(step, [f"valid loss {values['valid_loss']:.4f}{against}", *scores])

    def probe(self, step: int, values: Mapping[str, float]) -> None:
        """Record scores of the online probe: SCORE/TASK, and those of its baselines as SCORE_BASELINE/TASK."""
        if not self.writes:
            return
        self._record("probe", step, values, "probe/")
        for name, value in values.items():
            score, _, task = name.partition("/")
            if "_" in score:
                continue
            beside = [f"{label} {values[f'{score}_{kind}/{task}']:.3f}" for kind, label in BASELINES.items()]
            self._print(step, [f"probe {task}: {score} {value:.3f}  (against: {', '.join(beside)})"])

    def pictures(self, step: int, pictures: Sequence[Picture]) -> Path | None:
        """Add pictures and sounds to TensorBoard; returns the PNG with all of them."""
        if not self.writes or not pictures:
            return None
        path = self.folder / "pictures" / f"step-{step:08d}.png"
        with _reporting(path):
            write_png(stack([picture.image for picture in pictures]), path)
            for number, picture in enumerate(pictures):
                tag = f"reconstruction/{number}"
                self._board.add_image(f"{tag}/input_masked_reconstruction", picture.image, step)
                for name, waveform in picture.audio.items():
                    self._board.add_audio(f"{tag}/{name}", waveform[None], step, picture.sample_rate)
            self._board.flush()
        return path

    def sync(self) -> None:
        """Flush metrics.jsonl to the disk, so that no checkpoint outlives the lines before it in a power cut."""
        if self.writes:
            with _reporting(self.folder / "metrics.jsonl"):
                os.fsync(self._lines.fileno())

    def close(self) -> None:
        """Close the files; nothing may be recorded after it."""
        if self.writes:
            self._lines.close()
            self._board.close()

    def _record(self, kind: str, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        with _reporting(self.folder / "metrics.jsonl"):
            line = {"step": step} | {prefix + name: value for name, value in values.items()}
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()

    def _progress(self, step: int, values: Mapping[str, float]) -> Iterator[str]:
        yield f"loss {values['loss']:.4f}" if "loss" in values else "loss not finite, update left out"
        yield f"lr {values['lr']:.2e}"
        if "clips_per_second" in values:
            yield f"{values['clips_per_second']:,.1f} clips/s"
        if "data_wait_share" in values:
            yield f"data wait {values['data_wait_share']:.1%}"
        if "step_seconds" in values:
            yield f"ETA {_duration((self.total_steps - step) * values['step_seconds'])}"

    def _print(self, step: int, parts: Sequence[str]) -> None:
        width = len(str(self.total_steps))
        print(f"step {step:>{width}}/{self.total_steps}", *parts, sep="  ", flush=True)


class Stopwatch:
    """Wall time between log points, and the share of it spent waiting for data; never touches the device."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._start, self._waited = clock(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = self._clock()
        yield
        self._waited += self._clock() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out: validation, pictures and checkpoints are no part of a step."""
        start = self._clock()
        yield
        self._start += self._clock() - start

    def lap(self, steps: int, clips: int, clip_seconds: float) -> dict[str, float]:
        """Rates since the last lap, in which `steps` steps took `clips` crops of `clip_seconds` each.

        Returns step_seconds, clips_per_second, audio_hours_per_second and data_wait_share (0 to 1).
        """
        now = self._clock()
        seconds, waited = now - self._start, self._waited
        self._start, self._waited = now, 0.0
        return {
            "step_seconds": seconds / steps,
            "clips_per_second": clips / seconds,
            "audio_hours_per_second": clips * clip_seconds / 3600 / seconds,
            "data_wait_share": waited / seconds,
        }


def flops_per_clip(
    geometry: Geometry, num_patches: int, num_keep: int, num_masked: int, patch_pixels: int, cls_token: bool
) -> float:
    """Matrix FLOPs of one clip, forward and backward (three times the forward).

    Counted: embedding of the visible patches, encoder over them (and CLS), bridge, decoder over all patches
    (and CLS), head on the masked ones. A block of width D costs 24 D^2 per token for its linear maps (MLP x4)
    and 4 N D per token for attention over N tokens. 11.7 GFLOP for base at 80x208.
    """
    prefix = int(cls_token)
    embed = 2 * num_keep * patch_pixels * geometry.embed_dim
    encoder = geometry.depth * _block_flops(num_keep + prefix, geometry.embed_dim)
    bridge = 2 * (num_keep + prefix) * geometry.embed_dim * geometry.decoder_embed_dim
    decoder = geometry.decoder_depth * _block_flops(num_patches + prefix, geometry.decoder_embed_dim)
    head = 2 * num_masked * geometry.decoder_embed_dim * patch_pixels
    return 3.0 * (embed + encoder + bridge + decoder + head)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product on `device`, measured for about 0.2 s: what MFU is a share of."""
    size, at_once = (8192, 8) if device.type == "cuda" else (1024, 1)
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    product = torch.empty(size, size, device=device, dtype=dtype)

    def timed() -> float:
        start = time.perf_counter()
        for _ in range(at_once):
            torch.mm(left, right, out=product)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    fastest, spent = float("inf"), 0.0
    while spent < RATE_SECONDS:
        seconds = timed()
        fastest, spent = min(fastest, seconds), spent + seconds
    return at_once * 2.0 * size**3 / fastest


def device_memory_gib(device: torch.device) -> float:
    """Most memory that tensors have taken on `device` so far, in GiB; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a jsonl file in order; a last line torn by a kill is left out. Raises DataError."""
    try:
        with path.open("rb") as file:
            return [record for _, record in _records(file, path)]
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}); is it a run folder's file?") from None


def truncate_jsonl(path: Path, last_step: int) -> None:
    """Drop records with step > `last_step` and a torn last line, in one atomic rewrite; no file is no fault.

    Raises DataError for a line that is no record, OSError where the folder can't be written.
    """
    if not path.exists():
        return
    temporary = path.with_name(path.name + ".tmp")
    with path.open("rb") as file, temporary.open("wb") as kept:
        for line, record in _records(file, path):
            if record["step"] <= last_step:
                kept.write(line)
        kept.flush()
        os.fsync(kept.fileno())
    os.replace(temporary, path)


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Lines with their records. A line without its newline was torn by a kill; it can only be the last."""
    for number, line in enumerate(file, start=1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise DataError(
                f"{path}: line {number} is no record with a step ({line[:40]!r}); the file was damaged or "
                "edited: delete that line or move the file away"
            )
        yield line, record


def _is_score(name: str) -> bool:
    return name.startswith("valid_") and name != "valid_loss"


def _block_flops(num_tokens: int, width: int) -> float:
    return num_tokens * (24.0 * width**2 + 4.0 * num_tokens * width)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days}d " * bool(days) + f"{hours}:{minutes:02d}:{seconds:02d}"


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    """Name the file in the error of a full disk or an unwritable folder."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: can't be written ({error.strerror or error}); a run's record must be complete: free "
            "space or fix the permissions and start the same command again"
        ) from error
