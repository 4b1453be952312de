"""Saving, loading, adopting plain checkpoints, and what happens when a file is not what it should be."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from unets import CLASS_IDS, ONE_CASE_PER_CLASS, config_of, output_of, scaled_by_hand, seeded

from diffusers_scalelong import ScaleLongUNet2DConditionModel, ScaleLongUNet2DModel

METHODS = ("none", "uniform", "cs", "ls", "ls_unshared")
each_class = pytest.mark.parametrize(("plain_class", "scaled_class", "name"), ONE_CASE_PER_CLASS, ids=CLASS_IDS)
SMALL = config_of(UNet2DModel, "UpBlock2D")


def assert_same(loaded, original):
    assert type(loaded) is type(original)
    assert loaded.kappas == original.kappas
    state, expected = loaded.state_dict(), original.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    # Loaded tensors lie at other addresses, where the kernels may round differently, in plain Diffusers too.
    torch.testing.assert_close(output_of(loaded), output_of(original), rtol=1e-5, atol=1e-5)


@each_class
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
def test_a_model_survives_the_round_trip(plain_class, scaled_class, name, method, sharded, tmp_path):
    unet = seeded(scaled_class, config_of(plain_class, name), skip_scaling=method)
    unet.save_pretrained(tmp_path, max_shard_size="200KB" if sharded else "10GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == sharded
    assert_same(scaled_class.from_pretrained(tmp_path), unet)
    assert_same(AutoModel.from_pretrained(str(tmp_path)), unet)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["_class_name"] == scaled_class.__name__
    assert stored["skip_scaling"] == method
    assert not {"args", "kwargs"} & stored.keys()


@each_class
def test_constants_are_in_the_config_and_not_in_the_weights(plain_class, scaled_class, name, tmp_path):
    plain = seeded(plain_class, config_of(plain_class, name))
    unet = seeded(scaled_class, config_of(plain_class, name), skip_scaling="cs")
    assert unet.state_dict().keys() == plain.state_dict().keys()
    unet.set_kappa(0.55)
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kappa"] == 0.55
    assert scaled_class.from_pretrained(tmp_path).kappas[1] == 0.55


def test_the_default_constant_is_stored_by_value(tmp_path):
    seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="uniform").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["kappa"] == 2**-0.5


@each_class
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "sharded"])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("method", ["ls", "ls_unshared"])
def test_a_plain_checkpoint_gains_gates(plain_class, scaled_class, name, method, low_cpu_mem_usage, sharded, tmp_path):
    plain = seeded(plain_class, config_of(plain_class, name))
    plain.save_pretrained(tmp_path, max_shard_size="200KB" if sharded else "10GB")

    def load(seed):
        torch.manual_seed(seed)
        return scaled_class.from_pretrained(tmp_path, skip_scaling=method, low_cpu_mem_usage=low_cpu_mem_usage)

    first, again, other = load(0), load(0), load(1)
    assert not any(p.is_meta for p in first.parameters())
    assert_same(again, first)
    for key, value in plain.state_dict().items():
        assert torch.equal(first.state_dict()[key], value)
    for gate, other_gate in zip(first.skip_scaler.gates.values(), other.skip_scaler.gates.values(), strict=True):
        bound = gate.linear_1.in_features**-0.5  # PyTorch draws weights and biases from U(-1/√n, 1/√n)
        for parameter in gate.linear_1.parameters():
            assert 0 < parameter.abs().max() <= bound
        assert not torch.equal(gate.linear_1.weight, other_gate.linear_1.weight)


def test_a_plain_checkpoint_gains_gates_at_their_initial_value(tmp_path):
    plain = seeded(UNet2DModel, SMALL)
    plain.save_pretrained(tmp_path)
    unet = ScaleLongUNet2DModel.from_pretrained(tmp_path, skip_scaling="ls", ls_initial_gate=0.75)
    with scaled_by_hand([0.75] * 6):
        expected = output_of(plain)
    torch.testing.assert_close(output_of(unet), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}])
def test_gates_are_there_with_a_device_map_and_a_dtype(device_map, tmp_path):
    seeded(UNet2DModel, SMALL).save_pretrained(tmp_path)
    unet = ScaleLongUNet2DModel.from_pretrained(
        tmp_path, skip_scaling="ls", device_map=device_map, torch_dtype=torch.bfloat16
    )
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in unet.parameters())


@each_class
def test_a_plain_checkpoint_takes_constants(plain_class, scaled_class, name, tmp_path):
    plain = seeded(plain_class, config_of(plain_class, name))
    plain.save_pretrained(tmp_path)
    unet = scaled_class.from_pretrained(tmp_path, skip_scaling="uniform", kappa=0.25)
    with scaled_by_hand([0.25] * unet.num_skips):
        expected = output_of(plain)
    torch.testing.assert_close(output_of(unet), expected, rtol=1e-5, atol=1e-5)
    assert scaled_class.from_pretrained(tmp_path).config.skip_scaling == "none"


@each_class
@pytest.mark.parametrize("subfolder", [None, "unet"])
def test_a_plain_unet_is_adopted_and_given_back(plain_class, scaled_class, name, subfolder, tmp_path):
    plain = seeded(plain_class, config_of(plain_class, name))
    plain.save_pretrained(tmp_path / (subfolder or ""))
    adopted = scaled_class.from_pretrained(tmp_path, subfolder=subfolder, skip_scaling="cs", kappa=0.5)
    adopted.save_pretrained(tmp_path / "adopted")
    assert_same(scaled_class.from_pretrained(tmp_path / "adopted"), adopted)

    scaled_class.from_pretrained(tmp_path, subfolder=subfolder).to_unet().save_pretrained(tmp_path / "none")
    adopted.to_unet(drop_scaling=True).save_pretrained(tmp_path / "dropped")
    for folder in ("none", "dropped"):
        stored = json.loads((tmp_path / folder / "config.json").read_text())
        assert stored["_class_name"] == plain_class.__name__
        assert not {"skip_scaling", "kappa", "ls_reduction", "ls_initial_gate"} & stored.keys()
        back = plain_class.from_pretrained(tmp_path / folder)
        assert type(back) is plain_class
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in back.state_dict().items())
        torch.testing.assert_close(output_of(back), output_of(plain), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("stored", "override", "method", "kappa"),
    [
        ({"skip_scaling": "cs", "kappa": 0.5}, {"kappa": 0.9}, "cs", 0.9),
        ({"skip_scaling": "cs", "kappa": 0.5}, {"skip_scaling": "cs"}, "cs", 0.5),
        ({"skip_scaling": "cs", "kappa": 0.5}, {"skip_scaling": "uniform"}, "uniform", 2**-0.5),
        ({"skip_scaling": "cs", "kappa": 0.5}, {"skip_scaling": "uniform", "kappa": 0.5}, "uniform", 0.5),
        ({"skip_scaling": "cs", "kappa": 0.5}, {"skip_scaling": "none"}, "none", None),
        ({"skip_scaling": "cs", "kappa": 0.5}, {"skip_scaling": "ls"}, "ls", None),
        ({"skip_scaling": "uniform", "kappa": [0.5] * 6}, {"skip_scaling": "cs"}, "cs", 0.7),
        ({"skip_scaling": "ls", "ls_initial_gate": 0.9}, {"skip_scaling": "cs"}, "cs", 0.7),
        ({"skip_scaling": "ls", "ls_initial_gate": 0.9}, {"skip_scaling": "ls_unshared"}, "ls_unshared", None),
    ],
)
def test_arguments_at_load_override_the_stored_ones(stored, override, method, kappa, tmp_path):
    seeded(ScaleLongUNet2DModel, SMALL, **stored).save_pretrained(tmp_path)
    unet = ScaleLongUNet2DModel.from_pretrained(tmp_path, **override)
    assert (unet.config.skip_scaling, unet.config.kappa) == (method, kappa)
    output_of(unet)


def test_kappa_for_a_stored_learnable_model_is_refused(tmp_path):
    seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="ls").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leave it out"):
        ScaleLongUNet2DModel.from_pretrained(tmp_path, kappa=0.5)


@pytest.mark.parametrize("method", METHODS)
def test_a_pipeline_survives_the_round_trip(method, tmp_path):
    unet = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling=method)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers_scalelong", "ScaleLongUNet2DModel"]
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is DDPMPipeline
    assert_same(pipeline.unet, unet)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert_same(AutoModel.from_pretrained(str(tmp_path), subfolder="unet"), unet)


def test_a_fresh_process_loads_a_pipeline_after_the_import(tmp_path):
    unet = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="cs", kappa=0.6)
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    code = (
        "from diffusers import DiffusionPipeline\n{}\n"
        f"print(DiffusionPipeline.from_pretrained({str(tmp_path)!r}).unet.kappas[1])"
    )

    def run(statement):
        return subprocess.run([sys.executable, "-c", code.format(statement)], capture_output=True, text=True)

    assert run("import diffusers_scalelong").stdout.strip() == "0.6"
    without = run("")
    assert without.returncode != 0
    assert "diffusers_scalelong" in without.stderr


def test_importing_the_package_leaves_the_extras_alone():
    code = (
        "import sys, diffusers_scalelong\n"
        "print([m for m in ('matplotlib', 'datasets', 'tensorboard', 'sklearn') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


# Files that are not what they should be


@pytest.fixture
def saved(tmp_path):
    seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="cs").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2]], ids=["empty", "truncated"])
@pytest.mark.parametrize("name", ["config.json", "diffusion_pytorch_model.safetensors"])
def test_damaged_files_are_refused(saved, name, damage):
    file = saved / name
    file.write_bytes(damage(file.read_bytes()))
    damaged = file.read_bytes()
    with pytest.raises(OSError, match=r"config|checkpoint|safetensors"):
        ScaleLongUNet2DModel.from_pretrained(saved)
    assert file.read_bytes() == damaged


def test_the_config_of_another_class_is_refused(saved, tmp_path):
    with pytest.raises(ValueError, match=r"config of a ScaleLongUNet2DModel.*from_pretrained"):
        ScaleLongUNet2DConditionModel.from_pretrained(saved)
    plain_condition = config_of(*[ONE_CASE_PER_CLASS[1][i] for i in (0, 2)])
    seeded(ONE_CASE_PER_CLASS[1][0], plain_condition).save_pretrained(tmp_path / "condition")
    with pytest.raises(ValueError, match="config of a UNet2DConditionModel"):
        ScaleLongUNet2DModel.from_pretrained(tmp_path / "condition")


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_weights_of_another_model_are_refused(saved, low_cpu_mem_usage):
    config = json.loads((saved / "config.json").read_text())
    config["down_block_types"] = ["DownBlock2D", "AttnDownBlock2D"]
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="incomplete, or it belongs to another model"):
        ScaleLongUNet2DModel.from_pretrained(saved, low_cpu_mem_usage=low_cpu_mem_usage)


def test_half_a_gate_is_an_incomplete_file(tmp_path):
    from safetensors.torch import load_file, save_file

    seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="ls").save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["skip_scaler.gates.width_32.linear_2.bias"]
    save_file(weights, file)
    with pytest.raises(ValueError, match=r"width_32\.linear_2\.bias"):
        ScaleLongUNet2DModel.from_pretrained(tmp_path)


def test_invalid_scaling_in_a_stored_config_is_refused(saved):
    config = json.loads((saved / "config.json").read_text())
    config["kappa"] = -1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="greater than 0"):
        ScaleLongUNet2DModel.from_pretrained(saved)
