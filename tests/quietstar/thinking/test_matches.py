"""Predictions are compared byte by byte, whatever the tokenizer makes of a broken character."""

import pytest
import torch
from transformers import ByT5Tokenizer

from quietstar.testing import byte_tokenizer
from quietstar.thinking.matches import matches
from tests.quietstar.conftest import sentence_pieces

TEXTS = ("café ok", "日本", "🙂!", "a\ufffdb", "plain text", "Ãé", "{}")


def sentencepiece():
    return sentence_pieces("▁", "é"), list(range(256))


def byte_level():
    tokenizer = byte_tokenizer()
    letters = {x: i for i, x in ((i, tokenizer.convert_ids_to_tokens(i)) for i in range(256))}
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return tokenizer, [letters[bytes_to_unicode()[i]] for i in range(256)]


def byt5():
    return ByT5Tokenizer(), [i + 3 for i in range(256)]


@pytest.mark.parametrize("kind", [byte_level, sentencepiece, byt5])
def test_bytes(kind):
    """A prediction is right if its bytes are those of the next bytes, at every place; so are no others."""
    tokenizer, of_byte = kind()
    stray = [0x80, 0xC3, 0xFF, *"\ufffd".encode()]
    for text in TEXTS:
        data = text.encode()
        for at in range(len(data) - 1):
            after = data[at + 1 :]
            guesses = [after[:1], after[:2], bytes([stray[at % 3]]), "\ufffd".encode(), after[1:2] or b"x", b""]
            boxes = [b"so \\boxed{" + guess + b"}" for guess in guesses]
            T = max(map(len, boxes))
            ids = torch.tensor([[[[of_byte[i] for i in box.ljust(T, b"!")] for box in boxes]]])
            lengths = torch.tensor([[[len(box) for box in boxes]]])
            previous, following = torch.tensor([[of_byte[data[at]]]]), torch.tensor([[[*(of_byte[i] for i in after), -100]]])
            found = matches(ids, lengths, previous, following, tokenizer)[0, 0].tolist()
            for guess, right in zip(guesses, found, strict=True):
                braces = b"{" in guess or b"}" in guess
                assert braces or right == (guess != b"" and after.startswith(guess)), (text, at, guess)


def test_special_and_whole_tokens():
    tokenizer, of_byte = sentencepiece()
    box = [*(of_byte[i] for i in b"\\boxed{"), 258, of_byte[ord("}")]]
    ids, lengths = torch.tensor([[[box]]]), torch.tensor([[[len(box)]]])
    for following, right in (([258], True), ([257, 258], False), ([0xC3, 0xA9], True), ([256], False)):
        found = matches(ids, lengths, torch.tensor([[65]]), torch.tensor([[following]]), tokenizer)
        assert bool(found) == right, following
