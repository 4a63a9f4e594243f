"""Generation that thinks before a token: transformers runs its own loop and takes the logits from here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutput

from quietstar import checks
from quietstar.evaluation.scoring import mixed_logits, next_logits
from quietstar.hf.architectures import most_rows
from quietstar.hf.cache import ThoughtStore
from quietstar.hf.decoder import decode_rows, decode_step
from quietstar.hf.graphs import Graphs, Runner
from quietstar.hf.modules import dropout_off, embeddings
from quietstar.rollout import Sampling, continue_thoughts, draw_seed, on_device
from quietstar_kernels import ThoughtLayout

if TYPE_CHECKING:
    from quietstar.model import QuietStar

# Room is made for a multiple of so many text positions: texts of about the same length share their graphs.
ROOM = 128
# New tokens that room is made for before the first, at most; where more come, it is doubled.
AHEAD = 512


@dataclass
class Thinking:
    """When and how to think; the arguments of ``QuietStar.generate`` of the same names.

    Raises:
        ValueError: a value outside its range.
    """

    think: str | float
    thoughts: int
    sample_thoughts: bool
    seed: int | None
    sequence_ids: Tensor | None
    on_thoughts: Callable[[Tensor], None] | None

    def __post_init__(self) -> None:
        if isinstance(self.think, (int, float)) and not isinstance(self.think, bool):
            fits = 0 <= self.think < math.inf
        else:
            fits = self.think in ("always", "never")
        if not fits:
            raise ValueError(f"generate: think must be 'always', 'never' or nats of entropy, 0 or more, got {self.think!r}")
        if not isinstance(self.thoughts, int) or not 1 <= self.thoughts < 65536:
            raise ValueError(f"generate: thoughts must be 1 to 65,535, got {self.thoughts!r}")


@torch.no_grad()
def generate(qs: QuietStar, input_ids: Tensor, thinking: Thinking, usual: dict[str, Any]) -> Any:
    """See ``QuietStar.generate``; ``usual`` holds the arguments that are transformers' own."""
    model: Any = qs.model
    attention_mask, config = usual["attention_mask"], usual.get("generation_config")
    checks.check_text(input_ids, attention_mask, qs.thought_config, embeddings(model))
    with dropout_off(model):
        if thinking.think != "never":
            new_tokens = usual.get("max_new_tokens") or getattr(config, "max_new_tokens", None) or 1
            thinker = ThinkingModel(qs, thinking, new_tokens)
            out = thinker.generate(input_ids, **_without_cache(usual, config))
            if thinker.desk is not None:
                thinker.desk.leave(qs)
            return out
        longest = input_ids.shape[1] if attention_mask is None else int((attention_mask != 0).sum(1).max())
        checks.check_room(model, checks.learned_positions(model), longest)
        return model.generate(input_ids, **usual)


def _without_cache(usual: dict[str, Any], config: GenerationConfig | None) -> dict[str, Any]:
    """The text's keys and values are kept by ``ThinkingModel``; transformers is to make no cache of its own."""
    for name in ("past_key_values", "cache_implementation"):
        value = usual.get(name, getattr(config, name, None))
        if value is not None:
            got = value if isinstance(value, str) else type(value).__name__
            raise ValueError(f"generate: {name} must be None where the model thinks, which keeps a cache of its own, got {got}")
    if config is None:
        return usual | {"use_cache": False}
    config = copy.deepcopy(config)
    config.use_cache = False
    return usual | {"generation_config": config}


@dataclass
class Desk:
    """What generation works on: the text's keys and values, with room for more, and the graphs over them.

    Attributes:
        run: runs bodies over the store.
        graphs: those that ``run`` makes, None where it makes none.
        state: what they hang on, beside the model's weights.
        written: how many text positions hold a token.
    """

    store: ThoughtStore
    run: Runner
    graphs: Graphs | None
    state: tuple
    written: int

    @staticmethod
    def take(qs: QuietStar, layout: ThoughtLayout, room: int) -> Desk:
        """For new texts: the one that the last generation left, where that fits, since its graphs go on."""
        run = qs._runner()
        if run.graphs is None:
            return Desk(ThoughtStore(layout, capacity=room), run, None, (), layout.L)
        state = (*run.state, layout.B, room)
        desk = run.graphs.take_spare()
        if desk is None or desk.state != state:
            desk = Desk(ThoughtStore(layout, capacity=room), run, run.graphs.apart(), state, layout.L)
        else:
            desk.store.restart(layout)
        desk.run, desk.written = desk.graphs.runner(qs.model, layout.device), layout.L
        return desk

    def leave(self, qs: QuietStar) -> None:
        """For the next generation."""
        if self.graphs is not None and qs._graphs is not None:
            qs._graphs.spare = self

    def grow(self, room: int) -> None:
        self.store.grow(room)
        self.state = (*self.state[:-1], room)
        if self.graphs is not None:
            self.graphs.clear()

    def place(self) -> Tensor:
        """int64 [1], where the next token will stand."""
        return torch.full((1,), self.written, device=self.store.layout.device)


class ThinkingModel(GenerationMixin):
    """The language model as ``GenerationMixin.generate`` sees it: the same config and tokens, but logits with thoughts.

    Without a cache of its own, ``generate`` hands over the whole text before each token; only rows that are not in the store
    yet are run.

    Args:
        new_tokens: how many will come at most, where that is known.
    """

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    def __init__(self, qs: QuietStar, thinking: Thinking, new_tokens: int = 1):
        self.qs = qs
        self.thinking = thinking
        self.new_tokens = new_tokens
        self.limits = checks.position_limits(qs.model)
        self.desk: Desk | None = None
        if thinking.sample_thoughts:
            self.N, temperature = thinking.thoughts, 1.0
            self.seed = draw_seed() if thinking.seed is None else thinking.seed
        else:
            self.N, temperature, self.seed = 1, 0.0, 0  # greedy thoughts are all the same
        self.sampling = Sampling.of(qs.thought_config, temperature)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.qs.model, name)

    def __call__(self, **inputs: Any) -> CausalLMOutput:
        return self.forward(**inputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> CausalLMOutput:
        """The text so far, [B,L], to logits [B,1,V] of its next token: mixed where a row thinks, else the base model's."""
        if self.desk is None:
            self.desk = self._prepare(input_ids, attention_mask)
            h_base = self._read_prompt(self.desk, input_ids)
        else:
            h_base = self._read_token(self.desk, input_ids[:, -1:])
        if self.thinking.think == "always":
            thinks = torch.ones(len(h_base), dtype=torch.bool, device=h_base.device)
            logits = self._mix(h_base, self._think(self.desk, thinks))
        else:
            logits = next_logits(self.qs, h_base)
            thinks = torch.special.entr(logits.softmax(-1)).sum(-1) > float(self.thinking.think)
            if bool(thinks.any()):
                logits = torch.where(thinks[:, None], self._mix(h_base, self._think(self.desk, thinks)), logits)
        for token in self.qs.thought_config.banned:  # one by one: a list would be copied to the device
            logits[:, token].fill_(-torch.inf)
        return CausalLMOutput(logits=logits[:, None])

    def _prepare(self, input_ids: Tensor, attention_mask: Tensor | None) -> Desk:
        """For these prompts, which are still to be read."""
        layout = checks.make_layout(input_ids, attention_mask, None, None, self.qs.thought_config).text_only()
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"generate: attention_mask must pad on the left, row {row} ends in padding")
        self.sequence_ids = checks.check_sequence_ids(self.thinking.sequence_ids, input_ids)[:, -1:]
        self.longest = int(layout.text_position_ids().max()) + 1
        self._check_room(self.new_tokens - 1)
        ahead = min(self.new_tokens - 1, AHEAD)
        return Desk.take(self.qs, layout, self._room(layout.L, layout.L + ahead))

    def _read_prompt(self, desk: Desk, input_ids: Tensor) -> Tensor:
        """Last hidden states [B,D] of the prompts, whose keys and values enter the store."""
        model, store = self.qs.model, desk.store
        return decode_rows(model, embeddings(model)(input_ids), store.text_layout.text_position_ids(), store.prefill())[:, -1]

    def _read_token(self, desk: Desk, token: Tensor) -> Tensor:
        """Last hidden states [B,D] of the newest token [B,1], whose keys and values enter the store."""
        self.longest += 1
        self._check_room()
        if desk.written == desk.store.layout.L:
            desk.grow(self._room(desk.written + 1, 2 * desk.written))
        model, store = self.qs.model, desk.store

        def read(token: Tensor, place: Tensor, whole: bool) -> tuple[Tensor]:
            store.begin_at(place - 1, torch.ones_like(token[:, None], dtype=torch.int32), rows=1)
            hidden = decode_step(model, embeddings(model)(token), store, 0)
            store.keep_as_text(place)
            return (hidden[:, 0],)

        (hidden,) = desk.run("read", read, {"token": token, "place": desk.place()})
        desk.written += 1
        return hidden

    def _think(self, desk: Desk, thinks: Tensor) -> Tensor:
        """Last hidden states [B,N,D] of the end rows of new thoughts, T + 2 steps at most; off where a row does not think."""
        qs, store, sampling, T = self.qs, desk.store, self.sampling, self.sampling.thought_tokens

        def think(
            place: Tensor, length: Tensor, names: Tensor, seed: Tensor, start: Tensor, end: Tensor, whole: bool
        ) -> tuple[Tensor, ...]:
            store.begin_at(place - 1, length, rows=T + 2)
            thoughts, ends = continue_thoughts(qs.model, qs.lm_head, start, store, names, seed, sampling, end=end, whole=whole)
            assert ends is not None
            return thoughts.thought_ids[:, 0], thoughts.lengths[:, 0], ends[:, 0]

        inputs = {
            "place": desk.place(),
            "length": ((T + 2) * thinks.int())[:, None, None].repeat(1, 1, self.N),
            "names": self.sequence_ids,
            "seed": on_device(self.seed, thinks.device),
            "start": qs._embedding(qs.start_embedding),
            "end": qs._embedding(qs.end_embedding),
        }
        ids, lengths, ends = desk.run(("think", sampling), think, inputs)
        if self.thinking.on_thoughts is not None:
            on = checks.sampled(lengths, T) & thinks[:, None, None]
            self.thinking.on_thoughts(ids.masked_fill(~on, -1))
        return ends

    def _mix(self, h_base: Tensor, h_thought: Tensor) -> Tensor:
        """Logits [B,V] from states of the text [B,D] and of thoughts [B,N,D]; log-probabilities where several are averaged."""
        base, thought = h_base.float()[:, None].expand_as(h_thought), h_thought.float()
        logits = mixed_logits(self.qs, base, thought)
        return logits[:, 0] if self.N == 1 else logits.log_softmax(-1).logsumexp(1) - math.log(self.N)

    def _room(self, needed: int, wanted: int) -> int:
        """How many text positions to make room for."""
        most = most_rows(self.qs.model) - (self.sampling.thought_tokens + 2)
        return max(needed, min(-(-wanted // ROOM) * ROOM, most))

    def _check_room(self, ahead: int = 0) -> None:
        checks.check_room(self.qs.model, self.limits, self.longest + ahead + self.qs.thought_config.thought_tokens + 2)
