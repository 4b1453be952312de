"""Checkpoints of the reference implementations, U-ViT's and ScaleLong's, to the Diffusers format and back.

    python -m diffusers_scalelong.conversion SOURCE TARGET --num_attention_heads 8 [--skip_scaling cs --kappa 0.7]

The reference implementations are https://github.com/baofff/U-ViT (`libs/uvit.py`, `libs/uvit_t2i.py`) and
https://github.com/sail-sg/ScaleLong (`libs/uvit.py`).
"""

import argparse
import math
import os
import pickle
import re
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from .models import ScaleLongUViT2DModel
from .skip_scaling import check_method

_CLIP_TOKENS = 77

# Parts of a weight's name in ScaleLongUViT2DModel and in the reference.
_RENAMED = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "class_embedding.": "label_emb.",
    "context_embedder.": "context_embed.",
    ".attn.to_qkv.": ".attn.qkv.",
    ".attn.to_out.": ".attn.proj.",
    ".ff.net.0.proj.": ".mlp.fc1.",
    ".ff.net.2.": ".mlp.fc2.",
    "norm_out.": "norm.",
    "proj_out.": "decoder_pred.",
    "conv_out.": "final_layer.",
    ".linear_1.": ".layer1.",
    ".linear_2.": ".layer2.",
}


def original_names(model: ScaleLongUViT2DModel) -> dict[str, str]:
    """For each weight in the model's state dict, its name in the reference implementations."""

    def original_name(name: str) -> str:
        # The reference counts its gates in the order of use, from the deepest skip to the shallowest.
        name = re.sub(r"^skip_scaler\.gates\.width_\d+", "se", name)
        name = re.sub(
            r"^skip_scaler\.gates\.skip_(\d+)", lambda match: f"se.{model.num_skips - int(match.group(1))}", name
        )
        for own, original in _RENAMED.items():
            name = name.replace(own, original)
        return name

    return {name: original_name(name) for name in model.state_dict()}


def to_model_state_dict(
    model: ScaleLongUViT2DModel, state_dict: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The reference's weights under the model's names, copied.

    Raises:
        ValueError: weights are missing, unexpected or of the wrong shape; the message names them.
    """
    names = original_names(model)
    problems = []
    if missing := set(names.values()) - state_dict.keys():
        problems.append(f"it lacks {_list(missing)}")
    if unexpected := state_dict.keys() - names.values():
        problems.append(f"it has the unexpected {_list(unexpected)}")
    expected_shapes = {names[name]: weight.shape for name, weight in model.state_dict().items()}
    problems += [
        f"{name} has shape {tuple(weight.shape)} instead of {tuple(expected_shapes[name])}"
        for name, weight in state_dict.items()
        if name in expected_shapes and weight.shape != expected_shapes[name]
    ]
    if problems:
        raise ValueError(
            "The checkpoint does not fit the U-ViT that its shapes describe: " + "; ".join(problems) + "."
        )
    return {
        name: state_dict[original].detach().clone(memory_format=torch.contiguous_format)
        for name, original in names.items()
    }


def infer_config(
    state_dict: Mapping[str, torch.Tensor],
    num_attention_heads: int,
    skip_scaling: str = "none",
    kappa: float | Sequence[float] | None = None,
    num_context_tokens: int | None = None,
) -> dict[str, Any]:
    """The arguments of the `ScaleLongUViT2DModel` that a reference checkpoint belongs to, from its weights' shapes.

    Args:
        state_dict: the reference's weights.
        num_attention_heads, skip_scaling, kappa, num_context_tokens: as in
            `ScaleLongUViT2DModel.from_original_checkpoint`.

    Raises:
        ValueError: these are not the weights of a U-ViT, or the arguments contradict them.
    """
    check_method(skip_scaling)
    for name, weight in state_dict.items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
            raise ValueError(
                f"A checkpoint must map names to floating-point tensors, but {name!r} is a {kind}. If it is a "
                "training state, take the model's state dict out of it first."
            )

    def shape(name: str, num_axes: int) -> tuple[int, ...]:
        if name not in state_dict:
            raise ValueError(f"The checkpoint lacks {name}, without which it is not a reference U-ViT.")
        if state_dict[name].ndim != num_axes:
            raise ValueError(
                f"{name} must have {num_axes} axes in a reference U-ViT, but its shape is "
                f"{tuple(state_dict[name].shape)}."
            )
        return tuple(state_dict[name].shape)

    hidden_size, in_channels, patch_size, _ = shape("patch_embed.proj.weight", 4)
    num_tokens = shape("pos_embed", 3)[1]
    mlp_size = shape("in_blocks.0.mlp.fc1.weight", 2)[0]
    config: dict[str, Any] = {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": 2 * len({name.split(".")[1] for name in state_dict if name.startswith("in_blocks.")}),
        "num_attention_heads": num_attention_heads,
        "hidden_size": hidden_size,
        "mlp_ratio": _mlp_ratio(hidden_size, mlp_size),
        "attention_bias": "in_blocks.0.attn.qkv.bias" in state_dict,
        "time_embedding_mlp": "time_embed.0.weight" in state_dict,
        "skip_scaling": skip_scaling,
        "kappa": kappa,
    }

    num_patches = num_tokens - 1
    if "label_emb.weight" in state_dict:
        config["num_class_embeds"] = shape("label_emb.weight", 2)[0]
        num_patches -= 1
    if "context_embed.weight" in state_dict:
        if num_context_tokens is None:
            clip = num_patches > _CLIP_TOKENS and _is_square(num_patches - _CLIP_TOKENS)
            num_context_tokens = _CLIP_TOKENS if clip else num_patches - math.isqrt(max(num_patches - 1, 0)) ** 2
        config["cross_attention_dim"] = shape("context_embed.weight", 2)[1]
        config["num_context_tokens"] = num_context_tokens
        num_patches -= num_context_tokens
    elif num_context_tokens is not None:
        raise ValueError(f"The checkpoint takes no text, but `num_context_tokens` is {num_context_tokens}.")
    if num_patches < 1 or not _is_square(num_patches):
        raise ValueError(
            f"The checkpoint's {num_tokens} position embeddings leave {num_patches} for the patches, which is not the "
            "square of a whole number. For a text-conditional checkpoint, check `num_context_tokens`."
        )
    config["sample_size"] = patch_size * math.isqrt(num_patches)

    gates = [name for name in state_dict if name.startswith("se.")]
    if gates:
        shared = "se.layer1.weight" in state_dict
        method = "ls" if shared else "ls_unshared"
        if skip_scaling not in ("none", method):
            raise ValueError(
                f"The checkpoint has gates, {_list(gates)}, so its method is {method!r}, but skip_scaling is "
                f"{skip_scaling!r}."
            )
        gate_size = shape("se.layer1.weight" if shared else "se.0.layer1.weight", 2)[0]
        config["skip_scaling"] = method
        config["ls_reduction"] = _ls_reduction(num_tokens, gate_size)
    return config


def load_state_dict(path: str | os.PathLike) -> dict[str, torch.Tensor]:
    """The weights in a `.safetensors` file or a file written by `torch.save`, on the CPU. No code in it is run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is damaged, or holds something else than weights.
    """
    with open(path, "rb") as file:  # a file that cannot be opened is no damaged one
        try:
            if Path(path).suffix == ".safetensors":
                return safetensors.torch.load_file(path)
            state_dict = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} was refused: it holds other things than weights, which could run any code when loaded, or it "
                "is damaged. If you trust its source, save the state dict in it as .safetensors and convert that."
            ) from error
        except Exception as error:  # readers trip over damaged bytes in many ways
            raise ValueError(f"{path} is damaged or incomplete: {type(error).__name__}: {error}") from error
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{path} must hold a state dict, but holds a {type(state_dict).__name__}.")
    return dict(state_dict)


def _list(names: Collection[str]) -> str:
    """At most the first eight, sorted."""
    shown = sorted(names)[:8]
    return ", ".join(shown) + (f" and {len(names) - len(shown)} more" if len(names) > len(shown) else "")


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _mlp_ratio(hidden_size: int, mlp_size: int) -> float:
    """A ratio such that int(hidden_size * ratio) is mlp_size in floating point."""
    ratio = mlp_size / hidden_size
    return ratio if int(hidden_size * ratio) == mlp_size else math.nextafter(ratio, math.inf)


def _ls_reduction(num_tokens: int, gate_size: int) -> int:
    """A reduction r, the reference's 16 if possible, such that max(num_tokens // r, 1) is gate_size."""
    candidates = (16, num_tokens // gate_size) if gate_size else ()
    for reduction in candidates:
        if reduction and max(num_tokens // reduction, 1) == gate_size:
            return reduction
    raise ValueError(
        f"The checkpoint's gates have {gate_size} hidden features for {num_tokens} tokens, which no `ls_reduction` "
        "gives."
    )


def _main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m diffusers_scalelong.conversion",
        description="Converts a reference U-ViT or ScaleLong checkpoint to a Diffusers model folder.",
    )
    parser.add_argument("source", help="The checkpoint: a .safetensors file, or a .pth file of weights.")
    parser.add_argument("target", type=Path, help="The folder to write; it must not exist, or be empty.")
    parser.add_argument("--num_attention_heads", type=int, required=True)
    parser.add_argument(
        "--skip_scaling",
        default="none",
        help="The method that the checkpoint was trained with: none, uniform or cs. The learnable methods show.",
    )
    parser.add_argument("--kappa", type=float, nargs="+", help="The constant of uniform or cs, or one per skip.")
    parser.add_argument(
        "--num_context_tokens", type=int, help="The number of text tokens, where the default guess is wrong."
    )
    args = parser.parse_args()
    kappa = args.kappa[0] if args.kappa and len(args.kappa) == 1 else args.kappa
    try:
        if args.target.exists() and (not args.target.is_dir() or any(args.target.iterdir())):
            raise FileExistsError(f"{args.target} exists and is not an empty folder.")
        model = ScaleLongUViT2DModel.from_original_checkpoint(
            args.source,
            num_attention_heads=args.num_attention_heads,
            skip_scaling=args.skip_scaling,
            kappa=kappa,
            num_context_tokens=args.num_context_tokens,
        )
        args.target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target and then renamed: a run that is cut short leaves no half of a folder there.
        with tempfile.TemporaryDirectory(prefix=".conversion-", dir=args.target.parent) as scratch:
            model.save_pretrained(Path(scratch) / "model")
            if args.target.exists():
                args.target.rmdir()
            os.rename(Path(scratch) / "model", args.target)
    except (OSError, TypeError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"Wrote {args.target}: {model.num_parameters():,} parameters, skip_scaling={model.config.skip_scaling!r}.")


if __name__ == "__main__":
    _main()
