"""FSDP2 on two CPU processes: sharded models compute what whole ones do, and a sharded run is the run of DDP.

Accelerate turns FSDP on for accelerators alone. So on a CPU `start_fsdp` sets by hand the two attributes that it sets
itself on GPUs; the settings are those of `fsdp2.yaml`, and all that follows is Accelerate's FSDP and ours. The tests
start this file under torchrun.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import Accelerator, DistributedType
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from scripts import ENVIRONMENT, ROOT, TINY_UNET, TINY_UVIT, TORCHRUN, load_script, losses
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from unets import config_of, inputs_of, seeded

from diffusers_scalelong import ScaleLongUNet2DConditionModel, ScaleLongUNet2DModel, ScaleLongUViT2DModel
from diffusers_scalelong.training_setup import start_accelerator

MODELS = [
    (ScaleLongUNet2DModel, config_of(UNet2DModel, "AttnUpBlock2D")),
    (ScaleLongUNet2DConditionModel, config_of(UNet2DConditionModel, "CrossAttnUpBlock2D")),
    (ScaleLongUViT2DModel, TINY_UVIT | {"cross_attention_dim": 24, "num_context_tokens": 5}),
]
UNITS = ("AttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "ResnetBlock2D", "BasicTransformerBlock", "UViTBlock")
FULL = StateDictOptions(full_state_dict=True)


def torchrun(*args: object, **environment: str) -> None:
    command = [*TORCHRUN, "2", __file__, *map(str, args)]
    variables = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "tests")} | environment
    result = subprocess.run(command, capture_output=True, text=True, env=variables)
    assert result.returncode == 0, result.stderr[-6000:]


# Sharded models


def test_sharded_models_compute_what_whole_ones_do():
    torchrun("models")


def check_models() -> None:
    for cls, config in MODELS:
        config = {key: value for key, value in config.items() if key != "_class_name"}
        for scaling in ({"skip_scaling": "cs", "kappa": 0.6}, {"skip_scaling": "ls"}):
            check_model(lambda cls=cls, config=config, scaling=scaling: seeded(cls, config, **scaling))


def check_model(make: Callable[[], torch.nn.Module]) -> None:
    rank = torch.distributed.get_rank()
    model, whole = shard(make()), make()
    assert all(isinstance(parameter, torch.distributed.tensor.DTensor) for parameter in model.parameters())
    inputs = inputs_of(whole, batch_size=2)
    own_inputs = {key: value[rank : rank + 1] for key, value in inputs.items()}

    # κ warm-up, output and gradients: the mean over the processes is the mean over the batch
    outputs = []
    for progress in (0.0, 0.5) if whole.kappas else (1.0,):
        if whole.kappas:
            model.warm_up_kappa(progress)
            whole.warm_up_kappa(progress)
        outputs.append(whole(**inputs).sample)
        own_output = model(**own_inputs).sample
        torch.testing.assert_close(own_output, outputs[-1][rank : rank + 1], rtol=1e-4, atol=1e-5)
        own_output.square().mean().backward()
        outputs[-1].square().mean().backward()
    assert len(outputs) == 1 or not torch.allclose(*outputs, rtol=1e-3, atol=1e-4)
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    assert gradients.keys() == {name for name, _ in model.named_parameters()}
    assert all(gradient.any() for name, gradient in gradients.items() if name.startswith("skip_scaler"))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-3, atol=1e-5, msg=name)

    # Optimiser and moving average
    for each in (model, whole):
        average = EMAModel(each.parameters(), decay=0.5)
        for _ in range(3):
            torch.optim.SGD(each.parameters(), lr=0.01).step()
            average.step(each.parameters())
        average.store(each.parameters())
        average.copy_to(each.parameters())
        averaged = {name: value.clone() for name, value in get_model_state_dict(each, options=FULL).items()}
        average.restore(each.parameters())
        if each is model:
            sharded_average = averaged
    trained = get_model_state_dict(model, options=FULL)
    assert trained.keys() == whole.state_dict().keys()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(sharded_average[name], averaged[name], rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(trained["conv_out.weight"], sharded_average["conv_out.weight"])

    # The gathered weights load into a sharded and a whole model, and come back exactly
    other = shard(make())
    set_model_state_dict(other, dict(trained), options=FULL)
    again = get_model_state_dict(other, options=FULL)
    assert [name for name in trained if not torch.equal(trained[name], again[name])] == []
    whole.load_state_dict(trained)
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).sample, whole_at_target(whole)(**inputs).sample)


def whole_at_target(model: torch.nn.Module) -> torch.nn.Module:
    if model.kappas:
        model.warm_up_kappa(1.0)
    return model


def shard(model: torch.nn.Module) -> torch.nn.Module:
    for module in reversed(list(model.modules())):  # the inner ones first
        if type(module).__name__ in UNITS:
            fully_shard(module)
    fully_shard(model)
    blocks = model.out_blocks if isinstance(model, ScaleLongUViT2DModel) else model.up_blocks
    assert all(isinstance(block, FSDPModule) for block in blocks)
    return model


# Sharded runs


def test_a_sharded_run_is_the_run_of_ddp_and_resumes(tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_UNET))
    arguments = ["--config_file", str(ROOT / "training" / "accelerate_configs" / "fsdp2.yaml"), "--num_processes", "2"]
    arguments += ["--fsdp_transformer_layer_cls_to_wrap", "ResnetBlock2D", "x.py"]
    launch_arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(arguments))
    environment = prepare_multi_gpu_env(launch_arguments)
    torchrun("runs", tmp_path, **{key: value for key, value in environment.items() if "FSDP" in key})
    for scaling in ("ls", "cs"):
        ddp, fsdp, resumed, half = (tmp_path / f"{scaling}-{name}" for name in ("ddp", "fsdp", "resumed", "bf16"))
        torch.testing.assert_close(losses(fsdp), losses(ddp), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses(half), losses(ddp)[:2], rtol=2e-2, atol=1e-2)
        assert losses(half) != losses(ddp)[:2]
        assert losses(resumed) == losses(fsdp)
        for name in (
            "checkpoint-2/unet",
            "checkpoint-2/unet_ema",
            "checkpoint-4/unet",
            "checkpoint-4/unet_ema",
            "unet",
        ):
            expected, actual, again = (weights(run / name) for run in (ddp, fsdp, resumed))
            assert expected.keys() == actual.keys()
            for key, value in expected.items():
                torch.testing.assert_close(actual[key], value, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")
                assert torch.equal(again[key], actual[key]), f"{name} {key}"
            # The constants in force, too
            configs = [json.loads((run / name / "config.json").read_text()) for run in (ddp, fsdp, resumed)]
            assert configs[0]["skip_scaling"] == configs[1]["skip_scaling"] == configs[2]["skip_scaling"]
            assert configs[0]["kappa"] == configs[1]["kappa"] == configs[2]["kappa"]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def check_runs(folder: Path) -> None:
    for scaling in (["ls"], ["cs", "--kappa_warmup_steps", 3]):
        flags = ["--model_config_name_or_path", folder / "tiny.json", "--dataset_name", "digits", "--seed", 0]
        flags += ["--train_batch_size", 8, "--ddpm_num_inference_steps", 1, "--eval_batch_size", 1, "--use_ema"]
        flags += ["--cache_dir", folder / "cache", "--lr_warmup_steps", 2, "--skip_scaling", *scaling]
        flags += ["--lr_scheduler", "constant_with_warmup", "--checkpointing_steps", 2]
        for name, start, *more in (
            ("ddp", start_ddp, "--max_train_steps", 4),
            ("fsdp", start_fsdp, "--max_train_steps", 4),
            ("bf16", start_fsdp, "--max_train_steps", 2, "--mixed_precision", "bf16"),
            ("resumed", start_fsdp, "--max_train_steps", 2),
            ("resumed", start_fsdp, "--max_train_steps", 4, "--resume_from_checkpoint", "latest"),
        ):
            train_unconditional(start, *flags, "--output_dir", folder / f"{scaling[0]}-{name}", *more)


def start_ddp(args: argparse.Namespace) -> Accelerator:
    with patch.dict(os.environ, {"ACCELERATE_USE_FSDP": "false"}):
        accelerator = start_accelerator(args)
    assert accelerator.distributed_type == DistributedType.MULTI_CPU
    return accelerator


def start_fsdp(args: argparse.Namespace) -> Accelerator:
    accelerator = start_accelerator(args)
    # What AcceleratorState does itself for MULTI_GPU; the plugin reads fsdp2.yaml's settings from the environment.
    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):
        state.distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


# One process group for all runs: its processes do not leave a run at the same moment, so they could not meet again.
@patch.object(PartialState, "destroy_process_group", lambda state, group=None: None)
def train_unconditional(start: Callable[[argparse.Namespace], Accelerator], *flags: object) -> None:
    script = load_script("train_unconditional.py")
    script.start_accelerator = start
    with patch.object(sys, "argv", ["train_unconditional.py", *map(str, flags)]):
        script.main(*script.parse_args_with_preset(script.build_parser()))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    if sys.argv[1] == "models":
        check_models()
    else:
        check_runs(Path(sys.argv[2]))
    torch.distributed.destroy_process_group()
