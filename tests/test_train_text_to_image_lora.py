"""The LoRA script, run for real on a small Stable Diffusion pipeline and captioned images."""

from statistics import mean

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from scripts import launch, losses, start
from text_pipelines import NUM_TOKENS, write_captioned_images, write_stable_diffusion

from diffusers_scalelong import ScaleLongUNet2DConditionModel
from diffusers_scalelong.plots import save_image_grid
from diffusers_scalelong.training_run import TrainingRun

SCRIPT = "train_text_to_image_lora.py"
LORA, SCALING = "pytorch_lora_weights.safetensors", "skip_scaling.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pipeline, `sd`, and captioned images, `data`."""
    folder = tmp_path_factory.mktemp("base")
    write_stable_diffusion(folder / "sd")
    write_captioned_images(folder / "data", 16)
    return folder


def flags(base):
    return [
        *("--pretrained_model_name_or_path", base / "sd", "--train_data_dir", base / "data", "--seed", 5),
        *("--cache_dir", base / "cache", "--resolution", 16, "--train_batch_size", 8, "--learning_rate", 1e-2),
    ]


@pytest.fixture
def finished(monkeypatch):
    """The runs that ended in this process."""
    runs = []
    finish = TrainingRun.finish
    monkeypatch.setattr(
        TrainingRun, "finish", lambda run, *args, **kwargs: (runs.append(run), finish(run, *args, **kwargs))
    )
    return runs


def load(base, out, **scaling):
    """What the README tells users to do with the result."""
    unet = ScaleLongUNet2DConditionModel.from_pretrained(base / "sd", subfolder="unet", **scaling)
    unet.load_skip_scaling(out)
    pipeline = StableDiffusionPipeline.from_pretrained(base / "sd", unet=unet)
    pipeline.load_lora_weights(out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def predict(unet):
    random = torch.Generator().manual_seed(0)
    inputs = (torch.randn(2, 4, 8, 8, generator=random), torch.tensor([3, 700]))
    with torch.no_grad():
        return unet(*inputs, torch.randn(2, NUM_TOKENS, 16, generator=random)).sample


def assert_same_files(first, second):
    for name in (LORA, SCALING):
        expected, actual = load_file(first / name), load_file(second / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(expected[key], actual[key]) for key in expected)


def test_lora_and_gates_learn_and_the_result_draws_the_same_images(base, tmp_path):
    arguments = [*flags(base), "--skip_scaling", "ls", "--ls_initial_gate", 0.9, "--max_train_steps", 60]
    out, untrained = tmp_path / "run", tmp_path / "untrained"
    launch(
        *(SCRIPT, *arguments, "--output_dir", out, "--gradient_checkpointing", "--dataloader_num_workers", 1),
        *("--validation_prompt", "a red wall", "--validation_epochs", 15, "--num_validation_images", 2),
    )
    start(SCRIPT, *arguments, "--output_dir", untrained, "--learning_rate", 0)
    # The same draws in both runs: only the training makes the difference.
    assert losses(out)[0] == losses(untrained)[0]
    assert mean(losses(out)[-20:]) < 0.9 * mean(losses(untrained)[-20:])
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["step-0000030.png", "step-0000060.png"]

    lora, gates = load_file(out / LORA), load_file(out / SCALING)
    assert {name.split(".lora.")[0].split(".")[-1] for name in lora} == {"to_q", "to_k", "to_v", "0"}
    assert all(name.startswith("unet.") for name in lora)
    assert all(min(weight.shape) == 4 for weight in lora.values()), "the rank"
    assert all(weight.abs().max() > 0 for name, weight in lora.items() if "lora.up" in name)
    initial = load_file(untrained / SCALING)
    assert all(not torch.equal(gates[name], initial[name]) for name in gates if "linear_2" in name)

    pipeline = load(base, out, skip_scaling="ls")
    generator = torch.Generator().manual_seed(5)
    images = [
        pipeline("a red wall", generator=generator, num_inference_steps=30, output_type="np").images for _ in range(2)
    ]
    save_image_grid(np.concatenate(images), tmp_path / "again.png")
    drawn, again = (np.asarray(Image.open(path)) for path in (out / "samples.png", tmp_path / "again.png"))
    assert (drawn == again).all()
    assert not (out / "model_index.json").exists()
    assert not (out / ".results.partial").exists()


@pytest.mark.parametrize(
    "scaling",
    [
        {"skip_scaling": "ls"},
        {"skip_scaling": "ls_unshared"},
        {"skip_scaling": "cs", "kappa": 0.5},
        {"skip_scaling": "none"},
    ],
)
def test_the_result_loads_as_the_trained_model_bit_for_bit(base, tmp_path, finished, scaling):
    chosen = [item for key, value in scaling.items() for item in (f"--{key}", value)]
    start(SCRIPT, *flags(base), *chosen, "--rank", 2, "--max_train_steps", 3, "--output_dir", tmp_path / "run")
    trained = finished[0].model.eval()
    loaded = load(base, tmp_path / "run", skip_scaling=scaling["skip_scaling"]).unet.eval()
    assert loaded.kappas == trained.kappas
    assert torch.equal(predict(loaded), predict(trained))
    unet = ScaleLongUNet2DConditionModel.from_pretrained(base / "sd", subfolder="unet", **scaling)
    assert not torch.equal(predict(unet), predict(trained)), "the training has changed it"


@pytest.mark.parametrize("scaling", [("ls",), ("cs", "--kappa", 0.5, "--kappa_warmup_steps", 4)], ids=["ls", "cs"])
def test_a_resumed_run_equals_one_that_never_stopped(base, tmp_path, finished, scaling):
    arguments = [
        *(*flags(base), "--skip_scaling", *scaling, "--train_batch_size", 3, "--gradient_accumulation_steps", 2),
        *("--checkpointing_steps", 2, "--random_flip"),
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    start(SCRIPT, *arguments, "--max_train_steps", 6, "--output_dir", straight)
    start(SCRIPT, *arguments, "--max_train_steps", 3, "--output_dir", stopped)
    again = ["--max_train_steps", 6, "--output_dir", stopped, "--resume_from_checkpoint", "checkpoint-2"]
    with pytest.raises(ValueError, match=r"checkpoint-2 is of another run.*--rank"):
        start(SCRIPT, *arguments, *again, "--rank", 3)
    start(SCRIPT, *arguments, *again)
    assert losses(stopped) == losses(straight)
    assert_same_files(stopped, straight)
    assert_same_files(stopped / "checkpoint-6", straight / "checkpoint-6")
    optimizers = [
        torch.load(folder / "checkpoint-6" / "optimizer.bin", weights_only=True)["state"]
        for folder in (stopped, straight)
    ]
    assert all(
        torch.equal(optimizers[0][index][key], optimizers[1][index][key])
        for index in optimizers[1]
        for key in optimizers[1][index]
    )
    if scaling[0] == "cs":
        # A checkpoint on the way holds the constants in force then.
        halfway = load(base, stopped / "checkpoint-2", skip_scaling="uniform").unet.kappas
        targets = finished[0].model.kappas
        assert targets == tuple(0.5**i for i in range(len(targets)))
        assert halfway == tuple(0.5 + 0.5 * target for target in targets)
    assert [run.global_step for run in finished] == [6, 3, 6]


def test_mixed_precision_trains_float32_on_a_frozen_unet_of_less(base, tmp_path, finished):
    start(
        *(SCRIPT, *flags(base), "--skip_scaling", "ls", "--ls_initial_gate", 0.99, "--mixed_precision", "bf16"),
        *("--max_train_steps", 2, "--output_dir", tmp_path / "run", "--validation_prompt", "a red wall"),
    )
    unet = finished[0].model
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or name.startswith("skip_scaler.") for name in trained)
    for name, parameter in unet.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
    for name in (LORA, SCALING):
        assert {weight.dtype for weight in load_file(tmp_path / "run" / name).values()} == {torch.float32}
    assert (tmp_path / "run" / "samples.png").exists()
    start(SCRIPT, *flags(base), "--skip_scaling", "ls", "--max_train_steps", 1, "--output_dir", tmp_path / "float32")
    assert losses(tmp_path / "run")[0] != losses(tmp_path / "float32")[0]


def test_two_processes_train_what_one_trains(base, tmp_path):
    arguments = [*flags(base), "--skip_scaling", "ls", "--max_train_steps", 3]
    start(SCRIPT, *arguments, "--output_dir", tmp_path / "one")
    launch(SCRIPT, *arguments, "--train_batch_size", 4, "--output_dir", tmp_path / "two", num_processes=2)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    for name in (LORA, SCALING):
        one, two = load_file(tmp_path / "one" / name), load_file(tmp_path / "two" / name)
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--pretrained_model_name_or_path", "nowhere/nothing"], OSError, "nowhere/nothing is no pipeline"),
        (["--pretrained_model_name_or_path", "{base}/data"], OSError, "data is no pipeline"),
        (["--use_ema"], ValueError, "--use_ema.*LoRA"),
        (["--rank", 0], ValueError, "--rank must be at least 1"),
        (["--validation_prompt", ""], ValueError, "prompt is empty"),
        (["--caption_column", "caption"], ValueError, "no column 'caption'"),
    ],
)
def test_bad_input_stops_before_the_first_step(base, tmp_path, args, error, message):
    args = [str(arg).format(base=base) for arg in args]
    with pytest.raises(error, match=message):
        start(SCRIPT, *flags(base), "--output_dir", tmp_path / "run", *args)
    assert not (tmp_path / "run" / "loss.csv").exists()
