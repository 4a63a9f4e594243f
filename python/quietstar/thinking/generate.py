"""Generation with thoughts before tokens: transformers runs its own loop, and the logits come from here."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutput

from quietstar.checks import check_seed, check_think
from quietstar.hf.architectures import most_rows
from quietstar.hf.decoder import ThoughtStore, decode_step, decode_text
from quietstar.hf.graphs import EAGER, Graphs, Runner
from quietstar.hf.modules import check_whole, dropout_off, embeddings, not_finite, sharding_group
from quietstar.hf.positions import check_room, learned_positions, position_limits
from quietstar.objective import sampled
from quietstar.texts import check_columns, make_layout
from quietstar.thinking.forward import Thinker
from quietstar.thinking.rollout import RolloutOptions, continue_thoughts, draw_seed, on_device
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import INTEGERS, flag, function, integer, tensor

# Text positions are allocated in multiples of this, so that texts of about the same length share their graphs.
ROOM = 128
# At most so many new tokens are allocated before the first; after them the room is doubled.
AHEAD = 512


@dataclass
class Thinking:
    """When and how to think; the arguments of ``QuietStar.generate`` of the same names."""

    think: str | float
    thoughts: int
    sample_thoughts: bool
    seed: int | None
    sequence_ids: Tensor | None
    on_thoughts: Callable[[Tensor], None] | None

    def __post_init__(self) -> None:
        self.think = check_think("generate: think", self.think, "once")
        self.thoughts = integer("generate: thoughts", self.thoughts, 1, 65535)
        flag("generate: sample_thoughts", self.sample_thoughts)
        self.seed = check_seed(self.seed)
        if self.sequence_ids is not None:
            tensor("generate: sequence_ids", self.sequence_ids, "...", {}, dtypes=INTEGERS)
        if self.on_thoughts is not None:
            function("generate: on_thoughts", self.on_thoughts)


@torch.no_grad()
def generate(thinker: Thinker, graphs: Graphs | None, input_ids: Tensor, thinking: Thinking, options: dict[str, Any]) -> Any:
    """See ``QuietStar.generate``; ``options`` are transformers' own."""
    model: Any = thinker.model
    attention_mask, config = options["attention_mask"], options.get("generation_config")
    given = {"input_ids": input_ids, "attention_mask": attention_mask, "sequence_ids": thinking.sequence_ids}
    check_columns({name: x for name, x in given.items() if x is not None or name == "input_ids"}, model, thinker.config)
    tensor("input_ids", input_ids, "B,L", {}, embeddings(model).weight.device)
    if options.get("max_new_tokens") is not None:
        options["max_new_tokens"] = integer("generate: max_new_tokens", options["max_new_tokens"], 1)
    with dropout_off(model):
        if thinking.think != "never":
            check_whole(f"generate: think={thinking.think!r}", model)
            if thinker.marks is not None:
                start = thinker.config.thought_start
                raise ValueError(
                    f"generate: think must be 'never' where thoughts are text (thought_start={start!r}), got "
                    f"{thinking.think!r}: put that text at the end of the prompt, and the model thinks as it goes on"
                )
            new_tokens = options.get("max_new_tokens") or getattr(config, "max_new_tokens", None) or 1
            generator = ThinkingModel(thinker, graphs, thinking, new_tokens)
            out = generator.generate(input_ids, **_without_cache(options, config))
            if graphs is not None and generator.cache is not None and generator.cache.graphs is not None:
                graphs.spare = generator.cache
            return out
        longest = input_ids.shape[1] if attention_mask is None else int((attention_mask != 0).sum(1).max())
        check_room(type(model).__name__, learned_positions(model), longest)
        options["logits_processor"] = [FiniteLogits(model), *(options.get("logits_processor") or ())]
        if sharding_group(model) is not None:  # each process runs the model until all have ended their texts
            options["synced_gpus"] = True
        return model.generate(input_ids, **options)


class FiniteLogits(LogitsProcessor):
    """Names the model's state where a logit is NaN, from which transformers would draw anything."""

    def __init__(self, model: PreTrainedModel):
        self.model = model

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        check_finite(self.model, scores, input_ids.shape[1] - 1)
        return scores


def check_finite(model: PreTrainedModel, logits: Tensor, position: int) -> None:
    """Raises ValueError if a logit [B,V] is NaN. Waits for the device, as ``generate`` does after each token anyway."""
    if bool((broken := logits.isnan().any(-1)).any()):
        raise not_finite(model, f"at text {int(broken.nonzero()[0])}, position {position}")


def _without_cache(options: dict[str, Any], config: GenerationConfig | None) -> dict[str, Any]:
    """Options that keep transformers from making a cache: ``ThinkingModel`` has the text's keys and values."""
    for name in ("cache", "past_key_values", "cache_implementation"):
        value = options.get(name, getattr(config, name, None))
        if value is not None:
            got = value if isinstance(value, str) else type(value).__name__
            raise ValueError(f"generate: {name} must be None where the model thinks, since it keeps its own cache, got {got}")
    if config is None:
        return options | {"use_cache": False}
    config = copy.deepcopy(config)
    config.use_cache = False
    return options | {"generation_config": config}


@dataclass
class TextCache:
    """The text's keys and values with room for more tokens, and the graphs over them."""

    store: ThoughtStore
    run: Runner  # runs bodies over the store
    graphs: Graphs | None  # those that ``run`` makes, None where it makes none
    state: tuple  # what they depend on, besides the model's weights
    written: int  # how many text positions hold a token

    @staticmethod
    def take(thinker: Thinker, graphs: Graphs | None, layout: ThoughtLayout, room: int) -> TextCache:
        """For new texts: the cache of the last generation where it fits, so that its graphs are used again."""
        run = EAGER if graphs is None else graphs.runner(thinker.model, thinker.device)
        if run.graphs is None:
            return TextCache(ThoughtStore(layout, capacity=room), run, None, (), layout.L)
        state = (*run.state, layout.B, room)
        cache = run.graphs.take_spare()
        if cache is None or cache.state != state:
            cache = TextCache(ThoughtStore(layout, capacity=room), run, run.graphs.apart(), state, layout.L)
        else:
            cache.store.restart(layout)
        cache.run, cache.written = cache.graphs.runner(thinker.model, layout.device), layout.L
        return cache

    def grow(self, room: int) -> None:
        self.store.grow(room)
        self.state = (*self.state[:-1], room)
        if self.graphs is not None:
            self.graphs.clear()

    def place(self) -> Tensor:
        """int64 [1], the position of the next token."""
        return torch.full((1,), self.written, device=self.store.layout.device)


class ThinkingModel(GenerationMixin):
    """The language model as ``GenerationMixin.generate`` sees it: the same config and tokens, but logits with thoughts.

    Since it is given no cache, ``generate`` passes the whole text before each token; only rows that are not in the store yet
    are run.
    """

    _supported_generation_modes = [GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE]

    def __init__(self, thinker: Thinker, graphs: Graphs | None, thinking: Thinking, new_tokens: int):
        self.thinker = thinker
        self.graphs = graphs
        self.thinking = thinking
        self.new_tokens = new_tokens
        self.limits = position_limits(thinker.model)
        self.cache: TextCache | None = None
        self.behind: TextCache | None = None  # of the prompts with each of their thoughts, where they think once
        if thinking.sample_thoughts:
            self.N, temperature = thinking.thoughts, 1.0
            self.seed = draw_seed() if thinking.seed is None else thinking.seed
        else:
            self.N, temperature, self.seed = 1, 0.0, 0  # greedy thoughts are identical
        self.sampling = RolloutOptions.of(thinker.config, temperature)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.thinker.model, name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> CausalLMOutput:
        """The text so far, [B,L], to logits [B,1,V] of its next token: mixed where a row thinks, else the base model's."""
        model, newest = self.thinker.model, input_ids[:, -1:]
        if self.cache is None:
            self.cache = self._prepare(input_ids, attention_mask)
            h_base = decode_text(model, embeddings(model)(input_ids), self.cache.store)[:, -1]
        else:
            self.longest += 1
            self._check_room()
            h_base = self._read_token(self.cache, newest)
        if self.behind is not None:
            ahead = self._read_token(self.behind, newest.repeat_interleave(self.N, 0))
            logits = self._mix(h_base, ahead.unflatten(0, (-1, self.N)))
        elif self.thinking.think in ("always", "once"):
            ends, *thoughts = self._think(self.cache, torch.ones_like(newest[:, 0], dtype=torch.bool))
            logits = self._mix(h_base, ends)
            if self.thinking.think == "once" and self.new_tokens > 1:
                self.behind = self._read_thoughts(input_ids, attention_mask, *thoughts)
        else:
            logits = self.thinker.logprobs(h_base)
            thinks = torch.special.entr(logits.softmax(-1)).sum(-1) > float(self.thinking.think)
            if bool(thinks.any()):
                logits = torch.where(thinks[:, None], self._mix(h_base, self._think(self.cache, thinks)[0]), logits)
        check_finite(self.thinker.model, logits, self.longest - 1)
        for token in self.thinker.config.banned:  # one by one: a list would be copied to the device
            logits[:, token].fill_(-torch.inf)
        return CausalLMOutput(logits=logits[:, None])

    __call__ = forward

    def _prepare(self, input_ids: Tensor, attention_mask: Tensor | None) -> TextCache:
        """For these prompts, which are still to be read."""
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"generate: attention_mask must pad on the left, row {row} ends in padding")
        B, sequence_ids = len(input_ids), self.thinking.sequence_ids
        sequence_ids = torch.arange(B, device=input_ids.device) if sequence_ids is None else sequence_ids
        self.sequence_ids = sequence_ids.long().view(B, -1)[:, -1:]
        cache = self._cache(input_ids, attention_mask)
        self.longest = int(cache.store.text_layout.text_position_ids().max()) + 1
        self._check_room(self.new_tokens - 1)
        return cache

    def _cache(self, input_ids: Tensor, attention_mask: Tensor | None) -> TextCache:
        layout = make_layout({"input_ids": input_ids, "attention_mask": attention_mask}, self.thinker.config).text_only()
        ahead = min(self.new_tokens - 1, AHEAD)
        return TextCache.take(self.thinker, self.graphs, layout, self._room(layout.L, layout.L + ahead))

    def _read_token(self, cache: TextCache, token: Tensor) -> Tensor:
        """Last hidden states [B,D] of the newest token [B,1], whose keys and values enter the store."""
        if cache.written == cache.store.layout.L:
            cache.grow(self._room(cache.written + 1, 2 * cache.written))
        model, store = self.thinker.model, cache.store

        def read(token: Tensor, place: Tensor, whole: bool) -> tuple[Tensor]:
            store.begin_at(place - 1, torch.ones_like(token[:, None], dtype=torch.int32), rows=1)
            hidden = decode_step(model, embeddings(model)(token), store, 0)
            store.keep_as_text(place)
            return (hidden[:, 0],)

        (hidden,) = cache.run("read", read, {"token": token, "place": cache.place()})
        cache.written += 1
        return hidden

    def _think(self, cache: TextCache, thinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Last hidden states [B,N,D] of the end rows of new thoughts, T + 2 steps at most; off where a row does not think. Then
        their tokens [B,N,T] and lengths [B,N].
        """
        thinker, store, sampling, T = self.thinker, cache.store, self.sampling, self.sampling.thought_tokens

        def think(
            place: Tensor, length: Tensor, sequence_ids: Tensor, seed: Tensor, start: Tensor, end: Tensor, whole: bool
        ) -> tuple[Tensor, ...]:
            store.begin_at(place - 1, length, rows=T + 2)
            thoughts, ends = continue_thoughts(
                thinker.model, thinker.lm_head, start, store, sequence_ids, seed, sampling, end=end, whole=whole
            )
            assert ends is not None
            return thoughts.thought_ids[:, 0], thoughts.lengths[:, 0], ends[:, 0]

        inputs = {
            "place": cache.place(),
            "length": ((T + 2) * thinks.int())[:, None, None].repeat(1, 1, self.N),
            "sequence_ids": self.sequence_ids,
            "seed": on_device(self.seed, thinks.device),
            "start": thinker.start,
            "end": thinker.end,
        }
        ids, lengths, ends = cache.run(("think", sampling), think, inputs)
        ends = ends.masked_fill((ids < 0).any(-1)[..., None], torch.nan)  # that thought isn't the model's
        if self.thinking.on_thoughts is not None:
            on = sampled(lengths, T) & thinks[:, None, None]
            self.thinking.on_thoughts(ids.masked_fill(~on, -1))
        return ends, ids, lengths

    def _read_thoughts(self, prompt: Tensor, attention_mask: Tensor | None, ids: Tensor, lengths: Tensor) -> TextCache:
        """A cache of B*N texts: each prompt with one of its thoughts, behind which the text goes on as in training.

        The rows of a branch see nothing else, so that it is a text of its own.
        """
        thinker, T, N = self.thinker, self.sampling.thought_tokens, self.N
        L, length = prompt.shape[1], lengths.flatten()[:, None]
        # What is shorter has padding before it.
        source = torch.arange(L + T + 2, device=prompt.device) - (T - length)
        tokens = torch.cat([pad(prompt, (0, 1)).repeat_interleave(N, 0), pad(ids.flatten(0, 1).clamp(min=0), (0, 1))], 1)
        tokens = tokens.gather(1, source.clamp(min=0))
        mask = torch.ones_like(prompt) if attention_mask is None else attention_mask
        mask = pad(mask, (0, T + 2), value=1).repeat_interleave(N, 0).gather(1, source.clamp(min=0)) * (source >= 0)
        embeds = torch.where((source == L)[..., None], thinker.start, embeddings(thinker.model)(tokens))
        embeds = torch.where((source == L + 1 + length)[..., None], thinker.end, embeds)
        cache = self._cache(tokens, mask)
        decode_text(thinker.model, embeds, cache.store)
        return cache

    def _mix(self, h_base: Tensor, h_thought: Tensor) -> Tensor:
        """Log-probabilities [B,V] from states of the text [B,D] and of thoughts [B,N,D], whose probabilities are averaged."""
        logprobs = self.thinker.mixed_logprobs(h_base[:, None], h_thought).log_softmax(-1)
        return logprobs[:, 0] if self.N == 1 else logprobs.logsumexp(1) - math.log(self.N)

    def _room(self, needed: int, wanted: int) -> int:
        """How many text positions to make room for."""
        most = most_rows(self.thinker.model) - (self.sampling.thought_tokens + 2)
        return max(needed, min(-(-wanted // ROOM) * ROOM, most))

    def _check_room(self, ahead: int = 0) -> None:
        needed = self.longest + ahead + self.thinker.config.thought_tokens + 2
        check_room(type(self.thinker.model).__name__, self.limits, needed, "input_ids and max_new_tokens: text and thoughts")
