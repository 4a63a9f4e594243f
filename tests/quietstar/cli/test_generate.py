"""``quietstar generate``: the text and thoughts that it prints are those of ``QuietStar.generate``."""

import json

import torch
from transformers import AutoModelForCausalLM

from quietstar.cli import errors
from tests.quietstar.common import wrap


def test_generate(home, quietstar, byte_tokenizer):
    tokenizer = byte_tokenizer
    model = AutoModelForCausalLM.from_pretrained("model")
    torch.manual_seed(0)  # of a mixing head that changes the tokens
    qs = wrap(model, tokenizer, thought_tokens=2, lookahead=2)
    qs.save_pretrained("thinks")
    ids = tokenizer("Hello you", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "pad_token_id": 0}

    code, out, err = quietstar("generate", "--model=thinks", "--prompt=Hello you", "--max-new-tokens=6")
    thoughts = []
    tokens = qs.generate(ids, on_thoughts=thoughts.append, **options)[0, 9:]
    assert code == 0 and not any(err) and out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    out = quietstar("generate", "--model=thinks", "--prompt=Hello you", "--max-new-tokens=6", "--think=never")[1]
    plain = qs.generate(ids, think="never", **options)[0, 9:]
    assert out == tokenizer.decode(plain, skip_special_tokens=True) + "\n" and not torch.equal(plain, tokens)

    assert quietstar("generate", "--model=thinks", "Hello you", "--max-new-tokens=6", "--think=never")[1] == out

    shown = ("generate", "--model=thinks", "--prompt=Hello you", "--max-new-tokens=6", "--show-thoughts")
    lines = quietstar(*shown)[1].splitlines()
    assert [line[18:] for line in lines] == [repr(tokenizer.decode(each[0, 0])) for each in thoughts]
    assert quietstar(*shown, "--think=never")[1].count("  ") == 0
    sampled = (*shown, "--sample-thoughts", "--thoughts=2", "--temperature=1", "--top-k=9", "--top-p=0.9", "--seed=3")
    lines = quietstar(*sampled)[1].splitlines()
    assert {line.count("  |  ") for line in lines} == {1} and quietstar(*sampled)[1].splitlines() == lines

    code, out, err = quietstar("generate", "--model=thinks", "--prompt=Hello", "--think=often")
    assert code == errors.USAGE and "must be" in err[-1] and "often" in err[-1]
    for texts in ((), ("Hello", "--prompt=you")):
        code, _, err = quietstar("generate", "--model=thinks", *texts)
        assert code == errors.DATA and err == ["quietstar: generate takes a text or --prompt, one of the two"]


def test_the_text_as_a_message(home, quietstar, chat_tokenizer):
    qs = wrap(AutoModelForCausalLM.from_pretrained("model"), chat_tokenizer, thought_tokens=2, lookahead=2)
    qs.save_pretrained("thinks")
    turns = [{"role": "user", "content": "Hi"}]
    ids = chat_tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, return_tensors="pt")

    out = quietstar("generate", "--model=thinks", "Hi", "--chat", "--max-new-tokens=6")[1]
    tokens = qs.generate(ids, torch.ones_like(ids), max_new_tokens=6, pad_token_id=0)[0, ids.shape[1] :]
    assert out == chat_tokenizer.decode(tokens, skip_special_tokens=True) + "\n"

    lines = quietstar("think", "--model=thinks", "Hi", "--chat")[1].splitlines()
    assert [line.split()[1] for line in lines] == [repr(chat_tokenizer.decode(x)) for x in ids[0]]

    code, _, err = quietstar("explain", "--model=thinks", "Hi", "--chat", "--another=Ho", "--out=page.json")
    assert code == 0, err
    assert [x["id"] for x in json.loads((home / "page.json").read_text())["tokens"]] == ids[0].tolist()
