"""The text of the card beside exported weights: what they are, and how to load them.

In: what the weights say of themselves, and where they come from a run its configuration and metrics. Out: Markdown with
the YAML front matter that the Hugging Face Hub reads. Facts only; what is not known is not said, and the licence of the
weights is left to whoever publishes them, but where they descend from a published checkpoint.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from msm_dist.config import Config
from msm_dist.errors import ConfigError
from msm_dist.evaluate.finetune_config import FinetuneConfig
from msm_dist.model.mae import Decoder, Encoder
from msm_dist.model.origin import chain, is_trained, published_ancestor, told
from msm_dist.model.patches import PatchGrid
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo, differences

PAPER = "https://arxiv.org/abs/2204.12260"
TAGS = ["audio", "masked-spectrogram-modeling", "masked-autoencoder", "self-supervised"]


def model_card(
    state: Mapping[str, Tensor],
    info: WeightsInfo,
    digest: str,
    cfg: Config | FinetuneConfig | None = None,
    records: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The card of weights `state` whose file has the sha256 `digest`; `records` are lines of metrics.jsonl."""
    front = {"library_name": "msm-dist", "pipeline_tag": "feature-extraction", "tags": TAGS}
    title = info.origin.get("run") or info.origin.get("published_file") or "MSM-MAE encoder"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {_plain(title)}",
        f"An audio encoder pre-trained by [masked spectrogram modeling]({PAPER}){_tuned(info.origin)}, in the format "
        "of msm-dist.",
        _use(info),
        "## What it is\n\n" + _table(_facts(state, info, digest)),
        *_descent(info.origin),
        *_data(next((one["corpus"] for one in chain(info.origin) if one.get("corpus")), [])),
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
        f"{geometry.decoder_num_heads} heads, {model.decoder_positions[0]}-D positions"
        + ("" if is_trained(info.origin, "decoder") else "; not trained with this encoder: reconstructs nothing"),
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


def other_model(state: Mapping[str, Tensor], info: WeightsInfo) -> str:
    """How the tensors are not those that the configuration describes; empty where they are."""
    try:
        grid = PatchGrid(info.features.n_mels, info.crop_frames, info.model.patch)
        with torch.device("meta"):
            parts = nn.ModuleDict({"encoder": Encoder(info.model, grid), "decoder": Decoder(info.model, grid)})
    except ConfigError:
        return "the tensors are not those that model.* describes"
    found = differences(state, parts.state_dict())
    return f"the tensors are not those that model.* describes; {found}" if found else ""


def _facts(state: Mapping[str, Tensor], info: WeightsInfo, digest: str) -> dict[str, str]:
    origin = info.origin
    steps = {"steps": f"{origin['step']:,}"} if isinstance(origin.get("step"), int) else {}
    other = {"other model": _plain(found)} if (found := other_model(state, info)) else {}
    digests = {f"sha256 of {WEIGHTS_FILE}": digest}
    return facts(info) | {"parameters": parameter_counts(state)} | other | steps | digests


def _tuned(origin: Mapping[str, Any]) -> str:
    return f" and fine-tuned to label {_plain(origin['task'])}" if "task" in origin else ""


def _use(info: WeightsInfo) -> str:
    """How to load the weights, in code that runs."""
    tagger = """```python
import soundfile, torch
from msm_dist.evaluate.classifier import Tagger

tagger = Tagger.load("FOLDER")  # this folder
audio, sample_rate = soundfile.read("sound.wav", dtype="float32", always_2d=True)
probabilities = tagger.predict(torch.from_numpy(audio.mean(axis=1))[None], sample_rate)  # [1, labels]
print(dict(zip(tagger.labels, probabilities[0].tolist())))
```"""
    if info.origin.get("positions") == "interpolated":
        return (
            f"## How to load it\n\n{tagger}\n\nThe position table is stretched to the clips' length, which `Tagger` "
            "does; `Encoder` refuses these weights."
        )
    return _encoder_use(info) + (f"\n\nWith its head, as a classifier:\n\n{tagger}" if "task" in info.origin else "")


def _encoder_use(info: WeightsInfo) -> str:
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


def _descent(origin: Mapping[str, Any]) -> list[str]:
    """A line for each of the weights that these were made from, one after the other."""
    made = [f"{number}. {_plain(told(one))}" for number, one in enumerate(chain(origin), 1)]
    if len(made) == 1:
        return []
    return ["## Made from\n\nThese weights, and those that each was made from:\n\n" + "\n".join(made)]


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


def _training(
    info: WeightsInfo, cfg: Config | FinetuneConfig | None, records: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Settings and figures of the run."""
    rows: dict[str, str] = {}
    step = info.origin.get("step")
    if cfg is not None:
        rows |= {
            "global batch": f"{cfg.train.global_batch} {'clips' if 'task' in info.origin else 'crops'}",
            "peak learning rate": f"{cfg.peak_lr:g}",
            "weight decay": f"{cfg.optim.weight_decay:g}",
            "precision": cfg.train.precision,
            "seed": str(cfg.seed),
        }
        if isinstance(step, int) and "task" not in info.origin:
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
    "test_top1_acc": "test: top-1 accuracy",
    "test_mAP": "test: mAP",
    "test_aucroc": "test: area under the ROC",
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
    kind = "file that msm-dist wrote in the published layout" if "exported_from" in origin else "published checkpoint"
    return [f"## Converted from a {kind}\n\n" + _table(rows) + notes]


def _licence(origin: Mapping[str, Any]) -> str:
    if ancestor := published_ancestor(origin):
        made = "are converted from" if ancestor is origin else "descend from"
        return (
            f"These weights {made} {_plain(ancestor['published_file'])}: the licence of the published checkpoint holds "
            "for them. msm-dist itself is Apache-2.0."
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
