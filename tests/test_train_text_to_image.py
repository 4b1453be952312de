"""The text-to-image script, run for real on a small Stable Diffusion pipeline and captioned images."""

import argparse
import importlib.util
import json
from statistics import mean

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from diffusers import (
    DDPMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from PIL import Image
from safetensors.torch import load_file
from scripts import ROOT, TINY_UVIT, launch, load_script, losses, start
from text_pipelines import NUM_TOKENS, tiny_vae, write_captioned_images, write_stable_diffusion

from diffusers_scalelong import ScaleLongPipeline, ScaleLongUNet2DConditionModel, ScaleLongUViT2DModel
from diffusers_scalelong.diffusion_data import RunSampler
from diffusers_scalelong.text_to_image import encode_batch, latent_shape, load_captioned_samples

SCRIPT = "train_text_to_image.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a pipeline, `sd`, the same for v-prediction, `v`, and captioned images, `data`."""
    folder = tmp_path_factory.mktemp("base")
    write_stable_diffusion(folder / "sd")
    write_stable_diffusion(folder / "v", prediction_type="v_prediction")
    write_captioned_images(folder / "data", 16)
    return folder


def flags(base, pipeline="sd"):
    return [
        *("--pretrained_model_name_or_path", base / pipeline, "--train_data_dir", base / "data"),
        *("--cache_dir", base / "cache", "--resolution", 16, "--train_batch_size", 8),
    ]


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_it_learns_and_saves_a_pipeline_that_samples(base, tmp_path):
    out = tmp_path / "run"
    launch(
        *(SCRIPT, *flags(base), "--skip_scaling", "cs", "--kappa", 0.6, "--output_dir", out, "--use_ema"),
        *("--max_train_steps", 80, "--learning_rate", 2e-3, "--mixed_precision", "bf16", "--gradient_checkpointing"),
        *("--validation_prompts", "a red wall", "a blue wall", "--num_validation_images", 3),
        *("--validation_epochs", 20, "--dataloader_num_workers", 1),
    )
    curve = losses(out)
    assert len(curve) == 80
    assert mean(curve[-10:]) < 0.6 * mean(curve[:5])
    assert [path.name for path in sorted((out / "samples").iterdir())] == ["step-0000040.png", "step-0000080.png"]
    grid = Image.open(out / "samples.png")
    assert np.asarray(grid).std() > 0
    assert round(grid.width / grid.height, 1) == 1.5  # a row of three for each prompt

    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline) is StableDiffusionPipeline
    assert type(pipeline.unet) is ScaleLongUNet2DConditionModel
    assert pipeline.unet.kappas == pytest.approx([0.6**i for i in range(pipeline.unet.num_skips)])
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a red wall", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    # bfloat16 is for computing: what was frozen is saved as it came, what was trained in float32.
    for part in ("vae", "text_encoder"):
        assert_same_weights(weights(out / part), weights(base / "sd" / part))
    assert_same_weights(weights(out / "unet"), weights(out / "checkpoint-80" / "unet_ema"))
    assert all(weight.dtype == torch.float32 for weight in weights(out / "unet").values())


def test_a_resumed_run_equals_one_that_never_stopped_and_kappa_warms_up_exactly(base, tmp_path):
    arguments = [
        *flags(base, "v"),
        *("--skip_scaling", "cs", "--kappa", 0.5, "--kappa_warmup_steps", 4, "--use_ema", "--random_flip"),
        *("--train_batch_size", 3, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 2),
        *("--noise_offset", 0.1, "--snr_gamma", 5, "--proportion_empty_prompts", 0.5, "--seed", 3),
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    start(SCRIPT, *arguments, "--max_train_steps", 6, "--output_dir", straight)
    start(SCRIPT, *arguments, "--max_train_steps", 3, "--output_dir", stopped)
    launch(
        *(SCRIPT, *arguments, "--max_train_steps", 6, "--output_dir", stopped),
        *("--resume_from_checkpoint", "checkpoint-2"),
    )
    assert losses(stopped) == losses(straight)
    for part in ("unet", "checkpoint-6/unet", "checkpoint-6/unet_ema"):
        assert_same_weights(weights(stopped / part), weights(straight / part))

    num_skips = DiffusionPipeline.from_pretrained(stopped).unet.num_skips
    targets = [0.5**i for i in range(num_skips)]
    for step, progress in ((2, 0.5), (4, 1.0), (6, 1.0)):
        unet = ScaleLongUNet2DConditionModel.from_pretrained(stopped / f"checkpoint-{step}", subfolder="unet")
        assert unet.kappas == tuple((1 - progress) + progress * target for target in targets)
    assert json.loads((stopped / "unet" / "config.json").read_text())["skip_scaling"] == "cs"


def test_a_trained_pipeline_is_fine_tuned_without_a_jolt(base, tmp_path):
    trained = tmp_path / "trained"
    start(
        *(SCRIPT, *flags(base), "--skip_scaling", "none", "--output_dir", trained, "--max_train_steps", 250),
        *("--learning_rate", 2e-3, "--checkpointing_steps", 1000),
    )
    curve = losses(trained)
    assert mean(curve[-20:]) < 0.5 * mean(curve[:5]), "the model has learnt something that scaling can spoil"

    def first_loss(*scaling):
        name = "-".join(map(str, scaling))
        start(
            *(SCRIPT, *flags(base), "--pretrained_model_name_or_path", trained, "--seed", 1, "--max_train_steps", 1),
            *("--train_batch_size", 32, "--output_dir", tmp_path / name, "--skip_scaling", *scaling),
        )
        return losses(tmp_path / name)[0]

    unscaled = first_loss("none")
    assert first_loss("cs", "--kappa", 0.5, "--kappa_warmup_steps", 10) == unscaled
    assert first_loss("uniform", "--kappa_warmup_steps", 10) == unscaled
    assert first_loss("ls", "--ls_initial_gate", 0.99) == pytest.approx(unscaled, rel=0.002)
    for jolt in (first_loss("cs", "--kappa", 0.5), first_loss("uniform"), first_loss("ls")):
        assert jolt > 1.02 * unscaled


def test_a_half_precision_variant_is_trained_in_float32(base, tmp_path):
    StableDiffusionPipeline.from_pretrained(base / "sd").to(torch.float16).save_pretrained(
        tmp_path / "half", variant="fp16"
    )
    start(
        *(SCRIPT, *flags(base), "--pretrained_model_name_or_path", tmp_path / "half", "--variant", "fp16"),
        *("--skip_scaling", "ls", "--max_train_steps", 1, "--output_dir", tmp_path / "run"),
    )
    for part in ("unet", "vae", "text_encoder"):
        half = load_file(next((tmp_path / "half" / part).glob("*.fp16.safetensors")))
        assert {weight.dtype for weight in half.values()} == {torch.float16}
        saved = weights(tmp_path / "run" / part)
        assert {weight.dtype for weight in saved.values()} == {torch.float32}
        if part != "unet":
            assert_same_weights(saved, {key: weight.float() for key, weight in half.items()})


def test_a_unet_is_trained_from_scratch_on_a_stream(base, tmp_path):
    start(
        *(SCRIPT, *flags(base), "--model_config_name_or_path", base / "sd" / "unet", "--streaming", "--seed", 1),
        *("--skip_scaling", "uniform", "--max_train_steps", 3, "--output_dir", tmp_path / "run"),
    )
    assert len(losses(tmp_path / "run")) == 3
    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "run")
    assert type(pipeline.unet) is ScaleLongUNet2DConditionModel
    assert pipeline.unet.config.skip_scaling == "uniform"
    trained, pretrained = weights(tmp_path / "run" / "unet"), weights(base / "sd" / "unet")
    assert trained.keys() == pretrained.keys()
    # Three steps of 1e-4 do not lead from the pretrained weights to these.
    assert (trained["conv_in.weight"] - pretrained["conv_in.weight"]).abs().mean() > 0.01


def write_uvit(path, **training):
    config = TINY_UVIT | {"in_channels": 4, "cross_attention_dim": 16, "num_context_tokens": NUM_TOKENS - 2}
    path.write_text(json.dumps(config | {"training": {"resolution": 16, "proportion_empty_prompts": 0.1, **training}}))
    return path


def test_a_uvit_is_trained_on_latents_from_scratch(base, tmp_path):
    preset = write_uvit(tmp_path / "uvit.json", use_ema=True, max_train_steps=60)
    out = tmp_path / "run"
    start(
        *(SCRIPT, *flags(base), "--model_config_name_or_path", preset, "--skip_scaling", "ls", "--output_dir", out),
        *("--learning_rate", 2e-3, "--validation_prompts", "a red wall", "--validation_epochs", 100),
    )
    curve = losses(out)
    assert len(curve) == 60
    assert mean(curve[-10:]) < 0.8 * mean(curve[:5])
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline) is ScaleLongPipeline
    assert type(pipeline.unet) is ScaleLongUViT2DModel
    assert pipeline.unet.config.skip_scaling == "ls"
    assert pipeline.unet.config.sample_size == 8  # the latents of 16 pixels
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(prompt="a red wall", guidance_scale=3.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    assert_same_weights(weights(out / "vae"), weights(base / "sd" / "vae"))
    assert (out / "samples.png").exists()


def test_what_the_pipeline_predicts_is_respected_unless_another_is_asked_for(base, tmp_path):
    def first_loss(pipeline, *extra):
        out = tmp_path / f"{pipeline}{len(extra)}"
        start(SCRIPT, *flags(base, pipeline), *extra, "--max_train_steps", 1, "--output_dir", out)
        return losses(out)[0], DiffusionPipeline.from_pretrained(out).scheduler

    epsilon, scheduler = first_loss("sd")
    assert scheduler.config.prediction_type == "epsilon"
    velocity, scheduler = first_loss("v")
    assert scheduler.config.prediction_type == "v_prediction"
    asked, scheduler = first_loss("sd", "--prediction_type", "v_prediction")
    assert scheduler.config.prediction_type == "v_prediction"
    assert type(scheduler).__name__ == "PNDMScheduler"
    assert asked == velocity != epsilon


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.mark.parametrize("pipeline", ["sd", "v"])
@pytest.mark.parametrize("snr_gamma", [None, 5.0])
def test_the_loss_is_that_of_the_plain_recipe(base, tmp_path, accelerator, pipeline, snr_gamma):
    """Diffusers' own classes and the published formulas, on the samples that the script draws."""
    args = argparse.Namespace(
        **{"resolution": 16, "image_column": "image", "caption_column": "text", "noise_offset": 0.0, "seed": 4},
        **{"dataset_name": None, "dataset_config_name": None, "train_data_dir": base / "data", "streaming": False},
        **{"cache_dir": base / "cache", "max_train_samples": None, "skip_bad_images": False, "center_crop": False},
        **{"random_flip": False, "image_interpolation_mode": "lanczos", "dataloader_num_workers": 0},
    )
    plain = StableDiffusionPipeline.from_pretrained(base / pipeline)
    schedule = DDPMScheduler.from_config(plain.scheduler.config)
    samples = load_captioned_samples(args, accelerator, plain, schedule.config.num_train_timesteps)
    order = RunSampler(len(samples), num_batches=1, batch_size=8, seed=4)
    batch = torch.utils.data.default_collate([samples[place] for place in order])

    posterior = plain.vae.encode(batch["input"]).latent_dist
    latents = (posterior.mean + posterior.std * batch["posterior_noise"]) * 0.5  # the tiny VAE's scaling factor
    text = plain.text_encoder(batch["input_ids"]).last_hidden_state
    steps = batch["timestep"]
    assert type(plain.unet) is UNet2DConditionModel
    with torch.no_grad():
        prediction = plain.unet(schedule.add_noise(latents, batch["noise"], steps), steps, text).sample
    is_velocity = pipeline == "v"
    target = schedule.get_velocity(latents, batch["noise"], steps) if is_velocity else batch["noise"]
    error = (prediction - target).square().mean(dim=(1, 2, 3))
    if snr_gamma is not None:
        snr = compute_snr(schedule, steps)
        error = error * snr.clamp(max=snr_gamma) / (snr + 1 if is_velocity else snr)

    AcceleratorState._reset_state()
    PartialState._reset_state()
    extra = () if snr_gamma is None else ("--snr_gamma", snr_gamma)
    start(
        *(SCRIPT, *flags(base, pipeline), "--seed", 4, "--max_train_steps", 1, "--skip_scaling", "none"),
        *("--output_dir", tmp_path / "run", *extra),
    )
    assert losses(tmp_path / "run")[0] == pytest.approx(error.mean().item(), rel=1e-5)


def test_latents_are_drawn_from_the_posterior_and_scaled():
    torch.manual_seed(0)
    vae, images = tiny_vae(scaling_factor=0.25), torch.rand(3, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        sampled = vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(7))
    noise = torch.randn(sampled.shape, generator=torch.Generator().manual_seed(7))

    def text_encoder(tokens):
        return (tokens.float(),)

    batch = {"input": images, "posterior_noise": noise, "input_ids": torch.ones(3, 5)}
    latents, text = encode_batch(vae, text_encoder, batch)
    torch.testing.assert_close(latents, 0.25 * sampled)
    assert not latents.requires_grad
    assert text.shape == (3, 5)
    assert latent_shape(vae, 24) == (4, 12, 12)
    with pytest.raises(ValueError, match="--resolution 12 must be a multiple of 8"):
        latent_shape(vae, 12)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--pretrained_model_name_or_path", "nowhere/nothing"], OSError, "nowhere/nothing is no pipeline"),
        (["--pretrained_model_name_or_path", "{base}/data"], OSError, r"data is no pipeline.*model_index\.json"),
        (["--pretrained_model_name_or_path", "{base}/sd/model_index.json"], OSError, "is no pipeline.*a single file"),
        (["--pretrained_model_name_or_path", "{tmp}/ddpm"], ValueError, "is a DDPMPipeline.*StableDiffusionPipeline"),
        (["--validation_prompts", "a red wall", " "], ValueError, "prompt is empty"),
        (["--proportion_empty_prompts", "1.5"], ValueError, "--proportion_empty_prompts must be a probability"),
        (["--num_validation_images", "0"], ValueError, "--num_validation_images must be at least 1"),
    ],
)
def test_bad_input_stops_before_anything_is_made(base, tmp_path, args, error, message):
    (tmp_path / "ddpm").mkdir()
    (tmp_path / "ddpm" / "model_index.json").write_text('{"_class_name": "DDPMPipeline"}')
    args = [str(arg).format(base=base, tmp=tmp_path) for arg in args]
    with pytest.raises(error, match=message):
        start(SCRIPT, *flags(base), "--output_dir", tmp_path / "run", *args)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--caption_column", "caption"], r"no column 'caption'.*image, text.*--caption_column"),
        (["--resolution", 20], "--resolution 20 must be a multiple of 8"),
        (["--skip_scaling", "cs", "--kappa", "0"], "greater than 0"),
        (["--train_data_dir", "{tmp}/silent"], "Every caption in column 'text' is empty"),
        (["--model_config_name_or_path", ROOT / "training/configs/mscoco256_uvit_s2.json"], "text needs 16"),
        (["--model_config_name_or_path", ROOT / "training/configs/cifar10_uvit_s2.json"], "latents needs 4"),
    ],
)
def test_bad_input_stops_before_the_first_step(base, tmp_path, args, message):
    for index in range(2):
        row = {"file_name": f"{index}.png", "text": ""}
        (tmp_path / "silent").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "silent" / row["file_name"])
        with (tmp_path / "silent" / "metadata.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    args = [str(arg).format(tmp=tmp_path) for arg in args]
    with pytest.raises(ValueError, match=message):
        start(SCRIPT, *flags(base), "--output_dir", tmp_path / "run", *args)
    assert not (tmp_path / "run" / "loss.csv").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_8bit_adam_without_its_package_is_an_error(base, tmp_path):
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        start(SCRIPT, *flags(base), "--output_dir", tmp_path / "run", "--use_8bit_adam")


def test_the_pipeline_is_required(capsys):
    with pytest.raises(SystemExit):
        load_script(SCRIPT).build_parser().parse_args(["--train_data_dir", "data"])
    assert "--pretrained_model_name_or_path" in capsys.readouterr().err
