"""Presets: a model's config, together with the training flags of its paper."""

import argparse
import json
from pathlib import Path
from typing import Any

import diffusers
from diffusers import ModelMixin

# The model of Diffusers' unconditional example, used without --model_config_name_or_path.
DEFAULT_UNET = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}


def load_preset(name_or_path: str, cache_dir: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a model's config: a JSON file, a folder with a `config.json`, or a model on the Hub.

    Args:
        name_or_path: of the config. A JSON file may also hold a dictionary `"training"`: values for the script's
            flags, which take the place of their defaults.
        cache_dir: where files from the Hub are kept.

    Returns:
        The model's config and the training flags (empty when there are none).

    Raises:
        OSError: there is no such file, or it is not JSON.
    """
    path = Path(name_or_path)
    if not path.is_file():
        return diffusers.UNet2DModel.load_config(name_or_path, cache_dir=cache_dir), {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise OSError(f"{path} is not a valid JSON file: {error}") from error
    if not isinstance(config, dict):
        raise OSError(f"{path} must hold a JSON object with a model's config.")
    return config, config.pop("training", {})


def parse_args_with_preset(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any] | None]:
    """Parses the command line; flags that a preset sets take the place of the parser's defaults.

    Returns:
        The arguments, and the model's config or `None` without `--model_config_name_or_path`.

    Raises:
        OSError: as in `load_preset`.
        ValueError: the preset sets a flag that the script does not have.
    """
    args = parser.parse_args()
    if args.model_config_name_or_path is None:
        return args, None
    config, flags = load_preset(args.model_config_name_or_path, args.cache_dir)
    unknown = sorted(flags.keys() - vars(args).keys())
    if unknown:
        raise ValueError(
            f"{args.model_config_name_or_path} is no preset for this script: it sets --{', --'.join(unknown)}, which "
            "the script does not have."
        )
    if isinstance(config.get("sample_size"), int):
        parser.set_defaults(resolution=config["sample_size"])
    parser.set_defaults(**flags)
    return parser.parse_args(), config


def model_from_config(config: dict[str, Any], **overrides: Any) -> ModelMixin:
    """Builds a model of this package from a config; `_class_name` chooses the class.

    Args:
        config: of a `UNet2DModel`, `UNet2DConditionModel` or a model of this package.
        **overrides: values that replace the config's; `None` leaves the config's value.

    Raises:
        ValueError: the config names no class, or one that has no scaled version; invalid values.
    """
    import diffusers_scalelong

    name = str(config.get("_class_name"))
    cls = getattr(diffusers_scalelong, name if name.startswith("ScaleLong") else f"ScaleLong{name}", None)
    if cls is None:
        raise ValueError(
            f"The model config names the class {name!r}, but training needs one of UNet2DModel, "
            "UNet2DConditionModel, ScaleLongUNet2DModel, ScaleLongUNet2DConditionModel or ScaleLongUViT2DModel as its "
            "`_class_name`."
        )
    return cls.from_config(config, **{key: value for key, value in overrides.items() if value is not None})


def check_model(model: ModelMixin, resolution: int, takes_labels: bool = False) -> None:
    """Makes sure that a script can train a model: the model takes its images, and no condition that it does not give.

    Args:
        model: from `model_from_config`.
        resolution: pixels per side of the images.
        takes_labels: the script gives class labels, for an embedding of `num_class_embeds`.

    Raises:
        ValueError: the model needs another condition, or the resolution does not suit its levels.
    """
    refused = {"cross_attention_dim": "text", "class_embed_type": "a continuous or ready-made class embedding"}
    if not takes_labels:
        refused["num_class_embeds"] = "class labels"
    for key, condition in refused.items():
        if model.config.get(key) is not None:
            raise ValueError(
                f"The model config sets {key}: the model needs {condition}, which this script does not give. Choose "
                "another config."
            )
    # A UNet halves the image between its levels; a remainder would be lost on the way down.
    levels = len(model.config.get("block_out_channels", [0]))
    if resolution % 2 ** (levels - 1):
        raise ValueError(
            f"--resolution {resolution} cannot be halved {levels - 1} times, as this model's {levels} levels need: "
            f"choose a multiple of {2 ** (levels - 1)}."
        )
