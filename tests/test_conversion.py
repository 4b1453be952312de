"""Checkpoints of the reference implementations: the outputs they must give, the way back, and every damaged file."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_scalelong import ScaleLongUViT2DModel
from diffusers_scalelong.conversion import _ls_reduction, _main, _mlp_ratio, infer_config

# Weights, inputs and outputs of the reference implementations, with the arguments of their constructors.
GOLDEN = {path.stem: path for path in sorted((Path(__file__).parent / "golden").glob("*.safetensors"))}
METHODS = ("none", "uniform", "cs", "ls", "ls_unshared")  # in the order of the reference's `scalelong`


def read(name):
    """The constructor's arguments, the state dict, and the inputs and output."""
    with safe_open(GOLDEN[name], "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dictionary)
    state_dict = {key.removeprefix("state/"): value for key, value in tensors.items() if key.startswith("state/")}
    return config, state_dict, {key: value for key, value in tensors.items() if not key.startswith("state/")}


def scaling_of(config):
    method = METHODS[config.get("scalelong", 0)]
    return {"skip_scaling": method, "kappa": config["kappa"]} if method == "cs" else {"skip_scaling": method}


def convert(name, **changes):
    config, state_dict, _ = read(name)
    arguments = {"num_attention_heads": config["num_heads"], **scaling_of(config), **changes}
    return ScaleLongUViT2DModel.from_original_checkpoint(state_dict, **arguments)


def relative_error(model, tensors):
    with torch.no_grad():
        output = model(
            tensors["input/x"],
            tensors["input/timesteps"],
            encoder_hidden_states=tensors.get("input/context"),
            class_labels=tensors.get("input/y"),
        ).sample
    return ((output - tensors["output"]).abs().max() / tensors["output"].abs().max()).item()


def test_every_golden_file_is_here():
    assert len(GOLDEN) == 11


@pytest.mark.parametrize("name", GOLDEN)
def test_the_output_is_the_references(name):
    assert relative_error(convert(name), read(name)[2]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("uvit_uncond_cs", {"kappa": 0.67}),
        ("uvit_uncond_uniform", {"skip_scaling": "none"}),
        ("uvit_class_none", {"skip_scaling": "uniform"}),
        ("uvit_class_cs", {"num_attention_heads": 4}),
    ],
)
def test_other_arguments_give_another_output(name, changes):
    assert relative_error(convert(name, **changes), read(name)[2]) > 1e-4  # else the golden tests could not fail


def test_gates_in_the_wrong_order_give_another_output():
    config, state_dict, tensors = read("uvit_uncond_ls_unshared")
    swapped = {
        key.replace("se.0.", "se.x.").replace("se.2.", "se.0.").replace("se.x.", "se.2."): value
        for key, value in state_dict.items()
    }
    model = ScaleLongUViT2DModel.from_original_checkpoint(swapped, num_attention_heads=config["num_heads"])
    assert relative_error(model, tensors) > 1e-4


@pytest.mark.parametrize("name", GOLDEN)
def test_the_shapes_tell_the_constructors_arguments(name):
    reference = read(name)[0]
    config = convert(name).config
    assert config["sample_size"] == reference["img_size"]
    assert config["patch_size"] == reference["patch_size"]
    assert config["in_channels"] == reference["in_chans"]
    assert config["hidden_size"] == reference["embed_dim"]
    assert config["num_layers"] == reference["depth"]
    assert config["mlp_ratio"] == reference.get("mlp_ratio", 4)
    assert config["attention_bias"] == reference.get("qkv_bias", False)
    assert config["time_embedding_mlp"] == reference.get("mlp_time_embed", False)
    assert config["num_class_embeds"] == (reference["num_classes"] if reference.get("num_classes", -1) > 0 else None)
    assert config["cross_attention_dim"] == reference.get("clip_dim")
    assert config["num_context_tokens"] == reference.get("num_clip_token")
    assert config["skip_scaling"] == scaling_of(reference)["skip_scaling"]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_way_back_is_exact(name, tmp_path):
    _, state_dict, tensors = read(name)
    model = convert(name)
    back = model.to_original_state_dict()
    assert back.keys() == state_dict.keys()
    assert all(torch.equal(back[key], state_dict[key]) for key in state_dict)
    model.save_pretrained(tmp_path)
    stored = ScaleLongUViT2DModel.from_pretrained(tmp_path)
    assert relative_error(stored, tensors) <= 1e-5
    assert all(torch.equal(stored.to_original_state_dict()[key], state_dict[key]) for key in state_dict)


def test_the_method_of_gates_needs_no_mention():
    for name, method in (("uvit_class_ls", "ls"), ("uvit_class_ls_unshared", "ls_unshared")):
        model = convert(name, skip_scaling="none")
        assert model.config["skip_scaling"] == method
        assert relative_error(model, read(name)[2]) <= 1e-5


def test_a_converted_model_shares_nothing_and_keeps_the_dtype():
    config, state_dict, _ = read("uvit_class_ls")
    half = {key: value.to(torch.bfloat16) for key, value in state_dict.items()}
    model = ScaleLongUViT2DModel.from_original_checkpoint(half, num_attention_heads=config["num_heads"])
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(half[key], state_dict[key].to(torch.bfloat16)) for key in state_dict)


# ---------------------------------------------------------------------------------------- what only the shapes tell


def text_checkpoint(num_tokens):
    """Only what `infer_config` reads, without storage."""
    shapes = {
        "patch_embed.proj.weight": (512, 4, 2, 2),
        "pos_embed": (1, 1 + num_tokens, 512),
        "context_embed.weight": (512, 768),
        **{f"in_blocks.{i}.mlp.fc1.weight": (2048, 512) for i in range(6)},
    }
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("text_tokens", "sample_size", "given_tokens"),
    [(77, 32, None), (77, 64, None), (7, 32, None), (120, 32, 120), (120, 64, 120)],
)
def test_text_tokens_and_resolution(text_tokens, sample_size, given_tokens):
    checkpoint = text_checkpoint(text_tokens + (sample_size // 2) ** 2)
    config = infer_config(checkpoint, num_attention_heads=8, num_context_tokens=given_tokens)
    assert (config["num_context_tokens"], config["sample_size"]) == (text_tokens, sample_size)
    assert (config["cross_attention_dim"], config["num_layers"]) == (768, 12)


@pytest.mark.parametrize("num_context_tokens", [76, 0, 500])
def test_text_tokens_that_leave_no_square_of_patches(num_context_tokens):
    with pytest.raises(ValueError, match=r"334 position embeddings leave .* `num_context_tokens`"):
        infer_config(text_checkpoint(333), num_attention_heads=8, num_context_tokens=num_context_tokens)


@given(hidden_size=st.integers(1, 4096), mlp_size=st.integers(1, 16384))
def test_the_mlp_ratio_gives_back_the_size(hidden_size, mlp_size):
    assert int(hidden_size * _mlp_ratio(hidden_size, mlp_size)) == mlp_size


@given(num_tokens=st.integers(1, 5000), reduction=st.integers(1, 64))
def test_the_reduction_gives_back_the_size(num_tokens, reduction):
    gate_size = max(num_tokens // reduction, 1)
    found = _ls_reduction(num_tokens, gate_size)
    assert max(num_tokens // found, 1) == gate_size
    if reduction == 16:
        assert found == 16


@pytest.mark.parametrize("gate_size", [0, 4, 11])
def test_a_gate_size_that_no_reduction_gives(gate_size):
    with pytest.raises(ValueError, match=f"{gate_size} hidden features for 10 tokens"):
        _ls_reduction(10, gate_size)


# ------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def checkpoint():
    return read("uvit_class_cs")[1]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_files_of_every_kind(checkpoint, suffix, tmp_path):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    for source in (path, str(path)):
        model = ScaleLongUViT2DModel.from_original_checkpoint(source, num_attention_heads=2)
        assert all(torch.equal(value, checkpoint[key]) for key, value in model.to_original_state_dict().items())


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("writer", ["torch", "torch, old format", "pickle"])
def test_a_file_that_needs_code_is_refused(checkpoint, writer, tmp_path):
    path, trace = tmp_path / "model.pth", tmp_path / "trace"
    content = {**checkpoint, "extra": RunsCode(trace)}
    if writer == "pickle":
        path.write_bytes(pickle.dumps({"extra": RunsCode(trace)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=writer == "torch")
    with pytest.raises(ValueError, match="refused: it holds other things than weights"):
        ScaleLongUViT2DModel.from_original_checkpoint(path, num_attention_heads=2)
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("damage", ["empty", "half", "first bytes", "other"])
def test_damaged_files_are_named(checkpoint, suffix, damage, tmp_path):
    path = tmp_path / f"model{suffix}"
    if suffix == ".safetensors":
        save_file(checkpoint, path)
    else:
        torch.save(checkpoint, path)
    content = path.read_bytes()
    kept = {"empty": b"", "half": content[: len(content) // 2], "first bytes": content[:20], "other": b"<html>\n" * 99}
    path.write_bytes(kept[damage])
    with pytest.raises(ValueError, match=rf"model\{suffix} .*damaged"):
        ScaleLongUViT2DModel.from_original_checkpoint(path, num_attention_heads=2)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_missing_file_is_an_os_error(suffix, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        ScaleLongUViT2DModel.from_original_checkpoint(tmp_path / f"nothing{suffix}", num_attention_heads=2)
    with pytest.raises(IsADirectoryError):
        ScaleLongUViT2DModel.from_original_checkpoint(tmp_path, num_attention_heads=2)


def test_a_file_that_holds_no_state_dict(tmp_path):
    path = tmp_path / "model.pth"
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match="must hold a state dict, but holds a Tensor"):
        ScaleLongUViT2DModel.from_original_checkpoint(path, num_attention_heads=2)
    torch.save({"state_dict": {"pos_embed": torch.zeros(1, 2, 3)}}, path)
    with pytest.raises(ValueError, match=r"'state_dict' is a dict. If it is a training state"):
        ScaleLongUViT2DModel.from_original_checkpoint(path, num_attention_heads=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mid_block.attn.proj.bias"), r"it lacks mid_block\.attn\.proj\.bias"),
        (lambda s: s.pop("out_blocks.1.skip_linear.weight"), r"lacks out_blocks\.1\.skip_linear\.weight"),
        (lambda s: s.pop("in_blocks.1.norm1.weight"), r"lacks in_blocks\.1\.norm1\.weight"),
        (lambda s: s.pop("pos_embed"), "lacks pos_embed, without which it is not a reference U-ViT"),
        (lambda s: s.clear(), r"lacks patch_embed\.proj\.weight"),
        (lambda s: s.update({"head.weight": torch.zeros(2)}), r"unexpected head\.weight"),
        (lambda s: s.update({"in_blocks.1.attn.q_norm": torch.zeros(2)}), r"unexpected in_blocks\.1\.attn\.q_norm"),
        (lambda s: s.update({"norm.weight": torch.zeros(17)}), r"norm\.weight has shape \(17,\) instead of \(16,\)"),
        (
            lambda s: s.update({"pos_embed": torch.zeros(1, 37, 16)}),
            "leave 35 for the patches, which is not",
        ),
        (lambda s: s.update({"pos_embed": torch.zeros(38, 16)}), r"pos_embed must have 3 axes .* \(38, 16\)"),
        (lambda s: s.update({"norm.weight": torch.zeros(16, dtype=torch.int8)}), r"'norm\.weight' is a torch\.int8"),
    ],
)
def test_weights_that_do_not_fit_are_named(checkpoint, change, message):
    change(checkpoint)
    with pytest.raises(ValueError, match=message):
        ScaleLongUViT2DModel.from_original_checkpoint(checkpoint, num_attention_heads=2)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("uvit_class_ls", {"skip_scaling": "cs", "kappa": 0.7}, "its method is 'ls', but skip_scaling is 'cs'"),
        ("uvit_class_ls", {"skip_scaling": "ls_unshared"}, "its method is 'ls'"),
        ("uvit_class_ls_unshared", {"skip_scaling": "ls"}, "its method is 'ls_unshared'"),
        ("uvit_class_ls", {"kappa": 0.7}, "`kappa` is for the constant methods"),
        ("uvit_class_none", {"skip_scaling": "ls"}, r"it lacks se\.layer1\.bias"),
        ("uvit_class_none", {"skip_scaling": "CS"}, "must be one of none, uniform"),
        ("uvit_class_none", {"kappa": 0.7}, "`kappa` has no meaning"),
        ("uvit_class_none", {"num_attention_heads": 3}, "must divide `hidden_size`"),
        ("uvit_class_none", {"num_context_tokens": 7}, "takes no text"),
    ],
)
def test_arguments_that_contradict_the_checkpoint(name, changes, message):
    with pytest.raises(ValueError, match=message):
        convert(name, **changes)


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_writes_a_model_folder(tmp_path):
    config, state_dict, tensors = read("uvit_class_cs")
    source, target = tmp_path / "nnet_ema.pth", tmp_path / "new" / "model"
    torch.save(state_dict, source)
    command = [sys.executable, "-m", "diffusers_scalelong.conversion", source, target]
    options = ["--num_attention_heads", "2", "--skip_scaling", "cs", "--kappa", str(config["kappa"])]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "RuntimeWarning" not in done.stderr
    assert "skip_scaling='cs'" in done.stdout
    assert relative_error(ScaleLongUViT2DModel.from_pretrained(target), tensors) <= 1e-5
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def run_command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["conversion", *map(str, arguments)])
    _main()


def test_the_command_takes_a_schedule_and_an_empty_target(monkeypatch, tmp_path):
    source = tmp_path / "model.safetensors"
    save_file(read("uvit_uncond_none")[1], source)
    (tmp_path / "target").mkdir()
    options = ("--num_attention_heads", 2, "--skip_scaling", "uniform", "--kappa", 0.9, 0.8, 0.7)
    run_command(monkeypatch, source, tmp_path / "target", *options)
    assert ScaleLongUViT2DModel.from_pretrained(tmp_path / "target").kappas == (0.9, 0.8, 0.7)


def test_the_command_overwrites_nothing(monkeypatch, tmp_path):
    source = tmp_path / "model.safetensors"
    save_file(read("uvit_uncond_none")[1], source)
    target = tmp_path / "target"
    target.mkdir()
    (target / "precious").write_text("data")
    for occupied in (target, target / "precious"):
        with pytest.raises(SystemExit, match=r"error: .* exists and is not an empty folder"):
            run_command(monkeypatch, source, occupied, "--num_attention_heads", 2)
    assert [path.name for path in target.iterdir()] == ["precious"]
    assert (target / "precious").read_text() == "data"


def test_the_command_leaves_nothing_behind_when_it_fails(monkeypatch, tmp_path):
    _, state_dict, _ = read("uvit_uncond_none")
    source = tmp_path / "model.safetensors"
    save_file(state_dict, source)

    def fill_the_disk(self, folder):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("{")
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ScaleLongUViT2DModel, "save_pretrained", fill_the_disk)
        with pytest.raises(SystemExit, match="error: No space left on device"):
            run_command(monkeypatch, source, tmp_path / "target", "--num_attention_heads", 2)
    del state_dict["norm.weight"]
    save_file(state_dict, source)
    with pytest.raises(SystemExit, match=r"error: .* it lacks norm\.weight"):
        run_command(monkeypatch, source, tmp_path / "target", "--num_attention_heads", 2)
    with pytest.raises(SystemExit, match=r"error: .*nothing"):
        run_command(monkeypatch, tmp_path / "nothing.pth", tmp_path / "target", "--num_attention_heads", 2)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
