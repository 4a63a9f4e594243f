"""``quietstar generate``"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation import BaseStreamer
from tyro.conf import Positional, arg

from quietstar.checks import check_think, pad_id
from quietstar.cli.common import Chat, Checkpoint, load_checkpoint, prompt_ids, text_tokenizer
from quietstar.cli.errors import UsageError
from quietstar.cli.ignored import Rule
from quietstar.explanation.tokens import token_text


@dataclass
class Generate:
    """Continue a text, thinking before each token; print the new text as it comes."""

    model: Checkpoint
    text: Positional[Annotated[str, arg(metavar="TEXT", help="the text to continue; or use --prompt")]] = ""
    prompt: Annotated[str, arg(metavar="TEXT", help="the same as TEXT, which may then begin with a dash")] = ""
    chat: Chat = False
    think: Annotated[
        float | str,
        arg(help="always, once, never, or where the model's entropy is above this number of nats; a text thought is first"),
    ] = "always"
    thoughts: Annotated[int, arg(help="N, sampled thoughts whose predictions are averaged")] = 1
    sample_thoughts: Annotated[bool, arg(help="sample the thoughts; default the likeliest tokens")] = False
    show_thoughts: Annotated[bool, arg(help="print a line for each new token, with the thoughts before it")] = False
    max_new_tokens: Annotated[int, arg(help="most tokens to generate")] = 100
    temperature: Annotated[float, arg(help="temperature of the text's tokens; 0 takes the likeliest")] = 0.0
    top_p: Annotated[float | None, arg(help="sample from the likeliest tokens of this probability; default the model's")] = None
    top_k: Annotated[int | None, arg(help="sample from this many of the likeliest tokens; default the model's")] = None
    seed: Annotated[int | None, arg(help="seed of all that is sampled; default a new one each time")] = None

    ignored: ClassVar[list] = [
        Rule("thoughts sample_thoughts", lambda o: o.think == "never", "with --think=never"),
        Rule("thoughts", lambda o: not o.sample_thoughts, "without --sample-thoughts"),
        Rule("top_p top_k", lambda o: o.temperature == 0, "without --temperature above 0"),
        Rule(
            "seed", lambda o: o.temperature == 0 and not o.sample_thoughts, "without --temperature above 0 or --sample-thoughts"
        ),
    ]

    def run(self) -> None:
        if bool(self.text) == bool(self.prompt):
            raise ValueError("generate takes a text or --prompt, one of the two")
        try:
            check_think("--think", self.think, "once")
        except ValueError as error:
            raise UsageError(str(error)) from error
        if self.temperature < 0:
            raise UsageError(f"--temperature must be 0 or more, got {self.temperature}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise UsageError(f"--seed must be from 0 to 4,294,967,295, got {self.seed}")
        qs = load_checkpoint(self.model)
        tokenizer = text_tokenizer(qs)
        ids = prompt_ids(qs, self.text or self.prompt, self.chat)
        think = self.think
        if qs.thinker.marks is not None and think in ("always", "once"):  # the model writes the thought and goes on from it
            ids, think = torch.cat([ids, ids.new_tensor([qs.thinker.marks.start])], 1), "never"
        if self.seed is not None:
            set_seed(self.seed)
        options: dict[str, Any] = {"do_sample": self.temperature > 0}
        if options["do_sample"]:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.show_thoughts:
            lines = ThoughtLines(tokenizer)
            options |= {"streamer": lines, "on_thoughts": lines.on_thoughts}
        else:
            options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        qs.generate(
            ids,
            torch.ones_like(ids),
            max_new_tokens=self.max_new_tokens,
            think=think,
            thoughts=self.thoughts,
            sample_thoughts=self.sample_thoughts,
            pad_token_id=pad_id(qs.config),
            **{name: value for name, value in options.items() if value is not None},
        )


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
