"""Labels and captions: what they become, what is refused, and how often they are dropped."""

import datasets
import numpy as np
import pytest
import torch
from text_pipelines import NUM_TOKENS, write_tokenizer

from diffusers_scalelong.conditions import Captions, ClassLabels, check_captions, choose_caption


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_labels_are_dropped_as_often_as_asked():
    labels = ClassLabels("label", num_classes=3, dropout=0.25)
    random = np.random.default_rng(0)
    drawn = [labels({"label": 2}, random)["class_label"] for _ in range(4000)]
    assert drawn[0].dtype == torch.int64
    assert set(map(int, drawn)) == {2, 3}
    # Four standard errors of the proportion are 0.027.
    assert abs(np.mean([label == 3 for label in drawn]) - 0.25) < 0.027
    assert ClassLabels("label", 3)({"label": 0}, random)["class_label"] == 0


@pytest.mark.parametrize("label", [-1, 3, "cat", None, 1.0])
def test_a_label_out_of_range_is_an_error(label):
    with pytest.raises(ValueError, match=r"'label' must hold integers in \[0, 3\)"):
        ClassLabels("label", 3)({"label": label}, np.random.default_rng(0))


def test_captions_become_padded_tokens(tokenizer):
    captions = Captions("text", {"input_ids": tokenizer, "short_ids": tokenizer}, num_tokens=5)
    sample = captions({"text": "Red"}, np.random.default_rng(0))
    letters = [tokenizer.convert_tokens_to_ids(token) for token in ("r", "e", "d</w>")]
    expected = [tokenizer.bos_token_id, *letters, tokenizer.eos_token_id]
    assert sample["input_ids"].tolist() == sample["short_ids"].tolist() == expected
    assert sample["input_ids"].dtype == torch.int64
    # By default as long as the tokenizer says, however long the text.
    for text in ("", "a very long caption"):
        tokens = Captions("text", {"input_ids": tokenizer})({"text": text}, np.random.default_rng(0))["input_ids"]
        assert tokens.shape == (NUM_TOKENS,)
        assert tokens[-1] == tokenizer.eos_token_id


def test_captions_are_dropped_as_often_as_asked(tokenizer):
    captions = Captions("text", {"ids": tokenizer}, proportion_empty=0.25)
    empty = Captions("text", {"ids": tokenizer})({"text": ""}, np.random.default_rng(0))["ids"]
    random = np.random.default_rng(0)
    dropped = [torch.equal(captions({"text": "red"}, random)["ids"], empty) for _ in range(2000)]
    assert abs(np.mean(dropped) - 0.25) < 0.039  # four standard errors


def test_one_of_several_captions_is_drawn():
    random = np.random.default_rng(0)
    drawn = [choose_caption(["a", "b", "c"], "text", random) for _ in range(300)]
    assert all(60 < drawn.count(caption) < 140 for caption in "abc")
    for caption in (None, 3, [], [None]):
        with pytest.raises(ValueError, match="'text' must hold texts"):
            choose_caption(caption, "text", random)


def test_captions_are_checked_before_training():
    def check(*captions):
        check_captions(datasets.Dataset.from_dict({"text": list(captions)}), "text")

    check("red", "")
    check(["red", "dark red"], ["blue"])
    with pytest.raises(ValueError, match=r"row 1500 has None.*--caption_column"):
        check(*["red"] * 1500, None, "blue")
    with pytest.raises(ValueError, match=r"row 1 has \[\]"):
        check(["red"], [])
    with pytest.raises(ValueError, match="row 0 has 3"):
        check(3, 4)
    with pytest.raises(ValueError, match="Every caption in column 'text' is empty"):
        check("", "  ")
    check_captions(datasets.Dataset.from_dict({"text": [None]}).to_iterable_dataset(), "text")  # reads no stream
