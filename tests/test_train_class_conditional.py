"""Class-conditional training, run for real: classes that come out right, the null class, resumption, bad input."""

import json
import sys
from statistics import mean

import datasets
import numpy as np
import pytest
import scripts
import torch
from diffusers import DiffusionPipeline
from images import write_images
from PIL import Image
from safetensors.torch import load_file
from scripts import ROOT, TINY_UNET, TINY_UVIT, launch, load_script, losses

from diffusers_scalelong import ScaleLongPipeline, ScaleLongUNet2DModel, ScaleLongUViT2DModel
from diffusers_scalelong.image_data import load_images

SCRIPT = "train_class_conditional.py"


def write_config(file, config):
    file.write_text(json.dumps(config))
    return file


def weights(folder):
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def moved_classes(before, after, key):
    """Which rows of the class embedding differ between two checkpoints."""
    rows = weights(before / "unet")[key] != weights(after / "unet")[key]
    return rows.any(dim=1).nonzero().flatten().tolist()


def tiles(file, rows, columns, size=64, padding=2):
    """The images of a grid, (rows, columns, size, size); every pixel of a smaller image is a square in it."""
    grid = np.asarray(Image.open(file))
    assert grid.shape == (rows * (size + padding) + padding, columns * (size + padding) + padding)
    step = size + padding
    return np.stack(
        [[grid[r * step + padding :, c * step + padding :][:size, :size] for c in range(columns)] for r in range(rows)]
    )


def digits_of(images):
    """The class of 8×8 images in [0, 1] whose mean among scikit-learn's digits is the nearest."""
    dataset = load_images("digits")
    known = np.stack([np.asarray(image) for image in dataset["image"]]).reshape(-1, 64) / 255
    means = np.stack([known[np.array(dataset["label"]) == digit].mean(axis=0) for digit in range(10)])
    distances = ((images.reshape(-1, 1, 64) - means) ** 2).sum(axis=-1)
    return distances.argmin(axis=1)


def test_each_class_is_learnt_and_the_grid_shows_a_row_of_it(tmp_path):
    config = write_config(tmp_path / "tiny.json", TINY_UNET | {"block_out_channels": [32, 32]})
    out = tmp_path / "run"
    result = launch(
        *(SCRIPT, "--model_config_name_or_path", config, "--dataset_name", "digits", "--output_dir", out),
        *("--cache_dir", tmp_path / "cache", "--skip_scaling", "cs", "--kappa", 0.6, "--kappa_warmup_steps", 10),
        *("--max_train_steps", 240, "--train_batch_size", 64, "--learning_rate", 5e-3, "--lr_warmup_steps", 5),
        *("--adam_weight_decay", 0, "--use_ema", "--checkpointing_steps", 120, "--save_images_epochs", 5),
        *("--class_dropout_prob", 0.2, "--guidance_scale", 3, "--num_samples_per_class", 3),
        *("--ddpm_num_inference_steps", 20),
    )
    assert "Classes: 10, and a null class" in result.stderr
    curve = losses(out)
    assert mean(curve[-10:]) < 0.25 * mean(curve[:5])
    # With weight decay off, an embedding moves only if it has been used: all ten digits and the null class.
    assert moved_classes(out / "checkpoint-120", out / "checkpoint-240", "class_embedding.weight") == list(range(11))

    pipeline = DiffusionPipeline.from_pretrained(out)
    assert type(pipeline) is ScaleLongPipeline
    assert type(pipeline.unet) is ScaleLongUNet2DModel
    assert pipeline.unet.config.num_class_embeds == 11
    assert pipeline.unet.kappas == pytest.approx([0.6**i for i in range(pipeline.unet.num_skips)])
    pipeline.set_progress_bar_config(disable=True)
    labels = [digit for digit in range(10) for _ in range(3)]
    images = pipeline(
        labels,
        guidance_scale=3,
        num_inference_steps=20,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images
    assert (digits_of(images) == labels).mean() > 0.8
    average = weights(out / "checkpoint-240" / "unet_ema")
    assert all(torch.equal(value, average[key]) for key, value in weights(out / "unet").items())
    # The same images, from the saved pipeline: so the grid is of the averaged weights, guided, a row for each class.
    grid = tiles(out / "samples.png", rows=10, columns=3)[:, :, ::8, ::8]
    np.testing.assert_allclose(grid / 255, images.reshape(10, 3, 8, 8), atol=2 / 255)
    names = [path.name for path in sorted((out / "samples").iterdir())]
    assert names == ["step-0000141.png", "step-0000240.png"]


def test_a_stream_without_class_names_and_without_a_null_class(tmp_path):
    data = tmp_path / "digits.parquet"
    plain = datasets.Features({"image": datasets.Image(), "kind": datasets.Value("int64")})
    load_images("digits").rename_column("label", "kind").cast(plain).to_parquet(data)
    config = write_config(tmp_path / "tiny.json", TINY_UNET | {"num_class_embeds": 12})
    out = tmp_path / "run"
    result = launch(
        *(SCRIPT, "--model_config_name_or_path", config, "--dataset_name", data, "--output_dir", out, "--streaming"),
        *("--cache_dir", tmp_path / "cache", "--label_column", "kind", "--num_classes", 12, "--class_dropout_prob", 0),
        *("--max_train_steps", 6, "--checkpointing_steps", 3, "--train_batch_size", 32, "--adam_weight_decay", 0),
        *("--ddpm_num_inference_steps", 2, "--num_samples_per_class", 1),
    )
    assert "Classes: 12, and no null class" in result.stderr
    assert "the classes 0, 1, 2, 4, 5, 6, 7, 9, 10, 11" in result.stderr
    tiles(out / "samples.png", rows=10, columns=1)
    assert DiffusionPipeline.from_pretrained(out).unet.config.num_class_embeds == 12
    assert moved_classes(out / "checkpoint-3", out / "checkpoint-6", "class_embedding.weight") == list(range(10))


def test_a_resumed_uvit_equals_one_that_never_stopped(tmp_path):
    for name in ("cat", "dog", "owl"):
        write_images(tmp_path / "data" / name, 6, size=(12, 10))
    # The config's own number of classes gives way to that of the folders.
    config = write_config(tmp_path / "uvit.json", TINY_UVIT | {"in_channels": 3, "num_class_embeds": 1000})
    flags = [
        *(SCRIPT, "--model_config_name_or_path", config, "--train_data_dir", tmp_path / "data", "--random_flip"),
        *("--cache_dir", tmp_path / "cache", "--skip_scaling", "ls", "--use_ema", "--class_dropout_prob", 0.5),
        *("--train_batch_size", 4, "--gradient_accumulation_steps", 2, "--lr_scheduler", "constant"),
        *("--checkpointing_steps", 3, "--ddpm_num_inference_steps", 2),
    ]
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    launch(*flags, "--max_train_steps", 7, "--output_dir", straight)
    launch(*flags, "--max_train_steps", 4, "--output_dir", stopped)
    launch(*flags, "--max_train_steps", 7, "--output_dir", stopped, "--resume_from_checkpoint", "checkpoint-3")
    assert losses(stopped) == losses(straight)
    for folder in ("unet", "checkpoint-7/unet", "checkpoint-7/unet_ema"):
        first, second = weights(straight / folder), weights(stopped / folder)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    pipeline = DiffusionPipeline.from_pretrained(stopped)
    assert type(pipeline.unet) is ScaleLongUViT2DModel
    assert (pipeline.unet.config.num_class_embeds, pipeline.unet.config.skip_scaling) == (4, "ls")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline([0, 2], guidance_scale=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)


@pytest.fixture
def start(tmp_path):
    config = write_config(tmp_path / "tiny.json", TINY_UNET)

    def run(*args):
        arguments = ["--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--dataset_name", "digits"]
        scripts.start(SCRIPT, *arguments, "--model_config_name_or_path", config, *args)

    yield run
    assert not (tmp_path / "run" / "loss.csv").exists(), "no training step was made"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--class_dropout_prob", 1.5], "--class_dropout_prob must be a probability"),
        (["--guidance_scale", 2, "--class_dropout_prob", 0], "--guidance_scale 2.0 needs .* --class_dropout_prob"),
        (["--num_samples_per_class", 0], "--num_samples_per_class must be at least 1"),
        (["--num_classes", 0], "--num_classes must be at least 1"),
        (["--num_classes", 9], r"Column 'label' must hold integers in \[0, 9\), but has 9"),
        (["--label_column", "kind"], "no column 'kind'. Choose one of image, label with --label_column"),
        (["--label_column", "image"], "'image' has .* pass --num_classes"),
        (["--resolution", 9], "cannot be halved 1 times"),
        (["--ddpm_num_inference_steps", 2000], "exceeds the 1000 steps"),
        (["--skip_scaling", "uniform", "--kappa", 0.5, 0.6], "2 constants"),
    ],
)
def test_bad_command_lines_stop_before_training(start, args, message):
    with pytest.raises(ValueError, match=message):
        start(*args)


@pytest.mark.parametrize(
    ("labels", "args", "message"),
    [
        ([0, 1, 2], [], "how many classes .*int64.* pass --num_classes"),
        ([0, 1, 3], ["--num_classes", 3], "but has 3"),
        ([0, -1, 2], ["--num_classes", 3], "but has -1"),
        ([0, None, 2], ["--num_classes", 3], "but has None"),
        (["cat", "dog", "owl"], ["--num_classes", 3], "integers .* but has 'cat'"),
    ],
)
def test_labels_are_checked_before_training(start, tmp_path, labels, args, message):
    write_images(tmp_path / "data", 3)
    lines = [json.dumps({"file_name": f"{index}.png", "label": label}) for index, label in enumerate(labels)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        start("--dataset_name", tmp_path / "data", *args)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TINY_UVIT | {"cross_attention_dim": 8, "num_context_tokens": 4}, "sets cross_attention_dim.* needs text"),
        (TINY_UNET | {"class_embed_type": "timestep"}, "sets class_embed_type"),
    ],
)
def test_models_that_need_another_condition_are_refused(start, tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        start("--model_config_name_or_path", write_config(tmp_path / "other.json", config))


@pytest.mark.parametrize("preset", ["imagenet64_uvit_m4.json", "imagenet64_uvit_l4.json"])
def test_the_presets_with_classes_are_for_this_script(monkeypatch, preset):
    script = load_script(SCRIPT)
    monkeypatch.setattr(sys, "argv", [SCRIPT, "--model_config_name_or_path", str(ROOT / "training/configs" / preset)])
    args, config = script.parse_args_with_preset(script.build_parser())
    assert (args.resolution, args.train_batch_size, args.adam_beta1) == (64, 1024, 0.99)
    assert (config["_class_name"], config["num_class_embeds"]) == ("ScaleLongUViT2DModel", 1000)
