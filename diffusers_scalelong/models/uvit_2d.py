"""U-ViT (Bao et al., CVPR 2023, arXiv 2209.12152) with scaled long skip connections, ScaleLong's second backbone."""

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import ClassVar

import torch
from diffusers import ConfigMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import PatchEmbed, TimestepEmbedding, Timesteps
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import nn
from torch.nn import functional as F

from .skip_scaling_mixin import SkipScalingMixin

HAS_AVX512 = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"


class TokenLinear(nn.Linear):
    """`nn.Linear` for (batch, tokens, in_features), in float32 on a CPU with AVX-512 computed as a 1×1 convolution.

    The product is the same, but PyTorch takes it from MKL for matrices and from oneDNN for convolutions, and on an AMD
    CPU oneDNN was twice as fast (see benchmarks/README.md).
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        batch_size, num_tokens, _ = hidden_states.shape
        if (
            not HAS_AVX512
            or hidden_states.device.type != "cpu"
            or hidden_states.dtype != torch.float32
            or batch_size * num_tokens < 256  # too few to make up for the reordering of the weight
        ):
            return super().forward(hidden_states)
        # The tokens as an image of height 1 whose memory is channels-last: views, no copies.
        image = hidden_states.transpose(1, 2).unsqueeze(2)
        return F.conv2d(image, self.weight[:, :, None, None], self.bias).squeeze(2).transpose(1, 2)


class UViTAttention(nn.Module):
    """Multi-head self-attention in the dtype of its input, (batch, tokens, hidden_size) to the same."""

    def __init__(self, hidden_size: int, num_attention_heads: int, attention_bias: bool) -> None:
        super().__init__()
        self.num_attention_heads = num_attention_heads
        self.to_qkv = TokenLinear(hidden_size, 3 * hidden_size, bias=attention_bias)
        self.to_out = TokenLinear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # One unbind, whose backward is one stack; slices would each backpropagate into a zero tensor of full size.
        qkv = self.to_qkv(hidden_states).unflatten(-1, (3, self.num_attention_heads, -1))
        query, key, value = (tensor.transpose(1, 2) for tensor in qkv.unbind(2))
        hidden_states = F.scaled_dot_product_attention(query, key, value)
        return self.to_out(hidden_states.transpose(1, 2).flatten(2))


class UViTBlock(nn.Module):
    """A pre-norm transformer block; with `has_skip` it first projects `cat([hidden_states, skip])` to its width."""

    def __init__(
        self, hidden_size: int, num_attention_heads: int, mlp_ratio: float, attention_bias: bool, has_skip: bool
    ) -> None:
        super().__init__()
        self.skip_linear = TokenLinear(2 * hidden_size, hidden_size) if has_skip else None
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attn = UViTAttention(hidden_size, num_attention_heads, attention_bias)
        self.norm2 = nn.LayerNorm(hidden_size)
        inner_dim = int(hidden_size * mlp_ratio)
        self.ff = FeedForward(hidden_size, inner_dim=inner_dim, activation_fn="gelu")
        self.ff.net[0].proj = TokenLinear(hidden_size, inner_dim)
        self.ff.net[2] = TokenLinear(inner_dim, hidden_size)

    def forward(self, hidden_states: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
        if self.skip_linear is not None:
            assert skip is not None
            hidden_states = self.skip_linear(torch.cat([hidden_states, skip], dim=-1))
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class ScaleLongUViT2DModel(SkipScalingMixin, ConfigMixin):
    """U-ViT: a vision transformer with long skip connections, `cat([hidden, κ_i · skip_i])` (ScaleLong).

    The image becomes patches; the timestep, and the class or the text where the model takes one, become tokens beside
    them. `num_layers // 2` blocks lead in, one is in the middle, and `num_layers // 2` lead out; the i-th block from
    the outside in hands its output to its counterpart as skip i. The architecture, the initialisation and, for the
    same weights, the output are those of the reference implementations (https://github.com/baofff/U-ViT and
    https://github.com/sail-sg/ScaleLong).

    Args:
        sample_size: height and width of the image or latent, a multiple of `patch_size`.
        patch_size: height and width of a patch.
        in_channels: channels of the image, in and out.
        num_layers: the blocks, without the one in the middle. An odd number counts that one in: 12 and 13 give the
            same model.
        num_attention_heads: must divide `hidden_size`.
        hidden_size: width of the tokens.
        mlp_ratio: the feed-forward layers have `int(hidden_size * mlp_ratio)` hidden features.
        attention_bias: whether queries, keys and values have a bias.
        time_embedding_mlp: whether the sinusoidal time embedding passes through a two-layer network.
        num_class_embeds: the number of class embeddings, for a class-conditional model. For classifier-free guidance
            it is the number of classes plus one: the last embedding stands for "no class".
        cross_attention_dim, num_context_tokens: width and number of the text tokens, for a text-conditional model.
        skip_scaling: `"none"`, `"uniform"`, `"cs"`, `"ls"` or `"ls_unshared"`; see `diffusers_scalelong.skip_scaling`.
            The gates of LS live on the tokens.
        kappa: κ of the constant methods, as in `skip_coefficients`: by default 2^(-1/2) for `"uniform"` and 0.7 for
            `"cs"`.
        ls_reduction: the gate networks of LS have max(tokens // ls_reduction, 1) hidden features.
        ls_initial_gate: `None` for the paper's initialisation of the gates, or p in (0, 1): every gate starts at p.

    Attributes:
        num_skips: N = `num_layers // 2`.
        kappas: the constants in force, shallowest skip first; `None` for `"ls"` and `"ls_unshared"`.

    Raises:
        ValueError, TypeError: invalid arguments; the message says what is expected.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["UViTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["UViTBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["norm"]

    patch_embed: PatchEmbed
    time_proj: Timesteps
    time_embedding: TimestepEmbedding | None
    class_embedding: nn.Embedding | None
    context_embedder: nn.Linear | None
    pos_embed: nn.Parameter
    in_blocks: nn.ModuleList
    mid_block: UViTBlock
    out_blocks: nn.ModuleList
    norm_out: nn.LayerNorm
    proj_out: nn.Linear
    conv_out: nn.Conv2d
    gradient_checkpointing: bool

    @register_to_config
    def __init__(
        self,
        sample_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 3,
        num_layers: int = 12,
        num_attention_heads: int = 8,
        hidden_size: int = 512,
        mlp_ratio: float = 4.0,
        attention_bias: bool = False,
        time_embedding_mlp: bool = False,
        num_class_embeds: int | None = None,
        cross_attention_dim: int | None = None,
        num_context_tokens: int | None = None,
        skip_scaling: str = "none",
        kappa: float | Sequence[float] | None = None,
        ls_reduction: int = 16,
        ls_initial_gate: float | None = None,
    ) -> None:
        super().__init__()
        for name, value, minimum in (
            ("sample_size", sample_size, 1),
            ("patch_size", patch_size, 1),
            ("in_channels", in_channels, 1),
            ("num_layers", num_layers, 2),
            ("num_attention_heads", num_attention_heads, 1),
            ("hidden_size", hidden_size, 1),
        ):
            _check_integer(name, value, minimum)
        for name, optional_value in (
            ("num_class_embeds", num_class_embeds),
            ("cross_attention_dim", cross_attention_dim),
            ("num_context_tokens", num_context_tokens),
        ):
            if optional_value is not None:
                _check_integer(name, optional_value, 1)
        if isinstance(mlp_ratio, bool) or not isinstance(mlp_ratio, Real):
            raise TypeError(f"`mlp_ratio` must be a number, but is {mlp_ratio!r}.")
        if not 1 <= hidden_size * mlp_ratio < float("inf"):
            raise ValueError(f"`mlp_ratio` must leave the feed-forward layers a feature or more, but is {mlp_ratio}.")
        if sample_size % patch_size:
            raise ValueError(
                f"`sample_size` must be a multiple of `patch_size`, but {sample_size} is not one of {patch_size}."
            )
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"`num_attention_heads` must divide `hidden_size`, but {num_attention_heads} does not divide "
                f"{hidden_size}."
            )
        if (cross_attention_dim is None) != (num_context_tokens is None):
            raise ValueError(
                "A text-conditional model needs both `cross_attention_dim` and `num_context_tokens`, but they are "
                f"{cross_attention_dim} and {num_context_tokens}."
            )

        self.patch_embed = PatchEmbed(
            sample_size, sample_size, patch_size, in_channels, hidden_size, pos_embed_type=None
        )
        self.time_proj = Timesteps(hidden_size, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = (
            TimestepEmbedding(hidden_size, 4 * hidden_size, out_dim=hidden_size) if time_embedding_mlp else None
        )
        self.class_embedding = nn.Embedding(num_class_embeds, hidden_size) if num_class_embeds is not None else None
        self.context_embedder = (
            nn.Linear(cross_attention_dim, hidden_size) if cross_attention_dim is not None else None
        )
        num_patches = (sample_size // patch_size) ** 2
        num_tokens = 1 + (num_class_embeds is not None) + (num_context_tokens or 0) + num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, num_tokens, hidden_size))

        def block(has_skip: bool) -> UViTBlock:
            return UViTBlock(hidden_size, num_attention_heads, mlp_ratio, attention_bias, has_skip)

        self.in_blocks = nn.ModuleList([block(has_skip=False) for _ in range(num_layers // 2)])
        self.mid_block = block(has_skip=False)
        self.out_blocks = nn.ModuleList([block(has_skip=True) for _ in range(num_layers // 2)])

        self.norm_out = nn.LayerNorm(hidden_size)
        self.proj_out = nn.Linear(hidden_size, patch_size**2 * in_channels)
        self.conv_out = nn.Conv2d(in_channels, in_channels, 3, padding=1)

        self.gradient_checkpointing = False
        self._init_weights()
        # After the weights: the gates keep PyTorch's default initialisation, as in the reference.
        self._init_skip_scaling([num_tokens] * len(self.in_blocks), skip_scaling, kappa, ls_reduction, ls_initial_gate)

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DOutput | tuple[torch.Tensor]:
        """Predicts the noise, or whatever the model was trained to predict.

        Args:
            sample: the noisy images, (batch, in_channels, sample_size, sample_size).
            timestep: a number, or a tensor with one element or (batch,).
            encoder_hidden_states: the text, (batch, num_context_tokens, cross_attention_dim), exactly for a
                text-conditional model.
            class_labels: integers in [0, num_class_embeds), (batch,), exactly for a class-conditional model.
            return_dict: whether to return a `UNet2DOutput` or a tuple.

        Returns:
            `UNet2DOutput`, or a tuple with its one field: the prediction, of the shape of `sample`.

        Raises:
            ValueError: a tensor of the wrong shape; labels or text that are missing, or that the model does not take;
                a label out of range (checked on the CPU outside `torch.compile`; elsewhere the embedding asserts it).
        """
        self._check_inputs(sample, encoder_hidden_states, class_labels)
        batch_size = len(sample)
        timesteps = torch.as_tensor(timestep, device=sample.device)
        if timesteps.numel() not in (1, batch_size):
            raise ValueError(
                f"`timestep` must be one number or one per image, {batch_size}, but has shape {_shape(timesteps)}."
            )

        time_token = self.time_proj(timesteps.flatten()).to(self.dtype)
        if self.time_embedding is not None:
            time_token = self.time_embedding(time_token)
        tokens = [time_token[:, None].expand(batch_size, -1, -1), self.patch_embed(sample)]
        if self.class_embedding is not None:
            tokens.insert(0, self.class_embedding(class_labels)[:, None])
        if self.context_embedder is not None:
            tokens.insert(-1, self.context_embedder(encoder_hidden_states))
        hidden_states = torch.cat(tokens, dim=1) + self.pos_embed

        skips = []
        for block in self.in_blocks:
            hidden_states = self._run(block, hidden_states)
            skips.append(hidden_states)
        hidden_states = self._run(self.mid_block, hidden_states)
        for block in self.out_blocks:
            skip = skips.pop()
            if self.skip_scaler is not None:
                skip = self.skip_scaler(skip, len(skips))
            hidden_states = self._run(block, hidden_states, skip)

        size, patch_size, channels = self.config["sample_size"], self.config["patch_size"], self.config["in_channels"]
        grid = size // patch_size
        patches = self.proj_out(self.norm_out(hidden_states[:, -(grid**2) :]))
        patches = patches.reshape(batch_size, grid, grid, patch_size, patch_size, channels)
        output = self.conv_out(patches.permute(0, 5, 1, 3, 2, 4).reshape(batch_size, channels, size, size))
        return UNet2DOutput(sample=output) if return_dict else (output,)

    def _run(self, block: nn.Module, *inputs: torch.Tensor) -> torch.Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)

    def _check_inputs(
        self, sample: torch.Tensor, encoder_hidden_states: torch.Tensor | None, class_labels: torch.Tensor | None
    ) -> None:
        config = self.config
        size = config["sample_size"]
        if sample.shape[1:] != (config["in_channels"], size, size):
            raise ValueError(
                f"`sample` must have shape (batch, {config['in_channels']}, {size}, {size}), which this model was "
                f"built for, but has {_shape(sample)}."
            )

        num_classes = config["num_class_embeds"]
        if num_classes is None:
            if class_labels is not None:
                raise ValueError("This model takes no `class_labels`: `num_class_embeds` is not set in its config.")
        elif class_labels is None:
            raise ValueError(f"This model is class-conditional: give `class_labels`, integers below {num_classes}.")
        else:
            if class_labels.shape != sample.shape[:1]:
                raise ValueError(
                    f"`class_labels` must have one label per image, shape {_shape(sample)[:1]}, but has "
                    f"{_shape(class_labels)}."
                )
            # Only where looking at the values neither waits for a GPU nor breaks a graph.
            if (
                class_labels.device.type == "cpu"
                and not torch.compiler.is_compiling()
                and (class_labels.min() < 0 or class_labels.max() >= num_classes)
            ):
                raise ValueError(
                    f"`class_labels` must lie in [0, {num_classes}), but reach from {class_labels.min()} to "
                    f"{class_labels.max()}."
                )

        if config["cross_attention_dim"] is None:
            if encoder_hidden_states is not None:
                raise ValueError(
                    "This model takes no `encoder_hidden_states`: `cross_attention_dim` is not set in its config."
                )
            return
        expected = (len(sample), config["num_context_tokens"], config["cross_attention_dim"])
        if encoder_hidden_states is None:
            raise ValueError(f"This model is text-conditional: give `encoder_hidden_states` of shape {expected}.")
        if encoder_hidden_states.shape != expected:
            raise ValueError(
                f"`encoder_hidden_states` must have shape {expected}, but has {_shape(encoder_hidden_states)}. Pad "
                "or cut the text to the model's number of tokens."
            )

    @classmethod
    def from_original_checkpoint(
        cls,
        checkpoint: str | os.PathLike | Mapping[str, torch.Tensor],
        *,
        num_attention_heads: int,
        skip_scaling: str = "none",
        kappa: float | Sequence[float] | None = None,
        num_context_tokens: int | None = None,
    ) -> "ScaleLongUViT2DModel":
        """The model of a checkpoint in the format of the reference implementations, U-ViT's or ScaleLong's.

        Everything that the shapes of the weights tell is inferred from them. The model is in evaluation mode, in the
        dtype of the checkpoint, and shares no storage with it.

        Args:
            checkpoint: a `.safetensors` file, a file written by `torch.save` (`.pth`; read with `weights_only=True`),
                or a state dict.
            num_attention_heads: as in the constructor; the shapes do not tell.
            skip_scaling, kappa: the method that the checkpoint was trained with, as in the constructor. If it has
                gates, the method is `"ls"` or `"ls_unshared"`, as they are shared or not, and needs no mention.
            num_context_tokens: of a text-conditional checkpoint, whose shapes tell only the sum of text tokens and
                patches. By default 77, CLIP's, if that leaves a square of patches, and else as few as do.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file is damaged, or holds code rather than weights; weights are missing, unexpected or of
                the wrong shape (the message names them); `skip_scaling` or `kappa` contradicts the gates.
        """
        from ..conversion import infer_config, load_state_dict, to_model_state_dict

        state_dict = checkpoint if isinstance(checkpoint, Mapping) else load_state_dict(checkpoint)
        config = infer_config(state_dict, num_attention_heads, skip_scaling, kappa, num_context_tokens)
        model = cls(**config)
        model.load_state_dict(to_model_state_dict(model, state_dict), assign=True)
        return model.eval()

    def to_original_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights under the names of the reference implementations, as `state_dict` returns them otherwise.

        `from_original_checkpoint` makes the same model of them again, given what they do not hold: the number of heads
        and the constants of `"uniform"` and `"cs"`.
        """
        from ..conversion import original_names

        weights = self.state_dict()
        return {original: weights[name] for name, original in original_names(self).items()}


def _shape(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _check_integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"`{name}` must be an integer, but is {value!r}.")
    if value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, but is {value}.")
