"""Rows that are encoded once, against the pipeline's own encodings."""

import copy
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from sdxl_pipelines import write_sdxl

from diffusers_scalelong import precomputed
from diffusers_scalelong.diffusion_data import DiffusionDataset, DiffusionTransform
from diffusers_scalelong.image_data import ImageTransform
from diffusers_scalelong.precomputed import EncodedCaptions, SDXLEncoder, draw_latents, encode_rows

SIZES = [(20, 16), (16, 24), (16, 16), (31, 16)]  # width, height


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sdxl")


@pytest.fixture(scope="module")
def pipeline(folder):
    """The pipeline as the script holds it, and its UNet apart."""
    unet = write_sdxl(folder).unet
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, unet=None)
    return SimpleNamespace(
        encoders=pipeline, whole=StableDiffusionXLPipeline(**(pipeline.components | {"unet": unet}))
    )


@pytest.fixture
def rows(tmp_path):
    """Ten images of several sizes, in a file as `load_dataset` leaves them, so that results are cached beside it."""
    random = np.random.default_rng(0)
    images = [
        Image.fromarray(random.integers(256, size=(height, width, 3), dtype=np.uint8))
        for width, height in (SIZES[index % len(SIZES)] for index in range(10))
    ]
    captions = [f"picture {index}" for index in range(10)]
    features = datasets.Features({"photo": datasets.Image(), "text": datasets.Value("string")})
    dataset = datasets.Dataset.from_dict({"photo": images, "text": captions}, features=features)
    dataset.save_to_disk(tmp_path / "rows")
    return datasets.load_from_disk(str(tmp_path / "rows"))


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


class CountingEncoder(SDXLEncoder):
    """Knows which rows it has encoded, and can be interrupted before one."""

    def __init__(self, *args, interrupted_at=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.encoded = []
        self.interrupted_at = interrupted_at

    def __call__(self, rows, indices):
        if self.interrupted_at in indices:
            raise KeyboardInterrupt
        self.encoded += indices
        return super().__call__(rows, indices)


def encoder_of(pipeline, image=None, **kwargs):
    return CountingEncoder(pipeline.encoders, image or ImageTransform(16, center_crop=True), "photo", "text", **kwargs)


def pixels_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def test_the_unet_is_given_what_the_pipeline_itself_would_encode(pipeline, rows, accelerator):
    encoder = encoder_of(pipeline)
    encoded = encode_rows(rows, encoder, accelerator)
    assert len(encoded) == 10
    transform = DiffusionTransform(
        draw_latents, "posterior", encoder.latent_shape, condition=EncodedCaptions(encoder.unconditional)
    )
    samples = DiffusionDataset(encoded, transform, seed=5)
    whole, vae = pipeline.whole, pipeline.whole.vae
    for index in range(10):
        sample = samples[(3, index)]
        width, height = SIZES[index % len(SIZES)]
        left, top = (width - 16) // 2, (height - 16) // 2
        with torch.no_grad():
            image = rows[index]["photo"].crop((left, top, left + 16, top + 16))
            posterior = vae.encode(pixels_of(image)).latent_dist
            prompt, _, pooled, _ = whole.encode_prompt(f"picture {index}", do_classifier_free_guidance=False)
            # The posterior's noise is the first thing that is drawn for a sample.
            noise = np.random.default_rng((5, 3, index)).standard_normal((4, 8, 8), dtype=np.float32)
            latents = (posterior.mean + posterior.std * torch.from_numpy(noise)) * vae.config.scaling_factor
            time_ids = whole._get_add_time_ids((height, width), (top, left), (16, 16), torch.float32, 24)
            inputs = [latents, prompt, pooled, time_ids]
            names = ["input", "prompt_embeds", "pooled_prompt_embeds", "time_ids"]
            for name, expected in zip(names, inputs, strict=True):
                assert sample[name].dtype == torch.float32
                torch.testing.assert_close(sample[name], expected[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(sample["time_ids"], time_ids[0])

            def predict(latents, prompt, pooled, time_ids):
                added = {"text_embeds": pooled, "time_ids": time_ids}
                return whole.unet(latents, 500, prompt, added_cond_kwargs=added).sample

            actual = predict(*(sample[name][None] for name in names))
            torch.testing.assert_close(actual, predict(*inputs), rtol=1e-4, atol=1e-4)


def test_latents_are_drawn_anew_in_every_epoch(pipeline, rows, accelerator):
    encoder = encoder_of(pipeline)
    encoded = encode_rows(rows, encoder, accelerator)
    mean, std = encoded[4]["posterior"]
    transform = DiffusionTransform(draw_latents, "posterior", encoder.latent_shape)
    samples = DiffusionDataset(encoded, transform)
    draws = np.stack([samples[(epoch, 4)]["input"].numpy() for epoch in range(200)])
    assert torch.equal(samples[(7, 4)]["input"], torch.from_numpy(draws[7]))
    standardised = (draws - mean) / std
    assert standardised.mean() == pytest.approx(0, abs=0.05)
    assert standardised.std() == pytest.approx(1, abs=0.05)
    assert abs(np.corrcoef(standardised[0].ravel(), standardised[1].ravel())[0, 1]) < 0.3


def test_the_time_ids_tell_where_the_random_crop_is(pipeline, rows, accelerator):
    encoder = encoder_of(pipeline, ImageTransform(16, random_flip=True))
    encoded = encode_rows(rows, encoder, accelerator)
    mirrored, crops = [], set()
    for row, original in zip(encoded, rows, strict=True):
        height, width, top, left, *target = map(int, row["time_ids"])
        assert (width, height) == original["photo"].size
        assert target == [16, 16]
        matches = []
        for image in (original["photo"], original["photo"].transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            with torch.no_grad():
                crop = pixels_of(image.crop((left, top, left + 16, top + 16)))
                mean = encoder.pipeline.vae.encode(crop).latent_dist.mean[0] * 0.5
            matches.append(np.allclose(row["posterior"][0], mean, atol=1e-5))
        assert sum(matches) == 1
        mirrored.append(matches[1])
        crops.add((top, left))
    assert 0 < sum(mirrored) < 10
    assert len(crops) > 3
    other_seed = encode_rows(rows, encoder_of(pipeline, encoder.image, seed=1), accelerator)
    assert not np.array_equal(other_seed["time_ids"], encoded["time_ids"])


@pytest.mark.parametrize("force_zeros", [True, False])
def test_dropped_captions_are_what_guidance_takes_for_no_prompt(pipeline, rows, accelerator, force_zeros):
    encoders = StableDiffusionXLPipeline(**pipeline.encoders.components, force_zeros_for_empty_prompt=force_zeros)
    encoder = SDXLEncoder(encoders, ImageTransform(16), "photo", "text")
    encoded = encode_rows(rows, encoder, accelerator)
    with torch.no_grad():
        empty, _, empty_pooled, _ = pipeline.whole.encode_prompt("", do_classifier_free_guidance=False)
    if force_zeros:
        empty, empty_pooled = torch.zeros_like(empty), torch.zeros_like(empty_pooled)

    def samples(proportion):
        condition = EncodedCaptions(encoder.unconditional, proportion)
        transform = DiffusionTransform(draw_latents, "posterior", encoder.latent_shape, condition)
        return DiffusionDataset(encoded, transform, seed=1)

    places = [(epoch, index) for epoch in range(60) for index in range(10)]
    dropped = [samples(0.3)[place] for place in places]
    kept = [samples(0.0)[place] for place in places]
    are_empty = [torch.allclose(sample["prompt_embeds"], empty[0], atol=1e-6) for sample in dropped]
    assert 0.25 < np.mean(are_empty) < 0.35
    for is_empty, sample, other in zip(are_empty, dropped, kept, strict=True):
        assert torch.equal(sample["input"], other["input"])
        assert torch.equal(sample["time_ids"], other["time_ids"])
        expected = empty_pooled[0] if is_empty else other["pooled_prompt_embeds"]
        torch.testing.assert_close(sample["pooled_prompt_embeds"], expected, rtol=0, atol=1e-6)
        assert is_empty or torch.equal(sample["prompt_embeds"], other["prompt_embeds"])


def test_rows_are_encoded_once_and_again_when_something_has_changed(pipeline, folder, rows, accelerator):
    def num_encoded(encoder, dataset=rows):
        encode_rows(dataset, encoder, accelerator)
        return len(encoder.encoded)

    assert num_encoded(encoder_of(pipeline)) == 10
    assert num_encoded(encoder_of(pipeline)) == 0
    # The same models from another place are the same models.
    pipeline.encoders.save_pretrained(folder / "copy")
    moved = SimpleNamespace(encoders=StableDiffusionXLPipeline.from_pretrained(folder / "copy", unet=None))
    assert num_encoded(encoder_of(moved)) == 0

    assert num_encoded(encoder_of(pipeline, ImageTransform(8, center_crop=True))) == 10
    assert num_encoded(encoder_of(pipeline, ImageTransform(16))) == 10
    assert num_encoded(encoder_of(pipeline, ImageTransform(16, center_crop=True, random_flip=True))) == 10
    assert num_encoded(encoder_of(pipeline, ImageTransform(16, center_crop=True, interpolation="lanczos"))) == 10
    assert num_encoded(encoder_of(pipeline, seed=1)) == 10
    assert num_encoded(encoder_of(pipeline), rows.select([1, 3, 4])) == 3
    for name in ("vae", "text_encoder", "text_encoder_2"):
        changed = SimpleNamespace(encoders=copy.deepcopy(pipeline.encoders))
        with torch.no_grad():
            next(getattr(changed.encoders, name).parameters()).view(-1)[0] += 1e-3
        assert num_encoded(encoder_of(changed)) == 10
    changed = SimpleNamespace(encoders=copy.deepcopy(pipeline.encoders))
    changed.encoders.vae.register_to_config(scaling_factor=0.7)
    assert num_encoded(encoder_of(changed)) == 10


def test_an_interrupted_encoding_goes_on_where_it_was(pipeline, rows, accelerator, monkeypatch):
    monkeypatch.setattr(precomputed, "_ROWS_PER_PART", 3)
    interrupted = encoder_of(pipeline, interrupted_at=7)
    with pytest.raises(KeyboardInterrupt):
        encode_rows(rows, interrupted, accelerator)
    assert interrupted.encoded == [0, 1, 2, 3, 4, 5]
    resumed = encoder_of(pipeline)
    encoded = encode_rows(rows, resumed, accelerator)
    assert resumed.encoded == [6, 7, 8, 9]
    monkeypatch.undo()
    whole = encode_rows(rows, encoder_of(pipeline), accelerator)
    for first, second in zip(encoded, whole, strict=True):
        assert np.array_equal(first["time_ids"], second["time_ids"])
        np.testing.assert_allclose(first["posterior"], second["posterior"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(first["prompt_embeds"], second["prompt_embeds"], rtol=1e-5, atol=1e-5)


def test_processes_share_the_rows_and_encode_what_they_do_not_find(pipeline, rows, monkeypatch):
    monkeypatch.setattr(precomputed, "_ROWS_PER_PART", 3)
    encoders = [encoder_of(pipeline) for _ in range(2)]
    encoded_at_barrier = {}

    def process(index):
        # As `encode_rows` sees the process `index` of two.
        def wait():
            encoded_at_barrier[index] = list(encoders[index].encoded)

        return SimpleNamespace(
            process_index=index, num_processes=2, is_local_main_process=index == 0, wait_for_everyone=wait
        )

    second = encode_rows(rows, encoders[1], process(1))  # alone, as on a machine with a disk of its own
    assert encoded_at_barrier[1] == [3, 4, 5, 9]
    assert sorted(encoders[1].encoded) == list(range(10))
    first = encode_rows(rows, encoders[0], process(0))
    assert encoders[0].encoded == []
    assert all(np.array_equal(a["posterior"], b["posterior"]) for a, b in zip(first, second, strict=True))


def test_one_of_several_captions_is_drawn(pipeline, rows, accelerator):
    several = [[f"picture {index}", "something else"] for index in range(10)]
    captioned = rows.remove_columns("text").add_column("text", several)
    encoded = encode_rows(captioned, encoder_of(pipeline), accelerator)
    single = encode_rows(rows, encoder_of(pipeline), accelerator)
    same = [
        np.allclose(a["prompt_embeds"], b["prompt_embeds"], atol=1e-5) for a, b in zip(encoded, single, strict=True)
    ]
    assert 0 < sum(same) < 10


def test_what_cannot_be_encoded_is_an_error(pipeline, rows, accelerator):
    with pytest.raises(ValueError, match="multiple of 8"):
        encoder_of(pipeline, ImageTransform(20))
    captioned = rows.remove_columns("text").add_column("text", [None, *["text"] * 9])
    with pytest.raises(ValueError, match="'text' must hold texts"):
        encode_rows(captioned, encoder_of(pipeline), accelerator)
