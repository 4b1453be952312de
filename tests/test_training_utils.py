"""What the scripts share, and the command lines that they refuse before training."""

import importlib.util
import json
import sys

import pytest
from accelerate.state import AcceleratorState, PartialState
from images import write_images
from scripts import ROOT, TINY_UNET

from diffusers_scalelong import ScaleLongUNet2DModel
from diffusers_scalelong.training_utils import (
    LossRecord,
    check_output_dir,
    find_checkpoint,
    list_checkpoints,
    load_preset,
    model_from_config,
    remove_earlier_run,
)


def test_a_preset_holds_a_model_and_training_flags(tmp_path):
    file = tmp_path / "preset.json"
    file.write_text(json.dumps(TINY_UNET | {"training": {"learning_rate": 2e-4}}))
    assert load_preset(str(file)) == (TINY_UNET, {"learning_rate": 2e-4})
    model = ScaleLongUNet2DModel(**{k: v for k, v in TINY_UNET.items() if k != "_class_name"})
    model.save_pretrained(tmp_path / "model")
    config, flags = load_preset(str(tmp_path / "model"))
    assert config["block_out_channels"] == [16, 16]
    assert flags == {}


@pytest.mark.parametrize("text", ["", '{"sample_size": 8', "[1]"])
def test_a_damaged_preset_is_an_error(tmp_path, text):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(OSError, match=r"bad\.json"):
        load_preset(str(tmp_path / "bad.json"))
    with pytest.raises(OSError, match="missing"):
        load_preset(str(tmp_path / "missing"))


def test_the_config_chooses_the_class_and_the_flags_win():
    plain = TINY_UNET | {"_class_name": "UNet2DModel"}
    model = model_from_config(plain, skip_scaling="cs", kappa=0.5, sample_size=16, ls_initial_gate=None)
    assert type(model) is ScaleLongUNet2DModel
    assert model.config.sample_size == 16
    assert model.kappas[1] == 0.5
    assert model_from_config(TINY_UNET | {"skip_scaling": "ls"}, skip_scaling=None).config.skip_scaling == "ls"
    for name in ("AutoencoderKL", None, "ModelMixin"):
        with pytest.raises(ValueError, match="_class_name"):
            model_from_config(TINY_UNET | {"_class_name": name})


def test_checkpoints_are_ordered_by_step(tmp_path):
    for name in ("checkpoint-1000", "checkpoint-90", ".checkpoint-2000.partial", "checkpoint-best"):
        (tmp_path / name).mkdir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-90", "checkpoint-1000"]
    assert find_checkpoint(str(tmp_path), "latest").name == "checkpoint-1000"
    assert find_checkpoint(str(tmp_path), "checkpoint-90") == tmp_path / "checkpoint-90"
    assert find_checkpoint(str(tmp_path), str(tmp_path / "checkpoint-90")) == tmp_path / "checkpoint-90"
    with pytest.raises(OSError, match=r"no checkpoint checkpoint-91.*checkpoint-90, checkpoint-1000"):
        find_checkpoint(str(tmp_path), "checkpoint-91")
    (tmp_path / "empty").mkdir()
    assert find_checkpoint(str(tmp_path / "empty"), "latest") is None


def test_an_earlier_run_is_kept_unless_it_is_to_be_replaced(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "loss.csv").write_text("step,loss,learning_rate\n")
    with pytest.raises(OSError, match=r"checkpoint-5.*--resume_from_checkpoint latest.*--overwrite_output_dir"):
        check_output_dir(str(tmp_path), resume=False, overwrite=False)
    check_output_dir(str(tmp_path), resume=True, overwrite=False)
    check_output_dir(str(tmp_path), resume=False, overwrite=True)
    assert (tmp_path / "checkpoint-5").exists()
    remove_earlier_run(str(tmp_path))
    check_output_dir(str(tmp_path), resume=False, overwrite=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be created"):
        check_output_dir(str(tmp_path / "file" / "run"), resume=False, overwrite=False)


def test_a_loss_record_continues_where_the_checkpoint_was(tmp_path):
    record = LossRecord(tmp_path / "loss.csv")
    for step in range(1, 6):
        record.append(step, step / 3, 1e-4)
    del record  # no close: as after a crash
    with (tmp_path / "loss.csv").open("a") as file:
        file.write("6,0.")  # half a line
    record = LossRecord(tmp_path / "loss.csv", last_step=3)
    record.append(4, 0.25, 1e-4)
    record.close()
    assert record.losses == [1 / 3, 2 / 3, 1.0, 0.25]
    assert (tmp_path / "loss.csv").read_text().splitlines()[-1] == "4,0.25,0.0001"


# Command lines of train_unconditional.py


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_unconditional", ROOT / "training/train_unconditional.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def start(script, tmp_path, monkeypatch):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_UNET))

    def run(*args):
        arguments = ["--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--dataset_name", "digits"]
        arguments += ["--model_config_name_or_path", config, *args]
        monkeypatch.setattr(sys, "argv", ["train_unconditional.py", *map(str, arguments)])
        try:
            script.main(*script.parse_args_with_preset(script.build_parser()))
        finally:
            AcceleratorState._reset_state()
            PartialState._reset_state()

    yield run
    assert not (tmp_path / "run" / "loss.csv").exists(), "no training step was made"


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--skip_scaling", "cs", "--kappa", "nan"], ValueError, "finite"),
        (["--skip_scaling", "uniform", "--kappa", "0.5", "0.6"], ValueError, "2 constants"),
        (["--skip_scaling", "ls", "--kappa", "0.5"], ValueError, "leave it out"),
        (["--kappa", "0.5"], ValueError, "no meaning"),
        (["--skip_scaling", "ls", "--ls_initial_gate", "1"], ValueError, "between 0 and 1"),
        (["--resolution", "9"], ValueError, "cannot be halved 1 times.*multiple of 2"),
        (["--resolution", "0"], ValueError, "--resolution must be at least 1"),
        (["--train_batch_size", "0"], ValueError, "--train_batch_size must be at least 1"),
        (["--ddpm_num_inference_steps", "2000"], ValueError, "exceeds the 1000 steps"),
        (["--dataset_name", "nowhere/nothing"], OSError, "nowhere/nothing"),
        (["--image_column", "photo"], ValueError, "Choose one of image, label"),
        (["--resume_from_checkpoint", "checkpoint-3"], OSError, "no checkpoint checkpoint-3"),
        (["--model_config_name_or_path", "missing.json"], OSError, r"missing\.json"),
        (["--output_dir", "/proc/none"], OSError, "cannot be created"),
    ],
)
def test_bad_command_lines_stop_before_training(start, args, error, message):
    with pytest.raises(error, match=message):
        start(*args)


def test_an_unknown_method_lists_the_known_ones(start, capsys):
    with pytest.raises(SystemExit):
        start("--skip_scaling", "fixup")
    assert "ls_unshared" in capsys.readouterr().err


def test_a_preset_cannot_invent_flags(start, tmp_path):
    file = tmp_path / "preset.json"
    file.write_text(json.dumps(TINY_UNET | {"training": {"learning_rat": 2e-4}}))
    with pytest.raises(ValueError, match="learning_rat"):
        start("--model_config_name_or_path", file)


def test_bad_input_leaves_an_earlier_run_alone(start, tmp_path):
    checkpoint = tmp_path / "earlier" / "checkpoint-7"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ValueError, match="finite"):
        start("--output_dir", checkpoint.parent, "--overwrite_output_dir", "--skip_scaling", "cs", "--kappa", "inf")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(OSError, match="empty"):
        start("--output_dir", checkpoint.parent, "--overwrite_output_dir", "--dataset_name", empty)
    assert checkpoint.exists()


@pytest.mark.parametrize("preset", ["imagenet64_uvit_m4.json", "mscoco256_uvit_s2.json"])
def test_conditional_presets_are_refused(start, preset):
    with pytest.raises(ValueError, match=r"class labels|no preset for this script"):
        start("--model_config_name_or_path", ROOT / "training/configs" / preset)


def test_a_model_with_two_channels_has_no_images(start, tmp_path):
    file = tmp_path / "two.json"
    file.write_text(json.dumps(TINY_UNET | {"in_channels": 2, "out_channels": 2}))
    write_images(tmp_path / "data", 2)
    with pytest.raises(ValueError, match="1, 3 or 4"):
        start("--model_config_name_or_path", file, "--dataset_name", tmp_path / "data")
