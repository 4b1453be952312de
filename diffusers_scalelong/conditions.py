"""What a conditional model is told of an image: its class or its caption, now and then dropped for guidance."""

from typing import Any

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase


class ClassLabels:
    """The class of a row, replaced with the null class with some probability (Ho and Salimans, arXiv 2207.12598).

    Args:
        column: holds integers.
        num_classes: labels lie below it; the null class is `num_classes` itself.
        dropout: the probability of the null class.
    """

    def __init__(self, column: str, num_classes: int, dropout: float = 0.0) -> None:
        self.column = column
        self.num_classes = num_classes
        self.dropout = dropout

    def __call__(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, torch.Tensor]:
        """`"class_label"`, int64.

        Raises:
            ValueError: the row's label is not an integer in [0, num_classes).
        """
        label = row[self.column]
        if not isinstance(label, int) or not 0 <= label < self.num_classes:
            raise ValueError(
                f"Column {self.column!r} must hold integers in [0, {self.num_classes}), but has {label!r}."
            )
        return {"class_label": torch.tensor(self.num_classes if random.random() < self.dropout else label)}


class Captions:
    """The caption of a row as tokens, replaced with the empty text with some probability.

    Args:
        column: holds texts, or lists of texts of which one is drawn.
        tokenizers: one for each text encoder, by the name that its tokens get in the sample.
        num_tokens: texts are padded and cut to this length; by default to each tokenizer's own.
        proportion_empty: the probability of the empty text.
    """

    def __init__(
        self,
        column: str,
        tokenizers: dict[str, PreTrainedTokenizerBase],
        num_tokens: int | None = None,
        proportion_empty: float = 0.0,
    ) -> None:
        self.column = column
        self.tokenizers = tokenizers
        self.num_tokens = num_tokens
        self.proportion_empty = proportion_empty

    def __call__(self, row: dict[str, Any], random: np.random.Generator) -> dict[str, torch.Tensor]:
        """For each tokenizer the tokens, int64 (num_tokens,).

        Raises:
            ValueError: the row's caption is neither a text nor a list of texts.
        """
        caption = choose_caption(row[self.column], self.column, random)
        if random.random() < self.proportion_empty:
            caption = ""
        return {name: self._tokens(tokenizer, caption) for name, tokenizer in self.tokenizers.items()}

    def _tokens(self, tokenizer: PreTrainedTokenizerBase, text: str) -> torch.Tensor:
        length = self.num_tokens or tokenizer.model_max_length
        tokens = tokenizer(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return tokens.input_ids[0]


def choose_caption(caption: Any, column: str, random: np.random.Generator) -> str:
    """A row's caption; one of them, when it has several.

    Args:
        caption: a text, or a list of texts.
        column: the column that holds it.
        random: draws one of several.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(caption, list) and caption:
        caption = caption[random.integers(len(caption))]
    if not isinstance(caption, str):
        raise ValueError(f"Column {column!r} must hold texts or lists of texts, but has {caption!r}.")
    return caption


def check_captions(dataset: datasets.Dataset | datasets.IterableDataset, column: str) -> None:
    """Reads every caption of a dataset, so that a bad one is found before training; those of a stream are not read.

    Args:
        dataset: of the training.
        column: the column that holds the captions.

    Raises:
        ValueError: a caption is neither a text nor a list of texts, or all of them are empty.
    """
    if isinstance(dataset, datasets.IterableDataset):
        return
    any_text = False
    index = 0
    for rows in dataset.select_columns([column]).iter(batch_size=1000):
        for caption in rows[column]:
            texts = caption if isinstance(caption, list) else [caption]
            if not texts or not all(isinstance(text, str) for text in texts):
                raise ValueError(
                    f"Column {column!r} must hold texts or lists of texts, but row {index} has {caption!r}. Add the "
                    "caption, leave the image out, or choose another column with --caption_column."
                )
            any_text = any_text or any(text.strip() for text in texts)
            index += 1
    if not any_text:
        raise ValueError(
            f"Every caption in column {column!r} is empty. Choose another column with --caption_column, or train "
            "without text with train_unconditional.py."
        )
