"""Trains an unconditional diffusion model (DDPM) with scaled long skip connections.

    accelerate launch training/train_unconditional.py --dataset_name digits --resolution 16 --skip_scaling cs

Flags and defaults are those of Diffusers' `train_unconditional.py`; `--skip_scaling`, `--kappa` and
`--ls_initial_gate` choose the scaling (arXiv 2310.13545).
"""

import argparse
import logging
import math
import os
from pathlib import Path

import datasets
import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, ProjectConfiguration, set_seed
from diffusers import DDPMPipeline, DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_scalelong.diffusion_data import DiffusionDataset
from diffusers_scalelong.image_data import ImageDataset, drop_unreadable_images, load_images
from diffusers_scalelong.plots import save_image_grid, save_loss_curve
from diffusers_scalelong.skip_scaling import SKIP_SCALING_METHODS
from diffusers_scalelong.training_utils import (
    LossRecord,
    check_output_dir,
    checkpoint_step,
    find_checkpoint,
    model_from_config,
    parse_args_with_preset,
    register_model_hooks,
    remove_earlier_run,
    save_checkpoint,
)

logger = get_logger(__name__, log_level="INFO")

# The model of Diffusers' example, used without --model_config_name_or_path.
DEFAULT_MODEL = {
    "_class_name": "UNet2DModel",
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "block_out_channels": (128, 128, 256, 256, 512, 512),
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset_name", help="Hub name, local folder, parquet file, or 'digits' (needs no download).")
    data.add_argument("--dataset_config_name", help="The configuration of a dataset that has several.")
    data.add_argument("--train_data_dir", help="A folder of images. Ignored with --dataset_name.")
    data.add_argument("--image_column", default="image", help="The column that holds the images.")
    data.add_argument("--skip_bad_images", action="store_true", help="Leave out images that cannot be read.")
    data.add_argument("--cache_dir", help="Where downloaded models and datasets are kept.")
    data.add_argument("--resolution", type=int, default=64, help="Images are resized to this many pixels per side.")
    data.add_argument("--center_crop", action="store_true", help="Crop the middle instead of a random place.")
    data.add_argument("--random_flip", action="store_true", help="Mirror half of the images.")
    data.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that load images.")

    model = parser.add_argument_group("model")
    model.add_argument("--model_config_name_or_path", help="Preset or config of the model; default: Diffusers' DDPM.")
    model.add_argument("--skip_scaling", choices=SKIP_SCALING_METHODS, help="How to scale the long skip connections.")
    model.add_argument("--kappa", type=float, nargs="+", help="κ; for 'uniform' also one per skip, shallowest first.")
    model.add_argument("--ls_initial_gate", type=float, help="Every gate of 'ls' starts at this value in (0, 1).")

    training = parser.add_argument_group("training")
    training.add_argument("--seed", type=int, default=0, help="Of weights, data order, augmentation and noise.")
    training.add_argument("--train_batch_size", type=int, default=16, help="Per device.")
    training.add_argument("--num_epochs", type=int, default=100)
    training.add_argument("--max_train_steps", type=int, help="Optimiser steps. Overrides --num_epochs.")
    training.add_argument("--gradient_accumulation_steps", type=int, default=1)
    training.add_argument("--learning_rate", type=float, default=1e-4, help="After the warm-up.")
    training.add_argument("--lr_scheduler", default="cosine", help="linear, cosine, constant_with_warmup, …")
    training.add_argument("--lr_warmup_steps", type=int, default=500)
    training.add_argument("--adam_beta1", type=float, default=0.95)
    training.add_argument("--adam_beta2", type=float, default=0.999)
    training.add_argument("--adam_weight_decay", type=float, default=1e-6)
    training.add_argument("--adam_epsilon", type=float, default=1e-8)
    training.add_argument("--max_grad_norm", type=float, default=1.0, help="Gradients are clipped to this norm.")
    training.add_argument(
        "--mixed_precision", choices=["no", "fp16", "bf16"], help="Default: as in accelerate config."
    )
    training.add_argument("--use_ema", action="store_true", help="Sample from a moving average of the weights.")
    training.add_argument("--ema_inv_gamma", type=float, default=1.0)
    training.add_argument("--ema_power", type=float, default=3 / 4)
    training.add_argument("--ema_max_decay", type=float, default=0.9999)

    diffusion = parser.add_argument_group("diffusion")
    diffusion.add_argument("--prediction_type", default="epsilon", choices=["epsilon", "sample", "v_prediction"])
    diffusion.add_argument("--ddpm_num_steps", type=int, default=1000)
    diffusion.add_argument("--ddpm_num_inference_steps", type=int, default=1000)
    diffusion.add_argument("--ddpm_beta_schedule", default="linear")

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", default="ddpm-model-64", help="Pipeline, checkpoints and pictures go here.")
    output.add_argument("--overwrite_output_dir", action="store_true", help="Replace an earlier run in there.")
    output.add_argument("--eval_batch_size", type=int, default=16, help="Images in the sample grid.")
    output.add_argument("--save_images_epochs", type=int, default=10, help="Epochs between sample grids.")
    output.add_argument("--save_model_epochs", type=int, default=10, help="Epochs between saved pipelines.")
    output.add_argument("--checkpointing_steps", type=int, default=500, help="Steps between checkpoints.")
    output.add_argument("--checkpoints_total_limit", type=int, help="Keep this many checkpoints.")
    output.add_argument("--resume_from_checkpoint", help="'latest', or a checkpoint's path.")
    output.add_argument("--logger", default="tensorboard", choices=["tensorboard", "wandb"])
    output.add_argument("--logging_dir", default="logs", help="Inside --output_dir.")
    return parser


def check_args(args: argparse.Namespace) -> None:
    at_least_one = (
        "resolution train_batch_size num_epochs max_train_steps gradient_accumulation_steps eval_batch_size "
        "save_images_epochs save_model_epochs checkpointing_steps checkpoints_total_limit ddpm_num_steps "
        "ddpm_num_inference_steps"
    )
    for name in at_least_one.split():
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, but is {value}.")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, but is {args.seed}.")
    if args.ddpm_num_inference_steps > args.ddpm_num_steps:
        raise ValueError(
            f"--ddpm_num_inference_steps {args.ddpm_num_inference_steps} exceeds the {args.ddpm_num_steps} steps of "
            "--ddpm_num_steps."
        )


def check_model(model: diffusers.ModelMixin, resolution: int) -> None:
    for key, condition in (("num_class_embeds", "class labels"), ("cross_attention_dim", "text")):
        if model.config.get(key) is not None:
            raise ValueError(
                f"The model config sets {key}: the model needs {condition}, and this script trains unconditional "
                "models. Choose another config."
            )
    # A UNet halves the image between its levels; a remainder would be lost on the way down.
    levels = len(model.config.get("block_out_channels", [0]))
    if resolution % 2 ** (levels - 1):
        raise ValueError(
            f"--resolution {resolution} cannot be halved {levels - 1} times, as this model's {levels} levels need: "
            f"choose a multiple of {2 ** (levels - 1)}."
        )


def main(args: argparse.Namespace, model_config: dict | None) -> None:
    check_args(args)
    check_output_dir(args.output_dir, bool(args.resume_from_checkpoint), args.overwrite_output_dir)
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint) if args.resume_from_checkpoint else None

    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=args.logger,
        project_config=ProjectConfiguration(
            project_dir=args.output_dir, logging_dir=os.path.join(args.output_dir, args.logging_dir)
        ),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed),
    )
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO if accelerator.is_local_main_process else logging.ERROR,
    )
    logger.info(accelerator.state, main_process_only=False)
    datasets.utils.logging.set_verbosity_warning()
    set_seed(args.seed)

    # Model, moving average and noise scheduler
    model = model_from_config(
        model_config or DEFAULT_MODEL,
        sample_size=args.resolution,
        skip_scaling=args.skip_scaling,
        kappa=args.kappa[0] if args.kappa and len(args.kappa) == 1 else args.kappa,
        ls_initial_gate=args.ls_initial_gate,
    )
    check_model(model, args.resolution)
    ema_model = None
    if args.use_ema:
        ema_model = EMAModel(
            model.parameters(),
            decay=args.ema_max_decay,
            use_ema_warmup=True,
            inv_gamma=args.ema_inv_gamma,
            power=args.ema_power,
            model_cls=type(model),
            model_config=model.config,
        )
        ema_model.to(accelerator.device)
    register_model_hooks(accelerator, ema_model)
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=args.ddpm_num_steps,
        beta_schedule=args.ddpm_beta_schedule,
        prediction_type=args.prediction_type,
    )

    # Data
    with accelerator.main_process_first():
        dataset = load_images(
            args.dataset_name, args.dataset_config_name, args.train_data_dir, args.cache_dir, args.image_column
        )
        dataset, num_bad_images = drop_unreadable_images(
            dataset, args.image_column, args.skip_bad_images, args.dataloader_num_workers
        )
    if num_bad_images:
        logger.warning(f"Left out {num_bad_images} images that cannot be read.")
    channels = model.config.in_channels
    train_dataset = DiffusionDataset(
        ImageDataset(
            dataset, args.image_column, args.resolution, channels, args.center_crop, args.random_flip, args.seed
        ),
        noise_shape=(channels, args.resolution, args.resolution),
        num_train_timesteps=args.ddpm_num_steps,
        seed=args.seed,
    )
    train_dataloader = torch.utils.data.DataLoader(
        train_dataset,
        batch_size=args.train_batch_size,
        shuffle=True,
        num_workers=args.dataloader_num_workers,
        generator=torch.Generator(),  # its own: the global one, which dropout uses, resumes from checkpoints
    )

    # Optimiser and schedule
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
    )
    batches_per_epoch = math.ceil(len(train_dataloader) / accelerator.num_processes)
    steps_per_epoch = math.ceil(batches_per_epoch / args.gradient_accumulation_steps)
    max_train_steps = args.max_train_steps or args.num_epochs * steps_per_epoch
    num_epochs = math.ceil(max_train_steps / steps_per_epoch)
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer=optimizer,
        # Accelerate steps the schedule once per process.
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=max_train_steps * accelerator.num_processes,
    )
    model, optimizer, train_dataloader, lr_scheduler = accelerator.prepare(
        model, optimizer, train_dataloader, lr_scheduler
    )
    set_seed(args.seed, device_specific=True)  # dropout differs between processes

    # Resume
    global_step = 0
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        global_step = checkpoint_step(checkpoint)
        logger.info(f"Resuming from {checkpoint}")
    elif args.resume_from_checkpoint:
        logger.info("There is no checkpoint yet: starting from the beginning.")
    if accelerator.is_main_process:
        if not args.resume_from_checkpoint:
            remove_earlier_run(args.output_dir)
        accelerator.init_trackers(Path(__file__).stem)
        loss_record = LossRecord(Path(args.output_dir) / "loss.csv", last_step=global_step)

    def sample_and_save(epoch: int, save_images: bool, save_model: bool) -> None:
        """Draws a sample grid and the loss curve, saves the pipeline: from the moving average, where there is one."""
        unet = accelerator.unwrap_model(model)
        if ema_model is not None:
            ema_model.store(unet.parameters())
            ema_model.copy_to(unet.parameters())
        pipeline = DDPMPipeline(unet=unet, scheduler=noise_scheduler)
        if save_images:
            pipeline.set_progress_bar_config(desc="Sampling", leave=False)
            images = pipeline(
                generator=torch.Generator(device=pipeline.device).manual_seed(args.seed),
                batch_size=args.eval_batch_size,
                num_inference_steps=args.ddpm_num_inference_steps,
                output_type="np",
            ).images
            folder = Path(args.output_dir) / "samples"
            folder.mkdir(exist_ok=True)
            save_image_grid(images, folder / f"epoch-{epoch + 1:04d}.png")
            save_image_grid(images, Path(args.output_dir) / "samples.png")
            save_loss_curve(loss_record.steps, loss_record.losses, Path(args.output_dir) / "loss.png")
            pixels = (images * 255).round().astype(np.uint8)
            pixels = pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
            tracker = accelerator.get_tracker(args.logger)
            options = {"dataformats": "NHWC"} if args.logger == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=global_step, **options)
        if save_model:
            pipeline.save_pretrained(args.output_dir)
        if ema_model is not None:
            ema_model.restore(unet.parameters())

    # Train
    logger.info("***** Running training *****")
    logger.info(f"  Images = {len(train_dataset)}")
    logger.info(f"  Parameters = {sum(p.numel() for p in model.parameters()):,}")
    logger.info(f"  Long skip connections = {accelerator.unwrap_model(model).num_skips}")
    logger.info(f"  Coefficients, shallowest first = {accelerator.unwrap_model(model).kappas or 'learned'}")
    logger.info(f"  Batch size per device = {args.train_batch_size}")
    logger.info(f"  Gradient accumulation steps = {args.gradient_accumulation_steps}")
    logger.info(f"  Epochs = {num_epochs}")
    logger.info(f"  Optimiser steps = {max_train_steps}")
    progress_bar = tqdm(
        total=max_train_steps,
        initial=global_step,
        desc="Training",
        unit="step",
        disable=not accelerator.is_local_main_process,
    )
    first_epoch, steps_into_epoch = divmod(global_step, steps_per_epoch)
    for epoch in range(first_epoch, num_epochs):
        model.train()
        train_dataloader.set_epoch(epoch)
        batches_to_skip = steps_into_epoch * args.gradient_accumulation_steps if epoch == first_epoch else 0
        batches = accelerator.skip_first_batches(train_dataloader, batches_to_skip)
        step_loss = 0.0
        for batch in batches:
            clean_images, noise, timesteps = batch["input"], batch["noise"], batch["timestep"]
            noisy_images = noise_scheduler.add_noise(clean_images, noise, timesteps)

            with accelerator.accumulate(model):
                prediction = model(noisy_images, timesteps).sample.float()
                if args.prediction_type == "epsilon":
                    loss = F.mse_loss(prediction, noise)
                elif args.prediction_type == "v_prediction":
                    loss = F.mse_loss(prediction, noise_scheduler.get_velocity(clean_images, noise, timesteps))
                else:  # "sample", weighted by the signal-to-noise ratio (Salimans and Ho, arXiv 2202.00512)
                    alpha = noise_scheduler.alphas_cumprod.to(timesteps.device)[timesteps][:, None, None, None]
                    loss = (alpha / (1 - alpha) * (prediction - clean_images) ** 2).mean()
                step_loss += accelerator.reduce(loss.detach(), "mean").item() / args.gradient_accumulation_steps
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
                optimizer.step()
                lr_scheduler.step()
                optimizer.zero_grad()

            if not accelerator.sync_gradients:
                continue
            global_step += 1
            learning_rate = lr_scheduler.get_last_lr()[0]
            logs = {"loss": step_loss, "lr": learning_rate}
            if ema_model is not None:
                ema_model.step(model.parameters())
                logs["ema_decay"] = ema_model.cur_decay_value
            if accelerator.is_main_process:
                loss_record.append(global_step, step_loss, learning_rate)
            progress_bar.update(1)
            progress_bar.set_postfix(loss=f"{step_loss:.4f}", lr=f"{learning_rate:.2e}")
            accelerator.log(logs, step=global_step)
            step_loss = 0.0
            if global_step % args.checkpointing_steps == 0:
                save_checkpoint(accelerator, args.output_dir, global_step, args.checkpoints_total_limit)
            if global_step == max_train_steps:
                break

        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            last = epoch == num_epochs - 1
            save_images = last or (epoch + 1) % args.save_images_epochs == 0
            save_model = last or (epoch + 1) % args.save_model_epochs == 0
            if save_images or save_model:
                sample_and_save(epoch, save_images, save_model)

    progress_bar.close()
    if accelerator.is_main_process:
        loss_record.close()
        logger.info(f"The pipeline, samples.png and loss.png are in {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    main(*parse_args_with_preset(build_parser()))
