"""``quietstar think``"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from tyro.conf import Positional, arg

from quietstar.cli.common import Chat, Checkpoint, load_checkpoint, prompt_ids, text_tokenizer


@dataclass
class Think:
    """Print what a model thinks at the tokens of a text."""

    model: Checkpoint
    prompt: Positional[Annotated[str, arg(metavar="TEXT", help="the text to think about")]]
    chat: Chat = False
    at: Annotated[tuple[int, ...], arg(help="tokens to think at, from 0; -1 is the last; default all")] = ()
    seed: Annotated[int | None, arg(help="sample the thoughts with this seed; default the likeliest tokens")] = None

    def run(self) -> None:
        qs = load_checkpoint(self.model)
        decode = text_tokenizer(qs).decode
        ids = prompt_ids(qs, self.prompt, self.chat)
        L = ids.shape[1]
        for place in self.at:
            if not -L <= place < L:
                raise ValueError(f"--at must be from {-L} to {L - 1} in a text of {L} tokens, got {place}")
        places = sorted({place % L for place in self.at}) if self.at else list(range(L))
        anchors = torch.tensor([places], device=ids.device)
        thoughts = qs.think(ids, anchors=anchors, seed=self.seed or 0, greedy=self.seed is None)
        ends = thoughts.lengths[0].tolist()
        for place, several, lengths in zip(places, thoughts.thought_ids[0].tolist(), ends, strict=True):
            shown = [one[:length] for one, length in zip(several, lengths, strict=True)]
            shown = shown[:1] if self.seed is None else shown  # greedy thoughts are identical
            print(f"{place:>5}  {decode(ids[0, place])!r:<16}  {'  |  '.join(repr(decode(one)) for one in shown)}")
