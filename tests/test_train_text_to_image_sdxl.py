"""The SDXL script, run for real on a small pipeline and captioned images."""

from statistics import mean

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from scripts import launch, load_script, losses
from sdxl_pipelines import write_sdxl
from text_pipelines import tiny_vae, write_captioned_images, write_stable_diffusion

from diffusers_scalelong import ScaleLongUNet2DConditionModel

SCRIPT = "train_text_to_image_sdxl.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pipeline, `sdxl`, and captioned images, `data`."""
    folder = tmp_path_factory.mktemp("base")
    write_sdxl(folder / "sdxl")
    write_captioned_images(folder / "data", 20)
    return folder


def flags(base, cache="cache"):
    return [
        *("--pretrained_model_name_or_path", base / "sdxl", "--train_data_dir", base / "data", "--seed", 0),
        *("--cache_dir", base / cache, "--resolution", 16, "--learning_rate", 2e-3),
    ]


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def encoded_files(base, cache="cache"):
    """The files with encoded rows, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in (base / cache).rglob("cache-*.arrow") if path.stat().st_size}


def test_it_learns_and_saves_a_pipeline_that_samples(base, tmp_path):
    torch.manual_seed(1)
    vae = tiny_vae(scaling_factor=0.8)
    vae.save_pretrained(tmp_path / "vae")
    out = tmp_path / "run"
    launch(
        *(SCRIPT, *flags(base, "own cache"), "--skip_scaling", "cs", "--kappa", 0.7, "--output_dir", out),
        *("--max_train_steps", 100, "--train_batch_size", 8),
        *("--pretrained_vae_model_name_or_path", tmp_path / "vae", "--gradient_checkpointing"),
        *("--validation_prompt", "a red wall", "--num_validation_images", 2, "--validation_epochs", 20),
    )
    curve = losses(out)
    assert len(curve) == 100
    assert mean(curve[-10:]) < 0.6 * mean(curve[:5])

    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline) is StableDiffusionXLPipeline
    assert type(pipeline.unet) is ScaleLongUNet2DConditionModel
    assert pipeline.unet.kappas == pytest.approx([0.7**i for i in range(pipeline.unet.num_skips)])
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    assert pipeline.vae.config.scaling_factor == 0.8
    before = StableDiffusionXLPipeline.from_pretrained(base / "sdxl")
    for kept, name in ((vae, "vae"), (before.text_encoder, "text_encoder"), (before.text_encoder_2, "text_encoder_2")):
        saved = getattr(pipeline, name).state_dict()
        assert all(torch.equal(saved[key], value) for key, value in kept.state_dict().items())
    trained = pipeline.unet.state_dict()
    assert not any(torch.equal(trained[key], value) for key, value in before.unet.state_dict().items())

    # 100 steps of 8 samples are 40 epochs of 20: pictures at half the way, and at the end.
    pictures = sorted((out / "samples").iterdir())
    assert [picture.name for picture in pictures] == ["step-0000050.png", "step-0000100.png"]
    assert all(np.asarray(Image.open(picture)).std() > 0 for picture in pictures)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("a red wall", num_inference_steps=2, height=16, width=16, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


# Everything that is drawn at random, and an optimiser step of eight samples.
DRAWS = ["--random_flip", "--proportion_empty_prompts", 0.3, "--noise_offset", 0.1, "--snr_gamma", 5]
DRAWS += ["--prediction_type", "v_prediction"]
DRAWS += ["--skip_scaling", "ls", "--ls_initial_gate", 0.9, "--use_ema", "--checkpointing_steps", 4]


@pytest.fixture(scope="module")
def straight(base):
    """A run of six steps."""
    out = base / "straight"
    options = ["--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--max_train_steps", 6]
    launch(SCRIPT, *flags(base), *DRAWS, *options, "--output_dir", out)
    return out


def test_a_resumed_run_equals_one_that_never_stopped(base, straight):
    out = base / "stopped"
    run = [SCRIPT, *flags(base), *DRAWS, "--output_dir", out]
    run += ["--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--dataloader_num_workers", 1]
    encoded = encoded_files(base)
    launch(*run, "--max_train_steps", 4)
    launch(*run, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert losses(out) == losses(straight)
    for name in ("unet", "checkpoint-6/unet", "checkpoint-6/unet_ema"):
        expected, actual = weights(straight / name), weights(out / name)
        assert expected.keys() == actual.keys()
        assert all(torch.equal(actual[key], value) for key, value in expected.items())
    assert encoded_files(base) == encoded, "the later runs found the encoded rows in the cache"
    scheduler = EulerDiscreteScheduler.from_pretrained(out, subfolder="scheduler")
    assert scheduler.config.prediction_type == "v_prediction"


def test_two_processes_train_as_one_does(base, straight):
    out = base / "two"
    options = ["--train_batch_size", 2, "--gradient_accumulation_steps", 2, "--max_train_steps", 6]
    launch(SCRIPT, *flags(base, "cache of two"), *DRAWS, *options, "--output_dir", out, num_processes=2)
    assert losses(out) == pytest.approx(losses(straight), rel=1e-4)
    expected, actual = weights(straight / "unet"), weights(out / "unet")
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-2, atol=1e-4)
    assert len(encoded_files(base, "cache of two")) == len(encoded_files(base))


@pytest.fixture
def start(base, tmp_path):
    """Runs the script in this process, for what it refuses before the first step."""
    script = load_script(SCRIPT)

    def run(*args):
        arguments = [*flags(base), "--output_dir", tmp_path / "run", *args]
        try:
            script.main(script.build_parser().parse_args(list(map(str, arguments))))
        finally:
            AcceleratorState._reset_state()
            PartialState._reset_state()

    yield run
    assert not (tmp_path / "run" / "loss.csv").exists(), "no training step was made"


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--streaming", "--max_train_steps", "1"], ValueError, "--streaming is not possible"),
        (["--pretrained_model_name_or_path", "nowhere"], OSError, "nowhere"),
        (["--pretrained_vae_model_name_or_path", "nowhere"], OSError, "nowhere"),
        (["--caption_column", "caption"], ValueError, "no column 'caption'.*image, text.*--caption_column"),
        (["--validation_prompt", ""], ValueError, "prompt is empty"),
        (["--proportion_empty_prompts", "1.5"], ValueError, "--proportion_empty_prompts must be a probability"),
        (["--resolution", "20"], ValueError, "--resolution 20 must be a multiple of 8"),
        (["--skip_scaling", "uniform", "--kappa", "0.5", "0.6"], ValueError, "2 constants.*4 long skip"),
        (["--image_interpolation_mode", "sharp"], ValueError, "lanczos"),
        (["--resume_from_checkpoint", "checkpoint-3"], OSError, "no checkpoint checkpoint-3"),
    ],
)
def test_bad_command_lines_stop_before_training(start, args, error, message):
    with pytest.raises(error, match=message):
        start(*args)


def test_another_kind_of_pipeline_is_refused(start, tmp_path):
    write_stable_diffusion(tmp_path / "sd")
    with pytest.raises(ValueError, match=r"is a StableDiffusionPipeline.*trains a StableDiffusionXLPipeline"):
        start("--pretrained_model_name_or_path", tmp_path / "sd")


def test_captions_are_checked_before_anything_is_encoded(start, base, tmp_path):
    write_captioned_images(tmp_path / "data", 3)
    metadata = tmp_path / "data" / "metadata.jsonl"
    metadata.write_text(metadata.read_text().replace('"a green wall"', "null"))
    before = encoded_files(base)
    with pytest.raises(ValueError, match="row 1 has None"):
        start("--train_data_dir", tmp_path / "data")
    assert encoded_files(base) == before
