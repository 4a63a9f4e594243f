"""A small tokenizer of whole words, for models trained from scratch."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar.recipes.tasks.marks import AGAIN, CHAIN_MARK, MARK, TARGET

PAD, END = "<pad>", "<end>"


def small_tokenizer(symbols: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token for each of these words, which are separated by spaces in the text, and for the marks of ``Task``."""
    words = [PAD, END, *dict.fromkeys([CHAIN_MARK, MARK, TARGET, AGAIN, *symbols])]
    tokenizer = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(words)}, unk_token=PAD))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PAD)
