"""How ``quietstar generate --show-thoughts`` prints the text."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation import BaseStreamer

from quietstar.explain.token_text import token_text


class ThoughtLines(BaseStreamer):
    """Prints a line for each new token of one text: the token, and the thoughts before it if the model thought there.

    Pass the object as ``streamer`` and its ``on_thoughts`` as ``on_thoughts``.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.thoughts: list[str] = []
        self.in_prompt = True

    def on_thoughts(self, thought_ids: Tensor) -> None:
        self.thoughts = [repr(self.tokenizer.decode(thought[thought >= 0])) for thought in thought_ids[0]]

    def put(self, value: Tensor) -> None:
        if not self.in_prompt:
            print(f"{token_text(self.tokenizer, int(value))!r:<16}  {'  |  '.join(self.thoughts)}".rstrip(), flush=True)
        self.thoughts, self.in_prompt = [], False

    def end(self) -> None:
        self.in_prompt = True
