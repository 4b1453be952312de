"""The launchers' settings in `training/accelerate_configs/`, read by Accelerate itself; what a CPU can run is run."""

import json
import socket
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from diffusers import DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from scripts import ENVIRONMENT, ROOT, TINY_UNET, TINY_UVIT, losses
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from unets import config_of

from diffusers_scalelong import ScaleLongUNet2DConditionModel, ScaleLongUNet2DModel, ScaleLongUViT2DModel

CONFIGS = ROOT / "training" / "accelerate_configs"
KINDS = {
    "cpu": DistributedType.NO,
    "one_gpu": DistributedType.NO,
    "multi_gpu_ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
    "multi_node": DistributedType.MULTI_GPU,
}


def launch_arguments(name: str, *flags: str) -> Namespace:
    """What `accelerate launch` makes of a file and the command line."""
    command = ["--config_file", str(CONFIGS / f"{name}.yaml"), *flags, "train.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    args.deepspeed_fields_from_accelerate_config = ""
    return args


def test_every_file_is_known_here():
    assert {path.stem for path in CONFIGS.iterdir()} == KINDS.keys()


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_knows_every_key(name):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))  # raises at an unknown key of the top level
    assert config.distributed_type == KINDS[name]
    # Of the nested keys it would take any: each must be an argument of the launcher.
    known = vars(launch_command_parser().parse_args(["train.py"]))
    assert all(key in known for key in [*config.fsdp_config, *config.deepspeed_config])
    assert path.read_text().startswith("# ")
    assert "accelerate launch --config_file training/accelerate_configs/" + path.name in path.read_text()


@pytest.mark.parametrize("name", KINDS)
def test_the_launcher_takes_them(name):
    args = launch_arguments(name)
    assert (args.multi_gpu, args.use_fsdp, args.use_deepspeed) == (
        KINDS[name] == DistributedType.MULTI_GPU,
        KINDS[name] == DistributedType.FSDP,
        KINDS[name] == DistributedType.DEEPSPEED,
    )
    # It ignores keys whose flags have a default: whatever the file says must have arrived.
    stored = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    nested = {key: value for values in stored.values() if isinstance(values, dict) for key, value in values.items()}
    plain = {key: value for key, value in stored.items() if not isinstance(value, dict)}
    del plain["compute_environment"], plain["distributed_type"]
    expected = {**plain, **nested, "dynamo_backend": "no"}
    assert {key: getattr(args, key) for key in expected} == expected
    # The command line wins, as the comments in the files say.
    assert launch_arguments(name, "--mixed_precision", "no", "--num_processes", "4").num_processes == 4


def test_environments_of_the_processes():
    assert prepare_simple_launcher_cmd_env(launch_arguments("cpu"))[1]["ACCELERATE_USE_CPU"] == "True"
    one_gpu = prepare_simple_launcher_cmd_env(launch_arguments("one_gpu", "--gpu_ids", "1"))[1]
    assert (one_gpu["ACCELERATE_USE_CPU"], one_gpu["CUDA_VISIBLE_DEVICES"]) == ("False", "1")

    ddp = launch_arguments("multi_gpu_ddp", "--num_processes", "4")
    assert prepare_multi_gpu_env(ddp)["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert ddp.nproc_per_node == "4"

    node = launch_arguments("multi_node", "--machine_rank", "1", "--main_process_ip", "10.0.0.1")
    prepare_multi_gpu_env(node)
    assert (node.nnodes, node.nproc_per_node, node.node_rank) == ("2", "8", 1)
    assert node.rdzv_endpoint == "10.0.0.1:29500"

    deepspeed = prepare_deepspeed_cmd_env(launch_arguments("deepspeed_zero2"))[1]
    assert deepspeed["ACCELERATE_USE_DEEPSPEED"] == "true"
    assert deepspeed["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
    assert deepspeed["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == "auto"


@pytest.mark.parametrize(
    ("cls", "config", "flags", "units"),
    [
        (
            *(ScaleLongUNet2DConditionModel, config_of(UNet2DConditionModel, "CrossAttnUpBlock2D"), []),
            {"BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"},
        ),
        (ScaleLongUViT2DModel, TINY_UVIT, [], {"UViTBlock"}),
        (ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), [], set()),
        (
            *(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D")),
            *(["--fsdp_transformer_layer_cls_to_wrap", "ResnetBlock2D"], {"ResnetBlock2D"}),
        ),
    ],
    ids=["text-conditional UNet", "U-ViT", "UNet", "UNet with the flag"],
)
def test_fsdp_gathers_by_the_units_that_the_file_names(monkeypatch, cls, config, flags, units):
    environment = prepare_multi_gpu_env(launch_arguments("fsdp2", *flags))
    for key in [key for key in environment if "FSDP" in key]:
        monkeypatch.setenv(key, environment[key])
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy
    model = cls(**{key: value for key, value in config.items() if key != "_class_name"}, skip_scaling="ls")
    is_unit = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert is_unit is not None
    assert {type(module).__name__ for module in model.modules() if is_unit(module)} == units


def test_a_run_with_the_cpu_file(tmp_path: Path) -> None:
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "ACCELERATE_USE_CPU"}
    result = subprocess.run(training_command(tmp_path, "cpu"), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(losses(tmp_path / "run")) == 3
    assert "Mixed precision type: no" in result.stderr
    assert "Device: cpu" in result.stderr
    assert DiffusionPipeline.from_pretrained(tmp_path / "run").unet.config.skip_scaling == "cs"


def test_two_machines_on_two_cpus(tmp_path: Path) -> None:
    """Two launchers, as on two machines; with ACCELERATE_USE_CPU the processes that they start take no GPU."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launchers = []
    for rank in range(2):
        machine = ["--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = training_command(tmp_path, "multi_node", "--num_processes", "2", "--mixed_precision", "no", *machine)
        launchers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT))
    errors = [launcher.communicate()[1] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    assert "Distributed environment: DistributedType.MULTI_CPU" in errors[0]
    assert "Num processes: 2" in errors[0]
    assert len(losses(tmp_path / "run")) == 3
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert len(list(checkpoint.glob("random_states_*.pkl"))) == 2


def training_command(folder: Path, name: str, *flags: str) -> list[str]:
    config = folder / "tiny.json"
    config.write_text(json.dumps(TINY_UNET))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{name}.yaml")]
    command += [*flags, str(ROOT / "training" / "train_unconditional.py"), "--model_config_name_or_path", str(config)]
    command += ["--dataset_name", "digits", "--cache_dir", str(folder / "cache"), "--skip_scaling", "cs"]
    command += ["--max_train_steps", "3", "--ddpm_num_inference_steps", "1", "--eval_batch_size", "1"]
    return [*command, "--output_dir", str(folder / "run")]
