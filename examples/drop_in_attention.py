"""A small GPT in plain PyTorch that thinks at every position, with thought_attention in place of causal attention.

One packed forward pass runs a text and all its thoughts. The script

1. samples thoughts at all positions at once,
2. trains for a few steps on the text and on what each thought predicts,
3. compares every thought row with an ordinary causal forward pass over the text up to its anchor and that thought.

Thoughts get no reward here, and a model this small gains nothing from them. The package ``quietstar`` has mixing, rewards
and REINFORCE, and a key-value cache for sampling.

    python examples/drop_in_attention.py
"""

from __future__ import annotations

import sys
from pydoc_data import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quietstar_kernels import ThoughtLayout, sample_thoughts, thought_attention

B, L, N, T, J = 4, 48, 2, 3, 2  # batch, text tokens, thoughts per position, sampled tokens, tokens predicted after them
S = T + J + 1  # rows of a thought: start, T sampled tokens, end, J-1 tokens of the text
START, END, V = 256, 257, 258  # tokens are bytes
D, H, LAYERS, STEPS = 64, 4, 2, 40


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.mlp = nn.Sequential(nn.Linear(D, 4 * D), nn.GELU(), nn.Linear(4 * D, D))

    def forward(self, x: Tensor, layout: ThoughtLayout | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2) for y in self.qkv(self.norm_1(x)).chunk(3, -1))  # [B,H,M,K]
        if layout is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = thought_attention(q, k, v, layout)  # the one line a model needs
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(V, D), nn.Embedding(L + S, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V, bias=False)

    def forward(self, ids: Tensor, layout: ThoughtLayout | None = None) -> Tensor:
        """Last hidden states of a text [B,L,D], or of a text and its thoughts [B,M,D]."""
        positions = torch.arange(ids.shape[1])[None] if layout is None else layout.position_ids()
        x = self.tokens(ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x, layout)
        return self.norm(x)


def losses(model: GPT, text: Tensor, thoughts: Tensor, layout: ThoughtLayout) -> tuple[Tensor, Tensor]:
    """Cross entropy of the text, and of the J tokens after each thought's anchor, in nats per byte."""
    hidden = model(layout.token_ids(text, thoughts, START, END, pad_id=0), layout)
    text_loss = F.cross_entropy(model.head(hidden[:, : L - 1]).flatten(0, 1), text[:, 1:].flatten())
    logits = model.head(layout.predicting(hidden, J))  # [B,P,N,J,V], from the end row and those after it
    thought_loss = F.cross_entropy(logits.flatten(0, -2), layout.targets(text, J).flatten())
    return text_loss, thought_loss


@torch.no_grad()
def largest_difference(model: GPT, text: Tensor, thoughts: Tensor, layout: ThoughtLayout) -> float:
    """Largest difference of any logit between the packed forward pass and ordinary ones over text prefix + thought."""
    ids = layout.token_ids(text, thoughts, START, END, pad_id=0)
    _, packed = layout.split(model.head(model(ids, layout)))
    _, tokens = layout.split(ids)
    worst = 0.0
    for t in range(L):
        for n in range(N):
            ordinary = model.head(model(torch.cat([text[:, : t + 1], tokens[:, t, n]], 1)))[:, t + 1 :]
            worst = max(worst, float((packed[:, t, n] - ordinary).abs().max()))
    return worst


def main() -> int:
    torch.manual_seed(0)
    corpus = torch.tensor(list("\n".join(topics.topics.values()).encode()))
    model, layout = GPT(), ThoughtLayout.every_position(B, L, thoughts=N, rows=S)
    print(f"one forward pass: {layout.L} text rows and {layout.R} thought rows (P={layout.P} x N={N} x S={S}), batch {B}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        starts = torch.randint(len(corpus) - L, (B, 1))
        text = corpus[starts + torch.arange(L)]
        thoughts, _ = sample_thoughts(model, model.head.weight, layout, text, T, START, seed=step, banned=[START, END])
        text_loss, thought_loss = losses(model, text, thoughts, layout)
        optimizer.zero_grad()
        (text_loss + thought_loss).backward()
        optimizer.step()
        if step in (0, STEPS // 2, STEPS - 1):
            print(f"step {step:2d}: cross entropy {text_loss:.2f} on the text, {thought_loss:.2f} after the thoughts")

    place = L // 2
    shown = [bytes(ids.tolist()).decode(errors="replace") for ids in (text[0, : place + 1], *thoughts[0, place])]
    print(f"text {shown[0]!r}, its {N} thoughts {' and '.join(map(repr, shown[1:]))}")

    model.eval()
    worst = largest_difference(model, text, thoughts, layout)
    same = worst < 1e-4
    print(f"{B * layout.R} thought rows against ordinary forward passes: logits differ by at most {worst:.1e},", end=" ")
    print("rounding alone" if same else "which is too much")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
