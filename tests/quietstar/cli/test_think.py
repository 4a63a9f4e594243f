"""``quietstar think``: the thoughts at some tokens of a text, or at all."""

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quietstar import QuietStar, ThoughtConfig
from quietstar.testing import byte_tokenizer, tiny_model


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


def test_a_thought_is_shown_up_to_its_end(quietstar):
    """Thoughts that end themselves: 0, which fills the rest, is a letter in a byte vocabulary."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    qs = QuietStar(tiny_model(256), ThoughtConfig(preset="rlp", thoughts=2, thought_tokens=40), tokenizer, verify=False)
    qs.save_pretrained("ends")
    ids = torch.tensor([tokenizer("Hello, this is")["input_ids"]])
    own = QuietStar.from_pretrained("ends").think(ids, seed=3, greedy=False)
    lengths = torch.randint(41, own.lengths.shape, generator=torch.Generator().manual_seed(0))
    with pytest.MonkeyPatch.context() as patch:
        think = QuietStar.think
        patch.setattr(QuietStar, "think", lambda *args, **options: think(*args, **options).cut(lengths))
        code, out, _ = quietstar("think", "--model=ends", "Hello, this is", "--seed=3")
    own = own.cut(lengths)
    for place, line in enumerate(out.splitlines()):
        wanted = [tokenizer.decode(own.thought_ids[0, place, n, : own.lengths[0, place, n]]) for n in range(2)]
        assert code == 0 and line.endswith("  " + "  |  ".join(map(repr, wanted)))
