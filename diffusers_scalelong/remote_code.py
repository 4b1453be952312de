"""Puts the code of a scaled model beside its weights, so that Diffusers alone can load it (`trust_remote_code=True`).

The code is this package's own source, put together into modules that stand alone:

    diffusers_scalelong.py         beside a model's config.json, whose "auto_map" names it for `AutoModel`
    unet/diffusers_scalelong.py    in a pipeline: `DiffusionPipeline` looks there for the "diffusers_scalelong" that
                                   model_index.json names, unless this package is imported
    pipeline.py                    beside the model_index.json of a `ScaleLongPipeline`, for `custom_pipeline`
"""

import ast
import inspect
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

from diffusers import DiffusionPipeline, ModelMixin

_PACKAGE = __name__.partition(".")[0]
MODEL_CODE = f"{_PACKAGE}.py"
PIPELINE_CODE = "pipeline.py"

_HEADER = "# The code of this repository's model, written by diffusers-scalelong. Licence: Apache-2.0.\n"
_OWN_NAME = """
import sys

# Diffusers runs this file anew for each model that it loads, into a module that it keeps by its name. With a name of
# its own, each run leaves alone what the models refer to that were loaded before.
if not getattr(__spec__, "_initializing", False):
    _module = sys.modules.pop(__name__)
    __name__ = f"{__name__}_{id(_module)}"
    sys.modules[__name__] = _module
"""


@contextmanager
def including_code(saved: ModelMixin | DiffusionPipeline) -> Iterator[None]:
    """Inside this context `saved.save_pretrained` and `saved.push_to_hub` add the code, as `add_code` does.

    Args:
        saved: a model of this package, or any pipeline that holds one.
    """
    save_config = saved.save_config

    def save_config_and_code(save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        save_config(save_directory, *args, **kwargs)
        add_code(save_directory)

    saved.save_config = save_config_and_code  # of this object; Diffusers calls it before it uploads anything
    try:
        yield
    finally:
        del saved.save_config


def add_code(folder: str | os.PathLike) -> list[Path]:
    """Adds the code to a folder that a model or a pipeline was saved in.

    Args:
        folder: with the `config.json` of a model of this package, or a `model_index.json`.

    Returns:
        The files written. `config.json` gets an entry `"auto_map"` besides.

    Raises:
        OSError: the folder holds neither, or cannot be written to.
        ValueError: it holds no model or pipeline of this package: Diffusers loads it as it is.
    """
    folder = Path(folder)
    package = sys.modules[_PACKAGE]
    if not (folder / "model_index.json").is_file():
        if not (folder / "config.json").is_file():
            raise OSError(f"{folder} has neither config.json nor model_index.json: save a model or pipeline in it.")
        return [_add_model_code(folder)]

    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    components = [key for key, value in index.items() if isinstance(value, list) and value[0] == _PACKAGE]
    written = [_add_model_code(folder / component) for component in components]
    pipeline_class = getattr(package, str(index["_class_name"]), None)
    if pipeline_class is not None:
        source = _pipeline_source(sys.modules[pipeline_class.__module__])
        (folder / PIPELINE_CODE).write_text(source, encoding="utf-8")
        written.append(folder / PIPELINE_CODE)
    if not written:
        raise ValueError(f"The pipeline in {folder} holds no model of this package: Diffusers loads it as it is.")
    return written


def _add_model_code(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = str(config.get("_class_name"))
    model_class = getattr(sys.modules[_PACKAGE], name, None)
    if model_class is None:
        raise ValueError(f"{folder} holds a {name}, which is no model of this package: Diffusers loads it as it is.")
    (folder / MODEL_CODE).write_text(_model_source(sys.modules[model_class.__module__]), encoding="utf-8")
    config["auto_map"] = {"AutoModel": f"{_PACKAGE}.{name}"}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return folder / MODEL_CODE


def _model_source(module: ModuleType) -> str:
    """A module that stands alone: `module`, and before it the modules of its package that it imports."""
    imports: dict[str, None] = {}  # in order, each once
    bodies: dict[str, str] = {}

    def add(module: ModuleType) -> None:
        source = inspect.getsource(module)
        tree = ast.parse(source)
        for statement in tree.body:
            if _is_relative(statement):
                add(import_module("." * statement.level + (statement.module or ""), module.__package__))
            elif _is_import(statement):
                imports[ast.unparse(statement)] = None
        bodies.setdefault(module.__name__, _body(source, tree))

    add(module)
    return _HEADER + "\n".join([*imports, _OWN_NAME, *bodies.values()])


def _pipeline_source(module: ModuleType) -> str:
    """A module that stands alone: `module`, with Diffusers' `ModelMixin` for the models of the package.

    They serve it as annotations alone, and the repository has them in a file of their own.
    """
    source = inspect.getsource(module)
    tree = ast.parse(source)
    imports: list[str] = []
    for statement in tree.body:
        if _is_relative(statement):
            imports += [f"from diffusers import ModelMixin as {alias.name}" for alias in statement.names]
        elif _is_import(statement):
            imports.append(ast.unparse(statement))
    return _HEADER + "\n".join([*imports, _body(source, tree)])


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _is_relative(node: ast.AST) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and node.level > 0


def _body(source: str, tree: ast.Module) -> str:
    """The source without its imports, and without functions that need another module of the package when called."""
    left_out: list[Any] = [statement for statement in tree.body if _is_import(statement)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(map(_is_relative, ast.walk(node))):
            left_out.append(node)
    lines = source.splitlines()
    for node in left_out:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        lines[first - 1 : node.end_lineno] = [""] * (node.end_lineno - first + 1)
    return "\n".join(lines).strip() + "\n\n"
