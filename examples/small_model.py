"""What docs/tutorial.md starts with: a text file of sums, and a small language model to train on it.

A line of sums.txt is five digits and the last digit of their sum, such as 75862=8. The model, in the folder base, has read
such lines, most of them with an aside before the answer:

    75862=8.           the answer alone, 40 % of the lines
    75862=-2068-8.     an aside of running sums, which helps: 24 %
    75862=-7586-8.     an aside that repeats the digits, which doesn't: 36 %

Without an aside, it is too small to add five digits in one step. A model of yours takes its place: any causal language model.

    python examples/small_model.py
"""

import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

STEPS, LINES, WIDTH = 600, 256, 64  # of training; lines in a step; of the model
KINDS = {"answer alone": 0.40, "running sums": 0.24, "repeated digits": 0.36}


def make_line(number: int, kind: str) -> str:
    digits = [int(digit) for digit in f"{number:05d}"]
    sums = [sum(digits[:count]) % 10 for count in (2, 3, 4, 5)]
    aside = {"answer alone": [], "running sums": ["-", *sums, "-"], "repeated digits": ["-", *digits[:4], "-"]}[kind]
    return "".join(map(str, [*digits, "=", *aside, sums[-1], "."]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each character."""
    characters = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<end>", *"0123456789=-."])}))
    characters.pre_tokenizer, characters.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<end>", pad_token="<end>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        initializer_range=WIDTH**-0.5,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # a model this narrow learns sooner with large embeddings
    return model


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, numbers: list[int]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * step / STEPS))
    )
    for step in range(1, STEPS + 1):
        kinds = random.choices(list(KINDS), list(KINDS.values()), k=LINES)
        lines = [make_line(random.choice(numbers), kind) + "<end>" for kind in kinds]
        batch = tokenizer(lines, return_tensors="pt", padding=True)
        loss = model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {STEPS}: loss {loss:.2f}", flush=True)


def main() -> None:
    if Path("sums.txt").exists() or Path("base").exists():
        raise SystemExit("sums.txt or base is here already: run this in another folder")
    random.seed(0)
    torch.manual_seed(0)
    logging.disable_progress_bar()
    numbers = random.sample(range(100_000), 100_000)
    with open("sums.txt", "w", encoding="utf-8") as file:
        file.writelines(make_line(number, "answer alone") + "\n" for number in numbers[:4000])
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, numbers[4000:])
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    print("wrote sums.txt and base")


if __name__ == "__main__":
    main()
