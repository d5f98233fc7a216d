"""The engine: DeepSpeed's configuration, the optimiser, the schedule, and training against a plain loop."""

import math

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from torch import nn

from msm_dist.config import batch_layout, parse_config
from msm_dist.engine.optim import lr_at, parameter_groups
from msm_dist.engine.zero import check_precision, deepspeed_config, fitting_memory
from msm_dist.errors import ConfigError


def config(**sections):
    return parse_config({"train": {"steps": 10}} | sections, "test")


def test_learning_rate_rises_linearly_then_falls_as_half_a_cosine():
    rates = [lr_at(step, 2.0, 4, 12) for step in range(12)]
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[11] == pytest.approx(1 + math.cos(math.pi * 7 / 8))
    assert lr_at(12, 2.0, 4, 12) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("batch", "optim", "peak"),
    [
        (512, {}, 6e-4),
        (2048, {"base_lr": 3e-4}, 2.4e-3),
        (256, {"base_lr": 1e-3}, 1e-3),
        (512, {"lr": 0.1}, 0.1),
    ],
)
def test_base_learning_rate_is_per_256_clips(batch, optim, peak):
    assert config(train={"steps": 10, "global_batch": batch}, optim=optim).peak_lr == pytest.approx(peak)


def test_decay_spares_biases_and_1d_tensors_but_not_tokens():
    model = nn.ModuleDict({"linear": nn.Linear(3, 3), "norm": nn.LayerNorm(3)})
    model.cls_token = nn.Parameter(torch.zeros(1, 1, 3))
    decayed, plain = parameter_groups(model, 0.05)
    names = {id(value): name for name, value in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"cls_token", "linear.weight"}
    assert decayed["weight_decay"] == 0.05
    assert {names[id(p)] for p in plain["params"]} == {"linear.bias", "norm.weight", "norm.bias"}
    assert plain["weight_decay"] == 0.0


def test_deepspeed_accumulates_and_reduces_in_fp32():
    cfg = config(train={"steps": 10, "global_batch": 64, "micro_batch": 8, "precision": "bf16"})
    values = deepspeed_config(cfg, batch_layout(cfg, 2))
    assert values["gradient_accumulation_steps"] == 4
    assert values["train_batch_size"] == 64
    assert values["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}
    assert values["communication_data_type"] == "fp32"
    assert values["zero_optimization"]["stage"] == 1


def test_deepspeed_does_not_wait_for_the_device_to_time_it():
    cfg = config()
    parsed = DeepSpeedConfig(deepspeed_config(cfg, batch_layout(cfg, 1)))
    assert not parsed.timers_config.enabled


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}',
            "gradient_clipping = 1.0 contradicts",
        ),
        (
            '{"zero_optimization": {"stage": 1}, "bf16": {"enabled": false}}',
            "bf16.enabled = False contradicts",
        ),
        ('{"zero_optimization": {"stage": 1}, "optimizer": {}}', "optimizer: not ours"),
        ('{"zero_optimization": {"stage": 4}}', "stage = 4"),
        ('{"zero_optimization": {"stage": 0}}', "no fp32 masters at stage 0"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "parameters: needs .* 3, not 2"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', "offload_param = .* device cpu"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}', "ratio = 0.5"),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', "cpu_offload = True: write offload_optimizer"),
        ('{"zero_optimization": {"stage": 2, "compute_grad_norm": false}}', "compute_grad_norm = False contradicts"),
        ("{}", "stage = None"),
        ('{"zero_optimization": 5}', "stage = None"),
        ("[1]", "JSON object"),
        ("{", "not valid JSON"),
    ],
)
def test_own_deepspeed_file_may_not_contradict_the_run(tmp_path, content, says):
    path = tmp_path / "own.json"
    path.write_text(content)
    cfg = config(engine={"deepspeed": str(path)})
    with pytest.raises(ConfigError, match=says):
        deepspeed_config(cfg, batch_layout(cfg, 1))


@pytest.mark.parametrize(
    ("engine", "precision", "stage", "moved"),
    [
        ({"zero_stage": 0}, "fp32", 0, set()),
        ({"zero_stage": 2}, "bf16", 2, set()),
        ({"zero_stage": 2, "offload": "optimizer"}, "bf16", 2, {"offload_optimizer"}),
        ({"zero_stage": 3, "offload": "parameters"}, "fp16", 3, {"offload_optimizer", "offload_param"}),
    ],
)
def test_stage_and_offload_select_a_file_of_ours(engine, precision, stage, moved):
    cfg = config(engine=engine, train={"steps": 10, "precision": precision})
    values = deepspeed_config(cfg, batch_layout(cfg, 1))
    assert values["zero_optimization"]["stage"] == stage
    assert {name for name in values["zero_optimization"] if name.startswith("offload")} == moved
    assert values["fp16"]["enabled"] == (precision == "fp16")


def test_what_the_run_does_not_decide_is_taken_from_an_own_file(tmp_path):
    path = tmp_path / "own.json"
    path.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true}, "fp16": {"initial_scale_power": 4}}')
    cfg = config(engine={"deepspeed": str(path)}, train={"steps": 10, "precision": "fp16"})
    values = deepspeed_config(cfg, batch_layout(cfg, 1))
    assert values["fp16"] == {"enabled": True, "initial_scale_power": 4}
    assert values["zero_optimization"] == {"stage": 2, "overlap_comm": True, "compute_grad_norm": True}


def test_fp16_is_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="train.precision = fp16: needs a GPU"):
        check_precision("fp16", torch.device("cpu"))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_step_that_does_not_fit_the_memory_says_which_setting_to_lower(error):
    fault = pytest.raises(ConfigError, match="train.micro_batch = 4: .*lower train.micro_batch")
    with fault, fitting_memory(torch.device("cpu"), micro_batch=4):
        raise error


def test_memory_that_is_really_short_is_noticed():
    fault = pytest.raises(ConfigError, match="train.micro_batch = 4")
    with fault, fitting_memory(torch.device("cpu"), micro_batch=4):
        torch.empty(2**60)


def test_other_errors_of_a_step_are_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="shapes"), fitting_memory(torch.device("cpu"), micro_batch=4):
        raise RuntimeError("shapes do not match")
