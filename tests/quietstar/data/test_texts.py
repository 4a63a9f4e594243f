"""From texts to examples: reading, splitting and cutting, and a one-sentence error for each kind of bad input."""

import json
import sys
import types

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar.data.texts import DataConfig, load_data, read_texts

END = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz "


@pytest.fixture
def letters():
    """One token per letter, 0 at the end of a text, 1 for anything else."""
    vocabulary = {"<end>": END, "<unknown>": 1, **{letter: i for i, letter in enumerate(LETTERS, 2)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unknown>")


def ids(text):
    return [LETTERS.index(letter) + 2 for letter in text] + [END]


def numbered(tmp_path, count):
    """A file of different texts made of letters."""
    texts = ["text " + "".join(LETTERS[int(digit)] for digit in str(i)) for i in range(count)]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    return texts, DataConfig(data=str(tmp_path / "texts.txt"), length=16)


def test_a_packed_row_holds_text_after_text(letters, tmp_path):
    texts, config = numbered(tmp_path, 30)
    data = load_data(config, letters, lookahead=2)
    assert len(data.held_out) == 3
    assert {len(example["input_ids"]) for example in data.train[:-1]} == {16}
    tokens = torch.cat([example["input_ids"] for example in data.train])
    documents = torch.cat([example["document_ids"] for example in data.train])
    pieces = [tokens[documents == document].tolist() for document in documents.unique()]
    held = [example["input_ids"].tolist() for example in data.held_out]
    # The last text may lack a remainder of fewer than J + 2 tokens.
    whole = [ids(text) for text in texts]
    assert all(piece in whole for piece in pieces[:-1] + held)
    assert len(pieces) + len(held) == len(texts)


def test_alone_each_text_is_an_example_and_short_ones_are_left_out(letters, tmp_path):
    (tmp_path / "lines.txt").write_text("abcdefghij\n\nab\n  cd ef\n")
    config = DataConfig(data=str(tmp_path / "lines.txt"), pack=False, length=8)
    data = load_data(config, letters, lookahead=2)
    assert sorted(len(example["input_ids"]) for example in data.train) == [8, 8]
    assert {tuple(example["input_ids"].tolist()) for example in data.train} == {
        tuple(ids("abcdefghij")[:8]),
        tuple(ids("  cd ef")),
    }


@pytest.mark.parametrize("pack", [True, False], ids=["paragraphs", "lines"])
def test_a_text_file(tmp_path, pack):
    (tmp_path / "a.txt").write_text("\ufeffone\ntwo\n \n\nthree\n")
    texts = read_texts(DataConfig(data=str(tmp_path / "a.txt"), pack=pack))
    assert texts == (["one\ntwo", "three"] if pack else ["one", "two", "three"])


ROWS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], "source": "y"},
    {"question": "How many?", "answer": "2+2\n#### 4"},
    {"question": "Where?", "choices": ["bank", "library"], "answer": 1},
    {"text": "a text"},
]


def write_rows(tmp_path, rows=ROWS):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "a.jsonl")


def test_rows_of_messages_and_of_questions(tmp_path):
    data = write_rows(tmp_path)
    hello = (("user", "Hi"), ("assistant", "Hello"))
    plain = ["Q: How many?\nA: 2+2\n#### 4", "Q: Where?\n(A) bank\n(B) library\nA: B"]
    assert read_texts(DataConfig(data=data)) == [hello, *plain, "a text"]
    chats = [
        (("user", "How many?"), ("assistant", "2+2\n#### 4")),
        (("user", "Where?\n(A) bank\n(B) library"), ("assistant", "B")),
    ]
    assert read_texts(DataConfig(data=data, chat=True)) == [hello, *chats, "a text"]


def test_a_conversation_has_the_special_tokens_of_its_template_alone(chat_tokenizer, tmp_path):
    data = load_data(DataConfig(data=write_rows(tmp_path), pack=False, held_out=0), chat_tokenizer, lookahead=2)
    found = {chat_tokenizer.decode(x["input_ids"]) for x in data.train}
    assert {"<end>[user]Hi<end>\n[assistant]Hello<end>", "<end>a text<end>"} < found and len(found) == 4


@pytest.mark.parametrize(
    "template, role, message",
    [(False, "user", "the tokenizer has no chat template"), (True, "tool", "refuses the messages: no tools here")],
)
def test_a_conversation_that_no_template_takes(byte_tokenizer, chat_tokenizer, tmp_path, template, role, message):
    chat_tokenizer.chat_template = chat_tokenizer.chat_template if template else None
    data = write_rows(tmp_path, [{"messages": [{"role": role, "content": "Hi"}]}])
    with pytest.raises(ValueError, match=message):
        load_data(DataConfig(data=data), chat_tokenizer, lookahead=2)


BAD = {
    "missing": ("no.txt", None, "No such file"),
    "other kind": ("a.pdf", b"a,b", "expected a file ending in .txt"),
    "a table": ("a.csv", b"a,b", "need the datasets package: pip install datasets"),
    "empty": ("a.txt", b"", "no text in it"),
    "undecodable": ("a.txt", b"one\ntw\xffo", "byte 6, in line 2, is not UTF-8"),
    "broken json": ("a.jsonl", b'{"text": "a"}\n{"text', "line 2 is not JSON"),
    "not text": ("a.jsonl", b'{"text": 3}', "line 1 has no text in a field 'text'"),
    "no fields": ("a.jsonl", b"[1]", "it has no fields"),
    "too short": ("a.txt", b"abc", "it has 4 tokens, and looking 4 tokens ahead needs 6"),
    "hub": ("nobody/nothing", None, "pip install datasets"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(letters, tmp_path, monkeypatch, case):
    monkeypatch.setitem(sys.modules, "datasets", None)
    name, content, message = BAD[case]
    path = tmp_path / name if case != "hub" else name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_data(DataConfig(data=str(path)), letters, lookahead=4)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for ``datasets`` that records its calls."""
    asked = []

    def load_dataset(*names, **options):
        asked.append((*names, options))
        if names[0] == "out/of-reach":
            raise ConnectionError("Couldn't reach 'out/of-reach' on the Hub\nand more")
        return iter([{"text": f"text {i}"} for i in range(1000)])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return asked


def test_a_hub_data_set_is_read_from_its_start(hub):
    assert read_texts(DataConfig(data="allenai/c4:en", split="validation", hub_texts=3)) == ["text 0", "text 1", "text 2"]
    assert hub == [("allenai/c4", "en", {"split": "validation", "streaming": True})]


def test_a_hub_data_set_out_of_reach(hub):
    with pytest.raises(ValueError, match=r"loading it from the hub failed: Couldn't reach 'out/of-reach' on the Hub$"):
        read_texts(DataConfig(data="out/of-reach"))
