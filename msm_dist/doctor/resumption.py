"""The command that continues a run, as `msm-dist doctor RUN` prints it.

In: the run folder, its configuration, what it ran on. Out: a command line, which nobody runs but the user;
every word of the run's that is in it is quoted.
"""

import shlex
from pathlib import Path
from typing import Any

from msm_dist.config import Config
from msm_dist.doctor.files import is_there
from msm_dist.evaluate.finetune_config import FinetuneConfig

MODEL_RECORD = "model.json"


def command_to_continue(folder: Path, cfg: Config | FinetuneConfig, environment: dict[str, Any]) -> str:
    """The same run from where it stands, on as many processes as it had: a launcher's words, then the run's."""
    words = [str(folder / "config.yaml")]
    if Path(cfg.run.folder).resolve() != folder.resolve():
        words.append(f"run.dir={folder.resolve().parent}")
    is_finetuning = isinstance(cfg, FinetuneConfig)
    if is_finetuning:
        words = [cfg.weights, cfg.data.task, *words]
    given = shlex.join(words)
    if not is_finetuning and is_there(folder / MODEL_RECORD):
        return f"your program with the model of its own ({MODEL_RECORD} names it), with {given}"
    world, local = (_count(environment.get(name)) for name in ("world_size", "local_size"))
    command, module = ("finetune", "msm_dist.evaluate.finetune") if is_finetuning else ("pretrain", "msm_dist.pretrain")
    if environment.get("job") and not is_finetuning:
        return f"sbatch --nodes={world // local or 1} --ntasks-per-node={local} slurm/pretrain.sh {given}"
    if world == 1:
        return f"msm-dist {command} {given}"
    hosts = "" if local >= world else f" --nnodes {world // local} --rdzv-backend c10d --rdzv-endpoint HOST:29500"
    return f"torchrun{hosts} --nproc-per-node {min(world, local)} --module {module} {given}"


def _count(value: Any) -> int:
    return value if type(value) is int and 0 < value < 2**20 else 1
