"""The smallest size of natural_text.py: a random model of bytes, paragraphs of Python's manual, questions from a template."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from natural_text_settings import Experiment
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quietstar.data.texts import builtin_texts
from quietstar.files.writing import replaced

TINY = Experiment(
    out="runs/natural-text-tiny",
    model="",  # made by ``with_files``, as the data and the questions
    data="",
    held_out=8,
    length=32,
    arms=("plain", "small"),
    seeds=2,
    thought_tokens=3,
    lookahead=2,
    steps=4,
    batch_size=2,
    learning_rate=1e-3,
    checkpointing=False,
    save_every=2,
    precision="no",
    gsm8k="",
    commonsense_qa="",
    gsm8k_tokens=8,
    commonsense_qa_tokens=4,
    block=2,
    eval_batch=4,
)
PARAGRAPHS, QUESTIONS = 80, 4


def with_files(e: Experiment) -> Experiment:
    """Write model, data and questions where the settings name none, and name these."""
    folder = e.folder / "tiny"
    files = {
        "model": folder / "model",
        "data": folder / "paragraphs.jsonl",
        "gsm8k": folder / "gsm8k.jsonl",
        "commonsense_qa": folder / "commonsense_qa.jsonl",
    }
    if not folder.exists():
        with replaced(folder) as beside:
            save_model(beside / "model")
            write_rows(beside / "paragraphs.jsonl", [{"text": text} for text in builtin_texts()[:PARAGRAPHS]])
            write_rows(beside / "gsm8k.jsonl", [sum_of(i) for i in range(QUESTIONS)])
            write_rows(beside / "commonsense_qa.jsonl", [larger_of(i) for i in range(QUESTIONS)])
    return replace(e, **{name: str(file) for name, file in files.items() if not getattr(e, name)})


def sum_of(i: int) -> dict[str, object]:
    """A question in the form of GSM8K."""
    a, b = 3 + i, 5 + 7 * i
    return {
        "question": f"Ann has {a} pens and buys {b}. How many has she?",
        "answer": f"{a}+{b}=<<{a}+{b}={a + b}>>{a + b}\n#### {a + b}",
    }


def larger_of(i: int) -> dict[str, object]:
    """A question in the form of CommonsenseQA on the hub."""
    labels, things = list("ABC"), ["mouse", "horse", "whale"]
    things = things[i % 3 :] + things[: i % 3]
    choices = {"label": labels, "text": things}
    return {"question": "Which is the largest?", "choices": choices, "answerKey": labels[things.index("whale")]}


def save_model(folder: Path) -> None:
    """A Llama with random weights and a tokenizer of bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<end>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = LlamaConfig(vocab_size=1 + len(alphabet), max_position_embeddings=512, **ids, **sizes)
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
