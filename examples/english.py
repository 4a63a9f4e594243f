"""Quiet-STaR on real English, from scratch to thoughts in about a minute and a half on two CPU cores.

Trains a tokenizer and a small Llama on the documentation that ships with every Python, wraps the model in
quietstar.QuietStar and trains it to think before every token. On held-out text it then measures two gains: that of mixing in
any thought, here one of another text at the same place, and that of the thought's content, its own against the other text's.
A constant thought and a model trained as long without thoughts are measured beside them.

For a model this small the content hardly helps at all: this shows the loop at work, not a gain.

    python examples/english.py
    python examples/english.py --seconds-lm 300 --seconds-thoughts 600 --out runs/longer
"""

import argparse
import copy
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from quietstar import QuietStar, ThoughtConfig
from quietstar.evaluation.intervals import PARTS, mean_interval
from quietstar.evaluation.intervals import verdict as verdict_of
from quietstar.evaluation.losses import token_losses, with_constant_thoughts, with_own_thoughts
from quietstar.run.batches import Example
from quietstar_recipes.common.plots import Panel, panels

Rate = Callable[[float], float]  # the learning rate, by the share of the time that has passed
LENGTH = 64  # tokens in a text
NEW, HELD_OUT = 256, 128  # paragraphs that the language model doesn't see: to train thoughts on, to measure on
# The published policy_weight of 1e6 and embedding_scale of 100 are for a learning rate of 1e-6; these are for 3e-4.
THOUGHTS = ThoughtConfig(thoughts=2, thought_tokens=6, lookahead=4, policy_weight=3, embedding_scale=1)


def paragraphs(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Paragraphs to train the language model on, to train thoughts on, and to hold out; each occurs once.

    Topics repeat each other's paragraphs, so a split by topic would put training text into the held-out part. Thoughts are
    trained on text that is new to the model: on text it knows by heart, the reward goes to being surer of what it predicts
    anyway.
    """
    pieces = (" ".join(piece.split()) for text in topics.values() for piece in re.split(r"\n\s*\n", text))
    once = list(dict.fromkeys(piece for piece in pieces if len(piece) >= 100))
    random.Random(seed).shuffle(once)
    return once[HELD_OUT + NEW :], once[HELD_OUT : HELD_OUT + NEW], once[:HELD_OUT]


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bytes_first = {"special_tokens": ["<pad>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2048, show_progress=False, **bytes_first))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>")


def new_model(tokenizer: PreTrainedTokenizerFast, width: int = 128) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=width**-0.5,  # the default of 0.02 is for wide models: a narrow one learns little with it
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


class Log:
    """metrics.jsonl, written line by line, so that a stopped run keeps what it measured."""

    def __init__(self, path: Path):
        self.file = path.open("w", buffering=1, encoding="utf-8")
        self.entries: list[dict] = []

    def add(self, **entry: float | str) -> None:
        self.entries.append(entry)
        self.file.write(json.dumps(entry) + "\n")


def until(seconds: float, name: str) -> Iterator[tuple[float, tqdm]]:
    """Yield the share of the time that has passed, and the progress bar, until the time is up."""
    layout = "{desc} {bar:20} {elapsed}, {remaining} left{postfix}"
    with tqdm(total=seconds, desc=f"{name:<14}", bar_format=layout, mininterval=0.5) as bar:
        began, spent = time.perf_counter(), 0.0
        while spent < seconds:
            yield spent / seconds, bar
            spent = time.perf_counter() - began
            bar.update(min(spent, seconds) - bar.n)


def windows(stream: Tensor, count: int) -> Tensor:
    start = torch.randint(len(stream) - LENGTH + 1, (count, 1))
    return stream[start + torch.arange(LENGTH)]


def falling(spent: float) -> float:
    """For a new model."""
    return 3e-3 * min(1, 0.02 + 20 * spent) * (1 - 0.95 * spent)


def steady(spent: float) -> float:
    """For one that is trained further, with or without thoughts."""
    return 3e-4 * min(1, 0.02 + 20 * spent)


def train(model: Any, stream: Tensor, seconds: float, log: Log, phase: str, texts: int, optimizer: Any, rate: Rate) -> None:
    """Train on so many texts per step. With QuietStar around the model, there is a thought at every position of every text."""
    thinks = isinstance(model, QuietStar)
    names = ("loss_ce", "policy_loss", "reward", "weight") if thinks else ("loss",)
    unit = "thoughts" if thinks else "tokens"
    model.train()
    for spent, bar in until(seconds, phase):
        began = time.perf_counter()
        ids = windows(stream, texts)
        out = model(ids, labels=ids)
        out.loss.backward()
        group = optimizer.param_groups[0]
        group["lr"] = rate(spent)
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        speed = (out.reward if thinks else ids).numel() / (time.perf_counter() - began)
        values = {name: out[name].mean().item() for name in names}
        log.add(phase=phase, **values, **{f"{unit}_per_second": speed})
        shown = ", ".join(f"{name} {value:.2g}" for name, value in values.items())
        bar.set_postfix_str(f"{shown}, {speed:,.0f} {unit}/s", refresh=False)
    model.eval()


@torch.no_grad()
def plain_losses(model: LlamaForCausalLM, texts: list[Example]) -> Tensor:
    """fp64 [texts], the loss of a token without thoughts, nats."""
    return torch.stack([model(x["input_ids"][None], labels=x["input_ids"][None]).loss.double() for x in texts])


def mixed_losses(qs: QuietStar, texts: list[Example]) -> dict[str, Tensor]:
    """The same with thoughts: the model's own, greedy; another text's at the same places; its most frequent one everywhere."""
    own = with_own_thoughts(qs, texts)
    losses = token_losses(qs, own, progress=True)
    found = {"own": losses.mixed, "another": losses.another}
    found["constant"] = token_losses(qs, with_constant_thoughts(own), progress=True, controls=False).mixed
    return {name: losses.text.bincount(x) / losses.text.bincount() for name, x in found.items()}


Gain = tuple[float, float, float]  # nats, with the ends of the 95 % interval over texts, each compared with itself


def gains(losses: dict[str, Tensor]) -> dict[str, Gain]:
    """What thoughts are worth, from the loss of each text [texts] in each way."""
    return {name: mean_interval((losses[control] - losses[way]).tolist()) for name, (control, way, _) in GAINS.items()}


def verdict(found: dict[str, Gain]) -> str:
    """Thoughts help over none, over another text's and over a constant one; training without any is another question."""
    parts = {part: found[part] for part in PARTS} | {"constant": found["own over constant"]}
    figures = {f"{part}{end}": x for part, gain in parts.items() for end, x in zip(("", "_low", "_high"), gain, strict=True)}
    _, low, high = found["over plain training"]
    plain = "predicts worse" if low > 0 else "predicts better" if high < 0 else "predicts as well, within the interval"
    return f"{verdict_of(figures | {'texts': HELD_OUT})}\nthe model trained as long without thoughts {plain}"


LOSSES = {
    "before": "language model",
    "plain": "trained as long without thoughts",
    "base": "trained to think, but without a thought",
    "own": "  with its own thoughts",
    "another": "  with another text's thoughts",
    "constant": "  with one constant thought",
}
GAINS = {  # over which control, of which way, in words
    "gain": ("base", "own", "own thoughts, over none"),
    "mixing": ("base", "another", "mixing: another text's thoughts, over none"),
    "content": ("another", "own", "content: own thoughts, over another text's"),
    "own over constant": ("constant", "own", "own thoughts, over the constant one"),
    "over plain training": ("plain", "own", "own thoughts, over training without any"),
}


def show_losses(losses: dict[str, Tensor], log: Log) -> None:
    print(f"\nHeld-out loss, nats per token, mean of {len(losses['own'])} texts")
    for name, words in LOSSES.items():
        print(f"  {words:<44}{float(losses[name].mean()):8.4f}")
    found = gains(losses)
    print("\nGains, nats per token, with 95 % intervals")
    for name, (_, _, words) in GAINS.items():
        mean, low, high = found[name]
        print(f"  {words:<44}{mean:+8.4f}  ({low:+.4f} to {high:+.4f})")
    print(verdict(found))
    log.add(phase="held_out", **{name: float(values.mean()) for name, values in losses.items()})
    for name, (mean, low, high) in found.items():
        log.add(phase="gain", of=name, gain=mean, low=low, high=high)


def show_thoughts(qs: QuietStar, ids: Tensor, seed: int) -> None:
    """A few thoughts in the middle of a text."""
    places = list(range(7, LENGTH - 8, 12))
    thoughts = qs.think(ids[None], anchors=torch.tensor([places]), seed=seed, greedy=False).thought_ids[0]
    decode = qs.tokenizer.decode
    print("\nThoughts on a held-out text")
    for place, both in zip(places, thoughts, strict=True):
        print(f"  ...{decode(ids[place - 7 : place + 1])!r} thinks {' and '.join(repr(decode(thought)) for thought in both)}")
        print(f"     the text continues {decode(ids[place + 1 : place + 5])!r}")


def plot(log: Log, path: Path) -> None:
    shown = {"language model": ("loss", "language model: loss, nats"), "thoughts": ("reward", "Quiet-STaR: mean reward, nats")}
    found = {phase: [entry for entry in log.entries if entry["phase"] == phase] for phase in shown}
    curves = {phase: [list(enumerate(entry[shown[phase][0]] for entry in found[phase]))] for phase in shown}
    panels(path, "English", [Panel("step", label, {phase: curves[phase]}) for phase, (_, label) in shown.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds-lm", type=float, default=25, help="time to train the language model; default 25")
    parser.add_argument(
        "--seconds-thoughts", type=float, default=15, help="time to train it to think, and again without thoughts; default 15"
    )
    parser.add_argument("--seed", type=int, default=0, help="for weights, texts and sampling; default 0")
    parser.add_argument("--out", type=Path, default=Path("runs/english"), help="folder for metrics, plot and checkpoint")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "metrics.jsonl")
    torch.manual_seed(args.seed)
    training, new, held_out = paragraphs(args.seed)
    tokenizer = train_tokenizer(training)
    training, new = (tokenizer("\n".join(part), return_tensors="pt").input_ids[0] for part in (training, new))
    held_out = tokenizer(["\n" + text for text in held_out], truncation=True, max_length=LENGTH).input_ids
    texts = [{"input_ids": torch.tensor(ids)} for ids in held_out]
    model = new_model(tokenizer)
    print(
        f"{model.num_parameters() / 1e6:.1f} million parameters, vocabulary {len(tokenizer)}, {len(training):,} tokens of text"
    )

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    train(model, training, args.seconds_lm, log, "language model", 16, optimizer, falling)
    losses = {"before": plain_losses(model, texts)}
    plain = copy.deepcopy(model)
    # About as many updates as with thoughts, whose time goes into more texts per step instead.
    optimizer = torch.optim.AdamW(plain.parameters(), betas=(0.9, 0.98), weight_decay=0.1)
    train(plain, new, args.seconds_thoughts, log, "no thoughts", 64, optimizer, steady)
    losses["plain"] = plain_losses(plain, texts)
    qs = QuietStar(model, THOUGHTS, tokenizer)
    optimizer = torch.optim.AdamW(qs.parameters(), weight_decay=1e-3)
    train(qs, new, args.seconds_thoughts, log, "thoughts", 4, optimizer, steady)
    losses |= {"base": plain_losses(qs.model, texts), **mixed_losses(qs, texts)}
    show_losses(losses, log)

    logging.disable_progress_bar()
    whole = next(text["input_ids"] for text in texts if len(text["input_ids"]) == LENGTH)
    show_thoughts(qs, whole, args.seed)
    plot(log, args.out / "losses.png")
    qs.save_pretrained(args.out / "checkpoint")
    print(f"\n{args.out}: metrics.jsonl, losses.png, checkpoint (load it with QuietStar.from_pretrained)")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. What was measured so far is in metrics.jsonl.")
        sys.exit(130)
