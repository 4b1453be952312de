"""The model card (`README.md`) of a training run: what the model is, how it was trained, and how to load it."""

import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .hub import redact
from .models.skip_scaling_mixin import SkipScalingMixin
from .remote_code import MODEL_CODE, PIPELINE_CODE
from .skip_scaling import ConstantSkipScaling, LearnableSkipScaling

TEMPLATE = Path(__file__).with_name("model_card_template.md")
LORA_FILE = "pytorch_lora_weights.safetensors"

# The Hub's tag of each task.
TASKS = {
    "unconditional": "unconditional-image-generation",
    "class-conditional": "class-conditional-image-generation",
    "text-to-image": "text-to-image",
}
_VERSIONS_OF = "diffusers-scalelong diffusers torch transformers peft accelerate datasets safetensors huggingface_hub"


def save_model_card(
    output_dir: str | os.PathLike,
    *,
    model: SkipScalingMixin,
    task: str,
    repo_id: str,
    base_model: str | None = None,
    dataset: str | None = None,
    license: str | None = None,
    command: str | None = None,
    hyperparameters: Mapping[str, Any] | None = None,
    metrics: Mapping[str, float] | None = None,
    description: str | None = None,
    example_prompt: str = "a photo",
) -> Path:
    """Writes `README.md` into a folder that is complete otherwise: the card says what the folder holds.

    A pipeline (`model_index.json`), a model (`config.json`) and LoRA weights (`pytorch_lora_weights.safetensors`) each
    get the snippet that loads them, and code that `remote_code.add_code` added is mentioned. The folder's own PNG
    files, `samples.png` first, become the card's pictures. Texts may hold any characters: they are escaped, and what
    looks like a token of the Hub is replaced by `***`.

    Args:
        output_dir: the folder of the pipeline, the model or the LoRA weights.
        model: the model that was trained, whose scaling the card tells.
        task: `"unconditional"`, `"class-conditional"` or `"text-to-image"`.
        repo_id: what the snippets load: `USER/NAME` on the Hub, or a folder.
        base_model: the pretrained model that the training started from; needed for LoRA weights.
        dataset: a name on the Hub, or any words for the data.
        license: its identifier on the Hub, for example `"apache-2.0"`.
        command: that of the training; `hub.command_line` tells it without the token.
        hyperparameters: for a table, the seed among them; `hub.redacted_args` makes it of a script's arguments. Those
            that are `None`, and the token, are left out.
        metrics: results by name, for example `{"FID": 12.3}`.
        description: a sentence or more about this training.
        example_prompt: of the snippet of a text-to-image model.

    Returns:
        The card's path.

    Raises:
        ValueError: an unknown task; a folder that holds none of the three; LoRA weights without `base_model`.
    """
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, but is {task!r}.")
    folder = Path(output_dir)
    is_lora = (folder / LORA_FILE).is_file()
    if is_lora and base_model is None:
        raise ValueError("The card of LoRA weights needs `base_model`: the pipeline that they are for.")
    name = Path(repo_id).name
    metrics = metrics or {}
    results = [
        EvalResult(
            task_type=TASKS[task],
            dataset_type=dataset or "unknown",
            dataset_name=dataset or "unknown",
            metric_type=metric.lower(),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in metrics.items()
        if math.isfinite(value)  # the Hub keeps them as JSON, which has no other numbers
    ]
    card_data = ModelCardData(
        library_name="diffusers",
        license=license,
        base_model=base_model if _is_on_hub(base_model) else None,
        datasets=[dataset] if dataset is not None and _is_on_hub(dataset) else None,
        pipeline_tag="text-to-image" if task == "text-to-image" else "unconditional-image-generation",
        tags=["diffusers", "scalelong", TASKS[task], *(["lora"] if is_lora else [])],
        model_name=name if results else None,
        eval_results=results or None,
    )
    code_files = [file for file in (MODEL_CODE, f"unet/{MODEL_CODE}", PIPELINE_CODE) if (folder / file).is_file()]
    usage, usage_with_code = _usage(folder, model, task, repo_id, base_model, example_prompt)
    card = ModelCard.from_template(
        card_data,
        template_path=str(TEMPLATE),
        title=_escape(name),
        summary=_summary(model, task, base_model, is_lora),
        description=re.sub(r"^(\d*)([-+=.)])", r"\1\\\2", _escape(description or "")),  # no list
        pictures=[f"![{_escape(picture.stem)}]({quote(picture.name)})" for picture in _pictures(folder)],
        usage=_fenced("python", usage),
        usage_without_package=_fenced("python", usage_with_code) if code_files else "",
        code_files=" and ".join(f"`{file}`" for file in code_files),
        warning=_warning(model, is_lora),
        num_skips=model.num_skips,
        method=_method(model),
        scaling_table=_scaling_table(model),
        metrics_table=_table(["metric", "value"], [[n, f"{value:.6g}"] for n, value in metrics.items()]),
        training=_training(dataset, hyperparameters),
        command=_fenced("bash", command) if command else "",
        hyperparameters_table=_table(["flag", "value"], _shown(hyperparameters)),
    )
    path = folder / "README.md"
    ModelCard(redact(str(card))).save(path)
    return path


def _usage(
    folder: Path, model: SkipScalingMixin, task: str, repo_id: str, base_model: str | None, example_prompt: str
) -> tuple[str, str]:
    """The snippets that load what the folder holds: with this package, and with the repository's own code."""
    repo, base, class_name = _quoted(repo_id), _quoted(base_model or ""), type(model).__name__
    arguments = {
        "unconditional": [],
        "class-conditional": ["class_labels=[0]"],
        "text-to-image": [_quoted(example_prompt)],
    }[task]

    if (folder / LORA_FILE).is_file():
        method = "uniform" if _is_warming_up(model) else model.config["skip_scaling"]  # as the file beside the weights
        scaling = f", skip_scaling={_quoted(method)}"
        if isinstance(model.skip_scaler, LearnableSkipScaling):
            scaling += f", ls_reduction={model.config['ls_reduction']}"
        lines = [
            "from diffusers import DiffusionPipeline",
            f"from diffusers_scalelong import {class_name}",
            "",
            f'unet = {class_name}.from_pretrained({base}, subfolder="unet"{scaling})',
            f"unet.load_skip_scaling({repo})",
            f"pipeline = DiffusionPipeline.from_pretrained({base}, unet=unet)",
            f"pipeline.load_lora_weights({repo})",
        ]
        with_code = []
    elif (folder / "model_index.json").is_file():
        lines = [
            "import diffusers_scalelong  # tells Diffusers about the scaled models",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({repo})",
        ]
        custom = f', custom_pipeline="{Path(PIPELINE_CODE).stem}"' if (folder / PIPELINE_CODE).is_file() else ""
        with_code = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipeline = DiffusionPipeline.from_pretrained({repo}{custom}, trust_remote_code=True)",
        ]
    elif (folder / "config.json").is_file():
        lines = [
            f"from diffusers_scalelong import {class_name}",
            "",
            f"model = {class_name}.from_pretrained({repo})",
        ]
        with_code = [
            "from diffusers import AutoModel",
            "",
            f"model = AutoModel.from_pretrained({repo}, trust_remote_code=True)",
        ]
        return "\n".join(lines), "\n".join(with_code)
    else:
        raise ValueError(f"{folder} holds no pipeline, model or LoRA weights: save what the card is about first.")

    steps = min(_num_train_timesteps(folder), 50)
    sampling = [
        f"image = pipeline({', '.join([*arguments, f'num_inference_steps={steps}'])}).images[0]",
        'image.save("sample.png")',
    ]
    return "\n".join(lines + sampling), "\n".join(with_code + sampling)


def _num_train_timesteps(folder: Path) -> int:
    path = folder / "scheduler" / "scheduler_config.json"
    return json.loads(path.read_text(encoding="utf-8"))["num_train_timesteps"] if path.is_file() else 1000


def _is_scaled(model: SkipScalingMixin) -> bool:
    return model.kappas != (1.0,) * model.num_skips


def _is_warming_up(model: SkipScalingMixin) -> bool:
    """Whether the constants in force are not yet the config's; the model is then saved as a `uniform` schedule."""
    scaler = model.skip_scaler
    return isinstance(scaler, ConstantSkipScaling) and scaler.coefficients != scaler.targets


def _summary(model: SkipScalingMixin, task: str, base_model: str | None, is_lora: bool) -> str:
    what = "LoRA weights" if is_lora else f"A `{type(model).__name__}`"
    purpose = f"{task} generation" if task == "text-to-image" else f"{task} image generation"
    start = ""
    if base_model is not None:
        link = f"[{_escape(base_model)}](https://huggingface.co/{quote(base_model)})"
        start = (
            f", {'for' if is_lora else 'fine-tuned from'} {link if _is_on_hub(base_model) else _escape(base_model)}"
        )
    return f"{what} for {purpose}{start}."


def _warning(model: SkipScalingMixin, is_lora: bool) -> str:
    plain_class = getattr(model, "plain_class", None)
    if plain_class is None or not _is_scaled(model):
        return ""
    what = (
        f"These LoRA weights also load on a plain `{plain_class.__name__}`, which"
        if is_lora
        else f"A plain `{plain_class.__name__}.from_pretrained` of this repository works too, but"
    )
    return f"{what} **computes something else**: it leaves out the scaling. Load it as shown above."


def _method(model: SkipScalingMixin) -> str:
    method, kappa = model.config["skip_scaling"], model.config["kappa"]
    if method == "none":
        return "They are not scaled."
    if _is_warming_up(model):
        return (
            "Method `uniform`: one constant per skip. Training ended during the κ warm-up, on the way from 1 to "
            f"`{method}` with κ = {kappa}."
        )
    if method == "cs":
        return f"Method `cs`: κ_i = κ^(i−1), with κ = {kappa}."
    if method == "uniform":
        return "Method `uniform`: " + ("one constant per skip." if isinstance(kappa, list | tuple) else "κ_i = κ.")
    gate = model.config["ls_initial_gate"]
    start = "PyTorch's default initialisation" if gate is None else f"{gate} for every κ_i"
    return (
        f"Method `{method}`: κ_i = σ(W₂ · ReLU(W₁ · pool(skip_i))) is learnt and depends on the image. It "
        f"started from {start}."
    )


def _scaling_table(model: SkipScalingMixin) -> str:
    scaler = model.skip_scaler
    if isinstance(scaler, LearnableSkipScaling):
        rows = []
        for name, gate in scaler.gates.items():
            skips = [str(i) for i, used in enumerate(scaler.names, start=1) if used == name]
            hidden, features = gate.get_parameter("linear_1.weight").shape
            rows.append([name, ", ".join(skips), f"{features} → {hidden} → {features}"])
        return _table(["network", "skips i", "features"], rows)
    kappas = model.kappas or ()
    return _table(["i", *map(str, range(1, len(kappas) + 1))], [["κ_i", *(f"{kappa:.4g}" for kappa in kappas)]])


def _training(dataset: str | None, hyperparameters: Mapping[str, Any] | None) -> str:
    facts = [f"Data: {_escape(dataset)}."] if dataset else []
    if hyperparameters and hyperparameters.get("seed") is not None:
        facts.append(f"Seed: {hyperparameters['seed']}.")
    versions = [f"Python {platform.python_version()}"]
    for package in _VERSIONS_OF.split():
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return " ".join([*facts, f"Versions: {', '.join(map(_escape, versions))}."])


def _shown(hyperparameters: Mapping[str, Any] | None) -> list[list[str]]:
    return [
        [name, " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)]
        for name, value in (hyperparameters or {}).items()
        if value is not None and not name.startswith("hub_")
    ]


def _pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"), key=lambda path: (path.name != "samples.png", path.name))


def _is_on_hub(name: str | None) -> bool:
    """Whether it can be the name of a model or a dataset on the Hub; the card links to it then."""
    if name is None or "/" not in name:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _quoted(text: str) -> str:
    """A Python literal, in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _escape(text: str) -> str:
    """As Markdown that shows the text as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|~$&#])", r"\\\1", " ".join(text.split()))


def _fenced(language: str, code: str) -> str:
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; empty without rows."""
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *([_escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
