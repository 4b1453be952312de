"""A training run, from the first step or a checkpoint to the last: optimiser, data order, checkpoints, record.

The training scripts hold what is particular to a task, above all the loss; what is the same for all of them is here:

    run = TrainingRun(args, accelerator, model, samples)
    for batch in run:
        with accelerator.accumulate(run.model):
            run.optimize(loss_of(batch))
"""

import argparse
import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list, send_to_device, set_seed
from accelerate.utils import load as load_safely
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm.auto import tqdm

from .checkpoints import (
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
    read_state,
    remove_checkpoint,
    remove_leftovers,
    write_checkpoint,
)
from .diffusion_data import DiffusionDataset, RunSampler, StreamingDiffusionDataset
from .hub import HubUploader, command_line, redacted_args
from .loss_record import LossRecord
from .model_card import save_model_card
from .plots import save_loss_curve
from .stop_signals import StopSignals, leave_signals_to_the_main_process
from .training_results import save_pipeline, save_samples
from .training_setup import make_optimizer, remove_earlier_run

logger = get_logger(__name__, log_level="INFO")

# Flags of all scripts that a resumed run must share with the interrupted one to be the same run.
_RESUMED_WITH = (
    "seed use_ema kappa_warmup_steps mixed_precision resolution center_crop random_flip image_interpolation_mode "
    "max_train_samples streaming prediction_type noise_offset snr_gamma class_dropout_prob proportion_empty_prompts "
    "ddpm_num_steps ddpm_beta_schedule pretrained_model_name_or_path revision rank"
)


class TrainingRun:
    """Everything about a run that does not depend on its task.

    Args:
        args: with the flags of `training_args`.
        accelerator: from `start_accelerator`.
        model: with scaled long skip connections. Parameters that require no gradient are not trained.
        samples: the training data.
        save_weights, load_weights: write a model's weights into a checkpoint's folder and read them again. By default
            the whole model in Diffusers' format, in the folder `unet`.

    Attributes:
        model: prepared by Accelerate (and compiled with `--compile`): what to train with.
        global_step: optimiser steps done.
        max_train_steps: optimiser steps of the whole run.
        skipped_steps: steps that `--on_nan skip` left out.
        stopped: a signal has ended the run early, after a checkpoint.

    Raises:
        OSError: there is no such checkpoint, or it is damaged.
        ValueError: the checkpoint is of another run (the message names the differences), or newer than
            `--max_train_steps`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        model: ModelMixin,
        samples: DiffusionDataset | StreamingDiffusionDataset,
        save_weights: Callable[[ModelMixin, Path], None] | None = None,
        load_weights: Callable[[ModelMixin, Path], None] | None = None,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.save_weights = save_weights or _save_model
        self.load_weights = load_weights or _load_model
        self.model_class = type(model)
        self.global_step = 0
        self.skipped_steps = 0
        self.stopped = False

        # How long the run is
        self.samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.num_samples = len(samples) if isinstance(samples, DiffusionDataset) else None
        if args.max_train_steps is None:
            assert self.num_samples is not None
            self.max_train_steps = math.ceil(args.num_train_epochs * self.num_samples / self.samples_per_step)
        else:
            self.max_train_steps = args.max_train_steps
        checkpoint = self._find_checkpoint(model)

        # Model, optimiser and schedule
        if args.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.compile:
            model.compile()
        learning_rate = args.learning_rate * (self.samples_per_step if args.scale_lr else 1)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(args, trained, learning_rate, accelerator.device)
        lr_scheduler = get_scheduler(
            args.lr_scheduler,
            optimizer=optimizer,
            # Accelerate steps the schedule once per process.
            num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=self.max_train_steps * accelerator.num_processes,
        )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            plugin = accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
            plugin.deepspeed_config["gradient_clipping"] = args.max_grad_norm
        self.model, self.optimizer, self.lr_scheduler = accelerator.prepare(model, optimizer, lr_scheduler)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.ema = None
        if args.use_ema:
            self.ema = EMAModel(
                self.model.parameters(),
                decay=args.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=args.ema_inv_gamma,
                power=args.ema_power,
                # PyTorch has no foreach copy of sharded parameters.
                foreach=accelerator.distributed_type != DistributedType.FSDP,
            )
        accelerator.register_save_state_pre_hook(self._save_hook)
        accelerator.register_load_state_pre_hook(self._load_hook)
        set_seed(args.seed, device_specific=True)  # dropout differs between processes

        # Resume
        if checkpoint is not None:
            logger.info(f"Resuming from {checkpoint}")
            accelerator.load_state(str(checkpoint))
            state = read_state(checkpoint)
            self.global_step, self.skipped_steps = state["step"], state["skipped_steps"]
            if self.ema is not None:
                self.ema.optimization_step = state["ema_step"]
        self._warm_up_kappa(accelerator.unwrap_model(self.model))
        self.dataloader = self._make_dataloader(samples)
        if checkpoint is not None and isinstance(self.dataloader, StatefulDataLoader):
            self.dataloader.load_state_dict(load_safely(self._dataloader_file(checkpoint)))

        # Record
        self.uploader = None
        if args.push_to_hub and accelerator.is_main_process:
            self.uploader = HubUploader(
                args.hub_model_id, args.output_dir, args.hub_token, args.hub_private_repo or None
            )
        self._loss_sum = torch.zeros((), device=accelerator.device)
        if accelerator.is_main_process:
            if not args.resume_from_checkpoint:
                remove_earlier_run(args.output_dir)
            remove_leftovers(args.output_dir)
            self.loss_record = LossRecord(Path(args.output_dir) / "loss.csv", last_step=self.global_step)
        self._stop_signals = StopSignals()
        self.progress_bar = tqdm(
            total=self.max_train_steps,
            initial=self.global_step,
            desc="Training",
            unit="step",
            disable=not accelerator.is_local_main_process,
        )
        unwrapped = accelerator.unwrap_model(self.model)
        logger.info("***** Running training *****")
        logger.info(f"  Samples = {'a stream' if self.num_samples is None else self.num_samples}")
        logger.info(f"  Parameters = {sum(p.numel() for p in self.model.parameters()):,}")
        logger.info(f"  Trained parameters = {sum(p.numel() for p in self.trained):,}")
        logger.info(f"  Long skip connections = {unwrapped.num_skips}")
        logger.info(f"  Coefficients, shallowest first = {unwrapped.kappas or 'learned'}")
        logger.info(f"  Batch size per device = {args.train_batch_size}")
        logger.info(f"  Gradient accumulation steps = {args.gradient_accumulation_steps}")
        logger.info(f"  Total batch size = {self.samples_per_step}")
        logger.info(f"  Optimiser steps = {self.max_train_steps}")

    # Data

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The batches that are left, on the device. Ends after the last step, or early at SIGTERM or SIGINT."""
        batches = iter(self.dataloader)
        while self.global_step < self.max_train_steps and not self.stopped:
            batch = next(batches, None)
            if batch is None:
                raise OSError("The stream has no rows for this process: use fewer processes, or more shards of data.")
            yield send_to_device(batch, self.accelerator.device, non_blocking=True)

    def _make_dataloader(self, samples: DiffusionDataset | StreamingDiffusionDataset) -> torch.utils.data.DataLoader:
        args, accelerator = self.args, self.accelerator
        options = {
            "batch_size": args.train_batch_size,
            "num_workers": args.dataloader_num_workers,
            "worker_init_fn": leave_signals_to_the_main_process,
            "pin_memory": accelerator.device.type == "cuda",
        }
        if isinstance(samples, StreamingDiffusionDataset):
            return StatefulDataLoader(samples, drop_last=True, **options)
        sampler = RunSampler(
            len(samples),
            num_batches=self.max_train_steps * args.gradient_accumulation_steps,
            batch_size=args.train_batch_size,
            seed=args.seed,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            first_batch=self.global_step * args.gradient_accumulation_steps,
        )
        return torch.utils.data.DataLoader(samples, sampler=sampler, **options)

    # Steps

    def optimize(self, loss: torch.Tensor) -> None:
        """Backpropagates the loss of a batch; when accumulation is complete, steps, records and checkpoints.

        Call it inside `accelerator.accumulate(run.model)`.

        Raises:
            FloatingPointError: the loss or the gradient is not finite and `--on_nan` is `stop`. Nothing has been
                updated then; the message names the last checkpoint.
            OSError: a checkpoint could not be written.
        """
        accelerator = self.accelerator
        accelerator.backward(loss)
        self._loss_sum += loss.detach().float() / self.args.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            return

        # Loss and stop signal travel together: one synchronisation for each step.
        signalled = torch.tensor(float(self._stop_signals.received), device=accelerator.device)
        step_loss, stop = accelerator.reduce(torch.stack([self._loss_sum, signalled]), "mean").tolist()
        self._loss_sum.zero_()
        gradient_norm = accelerator.clip_grad_norm_(self.trained, self.args.max_grad_norm)
        finite = math.isfinite(step_loss)
        if accelerator.scaler is None and gradient_norm is not None:  # fp16's scaler skips overflows by itself
            finite = finite and math.isfinite(gradient_norm)
        if not finite:
            self._on_nan(step_loss, gradient_norm)
        learning_rate = self.lr_scheduler.get_last_lr()[0]
        if finite or accelerator.scaler is not None:
            self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        if self.ema is not None and finite:
            self.ema.step(self.model.parameters())
        self.global_step += 1
        self._warm_up_kappa(accelerator.unwrap_model(self.model))

        logs = {"loss": step_loss, "lr": learning_rate}
        if self.ema is not None:
            logs["ema_decay"] = self.ema.cur_decay_value
        accelerator.log(logs, step=self.global_step)
        if accelerator.is_main_process:
            self.loss_record.append(self.global_step, step_loss, learning_rate)
        self.progress_bar.update(1)
        self.progress_bar.set_postfix(loss=f"{step_loss:.4f}", lr=f"{learning_rate:.2e}", refresh=False)
        self.stopped = stop > 0
        last = self.global_step == self.max_train_steps
        if self.global_step % self.args.checkpointing_steps == 0 or self.stopped or last:
            self.save_checkpoint()

    def _on_nan(self, loss: float, gradient_norm: Any) -> None:
        what = f"At step {self.global_step + 1} the loss is {loss} and the norm of the gradient {gradient_norm}"
        if self.args.on_nan == "stop":
            checkpoints = list_checkpoints(self.args.output_dir)
            good = f"The last good checkpoint is {checkpoints[-1]}" if checkpoints else "There is no checkpoint yet"
            raise FloatingPointError(
                f"{what}. {good}. Lower the learning rate or the skip constants, or pass --on_nan skip to leave such "
                "steps out."
            )
        self.skipped_steps += 1
        logger.warning(f"{what}: skipped, the {self.skipped_steps}. time.")

    def _warm_up_kappa(self, model: ModelMixin) -> None:
        if self.args.kappa_warmup_steps:
            model.warm_up_kappa(min(self.global_step / self.args.kappa_warmup_steps, 1.0))

    def epoch_due(self, every: int) -> bool:
        """Whether the last step completed an epoch whose number is a multiple of `every`, and the run goes on.

        The epochs of a stream, whose length is not known, are not counted.
        """
        if not self.accelerator.sync_gradients or self.stopped or self.global_step == self.max_train_steps:
            return False
        return self.epoch // every > self._epoch_after(self.global_step - 1) // every

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self._epoch_after(self.global_step)

    def _epoch_after(self, step: int) -> int:
        return 0 if self.num_samples is None else step * self.samples_per_step // self.num_samples

    # Checkpoints

    def save_checkpoint(self) -> None:
        """Saves everything that the run needs to go on, then removes the oldest checkpoints beyond the limit."""
        accelerator, args = self.accelerator, self.args
        if accelerator.is_main_process:
            self.loss_record.flush()
        checkpoint = write_checkpoint(
            args.output_dir,
            self.global_step,
            write=self._write_state,
            state={
                "step": self.global_step,
                "skipped_steps": self.skipped_steps,
                "ema_step": self.ema.optimization_step if self.ema is not None else None,
                "run": self._run_description(accelerator.unwrap_model(self.model)),
            },
            is_main_process=accelerator.is_main_process,
            wait_for_everyone=accelerator.wait_for_everyone,
        )
        if accelerator.is_main_process and args.checkpoints_total_limit is not None:
            # A later one, damaged or from before the run went back to an earlier one, does not count.
            written = [c for c in list_checkpoints(args.output_dir) if checkpoint_step(c) <= self.global_step]
            for old in written[: -args.checkpoints_total_limit]:
                remove_checkpoint(old)
        logger.info(f"Saved the training state to {checkpoint}")
        if self.uploader is not None:
            self.uploader.upload_folder(checkpoint, checkpoint.name, f"Training in progress, step {self.global_step}")

    def _write_state(self, folder: Path) -> None:
        self.accelerator.save_state(str(folder))
        if isinstance(self.dataloader, StatefulDataLoader):
            torch.save(self.dataloader.state_dict(), self._dataloader_file(folder))

    def _dataloader_file(self, folder: Path) -> Path:
        return folder / f"dataloader_{self.accelerator.process_index}.pt"

    def _save_hook(self, models: list[torch.nn.Module], weights: list, folder: str) -> None:
        weights.clear()  # Accelerate saves what is left in here by itself
        model = self.whole_model()
        if self.accelerator.is_main_process:
            self.save_weights(model, Path(folder))
        if self.ema is not None:
            with self.averaged_weights():
                model = self.whole_model()
                if self.accelerator.is_main_process:
                    model.save_pretrained(Path(folder) / "unet_ema")

    def _load_hook(self, models: list[torch.nn.Module], folder: str) -> None:
        if self.ema is not None:
            average = self.model_class.from_pretrained(folder, subfolder="unet_ema")
            options = StateDictOptions(full_state_dict=True)
            own = self.accelerator.unwrap_model(self.model)
            self.ema.store(self.model.parameters())
            set_model_state_dict(own, average.state_dict(), options=options)
            self.ema.shadow_params = [parameter.detach().clone() for parameter in self.model.parameters()]
            self.ema.restore(self.model.parameters())
        if models:  # FSDP and DeepSpeed have loaded their own by now
            models.clear()
            self.load_weights(self.accelerator.unwrap_model(self.model), Path(folder))

    def _run_description(self, model: ModelMixin) -> dict[str, Any]:
        """What must be the same for a resumed run to be the same run; JSON values."""
        config = {key: value for key, value in model.config.items() if not key.startswith("_")}
        return json.loads(
            json.dumps(
                {
                    "processes": self.accelerator.num_processes,
                    "total batch size": self.samples_per_step,
                    "number of samples": self.num_samples,
                    **{f"--{name}": vars(self.args).get(name) for name in _RESUMED_WITH.split()},
                    "model class": self.model_class.__name__,
                    **{f"model's {key}": value for key, value in config.items()},
                }
            )
        )

    def _find_checkpoint(self, model: ModelMixin) -> Path | None:
        if not self.args.resume_from_checkpoint:
            return None
        found: list[Path | None] = [None]
        if self.accelerator.is_main_process:  # reading every byte of it once is enough
            found = [find_checkpoint(self.args.output_dir, self.args.resume_from_checkpoint)]
        checkpoint = broadcast_object_list(found)[0]
        if checkpoint is None:
            logger.info("There is no checkpoint yet: starting from the beginning.")
            return None
        then, now = read_state(checkpoint)["run"], self._run_description(model)
        differences = [
            f"{key} was {then.get(key)} and is {now.get(key)}"
            for key in sorted(then.keys() | now.keys())
            if then.get(key) != now.get(key)
        ]
        if differences:
            raise ValueError(
                f"{checkpoint} is of another run: {'; '.join(differences)}. Resume with the arguments of the "
                "interrupted run, or start a new one in another --output_dir."
            )
        if checkpoint_step(checkpoint) > self.max_train_steps:
            raise ValueError(
                f"{checkpoint} is newer than the {self.max_train_steps} steps of this run: raise --max_train_steps, "
                "or resume from an earlier checkpoint."
            )
        return checkpoint

    # Results

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The model has the moving average of its weights inside, where there is one, and is in evaluation mode."""
        self.model.eval()
        if self.ema is not None:
            self.ema.store(self.model.parameters())
            self.ema.copy_to(self.model.parameters())
        try:
            yield
        finally:
            if self.ema is not None:
                self.ema.restore(self.model.parameters())
            self.model.train()

    def whole_model(self) -> ModelMixin:
        """The model out of its wrappers; with FSDP a copy with all the weights, on the main process.

        Every process must call.
        """
        model = self.accelerator.unwrap_model(self.model)
        if self.accelerator.distributed_type != DistributedType.FSDP:
            return model
        weights = self.accelerator.get_state_dict(self.model)
        with torch.random.fork_rng(devices=[]):  # initial weights are drawn in vain, and must not move the run's draws
            whole = self.model_class.from_config(model.config)
        if self.accelerator.is_main_process:
            whole.load_state_dict(weights)
        self._warm_up_kappa(whole)
        return whole.eval()

    def save_results(
        self,
        pipeline_of: Callable[[ModelMixin], DiffusionPipeline],
        draw: Callable[[DiffusionPipeline, torch.Generator], np.ndarray],
        save_images: bool = True,
        save_model: bool = True,
        columns: int | None = None,
    ) -> None:
        """Draws a sample grid and saves the pipeline: of the averaged weights, if there are any.

        Args:
            pipeline_of: makes the pipeline of the trained model.
            draw: makes the samples with a pipeline and a generator, which starts at `--seed` each time; of the shape
                that `save_samples` takes.
            save_images, save_model: what is wanted of the two.
            columns: samples in a row of the grid.
        """
        with self.averaged_weights():
            model = self.whole_model()
            if not self.accelerator.is_main_process:
                return
            pipeline = pipeline_of(model.to(self.accelerator.device))
            if save_images:
                pipeline.set_progress_bar_config(desc="Sampling", leave=False)
                generator = torch.Generator(device=pipeline.device).manual_seed(self.args.seed)
                save_samples(
                    draw(pipeline, generator), self.args.output_dir, self.global_step, columns, self.accelerator
                )
            if save_model:
                save_pipeline(pipeline, self.args.output_dir)

    def finish(self, task: str, base_model: str | None = None) -> None:
        """Writes the model card and the loss curve, uploads what is to be, and closes everything.

        Args:
            task: as in `save_model_card`.
            base_model: the pretrained model that the training started from.
        """
        self._stop_signals.release()
        self.progress_bar.close()
        if self.skipped_steps:
            logger.warning(f"{self.skipped_steps} steps were skipped because loss or gradient were not finite.")
        if self.accelerator.is_main_process:
            self.loss_record.close()
            if not self.stopped:
                self._publish(task, base_model)
            if self.uploader is not None:
                self.uploader.finish(timeout=30 if self.stopped else None)
        if self.stopped:
            logger.info(
                f"Stopped by a signal after step {self.global_step} of {self.max_train_steps}, with a checkpoint. "
                "Continue with --resume_from_checkpoint latest."
            )
        self.accelerator.end_training()

    def _publish(self, task: str, base_model: str | None) -> None:
        args = self.args
        save_loss_curve(self.loss_record.steps, self.loss_record.losses, Path(args.output_dir) / "loss.png")
        save_model_card(
            args.output_dir,
            model=self.accelerator.unwrap_model(self.model),
            task=task,
            repo_id=self.uploader.repo_id if self.uploader is not None else args.output_dir,
            base_model=base_model,
            dataset=args.dataset_name or Path(args.train_data_dir).name,
            command=command_line(args.hub_token),
            hyperparameters=redacted_args(args),
        )
        if self.uploader is not None:
            self.uploader.upload_folder(args.output_dir, commit_message="End of training")
        logger.info(f"The results are in {args.output_dir}")


def _save_model(model: ModelMixin, folder: Path) -> None:
    model.save_pretrained(folder / "unet")


def _load_model(model: ModelMixin, folder: Path) -> None:
    stored = type(model).from_pretrained(folder, subfolder="unet")
    model.load_state_dict(stored.state_dict())
