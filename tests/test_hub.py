"""Pushing and loading over HTTP, with the real client against the server of `hub_server`."""

import argparse
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel, UNet2DModel
from hub_server import ALICE, BOB, HubServer
from unets import config_of, inputs_of, seeded

from diffusers_scalelong import (
    ScaleLongPipeline,
    ScaleLongUNet2DConditionModel,
    ScaleLongUNet2DModel,
    ScaleLongUViT2DModel,
    hub,
)
from diffusers_scalelong.remote_code import add_code, including_code

ROOT = Path(__file__).parent.parent
LIVE_TOKEN = "SCALELONG_HUB_TEST_TOKEN"


@pytest.fixture(scope="module")
def server():
    """The client in this process talks to the server, with Alice's token, until the module's tests are done."""
    with pytest.MonkeyPatch.context() as patch, HubServer() as hub_server:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        patch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(huggingface_hub.constants, "ENDPOINT", hub_server.url)
        patch.setenv("HF_TOKEN", ALICE)
        yield hub_server


@pytest.fixture
def fast_retries(monkeypatch):
    monkeypatch.setattr(hub, "FIRST_WAIT", 0.01)


# --------------------------------------------------------------------------------------------- models and pipelines


def condition_model():
    config = config_of(UNet2DConditionModel, "CrossAttnUpBlock2D")
    return seeded(ScaleLongUNet2DConditionModel, config, skip_scaling="ls")


def unet(kappa=0.6):
    return seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), skip_scaling="cs", kappa=kappa)


def uvit():
    sizes = {"sample_size": 8, "num_layers": 4, "num_attention_heads": 2, "hidden_size": 16, "num_class_embeds": 5}
    return seeded(ScaleLongUViT2DModel, sizes, skip_scaling="ls_unshared")


def inputs_for(loaded):
    if isinstance(loaded, DDPMPipeline):
        return {"batch_size": 2}
    if isinstance(loaded, ScaleLongPipeline):
        return {"class_labels": [0, 3]}
    if isinstance(loaded, ScaleLongUViT2DModel):
        sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"sample": sample, "timestep": torch.tensor([7, 307]), "class_labels": torch.tensor([1, 4])}
    inputs = inputs_of(loaded)
    return {**inputs, "sample": inputs["sample"].to(loaded.dtype)}


# A fresh process with an empty cache. It runs each expression of the plan and saves what the model or the pipeline
# computes, or the message of the error.
LOAD = """
import pickle, sys, torch
folder, block = sys.argv[1:]
if block == "without the package":
    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "diffusers_scalelong":
                raise ModuleNotFoundError(f"{name} is hidden")
    sys.meta_path.insert(0, Blocker())
else:
    import diffusers_scalelong
    from diffusers_scalelong import *
import diffusers
from diffusers import *
torch.set_num_threads(1)
inputs = torch.load(f"{folder}/inputs.pt")
results, models = {}, {}
for name, case, code in torch.load(f"{folder}/plan.pt"):
    try:
        loaded = eval(code)
        if isinstance(loaded, DiffusionPipeline):
            loaded.set_progress_bar_config(disable=True)
            kwargs = {**inputs[case], "generator": torch.Generator().manual_seed(3), "output_type": "np"}
            output = torch.from_numpy(loaded(**kwargs, num_inference_steps=2).images)
            model = loaded.unet
        else:
            model = loaded
            with torch.no_grad():
                output = model(**inputs[case]).sample
        results[name], models[name] = (output, type(model).__module__), model
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}", None
for name, model in models.items():  # which those that were loaded later have left alone
    results[name] += (model.kappas,)
    assert pickle.loads(pickle.dumps(model)).kappas == model.kappas
torch.save(results, f"{folder}/results.pt")
"""


class Site:
    """Repositories on the server, and what their models and pipelines compute.

    The expected outputs are those of the same files loaded from the disk: bit for bit the same.
    """

    def __init__(self, folder):
        self.folder, self.inputs, self.expected, self.kappas = folder, {}, {}, {}

    def expect(self, case, model, **loading):
        """Of the model or the pipeline that is saved in the folder with the name of the case."""
        loaded = type(model).from_pretrained(self.folder / case, **loading)
        self.inputs[case] = inputs_for(loaded)
        self.kappas[case] = getattr(loaded, "unet", loaded).kappas
        if isinstance(model, DiffusionPipeline):
            loaded.set_progress_bar_config(disable=True)
            generator = torch.Generator().manual_seed(3)
            images = loaded(**self.inputs[case], generator=generator, output_type="np", num_inference_steps=2).images
            self.expected[case] = torch.from_numpy(images)
        else:
            with torch.no_grad():
                self.expected[case] = loaded(**self.inputs[case]).sample

    def load(self, server, plan, home, *, with_package=True, **environment):
        torch.save(plan, self.folder / "plan.pt")
        mode = "with the package" if with_package else "without the package"
        result = run_python(LOAD, self.folder, mode, server=server, home=home, **environment)
        assert result.returncode == 0, result.stderr[-4000:]
        results = torch.load(self.folder / "results.pt")
        return {name: (case, *results[name]) for name, case, _ in plan}

    def assert_loaded(self, results, *names, module=None):
        for name in names or results:
            case, output, model_module, *kappas = results[name]
            assert isinstance(output, torch.Tensor), f"{name}: {output}"
            assert kappas == [self.kappas[case]], name
            assert torch.equal(output, self.expected[case]), name
            assert module is None or model_module.startswith(module), (name, model_module)


def run_python(code, *args, server, home, **environment):
    """Runs code in a process whose client talks to the server, with its own cache, away from the checkout."""
    home.mkdir(exist_ok=True)
    settings = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": ALICE,
        **environment,
    }
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, env=os.environ | settings, cwd=home, capture_output=True, text=True)


def push_everything(folder):
    """In a process of its own, which the environment points at the server."""
    site = Site(folder)

    # One model of each class, each in another way.
    model = unet(kappa=0.3)
    model.save_pretrained(folder / "unet v1")
    site.expect("unet v1", model)
    model.push_to_hub("unet")
    huggingface_hub.create_tag("alice/unet", tag="v1")
    model.set_kappa(0.9)
    model.save_pretrained(folder / "unet")
    site.expect("unet", model)
    model.push_to_hub("unet")
    for variant, other in (("fp16", unet(kappa=0.9).half()), ("ema", perturbed(unet(kappa=0.9)))):
        other.save_pretrained(folder / f"unet {variant}", variant=variant)
        site.expect(f"unet {variant}", other, variant=variant)
        other.push_to_hub("unet", variant=variant)

    model = condition_model()
    model.save_pretrained(str(folder / "condition"), max_shard_size="200KB", push_to_hub=True, repo_id="condition")
    site.expect("condition", model)
    model = uvit()
    model.save_pretrained(folder / "uvit")
    site.expect("uvit", model)
    model.push_to_hub("uvit", private=True)

    # Pipelines, Diffusers' and this package's.
    digits = DDPMPipeline(unet=unet(), scheduler=DDPMScheduler(num_train_timesteps=10))
    digits.save_pretrained(folder / "digits")
    site.expect("digits", digits)
    site.expect("digits/unet", digits.unet)
    digits.push_to_hub("digits")
    classes = ScaleLongPipeline(unet=uvit(), scheduler=DDIMScheduler(num_train_timesteps=10))
    classes.save_pretrained(folder / "classes")
    site.expect("classes", classes)

    # The same with their code.
    unet(kappa=0.9).push_to_hub("unet-with-code", include_code=True)
    condition_model().push_to_hub("condition-with-code", include_code=True)
    uvit().save_pretrained(str(folder / "coded"), include_code=True, push_to_hub=True, repo_id="uvit-with-code")
    for saved, name in ((digits, "digits-with-code"), (classes, "classes-with-code")):
        with including_code(saved):
            saved.push_to_hub(name)
    torch.save(site.inputs, folder / "inputs.pt")
    torch.save((site.expected, site.kappas), folder / "expected.pt")


@pytest.fixture(scope="module")
def site(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    server.fail("POST", "/unet/preupload/", status=500)
    server.fail("POST", "/unet.git/info/lfs/objects/batch", status=429, headers={"Retry-After": "1"})
    server.fail("PUT", "/lfs-storage/", drop=True)
    server.fail("PUT", "/lfs-storage/", delay=0.5)
    code = "import pathlib, sys, test_hub; test_hub.push_everything(pathlib.Path(sys.argv[1]))"
    result = run_python(code, folder, server=server, home=folder / "home", PYTHONPATH=str(ROOT / "tests"))
    assert result.returncode == 0, result.stderr[-4000:]
    site = Site(folder)
    site.inputs = torch.load(folder / "inputs.pt")
    site.expected, site.kappas = torch.load(folder / "expected.pt")
    return site


def perturbed(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    return model


def test_what_was_pushed_despite_the_failures(site, server):
    assert all(fault.times == 0 for fault in server.faults)
    repos = server.repos
    assert {name: repo.private for name, repo in repos.items() if repo.private} == {"alice/uvit": True}
    assert [path for path in repos["alice/unet"].files if path.endswith(".safetensors")] == [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.fp16.safetensors",
        "diffusion_pytorch_model.ema.safetensors",
    ]
    assert sum(path.endswith(".safetensors") for path in repos["alice/condition"].files) > 2
    for name, folder in (("alice/condition", "condition"), ("alice/uvit", "uvit"), ("alice/digits", "digits")):
        for path, content in repos[name].files.items():
            if path not in (".gitattributes", "README.md"):
                assert content == (site.folder / folder / path).read_bytes(), (name, path)
    assert not [path for path in repos["alice/unet"].files if path.endswith(".py")]
    # Signed storage URLs take no token, and the Hub got it with everything else that it asks it for.
    assert {r.user for r in server.requests if r.path.startswith("/lfs-storage/")} == {None}


def test_every_class_loads_anywhere(site, server, tmp_path):
    anonymous = 'ScaleLongUViT2DModel.from_pretrained("alice/uvit", token=False)'
    stranger = f'ScaleLongUViT2DModel.from_pretrained("alice/uvit", token="{BOB}")'
    invalid = 'ScaleLongUViT2DModel.from_pretrained("alice/uvit", token="hf_expired")'
    refused = [("anonymous", "uvit", anonymous), ("stranger", "uvit", stranger), ("invalid", "uvit", invalid)]
    loading = [
        ("unet", "unet", 'ScaleLongUNet2DModel.from_pretrained("alice/unet")'),
        ("tag", "unet v1", 'ScaleLongUNet2DModel.from_pretrained("alice/unet", revision="v1")'),
        ("fp16", "unet fp16", 'ScaleLongUNet2DModel.from_pretrained("alice/unet", variant="fp16")'),
        ("ema", "unet ema", 'AutoModel.from_pretrained("alice/unet", variant="ema")'),
        ("condition", "condition", 'ScaleLongUNet2DConditionModel.from_pretrained("alice/condition")'),
        ("auto", "condition", 'AutoModel.from_pretrained("alice/condition")'),
        ("uvit", "uvit", f'AutoModel.from_pretrained("alice/uvit", token="{ALICE}")'),
        ("digits", "digits", 'DiffusionPipeline.from_pretrained("alice/digits")'),
        ("subfolder", "digits/unet", 'AutoModel.from_pretrained("alice/digits", subfolder="unet")'),
    ]
    # Where there is code, this package needs none of it; only `AutoModel` insists, on a model of its own.
    coded = [
        ("own unet", "unet", 'ScaleLongUNet2DModel.from_pretrained("alice/unet-with-code")'),
        ("own digits", "digits", 'DiffusionPipeline.from_pretrained("alice/digits-with-code")'),
        ("own classes", "classes", 'DiffusionPipeline.from_pretrained("alice/classes-with-code")'),
        ("own subfolder", "digits/unet", 'AutoModel.from_pretrained("alice/digits-with-code", subfolder="unet")'),
    ]
    trusting = ("trusting", "unet", 'AutoModel.from_pretrained("alice/unet-with-code", trust_remote_code=True)')
    untrusting = ("untrusting", "unet", 'AutoModel.from_pretrained("alice/unet-with-code")')

    server.fail("GET", "/alice/unet/resolve/.*safetensors", drop=True)
    server.fail("GET", "/api/models/alice/condition/tree", status=500)
    server.fail("HEAD", "/alice/digits/resolve/", delay=0.5)
    plan = [*refused, *loading, *coded, trusting, untrusting]
    results = site.load(server, plan, tmp_path / "home")
    site.assert_loaded(results, *(name for name, *_ in loading + coded), module="diffusers_scalelong.")
    site.assert_loaded(results, "trusting", module="diffusers_modules.")
    assert "trust_remote_code=True" in results["untrusting"][1]
    for name in ("anonymous", "stranger"):
        assert "private" in results[name][1] and "token" in results[name][1], results[name]
    assert "401" in results["invalid"][1] and "hf_expired" not in results["invalid"][1]
    assert all(fault.times == 0 for fault in server.faults)

    # What was loaded once loads again without a network, and a private repository too. (Diffusers asks the Hub about
    # sharded weights all the same, unless it is told not to.)
    before = len(server.requests)
    offline = [
        (name, case, code.replace('"alice/condition"', '"alice/condition", local_files_only=True'))
        for name, case, code in loading
    ]
    again = site.load(server, offline, tmp_path / "home", HF_HUB_OFFLINE="1")
    site.assert_loaded(again)
    assert len(server.requests) == before


def test_diffusers_alone_loads_what_comes_with_its_code(site, server, tmp_path):
    trusted = "trust_remote_code=True"
    with_code = [
        ("unet", "unet", f'AutoModel.from_pretrained("alice/unet-with-code", {trusted})'),
        ("condition", "condition", f'AutoModel.from_pretrained("alice/condition-with-code", {trusted})'),
        ("uvit", "uvit", f'AutoModel.from_pretrained("alice/uvit-with-code", {trusted})'),
        (
            "classes",
            "classes",
            f'DiffusionPipeline.from_pretrained("alice/classes-with-code", custom_pipeline="pipeline", {trusted})',
        ),
        ("digits", "digits", f'DiffusionPipeline.from_pretrained("alice/digits-with-code", {trusted})'),
    ]
    refused = [
        ("not trusted", "unet", 'AutoModel.from_pretrained("alice/unet-with-code")'),
        ("not trusted either", "digits", 'DiffusionPipeline.from_pretrained("alice/digits-with-code")'),
        ("no code", "digits", f'DiffusionPipeline.from_pretrained("alice/digits", {trusted})'),
        ("the package", "unet", '__import__("diffusers_scalelong")'),
    ]
    results = site.load(server, [*with_code, *refused], tmp_path / "home", with_package=False)
    site.assert_loaded(results, *(name for name, *_ in with_code), module="diffusers_modules.")
    assert "trust_remote_code=True" in results["not trusted"][1]
    assert "trust_remote_code=True" in results["not trusted either"][1]
    assert "diffusers_scalelong" in results["no code"][1]
    assert "is hidden" in results["the package"][1]


@pytest.mark.skipif(LIVE_TOKEN not in os.environ, reason=f"needs a token of the Hub that may write, in {LIVE_TOKEN}")
def test_the_real_hub(tmp_path):
    code = """
import uuid, torch, huggingface_hub
from diffusers_scalelong import ScaleLongUNet2DModel
from test_hub import unet
model = unet()
repo_id = huggingface_hub.create_repo(f"scalelong-test-{uuid.uuid4().hex[:8]}", private=True).repo_id
try:
    model.push_to_hub(repo_id, include_code=True)
    loaded = ScaleLongUNet2DModel.from_pretrained(repo_id)
    assert all(map(torch.equal, model.state_dict().values(), loaded.state_dict().values()))
finally:
    huggingface_hub.delete_repo(repo_id)
"""
    environment = {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_TOKEN": os.environ[LIVE_TOKEN],
        "PYTHONPATH": str(ROOT / "tests"),
    }
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]


# --------------------------------------------------------------------------------------------------------- the flags


def hub_args(*flags, output_dir="outputs/my-model", **more):
    parser = argparse.ArgumentParser()
    hub.add_hub_arguments(parser)
    return argparse.Namespace(**vars(parser.parse_args(flags)), output_dir=output_dir, **more)


@pytest.mark.usefixtures("server")
class TestArguments:
    def test_the_repository_is_named_after_the_output_folder(self):
        args = hub_args("--push_to_hub", output_dir="outputs/my-model/")
        hub.check_hub_args(args)
        assert args.hub_model_id == "my-model"
        args = hub_args("--push_to_hub", "--hub_model_id", "alice/other")
        hub.check_hub_args(args)
        assert args.hub_model_id == "alice/other"

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (hub_args("--hub_model_id", "alice/x"), "--hub_model_id has no effect without --push_to_hub"),
            (hub_args("--hub_private_repo"), "--hub_private_repo has no effect"),
            (hub_args("--hub_token", ALICE), "--hub_token has no effect"),
            (hub_args("--push_to_hub", "--hub_model_id", "a/b/c"), "--hub_model_id is no valid name"),
            (hub_args("--push_to_hub", output_dir="outputs/my model"), "name of --output_dir .* --hub_model_id"),
            (hub_args("--push_to_hub", "--hub_token", ALICE + "\n"), "blanks"),
            (hub_args("--push_to_hub", "--hub_token", ALICE, report_to="wandb"), "Weights & Biases"),
            (hub_args("--push_to_hub", "--hub_token", ALICE, logger="wandb"), "Weights & Biases"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_what_is_refused_before_the_training(self, args, message):
        with pytest.raises(ValueError, match=message) as caught:
            hub.check_hub_args(args)
        assert ALICE not in str(caught.value)

    def test_a_token_must_be_at_hand(self, monkeypatch, tmp_path):
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        with pytest.raises(ValueError, match="hf auth login"):
            hub.check_hub_args(hub_args("--push_to_hub"))
        hub.check_hub_args(hub_args("--push_to_hub", "--hub_token", ALICE))
        (tmp_path / "token").write_text(ALICE)
        hub.check_hub_args(hub_args("--push_to_hub"))

    def test_offline_mode_is_refused(self, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match="HF_HUB_OFFLINE"):
            hub.check_hub_args(hub_args("--push_to_hub"))

    def test_no_token_in_the_record_of_a_run(self, monkeypatch):
        script = str(Path("training") / "train.py")
        for flags in (["--hub_token", "secret"], ["--hub_token=secret"], ["--hub_tok", "secret"], ["--x", ALICE]):
            monkeypatch.setattr(sys, "argv", [script, "--name", "it's", *flags])
            command = hub.command_line("secret")
            assert "secret" not in command and ALICE not in command
            assert shlex.split(command)[-1].endswith("***")
            assert shlex.split(command)[:4] == ["python", script, "--name", "it's"]
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")  # as `accelerate launch` does
        assert hub.command_line("secret").startswith("accelerate launch training")
        args = hub_args("--push_to_hub", "--hub_token", ALICE, seed=3)
        assert hub.redacted_args(args)["hub_token"] == "***"
        assert hub.redacted_args(args)["seed"] == 3
        assert args.hub_token == ALICE
        assert hub.redacted_args(hub_args())["hub_token"] is None


# ---------------------------------------------------------------------------------------------------------- uploads


@pytest.fixture
def run(tmp_path):
    """The folder of a training run, with more in it than the Hub should get."""
    files = {
        "model_index.json": "{}",
        "README.md": "# card",
        "loss.csv": "1,2",
        "loss.png": "png",
        "unet/config.json": "{}",
        "unet/diffusion_pytorch_model.safetensors": "weights 1",
        "unet/diffusion_pytorch_model.bin": "pickle",
        "unet/diffusers_scalelong.py": "code",
        "unet/other.py": "code",
        "logs/events.txt": "log",
        ".cache/secret.json": "{}",
    }
    files |= {f"checkpoint-5/{name}": name for name in ("optimizer.bin", "random_states_0.pkl", "unet/config.json")}
    files["checkpoint-5/unet/diffusion_pytorch_model.safetensors"] = "weights 5"
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def leftovers(run):
    return list(run.glob(".hub-upload-*"))


def titles(repo):
    return [commit.title for commit in repo.commits[1:]]


@pytest.mark.usefixtures("fast_retries")
class TestUploader:
    def test_uploads_in_order_from_copies(self, server, run, caplog):
        caplog.set_level(logging.INFO)
        (run / ".hub-upload-of-a-killed-run").mkdir()
        uploader = hub.HubUploader("ordered", run)
        assert (uploader.repo_id, uploader.url) == ("alice/ordered", f"{server.url}/alice/ordered")
        assert leftovers(run) == []
        server.fail("PUT", "/lfs-storage/", delay=0.3)
        uploader.upload_folder(run / "checkpoint-5", "checkpoint-5", "Step 5")
        (run / "checkpoint-5/unet/diffusion_pytorch_model.safetensors").unlink()  # rotated away
        uploader.upload_folder(run, commit_message="Pipeline")
        (run / "loss.csv").write_text("written anew, in place")
        assert uploader.finish() == []

        repo = server.repos["alice/ordered"]
        assert titles(repo) == ["Step 5", "Pipeline"]
        assert {path: content.decode() for path, content in repo.files.items() if path != ".gitattributes"} == {
            "checkpoint-5/unet/config.json": "unet/config.json",
            "checkpoint-5/unet/diffusion_pytorch_model.safetensors": "weights 5",
            "model_index.json": "{}",
            "README.md": "# card",
            "loss.csv": "1,2",
            "loss.png": "png",
            "unet/config.json": "{}",
            "unet/diffusers_scalelong.py": "code",
            "unet/diffusion_pytorch_model.safetensors": "weights 1",
        }
        assert leftovers(run) == []
        assert "Everything is uploaded" in caplog.text
        assert ALICE not in caplog.text

    def test_a_failing_hub_is_asked_again(self, server, run):
        server.fail("POST", "/api/repos/create", status=500)
        uploader = hub.HubUploader("flaky", run, private=True)
        server.fail("POST", "/flaky/commit/", times=2, status=500)
        server.fail("POST", "/flaky/commit/", status=429, headers={"Retry-After": "0"})
        server.fail("POST", "/flaky/commit/", drop=True)
        uploader.upload_folder(run, commit_message="Pipeline")
        assert uploader.finish() == []
        assert titles(server.repos["alice/flaky"]) == ["Pipeline"]
        assert server.count("POST", "/flaky/commit/") == 5
        assert server.repos["alice/flaky"].private

    def test_a_failed_upload_stops_nothing_and_is_tried_again_at_the_end(self, server, run, caplog):
        uploader = hub.HubUploader("late", run)
        server.fail("POST", "/late/commit/", status=403)
        uploader.upload_folder(run / "checkpoint-5", "checkpoint-5", "Step 5")
        uploader.upload_folder(run, commit_message="Pipeline")
        assert uploader.finish() == []
        assert titles(server.repos["alice/late"]) == ["Pipeline", "Step 5"]
        assert "checkpoint-5 is not uploaded" in caplog.text
        assert server.count("POST", "/late/commit/") == 3  # a refusal is not worth another attempt at once

    def test_the_commands_for_what_is_missing_upload_it(self, server, run, caplog):
        uploader = hub.HubUploader("manual", run)
        server.fail("POST", "/manual/commit/", times=6, status=403)
        for step in (1, 2):  # the second replaces the first
            uploader.upload_folder(run, commit_message=f"Pipeline {step}")
        uploader.upload_folder(run / "checkpoint-5", "checkpoint-5", "Step 5")
        (run / "checkpoint-5").rename(run / "removed")
        commands = uploader.finish()
        assert len(commands) == 2
        assert "has been removed" in commands[1]
        assert all(command in caplog.text for command in commands)
        assert leftovers(run) == []
        server.faults.clear()

        environment = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        program = Path(sys.executable).with_name("hf")
        command = [str(program), *shlex.split(commands[0])[1:]]
        subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
        assert "unet/diffusion_pytorch_model.safetensors" in server.repos["alice/manual"].files
        assert not [path for path in server.repos["alice/manual"].files if "bin" in path or path.startswith("logs")]

    def test_copies_do_not_pile_up(self, server, run, caplog):
        uploader = hub.HubUploader("slow", run)
        server.fail("POST", "/slow/commit/", delay=0.5)
        for step in range(5):
            uploader.upload_folder(run / "unet", f"step-{step}", f"Step {step}")
            assert len(leftovers(run)) <= 1 + hub.MAX_WAITING
            if step == 0:
                wait_for(lambda: server.count("POST", "/slow/commit/"))
        assert "cannot keep up" in caplog.text
        assert uploader.finish() == []
        assert titles(server.repos["alice/slow"]) == [f"Step {step}" for step in (0, 3, 4, 1, 2)]

    def test_no_longer_than_the_timeout(self, server, run):
        uploader = hub.HubUploader("hanging", run)
        server.fail("POST", "/hanging/commit/", delay=3)
        uploader.upload_folder(run, commit_message="Pipeline")
        uploader.upload_folder(run / "unet", "again", "Again")
        start = time.monotonic()
        commands = uploader.finish(timeout=0.5)
        assert time.monotonic() - start < 2.5
        assert len(commands) == 2
        wait_for(lambda: not leftovers(run))  # what was on its way still arrives, what had not begun never does
        assert titles(server.repos["alice/hanging"]) == ["Pipeline"]

    def test_a_folder_that_cannot_be_copied_stops_nothing(self, server, run, caplog):
        uploader = hub.HubUploader("unreadable", run)
        uploader.upload_folder(run / "absent", "absent")
        uploader.upload_folder(run / "unet", "unet", "Unet")
        assert len(uploader.finish()) == 1
        assert "absent is not uploaded" in caplog.text
        assert titles(server.repos["alice/unreadable"]) == ["Unet"]

    @pytest.mark.parametrize(
        ("repo_id", "token", "message"),
        [("bob/model", ALICE, "403"), ("model", "hf_expired", "401")],
        ids=["another's namespace", "invalid token"],
    )
    def test_what_cannot_be_created_is_known_before_the_training(self, server, run, repo_id, token, message):
        with pytest.raises(OSError, match=message) as caught:
            hub.HubUploader(repo_id, run, token=token)
        assert "may write" in str(caught.value)
        assert token not in str(caught.value)

    def test_an_unreachable_hub_is_known_before_the_training(self, server, run, monkeypatch):
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
        with pytest.raises(OSError, match="Check the connection"):
            hub.HubUploader("model", run)

    def test_a_public_repository_is_not_taken_for_a_private_one(self, server, run):
        hub.HubUploader("public", run)
        with pytest.raises(ValueError, match="is public"):
            hub.HubUploader("public", run, private=True)


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --------------------------------------------------------------------------------------------- code beside the weights


def test_code_is_added_only_where_it_is_of_use(tmp_path):
    with pytest.raises(OSError, match="neither"):
        add_code(tmp_path)
    UNet2DModel(**config_of(UNet2DModel, "UpBlock2D")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="UNet2DModel, which is no model of this package"):
        add_code(tmp_path)
    assert not list(tmp_path.glob("*.py"))


def test_a_copy_of_the_code_is_not_promised_by_what_is_saved_later(tmp_path):
    unet().save_pretrained(tmp_path, include_code=True)
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    loaded = ScaleLongUNet2DModel.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
