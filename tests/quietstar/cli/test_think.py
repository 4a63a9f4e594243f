"""``quietstar think``: the thoughts at some tokens of a text, or at all."""

import re
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def test_think(quietstar, trained):
    code, out, _ = quietstar("think", "--model=run", "Hello", "--at", "-1", "0")
    lines = out.splitlines()
    assert code == 0 and [line.split()[:2] for line in lines] == [["0", "'H'"], ["4", "'o'"]] and "|" not in out
    code, out, _ = quietstar("think", "--model=run/checkpoints/step-000004", "Hello", "--seed=3")
    assert code == 0 and len(out.splitlines()) == 5 and all(line.count("  |  ") == 1 for line in out.splitlines())
    assert quietstar("think", "--model=run", "Hello", "--seed=3")[1] == out


def test_a_tokenizer_that_lacks_a_character(quietstar, train):
    """One sentence; and ends of sentences are found without a letter in the vocabulary."""
    characters = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate("0123456789.\n")}))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=characters).save_pretrained("model")
    Path("digits.txt").write_text("\n\n".join(f"{i * 37}.\n{i}" for i in range(40)))
    assert train("--data=digits.txt", "--embedding-init=0", "--out=run")[0] == 0
    code, _, (line,) = quietstar("think", "--model=run", "Hello")
    assert code == 3 and line.startswith("quietstar: the tokenizer can't read the text: WordLevel error: Missing [UNK]")
    code, out, _ = quietstar("eval", "--model=run")
    assert code == 0 and re.search(r"^  sentences +[1-9]\d*% ", out, re.MULTILINE)
