"""Texts from the hub, a file or Python's documentation, tokenized, split and cut into examples to train and evaluate on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quietstar.config import option
from quietstar.data.rows import Text, chat_text, row_text
from quietstar.data.sources import BUILTIN, TEXT, from_hub, joined, names, rows, sources, text_of
from quietstar.files.reading import numbered_lines
from quietstar.run.batches import Example
from quietstar_kernels.checks import check_at_least, check_types, instance, integer

FEW = 20  # texts: a tenth of fewer is not two, which an interval needs
LEAST = 4  # texts or blocks of which two can be held out
SHORTEST = 16  # tokens of a block


@dataclass(frozen=True)
class Split:
    """Token ids int64 [their length] to train on and held out, with the number of the text that each of these is from."""

    train: list[Tensor]
    held_out: list[Tensor]
    sources: list[int]
    in_blocks: bool = False


def whole_texts(count: int, most: int, seed: int) -> list[int]:
    """The numbers of the texts to hold out, in random order: a tenth of ``count``, at least two of four or more."""
    held = min(most, max(2, count // 10)) if count >= LEAST else 0
    return random_order(count, seed)[:held]


def split_blocks(ids: list[Tensor], most: int, seed: int, length: int) -> Split:
    """Hold out blocks of ``length`` tokens, or a twentieth of all if that is less. What is between them is trained on."""
    size = min(length, max(SHORTEST, sum(map(len, ids)) // FEW))
    places = [(i, start) for i, x in enumerate(ids) for start in range(0, len(x) - size + 1, size)]
    held = [places[k] for k in whole_texts(len(places), most, seed)]
    training = []
    for i, x in enumerate(ids):
        begin = 0
        for start in [*sorted(start for text, start in held if text == i), len(x)]:
            training.append(x[begin:start])
            begin = start + size
    return Split(
        [x for x in training if len(x)], [ids[i][start : start + size] for i, start in held], [i for i, _ in held], True
    )


def random_order(count: int, seed: int) -> list[int]:
    """The numbers 0 to ``count`` - 1, shuffled."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class DataConfig:
    """Where the texts come from and how they are cut into examples.

    Raises:
        ValueError: a value is outside its range.
    """

    data: str = option(
        BUILTIN,
        "a file (.txt, .jsonl, .json, .csv, .parquet), folder or pattern, - for standard input, a data set on the hub (name or "
        "name:subset), or builtin: Python's manual; several with commas or as several --data",
    )
    text_field: str = option("", "field that holds the text of each row; default text, messages or a question and an answer")
    chat: bool = option(False, "write a question and its answer by the tokenizer's chat template, as messages always are")
    split: str = option("train", "split of a hub data set")
    hub_texts: int = option(10_000, "texts to read from the start of a hub data set")
    pack: bool = option(
        True, "fill each example with several texts; otherwise one text per example, and each line of a .txt is a text"
    )
    length: int = option(256, "L, tokens in an example")
    held_out: int = option(64, "texts to hold out for evaluation, at most a tenth of all, or two of fewer than 20; 0 for none")
    held_out_seed: int = option(0, "chooses the texts to hold out")
    held_out_split: str = option("", "split of a hub data set whose texts are held out; default some of --split")

    def __post_init__(self) -> None:
        if isinstance(self.data, (list, tuple)):
            self.data = joined(self.data)
        check_types("DataConfig", self)
        for name, least in (("length", 3), ("held_out", 0), ("hub_texts", 1)):
            check_at_least("DataConfig", self, least, (name,))


@dataclass(frozen=True)
class Data:
    """Examples to train on, and held-out examples of one text each, cut to L tokens."""

    train: list[Example]
    held_out: list[Example]
    held_out_texts: list[Text]  # the text that each held-out example is from, whole
    texts: int  # how many texts there were
    sha256: str  # of all these texts in order
    repeated: int  # held-out texts that training has too, word for word; they are not among ``held_out``


def load_data(config: DataConfig, tokenizer: PreTrainedTokenizerBase, lookahead: int) -> Data:
    """Read, tokenize and split texts. Each ends with an end-of-text token if the tokenizer has one.

    Texts are held out at random: see ``DataConfig`` and docs/using.md. Packed examples have document_ids, so that no text
    sees another.

    Args:
        lookahead: J. Examples have at least J + 2 tokens; unless texts are packed, shorter ones are left out.

    Raises:
        ValueError: the data can't be found, read or decoded, a line is not JSON, a row has no text, messages or question, the
            tokenizer has no chat template for messages, or no text has J + 2 tokens.
    """
    least = _least(config, tokenizer, lookahead)
    texts = read_texts(config)
    split = _split(config, texts, tokenizer)
    training = packed(split.train, config.length, least) if config.pack else alone(split.train, config.length, least)
    if not training:
        lengths = [len(x) for x in split.train]
        raise _too_short(config, sum(lengths) if config.pack else max(lengths), lookahead)
    held = [(ids, texts[i]) for ids, i in zip(split.held_out, split.sources, strict=True) if len(ids) >= least]
    trained = set() if split.in_blocks else {texts[i] for i in set(range(len(texts))) - set(split.sources)}
    new = [(ids, text) for ids, text in held if text not in trained]
    return Data(
        train=training,
        held_out=alone([ids for ids, _ in new], config.length, least),
        held_out_texts=[text for _, text in new],
        texts=len(texts),
        sha256=texts_hash(texts),
        repeated=len(held) - len(new),
    )


def load_all(config: DataConfig, tokenizer: PreTrainedTokenizerBase, lookahead: int) -> list[Example]:
    """Every text as an example of its own, cut to L tokens, to evaluate on; where ``load_data`` holds out blocks, every block.

    Arguments and errors are those of ``load_data``.
    """
    least = _least(config, tokenizer, lookahead)
    texts = read_texts(config)
    ids = tokenize(texts, tokenizer)
    if in_blocks(config, len(texts)):
        ids = [block for x in ids for block in x.split(config.length)]
    examples = alone(ids, config.length, least)
    if not examples:
        raise _too_short(config, max(map(len, ids)), lookahead)
    return examples


def _least(config: DataConfig, tokenizer: PreTrainedTokenizerBase, lookahead: int) -> int:
    """The fewest tokens of an example."""
    instance("config", config, DataConfig)
    instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
    least = integer("lookahead", lookahead, 1) + 2
    if config.length < least:
        wanted = f"J+2={least} for a lookahead of {lookahead}"
        raise ValueError(f"config: length must be at least {wanted}, got L={config.length}")
    return least


def _too_short(config: DataConfig, longest: int, lookahead: int) -> ValueError:
    return ValueError(
        f"{config.data}: the text is shorter than the look-ahead: it has {longest} tokens, and looking {lookahead} tokens "
        f"ahead needs {lookahead + 2}"
    )


def in_blocks(config: DataConfig, texts: int) -> bool:
    """Whether blocks are held out instead of whole texts, since there are too few of these."""
    few = FEW if all(x.endswith(TEXT) for x in names(config.data)) else LEAST
    return config.pack and not config.held_out_split and texts < few


def texts_hash(texts: list[Text]) -> str:
    """SHA-256 of texts in their order."""
    digest = hashlib.sha256()
    for text in texts:
        encoded = (text if isinstance(text, str) else json.dumps(text)).encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()


def _split(config: DataConfig, texts: list[Text], tokenizer: PreTrainedTokenizerBase) -> Split:
    """Tokenize and split the texts; those of a hub data set's ``held_out_split`` are added to them."""
    ids = tokenize(texts, tokenizer)
    if config.held_out_split:
        hub = ",".join(x for x in names(config.data) if from_hub(x))
        others = read_texts(replace(config, data=hub, split=config.held_out_split))
        held = random_order(len(others), config.held_out_seed)[: config.held_out]
        sources = [len(texts) + i for i in held]
        texts += others
        return Split(ids, tokenize([others[i] for i in held], tokenizer) if held else [], sources)
    if in_blocks(config, len(texts)):
        return split_blocks(ids, config.held_out, config.held_out_seed, config.length)
    held = whole_texts(len(ids), config.held_out, config.held_out_seed)
    training = random_order(len(ids), config.held_out_seed)[len(held) :]
    return Split([ids[i] for i in training], [ids[i] for i in held], held)


def read_texts(config: DataConfig) -> list[Text]:
    """The texts and conversations of ``config.data``: at least one, and none is empty."""
    texts = [text for source in sources(config.data) for text in _texts_of(source, config)]
    kept = [
        text.strip("\r\n") if isinstance(text, str) else text for text in texts if not isinstance(text, str) or text.strip()
    ]
    if not kept:
        raise ValueError(f"{config.data}: there is no text in it")
    return kept


def _texts_of(source: str, config: DataConfig) -> Iterator[Text]:
    if source == BUILTIN:
        return iter(builtin_texts())
    if (text := text_of(source)) is not None:
        return iter(re.split(r"\n\s*\n", text)) if config.pack else (line for _, line in numbered_lines(text))
    found = rows(source, config.split, config.hub_texts)
    return (row_text(row, config.text_field, config.chat, where) for where, row in found)


def builtin_texts() -> list[str]:
    """Paragraphs of Python's documentation, without the repetitions among its topics."""
    from pydoc_data.topics import topics

    pieces = (" ".join(piece.split()) for text in topics.values() for piece in re.split(r"\n\s*\n", text))
    return list(dict.fromkeys(piece for piece in pieces if len(piece) >= 100))


def tokenize(texts: list[Text], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of each text, int64 [its length], with an end-of-text token if the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    plain = _ids([text for text in texts if isinstance(text, str)], tokenizer)
    chats = _ids([chat_text(tokenizer, text) for text in texts if not isinstance(text, str)], tokenizer, special=False)
    ids = [next(plain if isinstance(text, str) else chats) for text in texts]
    return [torch.tensor(x if x[-1:] == end else x + end, dtype=torch.int64) for x in ids]


def _ids(texts: list[str], tokenizer: PreTrainedTokenizerBase, special: bool = True) -> Iterator[list[int]]:
    return iter(tokenizer(texts, verbose=False, add_special_tokens=special)["input_ids"] if texts else [])


def packed(ids: list[Tensor], length: int, least: int) -> list[Example]:
    """Concatenated texts, cut every ``length`` tokens; a remainder of fewer than ``least`` tokens is dropped."""
    if not ids:
        return []
    tokens = torch.cat(ids).split(length)
    documents = torch.repeat_interleave(torch.tensor([len(x) for x in ids])).split(length)
    pairs = zip(tokens, documents, strict=True)
    return [{"input_ids": x, "document_ids": document} for x, document in pairs if len(x) >= least]


def alone(ids: list[Tensor], length: int, least: int) -> list[Example]:
    """One text per example, cut to ``length`` tokens; texts of fewer than ``least`` tokens are dropped."""
    return [{"input_ids": x[:length]} for x in ids if len(x) >= least]
