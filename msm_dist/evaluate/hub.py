"""Weights from the Hugging Face Hub, through the optional package huggingface_hub.

In: "hf://owner/name", or "hf://owner/name@revision" with a branch, tag or commit. Out: a folder on this machine with
the two files that weights are; nothing else is fetched, and a commit that is there already not again. huggingface_hub's
own settings hold (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). Fails with CheckpointError where there are no such
weights, with ConfigError where the package is missing.
"""

import re
from pathlib import Path

from msm_dist.errors import CheckpointError, ConfigError
from msm_dist.model.weights import CONFIG_FILE, WEIGHTS_FILE
from msm_dist.redact import redacted

SCHEME = "hf:/"  # as it begins in a Path, too, which keeps one of two slashes
_REFERENCE = re.compile(r"hf:/{1,2}(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^\s@]+))?")


def download(reference: str) -> Path:
    """The folder with the weights of a repository. Raises CheckpointError, ConfigError."""
    parts = _REFERENCE.fullmatch(reference)
    if parts is None:
        raise CheckpointError(f"{reference}: must be hf://owner/name, or hf://owner/name@revision")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ConfigError(f"{reference}: needs huggingface_hub; pip install 'msm-dist[eval]'") from None
    try:
        found = snapshot_download(parts["name"], revision=parts["revision"], allow_patterns=[WEIGHTS_FILE, CONFIG_FILE])
    except Exception as error:  # those of the HTTP library below it differ from version to version
        reason = redacted(" ".join((str(error) or type(error).__name__).split()))[:300]
        raise CheckpointError(
            f"{reference}: can't be fetched ({reason}); check owner, name and revision, the network, and for a private "
            "repository HF_TOKEN"
        ) from None
    folder = Path(found)
    if missing := [name for name in (WEIGHTS_FILE, CONFIG_FILE) if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{reference}: has no {' and no '.join(missing)}; weights are what `msm-dist weights export` writes"
        )
    return folder
