"""Sampling with guidance, against a loop by hand; the schedulers, the text model and the autoencoder are real."""

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DModel,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from diffusers_scalelong import (
    ScaleLongPipeline,
    ScaleLongUNet2DConditionModel,
    ScaleLongUNet2DModel,
    ScaleLongUViT2DModel,
)

WORDS = ["[PAD]", "[UNK]", "a", "photo", "of", "red", "blue", "cat", "dog", "house"]
NUM_TOKENS, WIDTH, CLASSES = 7, 24, 5


def uvit(seed=0, **config):
    torch.manual_seed(seed)
    model = ScaleLongUViT2DModel(
        **{"sample_size": 8, "num_layers": 4, "num_attention_heads": 2, "hidden_size": 16, **config},
        skip_scaling="cs",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def unet(cls=ScaleLongUNet2DModel, **config):
    torch.manual_seed(0)
    model = cls(
        **{"sample_size": 8, "num_class_embeds": CLASSES, **config},
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
        **({"skip_scaling": "cs"} if cls is ScaleLongUNet2DModel else {}),
    )
    if model.class_embedding is not None:
        with torch.no_grad():
            model.class_embedding.weight.mul_(5)  # large enough to show
    return model.eval()


MODELS = {
    "UViT": lambda: uvit(num_class_embeds=CLASSES),
    "UNet": unet,
    "plain UNet": lambda: unet(UNet2DModel),
    "oblong UNet": lambda: unet(sample_size=(8, 16)),
}
each_model = pytest.mark.parametrize("model", MODELS)


def class_pipeline(scheduler=None, model="UViT"):
    """Four classes; the fifth embedding is the null class."""
    return quiet(ScaleLongPipeline(MODELS[model](), scheduler or DDIMScheduler()))


def text_pipeline():
    torch.manual_seed(1)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    text_config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=NUM_TOKENS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.23,
    )
    return quiet(
        ScaleLongPipeline(
            uvit(in_channels=4, cross_attention_dim=WIDTH, num_context_tokens=NUM_TOKENS),
            DDIMScheduler(),
            vae=vae.eval(),
            text_encoder=CLIPTextModel(text_config).eval(),
            tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"),
        )
    )


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(pipeline, seed=7, **arguments):
    settings = {"num_inference_steps": 3, "output_type": "np", "generator": torch.Generator().manual_seed(seed)}
    return pipeline(**{**settings, **arguments}).images


def encode_by_hand(pipeline, prompts):
    ids = [[WORDS.index(word) if word in WORDS else 1 for word in prompt.split()] for prompt in prompts]
    ids = torch.tensor([row + [0] * (NUM_TOKENS - len(row)) for row in ids])
    with torch.no_grad():
        return pipeline.text_encoder(ids).last_hidden_state


@torch.no_grad()
def sample_by_hand(pipeline, conditions, null_conditions, scale, batch_size, seed=7):
    """DDIM in closed form, the two predictions of guidance in two calls."""
    model = pipeline.unet
    size = model.config["sample_size"]
    shape = (batch_size, model.config["in_channels"], *((size, size) if isinstance(size, int) else size))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000), 0)
    for t in (666, 333, 0):
        conditional = model(x, t, **conditions).sample
        unconditional = model(x, t, **null_conditions).sample
        noise = unconditional + scale * (conditional - unconditional)
        image = ((x - (1 - alphas[t]) ** 0.5 * noise) / alphas[t] ** 0.5).clamp(-1, 1)
        previous = alphas[t - 333] if t else torch.tensor(1.0)
        x = previous**0.5 * image + (1 - previous) ** 0.5 * noise
    return x


def to_image(samples):
    return (samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


# ------------------------------------------------------------------------------------------------------------ classes


@each_model
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_for_classes(model, scale):
    pipeline = class_pipeline(DDIMScheduler(set_alpha_to_one=True), model)
    conditions, null = {"class_labels": torch.tensor([1, 3])}, {"class_labels": torch.tensor([CLASSES - 1] * 2)}
    expected = to_image(sample_by_hand(pipeline, conditions, null, scale, batch_size=2))
    np.testing.assert_allclose(run(pipeline, class_labels=[1, 3], guidance_scale=scale), expected, atol=1e-3)
    other = to_image(sample_by_hand(pipeline, conditions, null, scale + 1, batch_size=2))
    assert abs(other - expected).max() > 1e-2  # else this test could not fail


@each_model
def test_guidance_off_costs_one_evaluation_per_step(model):
    pipeline = class_pipeline(model=model)
    batch_sizes = []
    pipeline.unet.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    run(pipeline, class_labels=[0, 1])
    assert batch_sizes == [2, 2, 2]
    run(pipeline, class_labels=[0, 1], guidance_scale=1.5)
    assert batch_sizes[3:] == [4, 4, 4]


@each_model
def test_labels_of_every_form(model):
    pipeline = class_pipeline(model=model)
    expected = run(pipeline, class_labels=[2])
    for labels in (2, (2,), torch.tensor([2]), torch.tensor(2), torch.tensor([2], dtype=torch.int32)):
        np.testing.assert_array_equal(run(pipeline, class_labels=labels), expected)


@pytest.mark.parametrize(
    "scheduler", [DDPMScheduler(), DDIMScheduler(), EulerDiscreteScheduler(), DPMSolverMultistepScheduler()]
)
@pytest.mark.parametrize("model", ["UViT", "oblong UNet"])
def test_a_generator_makes_it_reproducible(model, scheduler):
    pipeline = class_pipeline(scheduler, model)
    images = run(pipeline, class_labels=[1, 2], guidance_scale=2.0)
    assert images.shape == (2, 8, 16 if model == "oblong UNet" else 8, 3)
    assert np.isfinite(images).all()
    np.testing.assert_array_equal(run(pipeline, class_labels=[1, 2], guidance_scale=2.0), images)
    assert abs(run(pipeline, seed=8, class_labels=[1, 2], guidance_scale=2.0) - images).max() > 1e-2


def test_a_generator_per_image_makes_each_independent_of_the_others():
    pipeline = class_pipeline(DDPMScheduler())

    def generators(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    both = run(pipeline, class_labels=[1, 2], generator=generators(3, 4))
    second = run(pipeline, class_labels=[2], generator=generators(4))
    np.testing.assert_allclose(both[1:], second, atol=1e-4)
    with pytest.raises(ValueError, match="one generator per image, 2"):
        run(pipeline, class_labels=[1, 2], generator=generators(3))


def test_output_types_agree():
    pipeline = class_pipeline()
    array = run(pipeline, class_labels=[1, 2])
    tensor = run(pipeline, class_labels=[1, 2], output_type="pt")
    assert tensor.shape == (2, 3, 8, 8)
    np.testing.assert_array_equal(tensor.permute(0, 2, 3, 1).numpy(), array)
    pictures = run(pipeline, class_labels=[1, 2], output_type="pil")
    assert all(isinstance(picture, PIL.Image.Image) and picture.size == (8, 8) for picture in pictures)
    np.testing.assert_array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype("uint8"))
    generator = torch.Generator().manual_seed(7)
    (as_tuple,) = pipeline([1, 2], num_inference_steps=3, generator=generator, output_type="np", return_dict=False)
    np.testing.assert_array_equal(as_tuple, array)


@pytest.mark.parametrize("model", ["UViT", "UNet"])
def test_half_precision(model):
    pipeline = class_pipeline(model=model)
    images = run(pipeline.to(torch.bfloat16), class_labels=[1], guidance_scale=2.0)
    assert images.dtype == np.float32
    assert np.isfinite(images).all()


def test_the_progress_bar_counts_the_steps(capfd):
    pipeline = class_pipeline()
    pipeline.set_progress_bar_config(disable=False)
    run(pipeline, class_labels=[1])
    assert "3/3" in capfd.readouterr().err


# --------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guidance_for_text(scale):
    pipeline = text_pipeline()
    prompts = ["a photo of a red cat", "blue house"]
    conditions = {"encoder_hidden_states": encode_by_hand(pipeline, prompts)}
    null = {"encoder_hidden_states": encode_by_hand(pipeline, ["", ""])}
    pipeline.scheduler = DDIMScheduler(set_alpha_to_one=True)
    expected = sample_by_hand(pipeline, conditions, null, scale, batch_size=2)
    latents = run(pipeline, prompt=prompts, guidance_scale=scale, output_type="latent")
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / 0.23).sample
    images = run(pipeline, prompt=prompts, guidance_scale=scale)
    assert images.shape == (2, 16, 16, 3)
    np.testing.assert_allclose(images, to_image(decoded), atol=1e-4)


def test_embeddings_take_the_place_of_the_prompt():
    pipeline = text_pipeline()
    expected = run(pipeline, prompt="red dog", guidance_scale=2.0)
    text, null = encode_by_hand(pipeline, ["red dog"]), encode_by_hand(pipeline, [""])
    without_encoder = ScaleLongPipeline(pipeline.unet, pipeline.scheduler, vae=pipeline.vae)
    quiet(without_encoder)
    for pipe in (pipeline, without_encoder):
        images = run(pipe, prompt_embeds=text, negative_prompt_embeds=null, guidance_scale=2.0)
        np.testing.assert_allclose(images, expected, atol=1e-4)
    assert abs(run(pipeline, prompt="blue cat", guidance_scale=2.0) - expected).max() > 1e-3


def test_long_prompts_are_cut_with_a_warning():
    pipeline = text_pipeline()
    prompt = "a photo of a red cat a blue dog"
    with pytest.warns(UserWarning, match="has 9 tokens and was cut to the 7"):
        images = run(pipeline, prompt=[prompt])
    np.testing.assert_array_equal(images, run(pipeline, prompt=[" ".join(prompt.split()[:NUM_TOKENS])]))


def test_classes_and_text_together():
    model = uvit(num_class_embeds=CLASSES, cross_attention_dim=WIDTH, num_context_tokens=NUM_TOKENS)
    pipeline = quiet(ScaleLongPipeline(model, DDIMScheduler(set_alpha_to_one=True)))
    text, null_text = torch.randn(2, 2, NUM_TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    conditions = {"class_labels": torch.tensor([0, 1]), "encoder_hidden_states": text}
    null = {"class_labels": torch.tensor([4, 4]), "encoder_hidden_states": null_text}
    expected = to_image(sample_by_hand(pipeline, conditions, null, 2.0, batch_size=2))
    embeds = {"prompt_embeds": text, "negative_prompt_embeds": null_text}
    np.testing.assert_allclose(run(pipeline, class_labels=[0, 1], guidance_scale=2.0, **embeds), expected, atol=1e-3)
    with pytest.raises(ValueError, match="as many labels as prompts"):
        run(pipeline, class_labels=[0], **embeds)


# ------------------------------------------------------------------------------------------------- save, load, errors


@each_model
def test_a_class_pipeline_is_saved_and_loaded_by_name(model, tmp_path, caplog):
    pipeline = class_pipeline(model=model)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert "Expected types" not in caplog.text
    assert type(loaded) is ScaleLongPipeline
    assert type(loaded.unet) is type(pipeline.unet)
    assert (loaded.vae, loaded.text_encoder, loaded.tokenizer) == (None, None, None)
    arguments = {"class_labels": [0, 3], "guidance_scale": 2.0}
    np.testing.assert_allclose(run(quiet(loaded), **arguments), run(pipeline, **arguments), atol=1e-4)


def test_a_text_pipeline_is_saved_and_loaded_by_name(tmp_path):
    pipeline = text_pipeline()
    pipeline.save_pretrained(tmp_path)
    for loader in (DiffusionPipeline, ScaleLongPipeline):
        loaded = loader.from_pretrained(str(tmp_path))
        assert type(loaded) is ScaleLongPipeline
        assert type(loaded.text_encoder) is CLIPTextModel
        arguments = {"prompt": ["a red cat", "dog"], "guidance_scale": 2.0}
        np.testing.assert_allclose(run(quiet(loaded), **arguments), run(pipeline, **arguments), atol=1e-3)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        ("class", {}, ValueError, "class-conditional: give `class_labels` below 5"),
        ("class", {"class_labels": []}, ValueError, "at least one label"),
        ("class", {"class_labels": [1.0]}, TypeError, "must be integers"),
        ("class", {"class_labels": [5]}, ValueError, r"must lie in \[0, 5\), but are \[5\]"),
        ("class", {"class_labels": [-1]}, ValueError, r"must lie in \[0, 5\)"),
        ("class", {"class_labels": [4], "guidance_scale": 2.0}, ValueError, r"\[0, 4\).*the last .* null class"),
        ("class", {"class_labels": [1], "prompt": "cat"}, ValueError, "takes no text"),
        ("class", {"class_labels": [1], "output_type": "jpg"}, ValueError, "`output_type` must be one of pil"),
        ("text", {}, ValueError, "give `prompt` or `prompt_embeds`"),
        ("text", {"prompt": []}, ValueError, "at least one text"),
        ("text", {"prompt": "cat", "class_labels": [1]}, ValueError, "takes no `class_labels`"),
        ("text", {"prompt": "cat", "prompt_embeds": torch.zeros(1, 7, 24)}, ValueError, "one of the two"),
        ("text", {"prompt_embeds": torch.zeros(1, 8, 24)}, ValueError, r"must have shape \(1, 7, 24\)"),
        (
            "text",
            {"prompt": "cat", "negative_prompt_embeds": torch.zeros(1, 7, 25), "guidance_scale": 2.0},
            ValueError,
            r"`negative_prompt_embeds` must have the shape of the text, \(1, 7, 24\)",
        ),
        ("no encoder", {"prompt": "cat"}, ValueError, "no text encoder and tokenizer: give `prompt_embeds`"),
        (
            "no encoder",
            {"prompt_embeds": torch.zeros(1, 7, 24), "guidance_scale": 2.0},
            ValueError,
            "needs `negative_prompt_embeds`",
        ),
        ("none", {}, ValueError, "unconditional: sample from it with DDPMPipeline"),
        ("UNet", {}, ValueError, "class-conditional: give `class_labels` below 5"),
        ("UNet", {"class_labels": [4], "guidance_scale": 2.0}, ValueError, r"\[0, 4\).*the last .* null class"),
        ("UNet", {"class_labels": [1], "prompt": "cat"}, ValueError, "takes no text"),
        ("UNet", {"class_labels": [1], "prompt_embeds": torch.zeros(1, 7, 24)}, ValueError, "takes no text"),
        ("no size", {"class_labels": [1]}, ValueError, "config of `unet` has no `sample_size`"),
        ("unconditional UNet", {}, ValueError, "unconditional: sample from it with DDPMPipeline"),
        ("unconditional UNet", {"class_labels": [1]}, ValueError, "takes no `class_labels`"),
    ],
)
def test_wrong_conditions_are_named(kind, arguments, error, message):
    if kind in ("text", "no encoder"):
        pipeline = text_pipeline()
        if kind == "no encoder":
            pipeline = ScaleLongPipeline(pipeline.unet, pipeline.scheduler)
    else:
        model = {
            "class": MODELS["UViT"],
            "none": uvit,
            "UNet": unet,
            "no size": lambda: unet(sample_size=None),
            "unconditional UNet": lambda: unet(num_class_embeds=None),
        }[kind]()
        pipeline = ScaleLongPipeline(model, DDIMScheduler())
    with pytest.raises(error, match=message):
        run(pipeline, **arguments)


def test_a_unet_for_text_belongs_to_another_pipeline():
    text_unet = ScaleLongUNet2DConditionModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    with pytest.raises(TypeError, match=r"ScaleLongUNet2DConditionModel: .* StableDiffusionPipeline"):
        ScaleLongPipeline(text_unet, DDIMScheduler())
