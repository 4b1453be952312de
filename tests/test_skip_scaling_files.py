"""The scaling as a file of its own, beside LoRA weights: real files and adapters, the Hub's client with its cache."""

import json
import resource
import subprocess
import sys
import textwrap

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from unets import CLASS_IDS, ONE_CASE_PER_CLASS, config_of, inputs_of, output_of, seeded

from diffusers_scalelong import ScaleLongUNet2DConditionModel, ScaleLongUNet2DModel, ScaleLongUViT2DModel

FILE = "skip_scaling.safetensors"
LEARNABLE = ("ls", "ls_unshared")
SCHEDULE = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
MODELS = [
    *[(scaled_class, config_of(plain_class, name)) for plain_class, scaled_class, name in ONE_CASE_PER_CLASS],
    (
        ScaleLongUViT2DModel,
        {
            "sample_size": 8,
            "num_layers": 4,
            "num_attention_heads": 2,
            "hidden_size": 16,
            "cross_attention_dim": 24,
            "num_context_tokens": 5,
        },
    ),
]
each_model = pytest.mark.parametrize(("cls", "config"), MODELS, ids=[*CLASS_IDS, "UViT2DModel"])
SMALL = MODELS[0][1]


def trained(model, seed=5):
    """The model with other gates, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.skip_scaler.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def metadata_of(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()


# -------------------------------------------------------------------------------------------------------- round trips


@each_model
@pytest.mark.parametrize("method", LEARNABLE)
def test_gates_survive_the_round_trip(cls, config, method, tmp_path):
    model = trained(seeded(cls, config, skip_scaling=method, ls_reduction=4))
    model.save_skip_scaling(tmp_path / "new" / "folder")
    fresh = seeded(cls, config, skip_scaling=method, ls_reduction=4)
    assert not torch.equal(output_of(fresh), output_of(model))
    fresh.load_skip_scaling(tmp_path / "new" / "folder")
    assert torch.equal(output_of(fresh), output_of(model))

    expected = {key: value for key, value in model.state_dict().items() if key.startswith("skip_scaler.")}
    stored = load_file(tmp_path / "new" / "folder" / FILE)
    assert {f"skip_scaler.{key}" for key in stored} == expected.keys()
    assert all(torch.equal(stored[key.removeprefix("skip_scaler.")], value) for key, value in expected.items())
    with torch.no_grad():
        for parameter in fresh.skip_scaler.parameters():
            parameter.zero_()
    again = seeded(cls, config, skip_scaling=method, ls_reduction=4)
    again.load_skip_scaling(tmp_path / "new" / "folder" / FILE)
    assert torch.equal(output_of(again), output_of(model)), "a loaded model shares no storage with the file"


@pytest.mark.parametrize(
    ("method", "kappa"), [("uniform", 0.3), ("uniform", SCHEDULE), ("cs", 0.45), ("none", None)], ids=str
)
def test_constants_survive_the_round_trip(method, kappa, tmp_path):
    model = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling=method, kappa=kappa)
    model.save_skip_scaling(tmp_path)
    assert load_file(tmp_path / FILE) == {}
    assert json.loads(metadata_of(tmp_path / FILE)["config"]) == {
        "skip_scaling": method,
        "kappa": kappa,
        "ls_reduction": 16,
        "num_skips": 6,
    }
    fresh = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling=method)
    fresh.load_skip_scaling(tmp_path)
    assert fresh.kappas == model.kappas
    assert fresh.config.kappa == kappa
    assert torch.equal(output_of(fresh), output_of(model))


def test_in_warm_up_the_constants_in_force_are_stored(tmp_path):
    model = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="cs", kappa=0.4)
    model.warm_up_kappa(0.5)
    model.save_skip_scaling(tmp_path)
    fresh = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="uniform")
    fresh.load_skip_scaling(tmp_path)
    assert fresh.kappas == pytest.approx([0.5 + 0.5 * 0.4**i for i in range(6)])
    assert torch.equal(output_of(fresh), output_of(model))
    assert (model.config.skip_scaling, model.config.kappa) == ("cs", 0.4)


def test_a_string_and_a_subfolder_and_a_second_write(tmp_path):
    for folder, kappa in (("", 0.2), ("checkpoint-1", 0.9), ("checkpoint-1", 0.4)):
        seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="cs", kappa=kappa).save_skip_scaling(str(tmp_path / folder))
    unet = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="cs")
    unet.load_skip_scaling(str(tmp_path), subfolder="checkpoint-1")
    assert unet.config.kappa == 0.4
    unet.load_skip_scaling(str(tmp_path))
    assert unet.config.kappa == 0.2
    assert [path.name for path in (tmp_path / "checkpoint-1").iterdir()] == [FILE]


def test_gates_take_the_dtype_of_the_model(tmp_path):
    model = trained(seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="ls"))
    model.save_skip_scaling(tmp_path)
    half = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="ls").to(torch.bfloat16)
    half.load_skip_scaling(tmp_path)
    for parameter, original in zip(half.skip_scaler.parameters(), model.skip_scaler.parameters(), strict=True):
        assert torch.equal(parameter, original.bfloat16())


def test_a_repository_of_the_hub(tmp_path):
    """From the client's cache, laid out as after a download: the suite has no network."""
    repository = tmp_path / "models--someone--lora"
    for revision, kappa in (("main", 0.3), ("v2", 0.6)):
        commit = {"main": "a" * 40, "v2": "b" * 40}[revision]
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        unet = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="cs", kappa=kappa)
        unet.save_skip_scaling(repository / "snapshots" / commit)
        unet.set_kappa(kappa + 0.1)
        unet.save_skip_scaling(repository / "snapshots" / commit / "sub")
    unet = seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="cs")
    for arguments, kappa in (
        ({}, 0.3),
        ({"revision": "v2"}, 0.6),
        ({"subfolder": "sub"}, 0.4),
        ({"subfolder": "sub", "revision": "v2", "local_files_only": True, "token": False}, 0.7),
    ):
        unet.load_skip_scaling("someone/lora", cache_dir=tmp_path, **arguments)
        assert unet.config.kappa == kappa
    with pytest.raises(OSError, match="someone/other"):
        unet.load_skip_scaling("someone/other", cache_dir=tmp_path)
    with pytest.raises(TypeError, match="variant"):
        unet.load_skip_scaling("someone/lora", cache_dir=tmp_path, variant="fp16")


# -------------------------------------------------------------------------------------------------------------- faults


def test_a_failed_write_names_the_file_and_leaves_the_earlier_one(tmp_path):
    unet = trained(seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="ls"))
    unet.save_skip_scaling(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    trained(unet, seed=6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))  # as on a disk that is full by then
    try:
        with pytest.raises(OSError, match=f"{FILE} cannot be written: .*File too large"):
            unet.save_skip_scaling(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / FILE).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def save_with(model, folder, **metadata):
    save_file(model.skip_scaler.state_dict(), folder / FILE, metadata=metadata)


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (lambda model, folder: None, OSError, FILE),
        (lambda model, folder: (folder / FILE).write_bytes(b""), OSError, "is damaged"),
        (
            lambda model, folder: (
                model.save_skip_scaling(folder),
                (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1]),
            ),
            OSError,
            "is damaged",
        ),
        (lambda model, folder: save_with(model, folder), ValueError, "`save_skip_scaling` did not write it"),
        (lambda model, folder: save_with(model, folder, config="{"), ValueError, "did not write it"),
        (lambda model, folder: save_with(model, folder, config="[1]"), ValueError, "did not write it"),
        (lambda model, folder: save_with(model, folder, config='{"kappa": 1}'), ValueError, "did not write it"),
    ],
    ids=["absent", "empty", "truncated", "no metadata", "not JSON", "a list", "keys missing"],
)
def test_other_files_are_refused(write, error, message, tmp_path):
    unet = trained(seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="ls"))
    write(trained(seeded(ScaleLongUNet2DModel, SMALL, skip_scaling="ls"), seed=6), tmp_path)
    before = output_of(unet)
    with pytest.raises(error, match=message):
        unet.load_skip_scaling(tmp_path)
    assert torch.equal(output_of(unet), before)


WIDER = SMALL | {"block_out_channels": (32, 96)}
DEEPER = SMALL | {"layers_per_block": 3}


@pytest.mark.parametrize(
    ("stored", "own", "message"),
    [
        (
            {"skip_scaling": "ls", "ls_reduction": 8},
            {"skip_scaling": "ls"},
            r"ScaleLongUNet2DModel\.from_pretrained\(…, skip_scaling='ls', ls_reduction=8\)",
        ),
        ({"skip_scaling": "ls"}, {"skip_scaling": "ls_unshared"}, r"from_pretrained\(…, skip_scaling='ls', ls_red"),
        ({"skip_scaling": "ls"}, {"skip_scaling": "cs"}, r"from_pretrained\(…, skip_scaling='ls', ls_reduction=16\)"),
        ({"skip_scaling": "cs"}, {"skip_scaling": "ls"}, r"from_pretrained\(…, skip_scaling='cs'\) first"),
        ({"skip_scaling": "cs"}, {"skip_scaling": "uniform"}, r"for skip_scaling='cs', but .* skip_scaling='uniform'"),
        ({"skip_scaling": "none"}, {"skip_scaling": "cs"}, r"from_pretrained\(…, skip_scaling='none'\)"),
        ({"skip_scaling": "ls"}, {"skip_scaling": "ls"} | WIDER, r"do not fit .*width_64"),
        ({"skip_scaling": "ls"}, {"skip_scaling": "ls"} | DEEPER, "with 6 long skip .* this one has 8"),
        ({"skip_scaling": "cs"}, {"skip_scaling": "cs"} | DEEPER, "with 6 long skip .* this one has 8"),
    ],
    ids=str,
)
def test_the_scaling_of_another_model_is_refused(stored, own, message, tmp_path):
    seeded(ScaleLongUNet2DModel, SMALL | stored).save_skip_scaling(tmp_path)
    unet = seeded(ScaleLongUNet2DModel, SMALL | own)
    before, config = output_of(unet), dict(unet.config)
    with pytest.raises(ValueError, match=message):
        unet.load_skip_scaling(tmp_path)
    assert torch.equal(output_of(unet), before)
    assert dict(unet.config) == config


# ---------------------------------------------------------------------------------------------------------------- LoRA

CONDITIONAL = MODELS[1][1] | {"in_channels": 4, "out_channels": 4, "sample_size": 8}
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def save_base_pipeline(folder):
    """A Stable Diffusion pipeline without its text encoder; its UNet is Diffusers' own class."""
    plain_class = ONE_CASE_PER_CLASS[1][0]
    torch.manual_seed(1)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4)
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(
        unet=seeded(plain_class, CONDITIONAL),
        vae=vae,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
        **parts,
    )
    pipeline.save_pretrained(folder)


def test_an_adapter_leaves_the_gates_alone(tmp_path):
    unet = trained(seeded(ScaleLongUNet2DConditionModel, CONDITIONAL, skip_scaling="ls"))
    gates = {key: value for key, value in unet.state_dict().items() if key.startswith("skip_scaler.")}
    unet.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    assert any("lora_A" in key for key in unet.state_dict())
    assert {key for key in unet.state_dict() if key.startswith("skip_scaler.")} == gates.keys()
    unet.save_skip_scaling(tmp_path)
    assert {f"skip_scaler.{key}" for key in load_file(tmp_path / FILE)} == gates.keys()

    fresh = seeded(ScaleLongUNet2DConditionModel, CONDITIONAL, skip_scaling="ls")
    fresh.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    fresh.load_skip_scaling(tmp_path)
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in gates.items())


def test_gates_that_an_adapter_wraps_are_refused(tmp_path):
    unet = seeded(ScaleLongUNet2DConditionModel, CONDITIONAL, skip_scaling="ls")
    unet.save_skip_scaling(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    unet.add_adapter(LoraConfig(r=2, target_modules=["linear_1", "linear_2"]))
    with pytest.raises(ValueError, match="choose its `target_modules`"):
        unet.save_skip_scaling(tmp_path)
    assert (tmp_path / FILE).read_bytes() == before
    with pytest.raises(ValueError, match="base_layer"):
        unet.load_skip_scaling(tmp_path)


SAMPLE = """
import torch
from diffusers import StableDiffusionPipeline
from diffusers_scalelong import ScaleLongUNet2DConditionModel

def load(base):
    unet = ScaleLongUNet2DConditionModel.from_pretrained(base, subfolder="unet", skip_scaling="ls")
    return StableDiffusionPipeline.from_pretrained(base, unet=unet, text_encoder=None, tokenizer=None)

def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    embeddings = torch.linspace(-1, 1, 5 * 24).reshape(1, 5, 24)
    generator = torch.Generator().manual_seed(0)
    inputs = {"prompt_embeds": embeddings, "negative_prompt_embeds": -embeddings, "generator": generator}
    return pipeline(**inputs, num_inference_steps=2, output_type="pt").images
"""
LOAD_AND_SAMPLE = (
    SAMPLE
    + """
import sys
from safetensors.torch import save_file

base, folder = sys.argv[1:]
images = {}
for order in (("gates", "lora"), ("lora", "gates")):
    pipeline = load(base)
    for part in order:
        if part == "gates":
            pipeline.unet.load_skip_scaling(folder)
        else:
            pipeline.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    images[order[0]] = sample(pipeline)
save_file(images, f"{folder}/images.safetensors")
"""
)


def test_lora_and_gates_that_were_trained_come_back_in_a_new_process(tmp_path):
    base, folder = tmp_path / "base", tmp_path / "lora"
    save_base_pipeline(base)
    namespace = {}
    exec(textwrap.dedent(SAMPLE), namespace)  # the very code of the other process
    pipeline = namespace["load"](base)
    untrained = namespace["sample"](pipeline)
    unet = pipeline.unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    unet.skip_scaler.requires_grad_(True)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.05)
    for _ in range(3):
        unet.train()(**inputs_of(unet)).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    unet.eval()
    expected = namespace["sample"](pipeline)

    lora = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    assert not any("skip_scaler" in key for key in lora)
    pipeline.save_lora_weights(folder, unet_lora_layers=lora)
    unet.save_skip_scaling(folder)
    assert {path.name for path in folder.iterdir()} == {"pytorch_lora_weights.safetensors", FILE}
    run = subprocess.run([sys.executable, "-c", LOAD_AND_SAMPLE, base, folder], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    images = load_file(folder / "images.safetensors")
    assert torch.equal(images["gates"], expected)
    assert torch.equal(images["lora"], expected)

    without_gates = namespace["load"](base)
    without_gates.load_lora_weights(folder, weight_name="pytorch_lora_weights.safetensors")
    for other in (untrained, namespace["sample"](without_gates)):
        assert (other - expected).abs().max() > 1e-3  # else the comparison above would prove nothing
