"""The training script, run for real on real images."""

import json
from statistics import mean

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline
from images import truncate, write_images
from PIL import Image
from safetensors.torch import load_file
from scripts import TINY_UNET, TINY_UVIT, launch, losses, start

from diffusers_scalelong import ScaleLongUViT2DModel
from diffusers_scalelong.image_data import load_images

SCRIPT = "train_unconditional.py"


@pytest.fixture
def tiny(tmp_path):
    """Flags of a run that takes seconds."""
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_UNET))
    return [
        *("--model_config_name_or_path", config, "--train_batch_size", 32, "--ddpm_num_inference_steps", 2),
        *("--eval_batch_size", 4, "--seed", 0, "--cache_dir", tmp_path / "cache", "--lr_warmup_steps", 2),
    ]


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_digits_are_learnt_and_the_results_are_all_there(tmp_path, tiny):
    out = tmp_path / "run"
    result = launch(
        *(SCRIPT, *tiny, "--dataset_name", "digits", "--skip_scaling", "cs", "--kappa", 0.6, "--output_dir", out),
        *("--max_train_steps", 80, "--learning_rate", 5e-3, "--use_ema", "--lr_scheduler", "constant"),
        *("--checkpointing_steps", 40, "--checkpoints_total_limit", 1, "--save_images_epochs", 1),
    )
    curve = losses(out)
    assert len(curve) == 80
    assert mean(curve[-10:]) < 0.5 * mean(curve[:5])
    assert "loss=" in result.stderr
    assert "step/s" in result.stderr

    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline) is DDPMPipeline
    assert pipeline.unet.kappas == pytest.approx([0.6**i for i in range(pipeline.unet.num_skips)])
    assert np.asarray(Image.open(out / "samples.png")).std() > 0
    assert Image.open(out / "loss.png").size[0] > 100
    # 80 batches of 32 are 1.4 epochs of 1797 digits; the 57th completes the first.
    assert [p.name for p in sorted((out / "samples").iterdir())] == ["step-0000057.png", "step-0000080.png"]
    assert list((out / "logs").rglob("events.out.tfevents*"))
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-80"]
    assert not list(out.glob(".*partial"))
    checkpoint = out / "checkpoint-80"
    # The pipeline holds the moving average, the checkpoint both.
    assert_same_weights(weights(out / "unet"), weights(checkpoint / "unet_ema"))
    current, average = weights(checkpoint / "unet"), weights(checkpoint / "unet_ema")
    assert not torch.equal(current["conv_in.weight"], average["conv_in.weight"])
    assert AutoModel.from_pretrained(str(checkpoint), subfolder="unet").config.kappa == 0.6

    # What would not be the same run is refused, and the run is left as it was.
    resume = [
        *(*tiny, "--dataset_name", "digits", "--use_ema", "--output_dir", out),
        *("--resume_from_checkpoint", "latest"),
    ]
    same = ["--skip_scaling", "cs", "--kappa", 0.6, "--max_train_steps", 90]
    for changed, message in (
        (["--skip_scaling", "uniform"], "model's skip_scaling was cs and is uniform"),
        (["--kappa", 0.7], "model's kappa was 0.6 and is 0.7"),
        (["--train_batch_size", 8], "total batch size was 32 and is 8"),
        (["--seed", 1], "--seed was 0 and is 1"),
        (["--max_train_steps", 79], "newer than the 79 steps"),
    ):
        with pytest.raises(ValueError, match=message):
            start(SCRIPT, *resume, *same, *changed)
    assert losses(out) == curve

    # A damaged checkpoint of a later step is passed over, and does not push the good ones out of the limit.
    damaged = out / "checkpoint-100"
    damaged.mkdir()
    start(SCRIPT, *resume, *same, "--max_train_steps", 82, "--checkpointing_steps", 1, "--checkpoints_total_limit", 1)
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-100", "checkpoint-82"]
    assert losses(out)[:80] == curve


def test_a_uvit_trains_on_parquet_and_its_pipeline_loads(tmp_path, tiny):
    data = tmp_path / "data" / "train-00000-of-00001.parquet"
    data.parent.mkdir()
    load_images("digits").to_parquet(data)
    config = tmp_path / "uvit.json"
    config.write_text(json.dumps(TINY_UVIT))
    out = tmp_path / "run"
    launch(
        *(SCRIPT, *tiny, "--model_config_name_or_path", config, "--dataset_name", data.parent, "--output_dir", out),
        *("--max_train_steps", 90, "--learning_rate", 2e-3, "--lr_scheduler", "constant", "--skip_scaling", "ls"),
    )
    curve = losses(out)
    assert mean(curve[-10:]) < 0.6 * mean(curve[:5])
    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline.unet) is ScaleLongUViT2DModel
    assert pipeline.unet.config.skip_scaling == "ls"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


def test_a_corrupt_image_is_named_before_training_and_can_be_skipped(tmp_path, tiny):
    truncate(write_images(tmp_path / "data", 8)[5])
    flags = [SCRIPT, *tiny, "--train_data_dir", tmp_path / "data", "--max_train_steps", 1]
    refused = launch(*flags, "--output_dir", tmp_path / "refused", check=False)
    assert refused.returncode != 0
    assert "5.png" in refused.stderr
    assert "--skip_bad_images" in refused.stderr
    assert not (tmp_path / "refused" / "loss.csv").exists()
    skipping = launch(*flags, "--output_dir", tmp_path / "run", "--skip_bad_images")
    assert "Left out 1 images" in skipping.stderr
    assert len(losses(tmp_path / "run")) == 1
