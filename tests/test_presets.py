"""Presets, and the models that they describe."""

import json

import pytest
from scripts import TINY_UNET

from diffusers_scalelong import ScaleLongUNet2DModel
from diffusers_scalelong.presets import load_preset, model_from_config


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
