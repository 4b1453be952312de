"""A training run that pushes to the Hub while it goes on, and what another machine gets from there."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import ALICE, HubServer
from scripts import ENVIRONMENT, LAUNCH, ROOT, TINY_UNET, losses

# What the model card tells a reader to do, in a process with an empty cache.
LOAD = """
import sys, torch
import diffusers_scalelong
from diffusers import DiffusionPipeline
here = DiffusionPipeline.from_pretrained(sys.argv[1])
there = DiffusionPipeline.from_pretrained("alice/digits")
assert there.unet.kappas == here.unet.kappas == tuple(0.6**i for i in range(4))
draw = lambda pipeline: pipeline(generator=torch.Generator().manual_seed(0), num_inference_steps=3, output_type="np")
assert (draw(here).images == draw(there).images).all()
"""


@pytest.fixture
def server():
    with HubServer() as server:
        yield server


def environment(server, tmp_path, token=ALICE):
    variables = {
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": token,
    }
    return ENVIRONMENT | variables


def train(server, tmp_path, *flags, token=ALICE):
    (tmp_path / "tiny.json").write_text(json.dumps(TINY_UNET))
    command = [
        *(*LAUNCH, ROOT / "training" / "train_unconditional.py", "--dataset_name", "digits", "--skip_scaling", "cs"),
        *("--kappa", 0.6, "--model_config_name_or_path", tmp_path / "tiny.json", "--cache_dir", tmp_path / "cache"),
        *("--max_train_steps", 6, "--checkpointing_steps", 3, "--ddpm_num_inference_steps", 2, "--push_to_hub"),
        *("--output_dir", tmp_path / "digits", *flags),
    ]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment(server, tmp_path, token)
    )


def test_checkpoints_and_results_arrive_despite_failures(tmp_path, server):
    server.fail("POST", "/api/models/alice/digits/commit/", status=500, times=2)
    server.fail("PUT", "/lfs/", drop=True, times=1)
    server.fail("POST", "/preupload/", status=429, headers={"Retry-After": "1"}, times=1)
    result = train(server, tmp_path, "--checkpoints_total_limit", 1)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(losses(tmp_path / "digits")) == 6

    repo = server.repos["alice/digits"]
    titles = [commit.title for commit in repo.commits]
    assert [title for title in titles if "step" in title or "End" in title] == [
        *("Training in progress, step 3", "Training in progress, step 6", "End of training"),
    ]
    weights = "diffusion_pytorch_model.safetensors"
    assert repo.files[f"unet/{weights}"] == (tmp_path / "digits" / "unet" / weights).read_bytes()
    assert {f"checkpoint-3/unet/{weights}", f"checkpoint-6/unet/{weights}", "model_index.json"} <= repo.files.keys()
    assert {"README.md", "loss.png", "samples.png", "loss.csv"} <= repo.files.keys()
    assert not [name for name in repo.files if name.endswith((".bin", ".pkl", ".pt"))]

    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "digits")],
        capture_output=True,
        text=True,
        env=environment(server, tmp_path) | {"HF_HOME": str(tmp_path / "another home")},
    )
    assert loaded.returncode == 0, loaded.stderr[-4000:]

    # The token is nowhere: not in what was printed, written or sent.
    assert ALICE not in result.stdout + result.stderr
    for path in (tmp_path / "digits").rglob("*"):
        assert path.is_dir() or ALICE.encode() not in path.read_bytes(), path
    assert not any(ALICE.encode() in content for content in repo.files.values())
    assert not [name for name in os.listdir(tmp_path / "digits") if name.startswith(".")]


def test_what_cannot_be_pushed_is_said_before_training(tmp_path, server):
    refused = train(server, tmp_path, token="hf_" + "wrong0" * 6)
    assert refused.returncode != 0
    assert "cannot be created on the Hub" in refused.stderr
    assert not (tmp_path / "digits" / "loss.csv").exists()
