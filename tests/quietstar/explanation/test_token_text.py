"""Token ids as text: no byte lost, no space lost, nothing invented."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar.explanation.tokens import text_pieces, token_text
from tests.quietstar.conftest import sentence_pieces


@pytest.fixture
def byte_level():
    """A token for each byte, and one that is a space and two thirds of the euro sign."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate([*letters, "ĠâĤ", "<end>"])}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


@pytest.fixture
def sentence_piece():
    return sentence_pieces("<s>", "▁", "▁a", "b")


def test_pieces_of_a_text(byte_level):
    ids = byte_level("a é\n中🙂")["input_ids"]
    want = ["a", " ", "⟨C3⟩", "é", "\n", "⟨E4⟩", "⟨B8⟩", "中", "⟨F0⟩", "⟨9F⟩", "⟨99⟩", "🙂"]
    assert text_pieces(byte_level, ids) == want


def test_a_token_of_space_and_bytes(byte_level):
    half = byte_level.convert_tokens_to_ids("ĠâĤ")
    last = byte_level.convert_tokens_to_ids("¬")
    assert text_pieces(byte_level, [half, last]) == ["⟨20 E2 82⟩", " €"]
    assert token_text(byte_level, half) == "⟨20 E2 82⟩"


def test_bytes_that_never_become_a_character(byte_level):
    lone = byte_level("é")["input_ids"][0]
    letters = byte_level("ab")["input_ids"]
    for count in range(1, 9):
        assert text_pieces(byte_level, [lone] * count + letters) == ["⟨C3⟩"] * count + ["a", "b"]
        assert text_pieces(byte_level, [lone] * count) == ["⟨C3⟩"] * count


def test_a_replacement_character_in_the_text(byte_level):
    assert text_pieces(byte_level, byte_level("\ufffdb")["input_ids"]) == ["⟨EF⟩", "⟨BF⟩", "⟨BD⟩", "b"]


def test_spaces_and_bytes_of_sentence_piece(sentence_piece):
    ids = [257, 259, 260, 259, *"中".encode(), 260, 258, 258]
    assert text_pieces(sentence_piece, ids) == ["<s>", " a", "b", " a", "⟨E4⟩", "⟨B8⟩", "中", "b", " ", " "]
    assert [token_text(sentence_piece, x) for x in (259, 260, 258, 0xE4)] == [" a", "b", " ", "⟨E4⟩"]


def test_special_and_unknown_tokens(byte_level):
    assert token_text(byte_level, byte_level.eos_token_id) == "<end>"
    assert text_pieces(byte_level, [byte_level.eos_token_id] * 5) == ["<end>"] * 5
    assert token_text(byte_level, 5000) == "⟨id 5000⟩"  # a vocabulary that is padded past the tokenizer's
