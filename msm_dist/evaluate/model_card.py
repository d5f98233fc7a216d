"""The card beside exported weights: a README.md that states what they are, and how to load them.

In: what the weights say of themselves, and where they come from a run its configuration and metrics. Out: Markdown with
the YAML front matter that the Hugging Face Hub reads. Facts only; what is not known is not said, and the licence of the
weights is left to whoever publishes them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from torch import Tensor

from msm_dist.config import Config
from msm_dist.model.patches import PatchGrid
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo

PAPER = "https://arxiv.org/abs/2204.12260"
TAGS = ["audio", "masked-spectrogram-modeling", "masked-autoencoder", "self-supervised"]


def model_card(
    state: Mapping[str, Tensor],
    info: WeightsInfo,
    digest: str,
    cfg: Config | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of weights `state` whose file has the sha256 `digest`; `records` are lines of metrics.jsonl."""
    front = {"library_name": "msm-dist", "pipeline_tag": "feature-extraction", "tags": TAGS}
    title = info.origin.get("run") or info.origin.get("published_file") or "MSM-MAE encoder"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_plain(title)}",
        f"An audio encoder pre-trained by [masked spectrogram modeling]({PAPER}), in the format of msm-dist.",
        _use(info),
        "## What it is\n\n" + _table(_facts(state, info, digest)),
        *_data(info.origin.get("corpus") or []),
        *_training(info, cfg, records),
        *_conversion(info.origin),
        "## Licence\n\n" + _licence(info.origin),
    ]
    return "\n\n".join(parts) + "\n"


def facts(info: WeightsInfo) -> dict[str, str]:
    """What kind of model these weights belong to, by name, in words."""
    model, features, geometry = info.model, info.features, info.model.geometry
    grid = PatchGrid(features.n_mels, info.crop_frames, model.patch)
    seconds = info.crop_frames * features.hop / features.sample_rate
    rows, columns = grid.shape
    masked = "" if "published_file" in info.origin else f", {model.mask_ratio:.0%} masked"
    biases = "query, key and value biases" if model.key_bias else "query and value biases"
    return {
        "encoder": f"{geometry.depth} blocks, width {geometry.embed_dim}, {geometry.num_heads} heads, {biases}, "
        + ("CLS token" if model.cls_token else "no CLS token"),
        "decoder": f"{geometry.decoder_depth} blocks, width {geometry.decoder_embed_dim}, "
        f"{geometry.decoder_num_heads} heads, {model.decoder_positions[0]}-D positions",
        "input": f"{features.n_mels} bands x {info.crop_frames} frames ({seconds:.2f} s at {features.sample_rate} Hz)",
        "patches": f"{model.patch_size} (bands x frames): {rows} x {columns} of them{masked}",
        "embedding": f"{rows * geometry.embed_dim} numbers every "
        f"{1000 * model.patch[1] * features.hop / features.sample_rate:g} ms",
        "log-mel": f"{features.n_fft} points, window {features.win}, hop {features.hop}, {features.fmin:g} to "
        f"{features.fmax:g} Hz",
        "statistics": f"mean {features.mean:g}, deviation {features.std:g}",
    }


def parameter_counts(state: Mapping[str, Tensor]) -> str:
    """Parameters of each part of the model, and of all."""
    parts: dict[str, int] = {}
    for name, tensor in state.items():
        part = name.partition(".")[0]
        parts[part] = parts.get(part, 0) + tensor.numel()
    return ", ".join(f"{part} {count:,}" for part, count in parts.items()) + f", all {sum(parts.values()):,}"


def _facts(state: Mapping[str, Tensor], info: WeightsInfo, digest: str) -> dict[str, str]:
    origin = info.origin
    steps = {"steps": f"{origin['step']:,}"} if isinstance(origin.get("step"), int) else {}
    return facts(info) | {"parameters": parameter_counts(state)} | steps | {f"sha256 of {WEIGHTS_FILE}": digest}


def _use(info: WeightsInfo) -> str:
    return f"""## How to load it

```python
import soundfile, torch
from msm_dist.evaluate.encoder import Encoder

encoder = Encoder.load("FOLDER")  # this folder
audio, sample_rate = soundfile.read("sound.wav", dtype="float32", always_2d=True)
waveform = torch.from_numpy(audio.mean(axis=1))[None]
frames = encoder.encode(waveform, sample_rate)  # [1, time steps, {_width(info)}]
clip = encoder.embed(waveform, sample_rate)  # [1, {_width(info)}]
```

Audio of any length and rate. The statistics below belong to the weights and are applied by `Encoder`."""


def _width(info: WeightsInfo) -> int:
    return info.features.n_mels // info.model.patch[0] * info.model.geometry.embed_dim


def _data(corpus: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row for each source that was trained on."""
    if not corpus:
        return []
    rows = [
        "## Data",
        "",
        "| source | clips | hours | share of the crops | index digest |",
        "| --- | --- | --- | --- | --- |",
    ]
    for source in corpus:
        hours = (source.get("seconds") or 0) / 3600
        name, clips, share = _plain(source.get("name")), source.get("clips", 0), source.get("share", 1)
        rows.append(f"| {name} | {clips:,} | {hours:.2f} | {share:.1%} | {str(source.get('digest'))[:12]} |")
        if official := source.get("official"):
            found, clips, tables = official["found"], official["clips"], ", ".join(official["tables"])
            rows.append(f"| | {found:,} of {clips:,} clips of {_plain(tables)} | | | |")
    return ["\n".join(rows)]


def _training(info: WeightsInfo, cfg: Config | None, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings and figures of the run."""
    rows: dict[str, str] = {}
    step = info.origin.get("step")
    if cfg is not None:
        rows |= {
            "global batch": f"{cfg.train.global_batch} crops",
            "peak learning rate": f"{cfg.peak_lr:g}",
            "weight decay": f"{cfg.optim.weight_decay:g}",
            "precision": cfg.train.precision,
            "seed": str(cfg.seed),
        }
        if isinstance(step, int):
            crops = step * cfg.train.global_batch
            seconds = info.crop_frames * info.features.hop / info.features.sample_rate
            rows["seen"] = f"{crops:,} crops, {crops * seconds / 3600:,.2f} h"
    latest: dict[str, Any] = {}
    for record in records:
        if not isinstance(step, int) or record["step"] <= step:
            latest |= {f"{name} at step {record['step']:,}": value for name, value in record.items() if name in FIGURES}
    for name in FIGURES:
        if found := [key for key in latest if key.startswith(f"{name} at step ")]:
            rows[found[-1].replace(name, FIGURES[name], 1)] = f"{latest[found[-1]]:.4f}"
    return ["## Training\n\n" + _table(rows)] if rows else []


FIGURES = {
    "loss": "training loss",
    "valid_loss": "held-out loss",
    "reference_mel_mean": "reference: mean per mel band",
    "reference_visible_mean": "reference: visible mean per band",
    "reference_nearest_patch": "reference: nearest visible patch",
}


def _conversion(origin: Mapping[str, Any]) -> list[str]:
    if "published_file" not in origin:
        return []
    rows = {"file": _plain(origin["published_file"]), "sha256 of the file": str(origin.get("sha256"))}
    rows |= {"epoch": str(origin["epoch"])} if origin.get("epoch") is not None else {}
    rows |= {"statistics": str(origin.get("statistics"))}
    if origin.get("untrained"):
        rows["not trained"] = ", ".join(origin["untrained"]) + ": not in the file or not taken, random values"
    notes = "".join(f"\n\n{note[0].upper()}{note[1:]}." for note in origin.get("notes", ()))
    return ["## Converted from a published checkpoint\n\n" + _table(rows) + notes]


def _licence(origin: Mapping[str, Any]) -> str:
    if "published_file" in origin:
        return (
            "These are converted weights: the licence of the published checkpoint holds for them. msm-dist itself is "
            "Apache-2.0."
        )
    return (
        "Not stated: whoever publishes these weights chooses it, here and as `license:` in the first lines. The data "
        "they were trained on may have a say. msm-dist itself is Apache-2.0."
    )


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows.items())])


def _plain(value: Any) -> str:
    """Text from a file's or folder's name that can't change the Markdown around it."""
    text = "".join(char if char.isprintable() else " " for char in str(value))[:200]
    return "".join(f"\\{char}" if char in "\\`*_[]<>|#" else char for char in text)
