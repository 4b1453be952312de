"""The U-ViT: its scaling against oracles by hand, its inputs, and that it behaves as a Diffusers model does."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import diffusers_scalelong
from diffusers_scalelong import ScaleLongUNet2DModel, ScaleLongUViT2DModel, skip_coefficients

METHODS = ("none", "uniform", "cs", "ls", "ls_unshared")
TINY = {"sample_size": 8, "patch_size": 2, "num_layers": 6, "num_attention_heads": 2, "hidden_size": 16}
CONDITIONS = {
    "none": {},
    "class": {"num_class_embeds": 5},
    "text": {"cross_attention_dim": 12, "num_context_tokens": 3},
    "both": {"num_class_embeds": 5, "cross_attention_dim": 12, "num_context_tokens": 3},
}
each_method = pytest.mark.parametrize("method", METHODS)


def build(method="none", seed=0, **config):
    """A tiny model in evaluation mode; its large weights let every part of it show in the output."""
    torch.manual_seed(seed)
    model = ScaleLongUViT2DModel(**{**TINY, "skip_scaling": method, **config})
    generator = torch.Generator().manual_seed(seed)  # its own: gates must not change the other weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("skip_scaler"):
                parameter.normal_(std=0.3, generator=generator)
    return model.eval()


def inputs_of(model, batch_size=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    size = config["sample_size"]
    inputs = {
        "sample": torch.randn(batch_size, config["in_channels"], size, size, generator=generator),
        "timestep": torch.randint(0, 1000, (batch_size,), generator=generator),
    }
    if config["num_class_embeds"]:
        inputs["class_labels"] = torch.randint(0, config["num_class_embeds"], (batch_size,), generator=generator)
    if config["cross_attention_dim"]:
        shape = (batch_size, config["num_context_tokens"], config["cross_attention_dim"])
        inputs["encoder_hidden_states"] = torch.randn(shape, generator=generator)
    return inputs


def output_of(model, **changes):
    with torch.no_grad():
        return model(**{**inputs_of(model), **changes}).sample


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def without_scaling(model):
    """The same weights in a model that scales nothing."""
    plain = build(**{key: value for key, value in model.config.items() if key in TINY})
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("skip_scaler")})
    return plain


def scale_by_hand(plain, factor):
    """Multiplies what the j-th out-block concatenates by `factor(j, skip)`; the first one takes the deepest skip."""
    for j, block in enumerate(plain.out_blocks):
        block.register_forward_pre_hook(lambda block, args, j=j: (args[0], args[1] * factor(j, args[1])))
    return plain


# ---------------------------------------------------------------------------------------------- the skip connections


@pytest.mark.parametrize(
    ("method", "kappa"),
    [("uniform", None), ("uniform", 0.8), ("uniform", [0.9, 0.6, 0.4]), ("cs", None), ("cs", 0.6), ("none", None)],
)
def test_constant_scaling_multiplies_the_right_skips(method, kappa):
    model = build(method, kappa=kappa)
    kappas = skip_coefficients(method, 3, kappa)
    assert model.kappas == kappas
    plain = without_scaling(model)
    by_hand = scale_by_hand(copy.deepcopy(plain), lambda j, skip: kappas[2 - j])
    assert_close(output_of(model), output_of(by_hand))
    if method != "none":
        assert (output_of(model) - output_of(plain)).abs().max() > 1e-2  # else this test could not fail


@pytest.mark.parametrize("method", ["ls", "ls_unshared"])
def test_learnable_scaling_gates_the_tokens(method):
    model = build(method, num_class_embeds=5)
    gates = model.state_dict()
    tokens = 1 + 1 + 4 * 4

    def gate(j, skip):
        name = f"width_{tokens}" if method == "ls" else f"skip_{3 - j}"
        w1, b1, w2, b2 = (
            gates[f"skip_scaler.gates.{name}.{key}"]
            for key in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
        )
        assert w1.shape == (max(tokens // 16, 1), tokens)
        pooled = skip.sum(-1) / skip.shape[-1]
        return (1 / (1 + torch.exp(-((pooled @ w1.T + b1).clamp(min=0) @ w2.T + b2))))[:, :, None]

    plain = build(num_class_embeds=5)
    plain.load_state_dict({k: v for k, v in gates.items() if not k.startswith("skip_scaler")})
    assert model.kappas is None
    assert_close(output_of(model), output_of(scale_by_hand(plain, gate)))


@pytest.mark.parametrize("method", ["ls", "ls_unshared"])
def test_gates_that_start_at_p_are_uniform_scaling_by_p(method):
    gated = build(method, ls_initial_gate=0.3)
    assert_close(output_of(gated), output_of(build("uniform", kappa=0.3)))


def test_coefficients_of_one_change_no_bit():
    assert torch.equal(output_of(build("uniform", kappa=1.0)), output_of(build("none")))


def test_set_kappa_is_the_same_as_building_with_it():
    model = build("cs", kappa=0.9)
    model.set_kappa(0.5)
    assert model.config["kappa"] == 0.5
    assert torch.equal(output_of(model), output_of(build("cs", kappa=0.5)))


def test_set_kappa_without_constants_is_an_error():
    with pytest.raises(ValueError, match="no constants"):
        build("ls").set_kappa(0.5)


# ------------------------------------------------------------------------------------------------------ architecture


def test_initialisation_is_the_references():
    torch.manual_seed(0)
    model = ScaleLongUViT2DModel(hidden_size=256, num_layers=4, attention_bias=True, skip_scaling="ls")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.startswith("skip_scaler"):
            assert abs(module.weight.std().item() - 0.02) < 1e-3, name
            assert not module.bias.any(), name
    assert abs(model.pos_embed.std().item() - 0.02) < 1e-3
    gate = model.skip_scaler.gates["width_257"]
    for layer, fan_in in ((gate.linear_1, 257), (gate.linear_2, 16)):  # PyTorch's default: uniform within 1/√fan_in
        assert abs(layer.weight.std().item() - 1 / math.sqrt(3 * fan_in)) < 0.1 / math.sqrt(fan_in)
        assert layer.bias.any()


def test_an_odd_number_of_layers_counts_the_middle_block():
    assert build(num_layers=7).state_dict().keys() == build(num_layers=6).state_dict().keys()
    model = build(num_layers=7)
    assert (len(model.in_blocks), len(model.out_blocks), model.num_skips) == (3, 3, 3)


def test_the_time_token_is_the_sinusoidal_embedding():
    model = build(hidden_size=6, num_attention_heads=1)
    seen = []
    model.in_blocks[0].register_forward_pre_hook(lambda block, args: seen.append(args[0] - model.pos_embed))
    output_of(model, timestep=torch.tensor([3.5, 700.0]))
    for row, t in zip(seen[0][:, 0], (3.5, 700.0), strict=True):
        frequencies = [10000 ** (-i / 3) for i in range(3)]
        expected = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
        torch.testing.assert_close(row, torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_timesteps_of_every_form():
    model = build(time_embedding_mlp=True)
    expected = output_of(model, timestep=torch.tensor([7, 7]))
    for timestep in (7, 7.0, torch.tensor(7), torch.tensor([7]), torch.tensor(7.0), torch.tensor([7.0, 7.0])):
        assert_close(output_of(model, timestep=timestep), expected)
    assert (output_of(model, timestep=7.5) - expected).abs().max() > 1e-3
    mixed = output_of(model, timestep=torch.tensor([7, 9]))
    assert_close(mixed[0], expected[0])
    assert not torch.allclose(mixed[1], expected[1])


@pytest.mark.parametrize("condition", CONDITIONS)
def test_conditions_reach_the_output_image_by_image(condition):
    model = build(**CONDITIONS[condition])
    inputs = inputs_of(model)
    expected = output_of(model)
    assert expected.shape == inputs["sample"].shape
    tuple_output = model(**inputs, return_dict=False)
    assert isinstance(tuple_output, tuple)
    assert_close(tuple_output[0], expected)
    for key in ("class_labels", "encoder_hidden_states"):
        if key in inputs:
            other = inputs[key].clone()
            other[1] = (other[1] + 1) % 5
            changed = output_of(model, **{key: other})
            assert_close(changed[0], expected[0])
            assert not torch.allclose(changed[1], expected[1])


def test_gradients_reach_every_parameter():
    for method in METHODS:
        model = build(method, time_embedding_mlp=True, attention_bias=True, **CONDITIONS["both"]).train()
        model(**inputs_of(model, batch_size=8)).sample.square().sum().backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # With one hidden feature a gate's ReLU may rest; the other parameters have no such excuse.
        assert all(name.startswith("skip_scaler") and "linear_1" in name for name in without), without


# ------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"sample_size": 9}, ValueError, "multiple of `patch_size`"),
        ({"sample_size": (8, 8)}, TypeError, "`sample_size` must be an integer"),
        ({"patch_size": 0}, ValueError, "`patch_size` must be at least 1"),
        ({"num_layers": 1}, ValueError, "`num_layers` must be at least 2"),
        ({"num_layers": 6.0}, TypeError, "`num_layers` must be an integer"),
        ({"num_attention_heads": 3}, ValueError, "must divide `hidden_size`"),
        ({"num_attention_heads": True}, TypeError, "`num_attention_heads` must be an integer"),
        ({"num_class_embeds": 0}, ValueError, "`num_class_embeds` must be at least 1"),
        ({"mlp_ratio": 0.01}, ValueError, "`mlp_ratio`"),
        ({"mlp_ratio": float("nan")}, ValueError, "`mlp_ratio`"),
        ({"mlp_ratio": "4"}, TypeError, "`mlp_ratio` must be a number"),
        ({"cross_attention_dim": 12}, ValueError, "`num_context_tokens`"),
        ({"num_context_tokens": 3}, ValueError, "`cross_attention_dim`"),
        ({"skip_scaling": "CS"}, ValueError, "must be one of none"),
        ({"skip_scaling": "cs", "kappa": -1.0}, ValueError, "greater than 0"),
        ({"skip_scaling": "uniform", "kappa": [0.5, 0.5]}, ValueError, "2 constants, but this model has 3"),
        ({"skip_scaling": "ls", "ls_initial_gate": 1.0}, ValueError, "between 0 and 1"),
    ],
)
def test_wrong_arguments_are_named(config, error, message):
    with pytest.raises(error, match=message):
        ScaleLongUViT2DModel(**{**TINY, **config})


@pytest.mark.parametrize(
    ("condition", "changes", "message"),
    [
        ("none", {"sample": torch.zeros(2, 3, 16, 16)}, r"must have shape \(batch, 3, 8, 8\).*has \(2, 3, 16, 16\)"),
        ("none", {"sample": torch.zeros(2, 3, 8, 7)}, r"has \(2, 3, 8, 7\)"),
        ("none", {"sample": torch.zeros(2, 1, 8, 8)}, r"has \(2, 1, 8, 8\)"),
        ("none", {"sample": torch.zeros(3, 8, 8)}, r"has \(3, 8, 8\)"),
        ("none", {"timestep": torch.zeros(3)}, r"`timestep` must be one number or one per image, 2"),
        ("none", {"class_labels": torch.zeros(2, dtype=torch.long)}, "takes no `class_labels`"),
        ("none", {"encoder_hidden_states": torch.zeros(2, 3, 12)}, "takes no `encoder_hidden_states`"),
        ("class", {"class_labels": None}, "give `class_labels`, integers below 5"),
        ("class", {"class_labels": torch.tensor([0, 5])}, r"must lie in \[0, 5\), but reach from 0 to 5"),
        ("class", {"class_labels": torch.tensor([-1, 4])}, "reach from -1 to 4"),
        ("class", {"class_labels": torch.tensor([1])}, r"one label per image, shape \(2,\)"),
        ("text", {"encoder_hidden_states": None}, r"give `encoder_hidden_states` of shape \(2, 3, 12\)"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 4, 12)}, r"has \(2, 4, 12\). Pad or cut"),
        ("text", {"encoder_hidden_states": torch.zeros(2, 3, 13)}, r"has \(2, 3, 13\)"),
        ("text", {"encoder_hidden_states": torch.zeros(1, 3, 12)}, r"has \(1, 3, 12\)"),
    ],
)
def test_wrong_inputs_are_named(condition, changes, message):
    with pytest.raises(ValueError, match=message):
        output_of(build(**CONDITIONS[condition]), **changes)


# ----------------------------------------------------------------------------------- precision, memory, compilation


@each_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(method, dtype):
    model = build(method, **CONDITIONS["class"])
    expected = output_of(model)
    model = model.to(dtype)
    output = output_of(model, sample=inputs_of(model)["sample"].to(dtype))
    assert output.dtype == dtype
    assert (output.float() - expected).abs().max() < 0.1 * expected.abs().max()


class RecordAttention(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.dtypes.update(tensor.dtype for tensor in args)
        return func(*args, **(kwargs or {}))


def test_attention_runs_in_the_models_dtype():
    with RecordAttention() as record:
        output_of(build().to(torch.bfloat16), sample=torch.zeros(2, 3, 8, 8, dtype=torch.bfloat16))
    assert record.dtypes == {torch.bfloat16}
    with RecordAttention() as record, torch.autocast("cpu", torch.bfloat16):
        output_of(build())
    assert record.dtypes == {torch.bfloat16}


@each_method
def test_gradient_checkpointing_changes_no_gradient(method):
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = build(method).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        block_runs = []
        for block in model.out_blocks:
            block.attn.register_forward_hook(lambda *args, runs=block_runs: runs.append(1))
        model(**inputs_of(model)).sample.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        runs.append(len(block_runs))
    assert runs == [3, 6]  # each out-block ran again on the way back
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_close(checkpointed, plain)


@each_method
@pytest.mark.parametrize("condition", ["none", "both"])
def test_one_graph_holds_the_model(method, condition):
    torch.compiler.reset()
    model = build(method, **CONDITIONS[condition])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(output_of(compiled), output_of(model))


@pytest.mark.parametrize("method", ["uniform", "cs"])
def test_set_kappa_does_not_recompile(method):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = build(method, num_layers=8)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for kappa in (0.9, 0.5, 1.0):
        model.set_kappa(kappa)
        assert_close(output_of(compiled), output_of(model))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_training_compiles_with_the_default_backend():
    torch.compiler.reset()
    model = build("cs", num_layers=2, **CONDITIONS["class"]).train()
    inputs = inputs_of(model)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(**inputs).sample.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4 * eager.abs().max().item())


# ------------------------------------------------------------------------------------------------ a Diffusers model


@each_method
def test_a_model_survives_the_round_trip(method, tmp_path):
    model = build(method, **CONDITIONS["both"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "ScaleLongUViT2DModel"
    for loaded in (ScaleLongUViT2DModel.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(loaded) is ScaleLongUViT2DModel
        assert loaded.kappas == model.kappas
        assert_close(output_of(loaded), output_of(model))


def test_a_plain_checkpoint_takes_new_gates_at_load(tmp_path):
    build("none").save_pretrained(tmp_path)
    loaded = ScaleLongUViT2DModel.from_pretrained(tmp_path, skip_scaling="ls", ls_initial_gate=0.25)
    assert_close(output_of(loaded), output_of(build("uniform", kappa=0.25)))
    # The gates of a U-ViT must not be guessed from another class.
    with pytest.raises(ValueError, match="ScaleLongUViT2DModel, which ScaleLongUNet2DModel cannot load"):
        ScaleLongUNet2DModel.from_pretrained(tmp_path)


def test_missing_weights_are_an_error(tmp_path):
    build().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del weights["out_blocks.1.ff.net.2.bias"]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"out_blocks\.1\.ff\.net\.2\.bias"):
        ScaleLongUViT2DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["cs", "ls"])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_whole_and_independent(method, clone):
    model = build(method)
    expected = output_of(model)
    other = clone(model)
    assert torch.equal(output_of(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    if method == "cs":
        other.set_kappa(0.1)
        assert model.config["kappa"] == 0.7
    assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
def test_pipelines_of_diffusers_take_it_as_their_unet(scheduler_class, tmp_path):
    pipeline = DDPMPipeline(build("cs"), scheduler_class(num_train_timesteps=20))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(str(tmp_path))
    assert type(loaded.unet) is ScaleLongUViT2DModel
    loaded.set_progress_bar_config(disable=True)
    images = [
        run(batch_size=2, num_inference_steps=3, output_type="np", generator=torch.Generator().manual_seed(5)).images
        for run in (pipeline, loaded)
    ]
    assert images[0].shape == (2, 8, 8, 3)
    assert abs(images[0] - images[1]).max() < 1e-4


def test_it_learns():
    torch.manual_seed(0)
    model = ScaleLongUViT2DModel(**{**TINY, "hidden_size": 32}, skip_scaling="ls", num_class_embeds=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    labels = torch.arange(4)
    targets = torch.randn(4, 3, 1, 1).expand(4, 3, 8, 8)
    losses = []
    for _ in range(150):
        loss = F.mse_loss(model(torch.zeros_like(targets), 10, class_labels=labels).sample, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]  # possible only if the labels reach the output: all else is the same


# ----------------------------------------------------------------------------------------------------------- presets

# Published sizes, in millions: U-ViT's table 1 and its table of MS-COCO, DDPM's section 4, DDIM's CelebA network.
PRESETS = {
    "cifar10_uvit_s2": (44, {"learning_rate": 2e-4, "adam_beta1": 0.99, "adam_beta2": 0.999, "lr_warmup_steps": 2500}),
    "celeba64_uvit_s4": (44, {"learning_rate": 2e-4, "adam_beta2": 0.99, "lr_warmup_steps": 5000}),
    "imagenet64_uvit_m4": (131, {"learning_rate": 3e-4, "train_batch_size": 1024, "max_train_steps": 300_000}),
    "imagenet64_uvit_l4": (287, {"learning_rate": 3e-4, "train_batch_size": 1024, "max_train_steps": 300_000}),
    "mscoco256_uvit_s2": (45, {"adam_beta1": 0.9, "adam_beta2": 0.9, "proportion_empty_prompts": 0.1}),
    "cifar10_ddpm": (35.7, {"learning_rate": 2e-4, "max_train_steps": 800_000}),
    "ddpm_64": (78.7, {"learning_rate": 2e-4, "train_batch_size": 128}),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_size(name):
    path = Path(__file__).parent.parent / "training" / "configs" / f"{name}.json"
    config = json.loads(path.read_text())
    training = config.pop("training")
    model_class = getattr(diffusers_scalelong, config.pop("_class_name"))
    with torch.device("meta"):
        model = model_class(**config, skip_scaling="cs")  # as keywords: an unknown key is an error
    millions, expected = PRESETS[name]
    assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - millions) <= (0.05 if millions % 1 else 1)
    assert training["ema_max_decay"] == 0.9999
    assert expected.items() <= training.items()


def test_the_cifar10_ddpm_is_the_plain_one_plus_scaling():
    config = json.loads((Path(__file__).parent.parent / "training" / "configs" / "cifar10_ddpm.json").read_text())
    del config["_class_name"], config["training"]
    with torch.device("meta"):
        plain, scaled = UNet2DModel(**config), ScaleLongUNet2DModel(**config, skip_scaling="cs")
    assert plain.state_dict().keys() == scaled.state_dict().keys()
    assert scaled.num_skips == 12
