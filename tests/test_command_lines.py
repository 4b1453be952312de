"""The command lines that are refused before training: what every script shares, run through the unconditional one."""

import json

import pytest
import scripts
from images import write_images
from scripts import ROOT, TINY_UNET

from diffusers_scalelong.training_setup import check_output_dir, remove_earlier_run


@pytest.fixture
def start(tmp_path):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(TINY_UNET))

    def run(*args):
        arguments = ["--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache", "--dataset_name", "digits"]
        arguments += ["--model_config_name_or_path", config, *args]
        scripts.start("train_unconditional.py", *arguments)

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
