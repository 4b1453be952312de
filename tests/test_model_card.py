"""The cards as the Hub and a Markdown renderer read them; their snippets as a reader runs them, against the server."""

import ast
import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import convert_state_dict_to_diffusers
from hub_server import ALICE, YOU, HubServer
from huggingface_hub import ModelCard
from huggingface_hub.repocard import metadata_load
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model_state_dict
from test_hub import run_python, server  # noqa: F401  a fixture
from text_pipelines import write_stable_diffusion
from unets import config_of, seeded

from diffusers_scalelong import (
    ScaleLongPipeline,
    ScaleLongUNet2DConditionModel,
    ScaleLongUNet2DModel,
    ScaleLongUViT2DModel,
)
from diffusers_scalelong.hub import HubUploader
from diffusers_scalelong.model_card import save_model_card
from diffusers_scalelong.remote_code import add_code

ROOT = Path(__file__).parent.parent
HOSTILE = [
    "a \"quoted\" 'name'",
    "pipes | and `ticks` ``` and *stars* _under_ ~~gone~~",
    "<script>alert(1)</script> &amp; [link](http://x) ![i](y)",
    "colon: value # no comment",
    "1. list",
    "a/" + "very-long-" * 50,
    "- list\n---\nkey: [1, {2}]\n\n# Title",
    "{{ jinja }} {% raw %} ${shell}",
    "日本語 κ 🤗 \\ back\\slash",
]


def unet(**scaling):
    return seeded(ScaleLongUNet2DModel, config_of(UNet2DModel, "UpBlock2D"), **scaling)


def save_pipeline(folder, model):
    DDPMPipeline(unet=model, scheduler=DDPMScheduler(num_train_timesteps=10)).save_pretrained(folder)
    return model


def parse(text):
    return MarkdownIt("commonmark").enable("table").parse(re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL))


def shown(text):
    """The text of each paragraph, heading and table cell as a reader sees it, formatting and code aside."""
    blocks = [token for token in parse(text) if token.type == "inline"]
    assert not any(token.type.startswith("html") for block in blocks for token in block.children)
    return ["".join(child.content or " " for child in block.children) for block in blocks]


def code_blocks(text, language):
    return [token.content for token in parse(text) if token.type == "fence" and token.info == language]


def test_what_a_card_says(tmp_path):
    model = save_pipeline(tmp_path, unet(skip_scaling="cs", kappa=0.5))
    for name in ("loss.png", "a (new) curve.png", "samples.png"):
        (tmp_path / name).write_bytes(b"picture")
    path = save_model_card(
        tmp_path,
        model=model,
        task="unconditional",
        repo_id="alice/digits",
        base_model="google/ddpm-cifar10-32",
        dataset="ylecun/mnist",
        license="apache-2.0",
        command="accelerate launch train.py --seed 7",
        hyperparameters={"seed": 7, "learning_rate": 1e-4, "kappa": [0.5], "hub_token": None, "ema_power": None},
        metrics={"FID": 12.5, "KID": float("nan")},
    )
    assert path == tmp_path / "README.md"
    text = path.read_text(encoding="utf-8")
    assert metadata_load(path) == {
        "library_name": "diffusers",
        "license": "apache-2.0",
        "base_model": "google/ddpm-cifar10-32",
        "datasets": ["ylecun/mnist"],
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers", "scalelong", "unconditional-image-generation"],
        "model-index": [
            {
                "name": "digits",
                "results": [
                    {
                        "task": {"type": "unconditional-image-generation"},
                        "dataset": {"name": "ylecun/mnist", "type": "ylecun/mnist"},
                        "metrics": [{"type": "fid", "name": "FID", "value": 12.5}],
                    }
                ],
            }
        ],
    }
    assert ModelCard.load(path).data.eval_results[0].metric_value == 12.5
    assert re.findall(r"!\[.*\]\((.*)\)", text) == ["samples.png", "a%20%28new%29%20curve.png", "loss.png"]
    assert "| κ\\_i | 1 | 0.5 | 0.25 | 0.125 | 0.0625 | 0.03125 |" in text
    assert "| learning\\_rate | 0.0001 |" in text and "| KID | nan |" in text
    assert "hub" not in "".join(code_blocks(text, "bash")) and "ema\\_power" not in text
    assert code_blocks(text, "bash") == ["accelerate launch train.py --seed 7\n"]
    body = " ".join(shown(text))
    assert f"torch {torch.__version__}" in body and "diffusers-scalelong" in body and "Seed: 7." in body
    assert "A plain UNet2DModel.from_pretrained" in body and "computes something else" in body
    assert "huang2023scalelong" in code_blocks(text, "bibtex")[0]
    assert "trust_remote_code" not in text


@pytest.mark.parametrize("method", ["none", "uniform", "schedule", "cs", "ls", "ls_unshared"])
def test_the_scaling_of_every_method(method, tmp_path):
    scaling = {"skip_scaling": method}
    if method == "schedule":
        scaling = {"skip_scaling": "uniform", "kappa": [1.0, 0.9, 0.8, 0.7, 0.6, 0.5]}
    model = unet(**scaling)
    model.save_pretrained(tmp_path)
    text = save_model_card(tmp_path, model=model, task="unconditional", repo_id="alice/m").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?:κ\\_i|width|skip).*$", text, flags=re.MULTILINE)
    cells = [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in rows]
    assert ("computes something else" in " ".join(shown(text))) == (method != "none")
    if method == "ls":
        assert cells == [["1, 2, 3, 4", "32 → 2 → 32"], ["5, 6", "64 → 4 → 64"]]
    elif method == "ls_unshared":
        assert [row[0] for row in cells] == ["1", "2", "3", "4", "5", "6"]
    else:
        assert [float(cell) for cell in cells[0]] == pytest.approx(model.kappas, rel=1e-3)


@pytest.mark.parametrize("text", HOSTILE)
def test_texts_of_any_kind_are_shown_as_they_are(text, tmp_path):
    model = save_pipeline(tmp_path, unet(skip_scaling="cs"))
    path = save_model_card(
        tmp_path,
        model=model,
        task="unconditional",
        repo_id=text,
        base_model=text,
        dataset=text,
        license=text,
        command=text,
        hyperparameters={text: text},
        metrics={text: 1.0},
        description=text,
    )
    card = path.read_text(encoding="utf-8")
    metadata = metadata_load(path)
    assert metadata["license"] == text
    assert metadata["model-index"][0]["results"][0]["dataset"]["name"] == text
    assert "base_model" not in metadata and "datasets" not in metadata  # no names on the Hub
    assert code_blocks(card, "bash") == [text + "\n"]
    snippet = ast.parse(code_blocks(card, "python")[0])
    assert text in [node.value for node in ast.walk(snippet) if isinstance(node, ast.Constant)]

    one_line = " ".join(text.split())
    body = shown(card)
    assert body[0] == " ".join(Path(text).name.split())
    assert body[2] == one_line  # the description
    assert body[3:].count(one_line) == 3  # the cells of both tables
    assert f"Data: {one_line}." in " ".join(body)
    headings = [token for token in parse(card) if token.type == "heading_open"]
    assert len(headings) == 6


def test_no_token_in_a_card(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "another-secret")
    model = save_pipeline(tmp_path, unet(skip_scaling="cs"))
    path = save_model_card(
        tmp_path,
        model=model,
        task="unconditional",
        repo_id="alice/digits",
        command=f"python train.py --hub_token {ALICE} --note another-secret",
        hyperparameters={"hub_token": ALICE, "note": ALICE},
        description=f"Trained with {ALICE}",
    )
    text = path.read_text(encoding="utf-8")
    assert ALICE not in text and "another-secret" not in text
    assert "--hub_token ***" in text


def test_what_has_no_card(tmp_path):
    with pytest.raises(ValueError, match="no pipeline, model or LoRA weights"):
        save_model_card(tmp_path, model=unet(), task="unconditional", repo_id="alice/m")
    with pytest.raises(ValueError, match="`task` must be one of"):
        save_model_card(tmp_path, model=unet(), task="upscaling", repo_id="alice/m")
    (tmp_path / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="base_model"):
        save_model_card(tmp_path, model=unet(), task="text-to-image", repo_id="alice/m")
    assert not (tmp_path / "README.md").exists()


HIDE_THE_PACKAGE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "diffusers_scalelong":
            raise ModuleNotFoundError(f"{name} is hidden")
sys.meta_path.insert(0, Blocker())
"""
# Runs each snippet of the plan in its own namespace and keeps what it made.
RUN_SNIPPETS = """
import os, sys, torch
folder = sys.argv[1]
made = {}
for name, snippet in torch.load(f"{folder}/snippets.pt").items():
    namespace = {}
    torch.manual_seed(0)
    exec(snippet, namespace)
    model = namespace["model"] if "model" in namespace else namespace["pipeline"].unet
    weights = {key.replace(".default_0.", "."): value.clone() for key, value in model.state_dict().items()}
    image = os.path.exists("sample.png") and os.remove("sample.png") is None
    made[name] = type(model).__name__, type(model).__module__, weights, model.kappas, image
torch.save(made, f"{folder}/made.pt")
"""


def test_the_snippets_run(server: HubServer, tmp_path):  # noqa: F811
    models = {}
    models["model"] = unet(skip_scaling="ls")
    models["model"].save_pretrained(tmp_path / "model", include_code=True)
    models["pipeline"] = save_pipeline(tmp_path / "pipeline", unet(skip_scaling="cs"))
    add_code(tmp_path / "pipeline")
    sizes = {"sample_size": 8, "num_layers": 4, "num_attention_heads": 2, "hidden_size": 16, "num_class_embeds": 5}
    models["classes"] = seeded(ScaleLongUViT2DModel, sizes, skip_scaling="ls")
    ScaleLongPipeline(models["classes"], DDIMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "classes")
    add_code(tmp_path / "classes")

    base = write_stable_diffusion(tmp_path / "base")
    models["text"] = ScaleLongUNet2DConditionModel.from_unet(base.unet, skip_scaling="uniform", kappa=0.8)
    base.register_modules(unet=models["text"])
    base.save_pretrained(tmp_path / "text")
    torch.manual_seed(2)  # other gates than those that a new model draws
    models["lora"] = ScaleLongUNet2DConditionModel.from_unet(base.unet, skip_scaling="ls")
    models["lora-in-warm-up"] = ScaleLongUNet2DConditionModel.from_unet(base.unet, skip_scaling="cs")
    models["lora-in-warm-up"].warm_up_kappa(0.5)
    for name in ("lora", "lora-in-warm-up"):
        lora = models[name]
        lora.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
        weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(lora))
        base.save_lora_weights(tmp_path / name, unet_lora_layers=weights)
        lora.save_skip_scaling(tmp_path / name)

    cards = {
        "base": None,
        "model": {"task": "unconditional"},
        "pipeline": {"task": "unconditional"},
        "classes": {"task": "class-conditional"},
        "text": {"task": "text-to-image", "example_prompt": 'a "red" wall'},
        "lora": {"task": "text-to-image", "base_model": "alice/base"},
        "lora-in-warm-up": {"task": "text-to-image", "base_model": "alice/base"},
    }
    for name, card in cards.items():
        if card is not None:
            save_model_card(tmp_path / name, model=models[name], repo_id=f"alice/{name}", **card)
        uploader = HubUploader(name, tmp_path)
        uploader.upload_folder(tmp_path / name)
        assert uploader.finish() == []

    # As a reader copies them from the page.
    snippets, without_package = {}, {}
    for name in models:
        page = server.repos[f"alice/{name}"].files["README.md"].decode()
        blocks = code_blocks(page, "python")
        assert len(blocks) == (2 if name in ("model", "pipeline", "classes") else 1)
        snippets[name] = blocks[0]
        if len(blocks) == 2:
            without_package[name] = blocks[1]
    card = metadata_load(tmp_path / "lora" / "README.md")
    assert card["base_model"] == "alice/base" and "lora" in card["tags"]

    for mode, plan in (("with the package", snippets), ("without the package", without_package)):
        torch.save(plan, tmp_path / "snippets.pt")
        code = RUN_SNIPPETS if mode == "with the package" else HIDE_THE_PACKAGE + RUN_SNIPPETS
        result = run_python(code, tmp_path, server=server, home=tmp_path / mode)
        assert result.returncode == 0, result.stderr[-4000:]
        made = torch.load(tmp_path / "made.pt")
        assert made.keys() == plan.keys()
        for name, (class_name, module, state, kappas, image) in made.items():
            assert class_name == type(models[name]).__name__
            assert module.startswith("diffusers_scalelong." if mode == "with the package" else "diffusers_modules.")
            expected = {key.replace(".default.", "."): value for key, value in models[name].state_dict().items()}
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], expected[key]) for key in expected), name
            assert kappas == models[name].kappas
            assert image == (name != "model")


def test_the_documentation_runs(server: HubServer, tmp_path):  # noqa: F811
    """Every snippet of docs/hub.md, in order: in one process, but for the one where the package is not installed."""
    snippets = code_blocks((ROOT / "docs" / "hub.md").read_text(encoding="utf-8"), "python")
    outside = [snippet for snippet in snippets if "trust_remote_code=True" in snippet]
    inside = [snippet for snippet in snippets if snippet not in outside]
    assert (len(inside), len(outside)) == (8, 1)
    for number, code in enumerate(["\n".join(inside), HIDE_THE_PACKAGE + outside[0]]):
        result = run_python(code, server=server, home=tmp_path / str(number), HF_TOKEN=YOU)
        assert result.returncode == 0, result.stderr[-4000:]
    assert {name for name in server.repos if name.startswith("you/")} == set(
        re.findall(r"you/[\w-]+", " ".join(inside))
    )
    card = server.repos["you/my-unet"].files["README.md"].decode()
    assert "Data: my photographs." in card
