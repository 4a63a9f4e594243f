"""A block drafter for speculative decoding: one layer that drafts eight tokens at once, in plain PyTorch.

A document counts up by a step: +7 0385 0392 0399 0406 ... A small Llama learns to write such documents and is then frozen.
From its hidden states, the drafter guesses eight tokens in parallel. The Llama checks them in one forward pass: it keeps those
that it would have chosen itself, and adds one. The output is that of greedy decoding, in fewer steps.

A step of training packs documents into rows and hangs a block of eight rows on each of many random anchors:

    text              + 7 _ 0 3 8 5 _ 0 3 9 2 _ 0 3 9 9 _ 0 4 0 6 ...
    anchor                          ^
    row 0 of its block                0                                 the token after the anchor, which is known
    rows 1 to 7                         ? ? ? ? ? ? ?                   every row predicts the token after its own place

A block row sees the text up to its anchor and, with own="full", all rows of its block. Three drafters are compared: this one,
the same trained with own="causal", where a row sees only the rows before it, and a table of which token follows which. Don't
expect full to beat causal here: this target chooses a token from those before it, so later rows have no news for earlier ones.

    python examples/block_drafter.py              three seeds, three to five minutes on two cores
    python examples/block_drafter.py --seeds 0    one seed
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # waiting threads yield a busy core; read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from transformers import LlamaConfig, LlamaForCausalLM

from quietstar_kernels import ThoughtLayout, thought_attention

PLUS, SPACE, VOCABULARY = 10, 11, 12  # the digits are tokens 0 to 9
NUMBERS, LARGEST_STEP = 10_000, 9  # numbers have four digits and start again after 9999
SHORTEST, LONGEST = 24, 64  # tokens of a document
B, L, ANCHORS = 8, 128, 24  # of a training step: rows of text, their length, blocks in each
BLOCK, ROUNDS = 8, 2  # rows of a block; how often the layer runs
DECAY = 0.8  # a draft counts only if all before it were right, so later places weigh less in the loss
D, H = 64, 4  # width and heads of the target and of the drafter
PROMPT, NEW, TEXTS = 12, 40, 64  # tokens of a held-out text that are given, then written; texts
FULL, CAUSAL, BIGRAM = 'block drafter, own="full"', 'block drafter, own="causal"', "bigram drafter"

Draft = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def documents(starts: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """[count,LONGEST], each a step and numbers that go up by it, the first of them from ``starts``."""
    start = starts[torch.randint(len(starts), (count, 1), generator=generator)]
    step = torch.randint(1, LARGEST_STEP + 1, (count, 1), generator=generator)
    numbers = (start + step * torch.arange(LONGEST // 5 + 1)) % NUMBERS
    digits = numbers[..., None] // torch.tensor([1000, 100, 10, 1]) % 10
    spaced = F.pad(digits, (1, 0), value=SPACE).flatten(1)
    return torch.cat([torch.full_like(step, PLUS), step, spaced], 1)[:, :LONGEST]


def packed_documents(starts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of text [B,L], documents of random lengths one after another, and ``lo`` [B,L], the start of each one's document."""
    rows = []
    for _ in range(B):
        texts = documents(starts, math.ceil(L / SHORTEST), generator)
        lengths = torch.randint(SHORTEST, LONGEST + 1, (len(texts), 1), generator=generator)
        rows.append(texts[torch.arange(LONGEST) < lengths][:L])
    text = torch.stack(rows)
    return text, torch.where(text == PLUS, torch.arange(L), 0).cummax(1).values


def next_tokens(tokens: Tensor, lo: Tensor) -> Tensor:
    """[B,L]: the token after each, -100 at the end of a document."""
    return F.pad(tokens[:, 1:].masked_fill(lo[:, 1:] != lo[:, :-1], -100), (0, 1), value=-100)


def new_target() -> LlamaForCausalLM:
    sizes = {"hidden_size": D, "intermediate_size": 3 * D, "num_hidden_layers": 3, "num_attention_heads": H}
    no_marks = dict.fromkeys(["bos_token_id", "eos_token_id", "pad_token_id"])
    target = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, initializer_range=D**-0.5, **sizes, **no_marks))
    nn.init.normal_(target.get_input_embeddings().weight)  # a model this narrow learns sooner with large embeddings
    return target


def read(target: LlamaForCausalLM, text: Tensor, lo: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of the target [B,L,V], and the features that drafters read [B,L,3*D]: low, middle and last hidden states."""
    layout = ThoughtLayout.at(text[:, :0], 1, BLOCK, lo=lo)  # the text alone
    mask, positions = layout.dense_mask()[:, None], layout.text_position_ids()
    out = target(text, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False)
    first, *middle, last = out.hidden_states
    return out.logits, torch.cat([first, middle[len(middle) // 2], last], -1)


class Drafter(nn.Module):
    """One decoder layer over blocks of rows, run ROUNDS times so that rows see what the others found."""

    def __init__(self, target: LlamaForCausalLM, own: str):
        super().__init__()
        self.own = own
        self.embed, self.head = target.get_input_embeddings(), target.lm_head  # shared, and frozen as the target is
        self.mask, self.places = nn.Parameter(torch.randn(D)), nn.Parameter(torch.randn(BLOCK, D))
        self.fuse = nn.Sequential(nn.Linear(3 * D, D), nn.RMSNorm(D))
        self.norm_1, self.norm_2, self.norm_3 = nn.RMSNorm(D), nn.RMSNorm(D), nn.RMSNorm(D)
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def blocks(self, text: Tensor, anchors: Tensor) -> Tensor:
        """[B,R,D], the rows of all blocks: row 0 holds the token after the anchor, the others the mask."""
        first = self.embed(text.gather(1, anchors + 1))[:, :, None]
        masks = self.mask.expand(*anchors.shape, BLOCK - 1, D)
        return (torch.cat([first, masks], 2) + self.places).flatten(1, 2)

    def forward(self, features: Tensor, x: Tensor, layout: ThoughtLayout) -> Tensor:
        """Logits of all block rows [B,R,V], from the features of the text [B,L,3*D] and the rows x [B,R,D]."""
        positions = layout.position_ids()
        text = self.kv(self.fuse(features))
        for _ in range(ROUNDS):
            y = self.norm_1(x)
            k, v = (heads(z) for z in torch.cat([text, self.kv(y)], 1).chunk(2, -1))  # [B,H,M,K], where M = L + R
            q = rotated(heads(self.q(y)), positions[:, layout.L :])  # [B,H,R,K]: text rows ask nothing
            y = thought_attention(q, rotated(k, positions), v, layout, query_rows="thoughts")
            x = x + self.out(y.transpose(1, 2).flatten(2))
            x = x + self.mlp(self.norm_2(x))
        return self.head(self.norm_3(x))

    def draft(self, text: Tensor, features: Tensor, anchors: Tensor, lo: Tensor) -> Tensor:
        """[B,P*BLOCK], the tokens that follow the known one after each anchor."""
        layout = ThoughtLayout.at(anchors, 1, BLOCK, lo=lo, own=self.own)
        return self(features, self.blocks(text, anchors), layout).argmax(-1)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (H, -1)).transpose(1, 2)


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary position embedding of x [B,H,rows,K]."""
    x, y = x.chunk(2, -1)
    angles = positions[:, None, :, None] * 10_000 ** (-torch.arange(x.shape[-1]) / x.shape[-1])
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([x * cos - y * sin, y * cos + x * sin], -1)


def random_anchors(lo: Tensor, generator: torch.Generator) -> Tensor:
    """[B,ANCHORS], ascending: positions with another token of their document after them."""
    inside = F.pad(lo[:, 1:] == lo[:, :-1], (0, 1))
    return torch.rand(lo.shape, generator=generator).masked_fill(~inside, -1).topk(ANCHORS).indices.sort().values


def drafter_loss(drafter: Drafter, text: Tensor, features: Tensor, choices: Tensor, anchors: Tensor, lo: Tensor) -> Tensor:
    """Mean cross entropy of what the target chooses at each place of each block. ``choices`` [B,L] are its next tokens."""
    layout = ThoughtLayout.at(anchors, 1, BLOCK, lo=lo, own=drafter.own)
    # Row i stands at position anchor + 1 + i and predicts the choice there; there is none in another document.
    targets = layout.targets(choices, BLOCK).flatten(1)
    logits = drafter(features, drafter.blocks(text, anchors), layout)
    losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none").unflatten(1, (-1, BLOCK))
    weights = DECAY ** torch.arange(BLOCK) * (targets != -100).unflatten(1, (-1, BLOCK))
    return (losses * weights).sum() / weights.sum()


class Optimizer:
    """AdamW with a warm-up and a cosine."""

    def __init__(self, model: nn.Module, steps: int):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.parameters, betas=(0.9, 0.98), weight_decay=0.01)
        self.schedule = OneCycleLR(self.adamw, 5e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adamw.step()
        self.adamw.zero_grad()
        self.schedule.step()


def train_target(starts: Tensor, steps: int, generator: torch.Generator) -> LlamaForCausalLM:
    target = new_target()
    optimizer = Optimizer(target, steps)
    for step in range(1, steps + 1):
        text, lo = packed_documents(starts, generator)
        logits, _ = read(target, text, lo)
        loss = F.cross_entropy(logits.transpose(1, 2), next_tokens(text, lo))
        optimizer.step(loss)
        if step % 100 == 0:
            print(f"  target, step {step} of {steps}: loss {loss:.2f}", flush=True)
    return target.requires_grad_(False).eval()


def train_drafters(
    drafters: list[Drafter], target: LlamaForCausalLM, starts: Tensor, steps: int, generator: torch.Generator
) -> list[list[float]]:
    """Train all on the same texts and anchors; returns the losses of each."""
    optimizers, losses = [Optimizer(drafter, steps) for drafter in drafters], [[] for _ in drafters]
    for step in range(1, steps + 1):
        text, lo = packed_documents(starts, generator)
        with torch.no_grad():
            logits, features = read(target, text, lo)
        anchors = random_anchors(lo, generator)
        choices = logits.argmax(-1).masked_fill(next_tokens(text, lo) == -100, -100)
        for drafter, optimizer, history in zip(drafters, optimizers, losses, strict=True):
            loss = drafter_loss(drafter, text, features, choices, anchors, lo)
            optimizer.step(loss)
            history.append(loss.item())
        if step % 100 == 0:
            means = ", ".join(f"{x.own} {sum(y[-50:]) / 50:.2f}" for x, y in zip(drafters, losses, strict=True))
            print(f"  drafters, step {step} of {steps}: loss {means}", flush=True)
    return losses


def bigram(text: Tensor) -> Draft:
    """Drafts the most frequent token after each, again and again."""
    pairs = text[:, :-1] * VOCABULARY + text[:, 1:]
    table = pairs.flatten().bincount(minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY).argmax(1)

    def draft(text: Tensor, features: Tensor, anchors: Tensor, lo: Tensor) -> Tensor:
        tokens = [table[text.gather(1, anchors + 1)]]
        for _ in range(BLOCK - 1):
            tokens.append(table[tokens[-1]])
        return torch.cat(tokens, 1)

    return draft


@torch.no_grad()
def speculate(target: LlamaForCausalLM, prompts: Tensor, new: int, draft: Draft) -> tuple[Tensor, float]:
    """Prompts [N,T] with ``new`` tokens more, and how many tokens a step wrote: the drafts that were right, and one.

    A real decoder keeps the target's keys and values; here it reads the whole text in each step.
    """
    start = prompts.shape[1]
    end = start + new
    text = F.pad(prompts, (0, new + 2 * BLOCK + 1))
    lo = torch.zeros_like(text)
    logits, features = read(target, text, lo)
    known = torch.full_like(text[:, :1], start)  # the last token that is certain; the target has not read it yet
    text[:, start] = logits[:, start - 1].argmax(-1)
    steps = 0
    while (live := known < end).any():
        places = known + torch.arange(1, BLOCK + 1)
        drafts = draft(text, features, known - 1, lo)
        text.scatter_(1, places, drafts)
        logits, features = read(target, text, lo)
        choices = logits.argmax(-1).gather(1, torch.cat([known, places], 1))  # after the known token and after each draft
        right = (drafts == choices[:, :BLOCK]).cumprod(1).sum(1, keepdim=True)
        steps += int(live.sum())
        known = known + (right + 1) * live
        text.scatter_(1, known, choices.gather(1, right))  # of a text that is done, this changes only what is cut off
    return text[:, :end], int((known - start).sum()) / steps


def run_seed(seed: int, target_steps: int, drafter_steps: int) -> dict[str, float]:
    """Tokens a step of each drafter on held-out texts."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randperm(NUMBERS, generator=generator)
    held_out, starts = starts[: NUMBERS // 10], starts[NUMBERS // 10 :]
    torch.manual_seed(seed)
    target = train_target(starts, target_steps, generator)
    drafters = []
    for own in ("full", "causal"):
        torch.manual_seed(seed)  # both start from the same weights
        drafters.append(Drafter(target, own))
    train_drafters(drafters, target, starts, drafter_steps, generator)

    prompts = documents(held_out, TEXTS, generator)[:, :PROMPT]
    greedy = target.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=NEW, do_sample=False)
    full, causal = drafters
    drafts = {FULL: full.draft, CAUSAL: causal.draft, BIGRAM: bigram(documents(starts, 1000, generator))}
    found = {}
    for name, draft in drafts.items():
        written, found[name] = speculate(target, prompts, NEW, draft)
        assert written.equal(greedy), f"{name}: not what the target writes alone"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="for weights, texts and anchors; default 0 1 2")
    parser.add_argument("--target-steps", type=int, default=300, help="of training the target; default 300")
    parser.add_argument("--drafter-steps", type=int, default=300, help="of training each drafter; default 300")
    parser.add_argument("--threads", type=int, default=2, help="default 2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for seed in args.seeds:
        began = time.perf_counter()
        print(f"seed {seed}", flush=True)
        found.append(run_seed(seed, args.target_steps, args.drafter_steps))
        print(f"  {time.perf_counter() - began:.0f} s; all drafters' texts are those of greedy decoding", flush=True)
    print(f"\nTokens a step on held-out texts, at most {BLOCK + 1}; plain decoding has 1")
    print(f"{'':<32}{'mean':>6}" + "".join(f"{f'seed {seed}':>8}" for seed in args.seeds))
    for name in (FULL, CAUSAL, BIGRAM):
        values = [result[name] for result in found]
        print(f"{name:<32}{sum(values) / len(values):6.2f}" + "".join(f"{value:8.2f}" for value in values))


if __name__ == "__main__":
    main()
