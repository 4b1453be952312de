"""Fine-tunes Stable Diffusion with LoRA on a UNet with scaled long skip connections.

    accelerate launch training/train_text_to_image_lora.py --pretrained_model_name_or_path FOLDER \
        --train_data_dir IMAGES --skip_scaling ls --ls_initial_gate 0.99

LoRA trains low-rank updates of the attention's projections (Hu et al., arXiv 2106.09685); with 'ls' the gates train
too. `--output_dir` gets `pytorch_lora_weights.safetensors` and, beside it, the gates or constants in
`skip_scaling.safetensors`. Flags and defaults are those of Diffusers' `train_text_to_image_lora.py`; `--skip_scaling`,
`--kappa`, `--kappa_warmup_steps` and `--ls_initial_gate` choose the scaling (arXiv 2310.13545).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import DistributedType
from diffusers import DiffusionPipeline, ModelMixin, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from diffusers_scalelong import ScaleLongUNet2DConditionModel
from diffusers_scalelong.diffusion_loss import diffusion_loss
from diffusers_scalelong.text_to_image import (
    add_text_to_image_arguments,
    check_base_pipeline,
    check_prompts,
    check_text_model,
    draw_validation_images,
    encode_batch,
    frozen_copy,
    load_base_pipeline,
    load_captioned_samples,
    load_scaled_unet,
    training_scheduler,
    weight_dtype,
)
from diffusers_scalelong.training_args import (
    add_data_arguments,
    add_output_arguments,
    add_scaling_arguments,
    add_training_arguments,
    check_args,
    new_parser,
)
from diffusers_scalelong.training_results import save_aside
from diffusers_scalelong.training_run import TrainingRun
from diffusers_scalelong.training_setup import start_accelerator

VALIDATION_STEPS = 30  # as in Diffusers' example


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    add_text_to_image_arguments(parser)
    parser.add_argument("--rank", type=int, default=4, help="Of the updates of LoRA.")
    parser.add_argument("--validation_prompt", help="Text to draw images of while training.")
    add_scaling_arguments(parser)
    add_data_arguments(parser)
    add_training_arguments(parser)
    add_output_arguments(parser)
    parser.set_defaults(output_dir="sd-model-finetuned-lora", resolution=512, image_interpolation_mode="lanczos")
    return parser


def add_lora(unet: ScaleLongUNet2DConditionModel, rank: int, dtype: torch.dtype) -> None:
    """Adds trainable LoRA layers and freezes all else but the gates; what is frozen gets the dtype."""
    unet.add_adapter(
        LoraConfig(
            r=rank,
            lora_alpha=rank,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0"],
        )
    )
    if unet.skip_scaler is not None:
        unet.skip_scaler.requires_grad_(True)
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def save_lora(unet: ScaleLongUNet2DConditionModel, folder: Path) -> None:
    """Writes the LoRA layers as `pipeline.load_lora_weights` reads them, and the scaling."""
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers)
    unet.save_skip_scaling(folder)


def load_lora(unet: ScaleLongUNet2DConditionModel, folder: Path) -> None:
    """Reads a checkpoint's LoRA layers and gates. The constants are those of the command line."""
    layers, _ = StableDiffusionPipeline.lora_state_dict(folder)
    layers = {name.removeprefix("unet."): weight for name, weight in layers.items()}
    try:
        set_peft_model_state_dict(unet, convert_unet_state_dict_to_peft(layers))
    except RuntimeError as error:
        raise ValueError(f"{folder} is of another run, perhaps of another --rank: {error}") from error
    if unet.kappas is None:
        unet.load_skip_scaling(folder)


def main(args: argparse.Namespace) -> None:
    check_args(args)
    if args.use_ema:
        raise ValueError("--use_ema averages whole models: leave it out with LoRA.")
    prompts = [] if args.validation_prompt is None else [args.validation_prompt]
    check_prompts(prompts)
    check_base_pipeline(args, StableDiffusionPipeline)
    accelerator = start_accelerator(args)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ValueError("LoRA trains too little to be worth sharding: launch with DDP in place of FSDP.")

    # The UNet, the noise schedule, the frozen parts and the data
    dtype = weight_dtype(accelerator)
    unet = load_scaled_unet(args)
    base = load_base_pipeline(args, StableDiffusionPipeline, safety_checker=None, requires_safety_checker=False)
    vae, text_encoder = (frozen_copy(part, accelerator.device, dtype) for part in (base.vae, base.text_encoder))
    check_text_model(unet, base)
    add_lora(unet, args.rank, dtype)
    noise_scheduler = training_scheduler(base, args.prediction_type)
    samples = load_captioned_samples(args, accelerator, base, noise_scheduler.config.num_train_timesteps)

    # Results
    def make_pipeline(unet: ModelMixin) -> DiffusionPipeline:
        components = base.components | {"unet": unet, "vae": vae, "text_encoder": text_encoder}
        return StableDiffusionPipeline(**components, requires_safety_checker=False)

    def draw(pipeline: DiffusionPipeline, generator: torch.Generator) -> np.ndarray:
        return draw_validation_images(
            *(accelerator, pipeline, prompts, args.num_validation_images, generator),
            num_inference_steps=VALIDATION_STEPS,
            height=args.resolution,
            width=args.resolution,
        )

    # Train
    accelerator.init_trackers(Path(__file__).stem)
    run = TrainingRun(args, accelerator, unet, samples, save_weights=save_lora, load_weights=load_lora)
    for batch in run:
        latents, text = encode_batch(vae, text_encoder, batch)
        noisy_latents = noise_scheduler.add_noise(latents, batch["noise"], batch["timestep"])
        with accelerator.accumulate(run.model):
            prediction = run.model(noisy_latents, batch["timestep"], encoder_hidden_states=text).sample
            loss = diffusion_loss(
                *(noise_scheduler, prediction, latents, batch["noise"], batch["timestep"]), args.snr_gamma
            )
            run.optimize(loss)
        if prompts and run.epoch_due(args.validation_epochs):
            run.save_results(make_pipeline, draw, save_model=False)

    if not run.stopped:
        run.save_results(make_pipeline, draw, save_images=bool(prompts), save_model=False)
        if accelerator.is_main_process:
            save_aside(args.output_dir, lambda folder: save_lora(run.whole_model(), folder))
    run.finish("text-to-image", base_model=args.pretrained_model_name_or_path)


if __name__ == "__main__":
    main(build_parser().parse_args())
