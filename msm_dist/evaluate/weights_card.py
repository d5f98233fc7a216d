"""README.md beside weights, written as long as nobody else has a hand in it.

In: a folder with weights, and the run that they are of, for its settings and figures. Out: the card, there whole or not
at all, sealed by a digest of its text: a README.md without that seal, or changed since, is somebody's own and stays.
Fails with CheckpointError where it can't be written.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from msm_dist.config import Config, is_finetuning, load_config
from msm_dist.engine.stored import digest
from msm_dist.errors import CheckpointError, DataError
from msm_dist.evaluate.finetune_config import FinetuneConfig
from msm_dist.evaluate.model_card import model_card
from msm_dist.files import write_atomically
from msm_dist.model.origin import published_ancestor
from msm_dist.model.weights import WEIGHTS_FILE, WeightsInfo
from msm_dist.monitor import read_metrics
from msm_dist.settings import read_settings, validated

CARD_FILE = "README.md"
SEAL = re.compile(r"\n<!-- written by msm-dist, which replaces it while its sha256 is ([0-9a-f]{64}) -->\n\Z")


def write_card(folder: Path, state: Mapping[str, Tensor], info: WeightsInfo, run: Path | None = None) -> str:
    """Write the card of the weights in `folder`, which `run`, where there is one, has trained; what was done, as text.

    A README.md that this program did not write, or that was edited since, is left as it is. Raises CheckpointError,
    ConfigError.
    """
    path = folder / CARD_FILE
    if path.exists() and not is_own_card(path):
        return f"{path} is left as it is: not written by msm-dist, or edited since; take it away for a new one"
    cfg, records = None, []
    if run is not None:
        cfg = _settings(run / "config.yaml")
        try:
            records = [*read_metrics(run / "metrics.jsonl"), *_results(run / "results.json")]
        except DataError:
            records = []  # a run without figures, or with damaged ones, is no reason to keep its weights back
    try:
        write_atomically(path, _sealed(model_card(state, info, digest(folder / WEIGHTS_FILE), cfg, records)))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be written ({error.strerror}); check space and permissions") from None
    licence = "that of the published checkpoint" if published_ancestor(info.origin) else "yours to state"
    return f"{path}; its licence is {licence}"


def is_own_card(path: Path) -> bool:
    """Whether a file is a card as this program wrote it."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return False
    seal = SEAL.search(text)
    return seal is not None and _digest(text[: seal.start()]) == seal[1]


def _results(path: Path) -> list[dict[str, Any]]:
    """What a fine-tuned run reached on its test clips; nothing where there is no such file, or a damaged one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return [{"step": int(results["step"])} | {name: v for name, v in results.items() if isinstance(v, float)}]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def _sealed(text: str) -> str:
    return f"{text}\n<!-- written by msm-dist, which replaces it while its sha256 is {_digest(text)} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _settings(path: Path) -> Config | FinetuneConfig:
    if is_finetuning(path):
        return validated(FinetuneConfig, read_settings(path, ()), str(path), lambda _: ())
    return load_config(path)
