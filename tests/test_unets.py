"""The scaled UNets against Diffusers' own, for every up-block type."""

import copy
import pickle

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DModel
from peft import LoraConfig
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from unets import (
    CASE_IDS,
    CASES,
    CLASS_IDS,
    ONE_CASE_PER_CLASS,
    config_of,
    inputs_of,
    output_of,
    scaled_by_hand,
    seeded,
)

from diffusers_scalelong import ScaleLongUNet2DConditionModel, ScaleLongUNet2DModel

METHODS = ("none", "uniform", "cs", "ls", "ls_unshared")
every_case = pytest.mark.parametrize(("plain_class", "scaled_class", "name"), CASES, ids=CASE_IDS)
each_class = pytest.mark.parametrize(("plain_class", "scaled_class", "name"), ONE_CASE_PER_CLASS, ids=CLASS_IDS)


@every_case
def test_none_is_bit_identical_to_the_parent(plain_class, scaled_class, name):
    config = config_of(plain_class, name)
    plain, scaled = seeded(plain_class, config), seeded(scaled_class, config)
    assert plain.state_dict().keys() == scaled.state_dict().keys()
    assert torch.equal(output_of(plain), output_of(scaled))
    assert scaled.kappas == (1.0,) * scaled.num_skips


@every_case
@pytest.mark.parametrize("method", ["uniform", "cs", "schedule"])
def test_constants_equal_a_plain_unet_scaled_by_hand(plain_class, scaled_class, name, method):
    config = config_of(plain_class, name)
    plain = seeded(plain_class, config)
    n = seeded(scaled_class, config).num_skips
    by_hand = {
        "uniform": [0.6] * n,
        "cs": [0.6**i for i in range(n)],
        "schedule": [0.3 + 0.6 * i / n for i in range(n)],
    }[method]
    kappa = by_hand if method == "schedule" else 0.6
    scaled = seeded(scaled_class, config, skip_scaling=method.replace("schedule", "uniform"), kappa=kappa)
    assert scaled.kappas == pytest.approx(by_hand)
    with scaled_by_hand(by_hand) as seen:
        expected = output_of(plain)
    assert len(seen) == n, "the numbering counts the skips that the decoder concatenates"
    assert torch.equal(output_of(scaled), expected)
    assert not torch.allclose(expected, output_of(plain), rtol=1e-3)


@every_case
@pytest.mark.parametrize("method", ["ls", "ls_unshared"])
def test_learnable_gates_fit_every_skip_and_train(plain_class, scaled_class, name, method):
    config = config_of(plain_class, name)
    scaled = seeded(scaled_class, config, skip_scaling=method, ls_reduction=4)
    with scaled_by_hand([1.0] * scaled.num_skips) as widths:
        output_of(seeded(plain_class, config))
    gated = widths if method == "ls_unshared" else sorted(set(widths))
    plain_size = sum(p.numel() for p in seeded(plain_class, config).parameters())
    gates_size = sum(w * (w // 4) + w // 4 + (w // 4) * w + w for w in gated)
    assert sum(p.numel() for p in scaled.parameters()) == plain_size + gates_size
    assert scaled.kappas is None

    seen = []
    for gate in scaled.skip_scaler.gates.values():
        gate.register_forward_hook(lambda _module, _args, value: seen.append(value))
    scaled(**inputs_of(scaled)).sample.square().mean().backward()
    assert len(seen) == scaled.num_skips
    assert all(((gate > 0) & (gate < 1)).all() for gate in seen)
    for parameter in scaled.skip_scaler.parameters():
        assert parameter.grad is not None
    assert all(gate.linear_2.weight.grad.abs().max() > 0 for gate in scaled.skip_scaler.gates.values())


@every_case
@pytest.mark.parametrize("method", ["ls", "ls_unshared"])
def test_gates_that_start_at_p_equal_a_uniform_kappa_of_p(plain_class, scaled_class, name, method):
    config = config_of(plain_class, name)
    learned = seeded(scaled_class, config, skip_scaling=method, ls_initial_gate=0.8)
    constant = seeded(scaled_class, config, skip_scaling="uniform", kappa=0.8)
    torch.testing.assert_close(output_of(learned), output_of(constant), rtol=1e-4, atol=1e-5)


def test_a_standard_ddpm_unet_has_twelve_skips():
    unet = ScaleLongUNet2DModel(
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * 4,
        up_block_types=("UpBlock2D",) * 4,
        layers_per_block=2,
        skip_scaling="cs",
        kappa=0.5,
    )
    assert unet.num_skips == 12
    assert unet.kappas == tuple(0.5**i for i in range(12))


def count_multiplications(unet) -> int:
    inputs = inputs_of(unet)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as trace:
        unet(**inputs)
    return sum(event.count for event in trace.key_averages() if event.key == "aten::mul")


def test_a_coefficient_of_one_costs_no_operation():
    config = config_of(UNet2DModel, "AttnUpBlock2D")
    baseline = count_multiplications(seeded(UNet2DModel, config))
    unet = seeded(ScaleLongUNet2DModel, config, skip_scaling="uniform", kappa=1)
    assert count_multiplications(unet) == baseline
    unet.set_kappa(0.5)
    assert count_multiplications(unet) == baseline + 6
    cs = seeded(ScaleLongUNet2DModel, config, skip_scaling="cs", kappa=0.5)
    assert count_multiplications(cs) == baseline + 5


@each_class
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("method", ["cs", "ls"])
def test_copies_are_independent(plain_class, scaled_class, name, clone, method):
    unet = seeded(scaled_class, config_of(plain_class, name), skip_scaling=method)
    before = output_of(unet)
    twin = clone(unet)
    assert torch.equal(output_of(twin), before)
    if method == "cs":
        twin.set_kappa(0.1)
        assert unet.kappas[1] == 0.7
        assert unet.config.kappa == 0.7
    else:
        with torch.no_grad():
            twin.skip_scaler.gates["width_32"].linear_2.bias.fill_(-5)
    assert not torch.allclose(output_of(twin), before, rtol=1e-3)
    assert torch.equal(output_of(unet), before)


@each_class
@pytest.mark.parametrize("method", METHODS)
def test_torch_compile_traces_one_graph(plain_class, scaled_class, name, method):
    torch._dynamo.reset()
    unet = seeded(scaled_class, config_of(plain_class, name), skip_scaling=method)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    torch.testing.assert_close(output_of(compiled), output_of(unet), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", ["uniform", "cs"])
def test_set_kappa_changes_a_compiled_model_without_recompiling_it(method):
    torch._dynamo.reset()
    unet = seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), skip_scaling=method, kappa=0.9)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(unet, fullgraph=True, backend=counter)
    outputs = []
    for kappa in (0.9, 0.5, 1.0, 0.7, 1):
        unet.set_kappa(kappa)
        outputs.append(output_of(compiled))
        torch.testing.assert_close(outputs[-1], output_of(unet), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1], rtol=1e-3)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", ["cs", "ls"])
def test_the_inductor_compiles_a_training_step(method):
    torch._dynamo.reset()
    config = config_of(UNet2DModel, "UpBlock2D") | {
        "block_out_channels": (16,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "add_attention": False,
    }
    gradients = []
    for compile_it in (False, True):
        unet = seeded(ScaleLongUNet2DModel, config, skip_scaling=method, ls_reduction=2)
        run = torch.compile(unet, fullgraph=True) if compile_it else unet
        run(**inputs_of(unet)).sample.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in unet.parameters()]))
    assert (gradients[1] - gradients[0]).norm() < 1e-4 * gradients[0].norm()


@each_class
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_gradient(plain_class, scaled_class, name, method):
    gradients = []
    for checkpointing in (False, True):
        unet = seeded(scaled_class, config_of(plain_class, name), skip_scaling=method).train()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        unet(**inputs_of(unet)).sample.square().mean().backward()
        gradients.append([p.grad for p in unet.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


@each_class
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_and_back(plain_class, scaled_class, name, method):
    unet = seeded(scaled_class, config_of(plain_class, name), skip_scaling=method)
    full = output_of(unet)
    kappas = unet.kappas
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs_of(unet).items()}
    with torch.no_grad():
        half = copy.deepcopy(unet).to(torch.bfloat16)(**inputs).sample
        autocast_unet = copy.deepcopy(unet)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = autocast_unet(**inputs_of(unet)).sample
    assert half.dtype == torch.bfloat16
    for output in (half, mixed):
        assert torch.nn.functional.cosine_similarity(output.float().flatten(), full.flatten(), dim=0) > 0.99
    assert unet.to(torch.bfloat16).float().kappas == kappas


@each_class
def test_from_unet_copies_everything_and_shares_nothing(plain_class, scaled_class, name):
    plain = seeded(plain_class, config_of(plain_class, name)).double().train()
    scaled = scaled_class.from_unet(plain, skip_scaling="cs", kappa=0.5)
    assert scaled.dtype == torch.float64
    assert scaled.training
    ignored = {"skip_scaling", "kappa", "ls_reduction", "ls_initial_gate"}
    public = {key: value for key, value in plain.config.items() if not key.startswith("_")}
    assert {k: v for k, v in scaled.config.items() if k not in ignored and not k.startswith("_")} == public
    for key, value in plain.state_dict().items():
        assert torch.equal(scaled.state_dict()[key], value)
        assert scaled.state_dict()[key].data_ptr() != value.data_ptr()
    with torch.no_grad():
        for parameter in scaled.parameters():
            parameter.zero_()
    assert all(p.abs().sum() > 0 for n, p in plain.named_parameters() if n.endswith("conv_in.weight"))


def test_from_unet_keeps_what_was_passed_by_position():
    plain = UNet2DModel(
        8, 1, 1, **{k: v for k, v in config_of(UNet2DModel, "UpBlock2D").items() if k != "sample_size"}
    )
    scaled = ScaleLongUNet2DModel.from_unet(plain, skip_scaling="ls")
    assert (scaled.config.sample_size, scaled.config.in_channels) == (8, 1)
    positional = ScaleLongUNet2DModel(8, 1, 1, block_out_channels=(32, 64, 64, 64))
    assert (positional.config.sample_size, positional.config.in_channels) == (8, 1)
    assert "args" not in positional.config


def test_from_unet_between_methods():
    source = seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), skip_scaling="ls")
    same = ScaleLongUNet2DModel.from_unet(source, skip_scaling="ls")
    assert torch.equal(output_of(same), output_of(source))
    torch.manual_seed(5)
    first = ScaleLongUNet2DModel.from_unet(source, skip_scaling="ls_unshared")
    torch.manual_seed(5)
    second = ScaleLongUNet2DModel.from_unet(source, skip_scaling="ls_unshared")
    assert torch.equal(output_of(first), output_of(second))
    assert ScaleLongUNet2DModel.from_unet(source).config.skip_scaling == "none"


def test_from_unet_refuses_other_things():
    unet = seeded(UNet2DModel, config_of(UNet2DModel, "UpBlock2D"))
    for other in (torch.nn.Conv2d(3, 3, 3), {"conv_in": 1}, torch.compile(unet)):
        with pytest.raises(TypeError, match="needs a UNet2DModel"):
            ScaleLongUNet2DModel.from_unet(other, skip_scaling="cs")
    with pytest.raises(TypeError, match="needs a UNet2DConditionModel"):
        ScaleLongUNet2DConditionModel.from_unet(unet, skip_scaling="cs")
    unet.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"do not fit its config.*extra"):
        ScaleLongUNet2DModel.from_unet(unet, skip_scaling="cs")


@every_case
def test_to_unet_gives_back_the_plain_unet(plain_class, scaled_class, name):
    config = config_of(plain_class, name)
    plain = seeded(plain_class, config)
    back = scaled_class.from_unet(plain).to_unet()
    assert type(back) is plain_class
    assert torch.equal(output_of(back), output_of(plain))
    public, expected = ({k: v for k, v in unet.config.items() if k[0] != "_"} for unet in (back, plain))
    assert public == expected


@each_class
def test_to_unet_copies_everything_and_shares_nothing(plain_class, scaled_class, name, caplog):
    scaled = seeded(scaled_class, config_of(plain_class, name)).double().train()
    scaled.conv_out.half()
    before = copy.deepcopy(scaled.state_dict())
    caplog.clear()
    plain = scaled.to_unet()
    assert not caplog.records, "nothing to warn of"
    assert plain.training
    assert plain.state_dict().keys() == before.keys()
    for key, value in plain.state_dict().items():
        assert value.dtype == (torch.float16 if key.startswith("conv_out") else torch.float64)
        assert torch.equal(value, before[key])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[key]) for key, value in scaled.state_dict().items())
    assert not scaled.eval().to_unet().training


@each_class
@pytest.mark.parametrize("method", ["uniform", "cs", "ls", "ls_unshared"])
def test_to_unet_drops_a_scaling_only_when_asked_to(plain_class, scaled_class, name, method):
    config = config_of(plain_class, name)
    plain, scaled = seeded(plain_class, config), seeded(scaled_class, config, skip_scaling=method)
    before = output_of(scaled)
    with pytest.raises(ValueError, match=f"skip_scaling='{method}': a {plain_class.__name__} .* drop_scaling=True"):
        scaled.to_unet()
    dropped = scaled.to_unet(drop_scaling=True)
    assert type(dropped) is plain_class
    assert torch.equal(output_of(dropped), output_of(plain))
    assert not torch.allclose(output_of(dropped), before, rtol=1e-3)
    assert torch.equal(output_of(scaled), before)


def test_to_unet_with_coefficients_of_one_drops_nothing():
    unet = seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), skip_scaling="uniform", kappa=1)
    assert torch.equal(output_of(unet.to_unet()), output_of(unet))


def test_to_unet_refuses_an_adapter():
    plain_class, scaled_class, name = ONE_CASE_PER_CLASS[1]
    unet = seeded(scaled_class, config_of(plain_class, name))
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match=r"do not fit its config.*unload adapters"):
        unet.to_unet()


@pytest.mark.parametrize("method", ["none", "ls", "ls_unshared"])
def test_set_kappa_needs_constants(method):
    unet = seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), skip_scaling=method)
    with pytest.raises(ValueError, match="'uniform' and 'cs'"):
        unet.set_kappa(0.5)


def test_set_kappa_updates_model_and_config_together():
    unet = seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), skip_scaling="uniform")
    schedule = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    unet.set_kappa(schedule)
    assert list(unet.kappas) == unet.config.kappa == schedule
    with pytest.raises(ValueError, match="greater than 0"):
        unet.set_kappa(-1)
    assert list(unet.kappas) == unet.config.kappa == schedule
    again = ScaleLongUNet2DModel.from_config(unet.config)
    assert list(again.kappas) == schedule


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"skip_scaling": "fixup"}, ValueError),
        ({"skip_scaling": "cs", "kappa": "0.7"}, TypeError),
        ({"skip_scaling": "ls", "kappa": 0.7}, ValueError),
        ({"skip_scaling": "uniform", "kappa": [0.5]}, ValueError),
        ({"skip_scaling": "ls", "ls_initial_gate": 1.5}, ValueError),
    ],
)
def test_the_models_refuse_bad_arguments(arguments, error):
    with pytest.raises(error):
        ScaleLongUNet2DModel(**config_of(UNet2DModel, "UpBlock2D"), **arguments)


def test_a_stable_diffusion_pipeline_takes_a_scaled_unet():
    plain_class, scaled_class, name = ONE_CASE_PER_CLASS[1]
    config = config_of(plain_class, name) | {"in_channels": 4, "out_channels": 4, "sample_size": 8}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4).eval()

    def sample(unet):
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=DDIMScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        embeddings = torch.ones(1, 5, 24)
        return pipeline(
            prompt_embeds=embeddings,
            negative_prompt_embeds=-embeddings,
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images

    plain, scaled = seeded(plain_class, config), seeded(scaled_class, config, skip_scaling="none")
    assert (sample(plain) == sample(scaled)).all()
    assert (sample(plain) != sample(seeded(scaled_class, config, skip_scaling="cs"))).any()


def test_a_noise_scheduler_loop_runs_as_with_any_unet():
    unet = seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), skip_scaling="cs")
    scheduler = DDPMScheduler(num_train_timesteps=10)
    sample = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for timestep in scheduler.timesteps:
        with torch.no_grad():
            sample = scheduler.step(unet(sample, timestep).sample, timestep, sample).prev_sample
    assert torch.isfinite(sample).all()
