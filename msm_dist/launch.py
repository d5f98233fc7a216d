"""A run as a submitit job: what its ranks execute, and the executors that start it.

In: the path of a resolved configuration. Out: the run itself. A preempted or timed-out job is saved by all ranks
together at a step boundary; only then rank 0 hands over to submitit, whose handler puts the job back into the queue:
no collective can run inside of a signal handler. The callable holds nothing but text, so that an old pickle fits.
What a site preempts by TERM alone is put back by the job's script, as slurm/pretrain.sh does it.
"""

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths, UncompletedJobError

from msm_dist.allocation import announce, conclude, is_cancelled, slurm_record
from msm_dist.errors import ConfigError, reporting
from msm_dist.site import PLAIN_PYTHON, Site

REQUEUE_EXIT_CODE = 75
"""As msm_dist.engine.preempt has it, whose module imports torch."""
FIRST_PORT, PORTS = 12000, 18000
"""Ports for the ranks' rendezvous: below those that Linux gives away by itself."""
REQUEUE_SECONDS = 300
"""How long ranks wait, saved, for rank 0's requeue to end them; submitit's own limit for it is 60 s."""
AGAIN = "submit the same command again to go on"
TEARDOWN = [
    "code=$?",
    "job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}",
    """if [ "$code" -eq 143 ] && scontrol show job "$job" 2>/dev/null | grep -Eq 'PreemptTime=[0-9]'; then""",
    '  echo "job $job: preempted by TERM; asking Slurm to run it again"',
    '  if scontrol requeue "$job"; then exit 0; fi',
    f'  echo "job $job: Slurm does not run it again; {AGAIN}"',
    "fi",
    'exit "$code"',
]
"""After srun: where a site sends TERM and nothing before it, a job that ends in its grace time counts as failed."""
HOLD_SIGNALS = ("env", "--block-signal=USR1,USR2")
"""A signal that comes while Python imports stays pending until the handlers stand. Needs coreutils 8.31."""


@dataclass(frozen=True)
class Allocation:
    """What a job asks for."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    cpus_per_task: int
    minutes: int
    partition: str | None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.tasks_per_node


class PretrainJob:
    """What submitit runs on every rank: the run of a configuration file, started anew or continued."""

    def __init__(self, config: str, code: str | None = None):
        self.config = config
        self.code = code

    def __call__(self) -> int:
        """0 when the run is finished; every other end leaves the process with the run's exit code."""
        _speak_once()
        environment = submitit.JobEnvironment()
        requeue = signal.getsignal(_signal(environment))  # submitit's; the run takes the signal over for its time
        if environment.cluster == "local":
            exit_code_path(environment.paths).unlink(missing_ok=True)
        if environment.cluster != "debug":
            # Nothing to save before the run listens itself; submitit would ignore it.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _join(environment)
        code = reporting(self._run)
        if environment.cluster == "local":
            exit_code_path(environment.paths).write_text(str(code))
        if code == 0:
            return 0
        if code == REQUEUE_EXIT_CODE and callable(requeue):
            _requeue(environment, requeue, code)
        sys.exit(code)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """The same job again; the run folder knows where to go on."""
        return submitit.helpers.DelayedSubmission(self)

    def _run(self) -> int:
        snapshot = getattr(self, "code", None)  # not in the pickle of an older version
        if snapshot and Path(__file__).resolve().parent.parent != Path(snapshot).resolve():
            raise ConfigError(
                f"{snapshot}: the code that this job was submitted with is gone or hidden, {Path(__file__).parent} "
                "would run instead; submit again"
            )
        from msm_dist.config import load_config

        speaks = os.environ.get("RANK", "0") == "0"
        cfg = load_config(self.config)
        if speaks and "WORLD_SIZE" in os.environ:
            print(f"code       {Path(__file__).parent.parent}\n{announce(cfg, os.environ)}", flush=True)
        from msm_dist import pretrain

        code = pretrain.main([self.config])
        if speaks:
            # Where an error was said too, behind it.
            print(conclude(cfg, code), file=sys.stderr, flush=True)
        return code


def _speak_once() -> None:
    """Make submitit say everything once: warnings go to both of its streams, which are one file, and to our logger."""
    logger = logging.getLogger("submitit")
    logger.propagate = False
    logger.handlers = [handler for handler in logger.handlers if handler.level < logging.WARNING]


def _join(environment: submitit.JobEnvironment) -> None:
    """Export the launcher's common names. DeepSpeed chooses the device by LOCAL_RANK."""
    job = int(environment.raw_job_id)
    # Not one inherited from where the job was submitted, which all jobs of a sweep would share.
    os.environ["MASTER_PORT"] = str(FIRST_PORT + job % PORTS)
    submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if environment.cluster == "local":
        os.environ["MASTER_ADDR"] = "127.0.0.1"  # a machine's own name need not lead to it
    if environment.global_rank == 0:
        # Left behind by a requeue that was killed in the middle; submitit would not start another.
        pickled = environment.paths.submitted_pickle
        pickled.with_suffix(f"{pickled.suffix}.save_tmp").unlink(missing_ok=True)


def _requeue(environment: submitit.JobEnvironment, handler: Any, code: int) -> None:
    """All ranks have saved: rank 0 asks for the requeue, which ends the others. Comes back when there is none."""
    if environment.global_rank != 0:
        if environment.cluster == "local":
            return  # the local controller waits for every rank to end by itself
        signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
        time.sleep(REQUEUE_SECONDS)
        return
    if environment.cluster == "slurm" and is_cancelled(slurm_record(environment.job_id)):
        # Slurm would run it again all the same.
        print(f"msm-dist: saved, but not started again: the job was cancelled meanwhile; {AGAIN}", file=sys.stderr)
        return
    try:
        handler(_signal(environment), None)
    except UncompletedJobError as error:
        reason = str(error).removeprefix("Job not requeued because: ").rstrip(".")
        print(f"msm-dist: saved, but not started again: {reason}; {AGAIN}", file=sys.stderr)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"msm-dist: saved, but Slurm did not take the requeue ({error}); {AGAIN}", file=sys.stderr)


def _signal(environment: submitit.JobEnvironment) -> signal.Signals:
    """The signal that submitit has Slurm send, and handles."""
    return signal.Signals[f"SIG{environment.USR_SIG}"]


def exit_code_path(paths: JobPaths) -> Path:
    """Where a rank of a local job leaves its exit code, which submitit's controller does not tell."""
    return paths.stdout.with_suffix(".code")


def check_environment(cluster: str) -> None:
    """Whether this machine has what submitting needs. Raises ConfigError."""
    if cluster == "slurm" and (missing := [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]):
        raise ConfigError(
            f"no Slurm on this machine ({missing[0]} is not found): submit from a login node, see what would be "
            "submitted with --dry-run, or run here with --cluster local"
        )
    if subprocess.run([*HOLD_SIGNALS, "true"], capture_output=True).returncode != 0:
        raise ConfigError(
            f"`{' '.join(HOLD_SIGNALS)}` does not work here: GNU coreutils 8.31 or newer is needed, here and on the "
            "nodes; put one into PATH"
        )


def slurm_executor(folder: Path, name: str, wants: Allocation, site: Site, code: Path, max_timeouts: int) -> Any:
    """A SlurmExecutor for jobs with these wants, whose files go to `folder` and whose code is in `code`."""
    executor_class = submitit.SlurmExecutor
    if not shutil.which("srun"):
        # On paper a job may be written without Slurm; check_environment is what refuses to submit it.
        executor_class = type("SlurmExecutor", (executor_class,), {"affinity": classmethod(lambda cls: 2)})
    executor = executor_class(folder, max_num_timeout=max_timeouts, python=_python(site, folder))
    executor.update_parameters(
        job_name=name,
        partition=wants.partition,
        time=wants.minutes,
        nodes=wants.nodes,
        ntasks_per_node=wants.tasks_per_node,
        cpus_per_task=wants.cpus_per_task,
        **_gpus(wants.gpus_per_node, site.gres),
        account=site.account,
        qos=site.qos,
        constraint=site.constraint,
        exclude=site.exclude,
        mem=site.mem,
        signal_delay_s=site.signal_seconds,
        setup=_setup(site, code),
        teardown=TEARDOWN,
        stderr_to_stdout=True,
        wckey=None,
        additional_parameters={"requeue": True, **site.sbatch},
        srun_args=_srun(wants, site, folder),
    )
    return executor


def slurm_text(executor: Any, count: int, max_parallel: int | None) -> str:
    """What would be submitted for so many jobs; submitit's own text."""
    spread_over(executor, count, max_parallel)
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def spread_over(executor: Any, count: int, max_parallel: int | None) -> None:
    """Make an executor's next batch an array of `count` jobs, each with a log of its own."""
    if count > 1:
        log = f"--output={JobPaths(executor.folder).stdout}".replace("%j", "%A_%a").replace("%t", "0")
        words = [log if word.startswith("--output=") else word for word in executor.parameters["srun_args"]]
        executor.update_parameters(srun_args=words, array_parallelism=max_parallel or count)


def local_executor(folder: Path, wants: Allocation, site: Site, max_timeouts: int) -> submitit.LocalExecutor:
    """An executor for jobs on this machine, one process per rank."""
    python = shlex.join([*HOLD_SIGNALS, sys.executable])
    executor = submitit.LocalExecutor(folder, max_num_timeout=max_timeouts, python=python)
    executor.update_parameters(
        timeout_min=wants.minutes,
        signal_delay_s=site.signal_seconds,
        tasks_per_node=wants.tasks_per_node,
        gpus_per_node=wants.gpus_per_node,
        visible_gpus=visible_gpus(wants.gpus_per_node),
        stderr_to_stdout=True,
    )
    return executor


def visible_gpus(count: int) -> Sequence[int]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to `count` local ranks; () when it is not set. Raises ConfigError."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not count or text is None:
        return ()
    names = [name.strip() for name in text.split(",") if name.strip()]
    if len(names) < count or not all(name.isdecimal() for name in names):
        raise ConfigError(
            f"--gpus-per-node {count} with CUDA_VISIBLE_DEVICES={text}: must name that many GPUs by their "
            f"numbers, such as {','.join(map(str, range(count)))}"
        )
    return [int(name) for name in names]


def _python(site: Site, folder: Path) -> str:
    """The words that start Python on a node, for a shell."""
    words = [*HOLD_SIGNALS]
    if site.container is None:
        words.append(site.python or sys.executable)
    elif site.container.runtime == "pyxis":
        words.append(site.container.python)
    else:
        binds = [word for mount in _mounts(site, folder) for word in ("--bind", mount)]
        words += ["apptainer", "exec", "--nv", "--pwd", os.getcwd(), *binds]
        words += [site.container.image, site.container.python]
    return shlex.join(words)


def _srun(wants: Allocation, site: Site, folder: Path) -> list[str]:
    words = [
        "--kill-on-bad-exit=1",
        f"--cpus-per-task={wants.cpus_per_task}",  # since 22.05 srun does not take it over from sbatch
        f"--output={JobPaths(folder).stdout}".replace("%t", "0"),  # one log for all ranks
        "--open-mode=append",
    ]
    if site.container and site.container.runtime == "pyxis":
        words.append(f"--container-image={site.container.image}")
        words.append(f"--container-mounts={','.join(_mounts(site, folder))}")
        words.append(f"--container-workdir={os.getcwd()}")
    return [*words, *site.srun]


def _mounts(site: Site, folder: Path) -> list[str]:
    """The container's mounts as HOST:CONTAINER: the profile's, the folder of submission and the run's."""
    own = [os.getcwd(), str(folder.parent)]
    return list(
        dict.fromkeys(mount if ":" in mount else f"{mount}:{mount}" for mount in (*own, *site.container.mounts))
    )


def _setup(site: Site, code: Path) -> list[str]:
    """The profile's lines, and what makes Python take the snapshot, not what is installed or in this folder."""
    exports = {name: str(value) for name, value in site.environment.items()}
    lines = [*site.setup, *(f"export {name}={shlex.quote(value)}" for name, value in exports.items())]
    inherited = "" if site.container else "${PYTHONPATH:+:$PYTHONPATH}"
    lines += ["export PYTHONSAFEPATH=1", f"export PYTHONPATH={shlex.quote(str(code))}{inherited}"]
    # Of sbatch --export=NONE: srun would hide from the ranks what is exported here.
    lines.append("unset SLURM_EXPORT_ENV")
    # Beside srun, outside of a container; it needs the standard library alone.
    python = PLAIN_PYTHON if site.container else site.python or sys.executable
    lines.append(f"{shlex.quote(python)} -m msm_dist.guard &")
    # The tasks get the signals themselves; the script only has to outlive them, to its teardown.
    return [*lines, "set +e", "trap : TERM USR1 USR2"]


def _gpus(count: int, gres: str | None) -> dict[str, Any]:
    if count == 0 or gres == "none":
        return {}
    return {"gpus_per_node": count} if gres is None else {"gres": gres.replace("{gpus}", str(count))}
