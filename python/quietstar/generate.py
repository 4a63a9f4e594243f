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
from quietstar.cache import ThoughtStore
from quietstar.parts import dropout_off, embeddings
from quietstar.rollout import Stop, Thoughts, continue_thoughts, decode_rows, decode_step, draw_seed
from quietstar.scoring import mixed_logits, next_logits

if TYPE_CHECKING:
    from quietstar.model import QuietStar


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
            return ThinkingModel(qs, thinking, new_tokens).generate(input_ids, **_without_cache(usual, config))
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
        self.store: ThoughtStore | None = None
        if thinking.sample_thoughts:
            self.N, self.temperature = thinking.thoughts, 1.0
            self.seed = draw_seed() if thinking.seed is None else thinking.seed
        else:
            self.N, self.temperature, self.seed = 1, 0.0, 0  # greedy thoughts are all the same

    def __getattr__(self, name: str) -> Any:
        return getattr(self.qs.model, name)

    def __call__(self, **inputs: Any) -> CausalLMOutput:
        return self.forward(**inputs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> CausalLMOutput:
        """The text so far, [B,L], to logits [B,1,V] of its next token: mixed where a row thinks, else the base model's."""
        if self.store is None:
            self.store = self._prepare(input_ids, attention_mask)
            h_base = self._read_prompt(self.store, input_ids)
        else:
            h_base = self._read_token(self.store, input_ids[:, -1:])
        if self.thinking.think == "always":
            thinks = torch.ones(len(h_base), dtype=torch.bool, device=h_base.device)
            logits = self._mix(h_base, self._think(self.store, thinks))
        else:
            logits = next_logits(self.qs, h_base)
            thinks = torch.special.entr(logits.softmax(-1)).sum(-1) > float(self.thinking.think)
            if bool(thinks.any()):
                logits = torch.where(thinks[:, None], self._mix(h_base, self._think(self.store, thinks)), logits)
        logits[:, self.qs.thought_config.banned] = -torch.inf
        return CausalLMOutput(logits=logits[:, None])

    def _prepare(self, input_ids: Tensor, attention_mask: Tensor | None) -> ThoughtStore:
        """An empty store for these prompts."""
        layout = checks.make_layout(input_ids, attention_mask, None, None, self.qs.thought_config).text_only()
        if attention_mask is not None and not bool(attention_mask[:, -1].all()):
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"generate: attention_mask must pad on the left, row {row} ends in padding")
        self.sequence_ids = checks.check_sequence_ids(self.thinking.sequence_ids, input_ids)[:, -1:]
        self.longest = int(layout.text_position_ids().max()) + 1
        self._check_room(self.new_tokens - 1)
        return ThoughtStore(layout)

    def _read_prompt(self, store: ThoughtStore, input_ids: Tensor) -> Tensor:
        """Last hidden states [B,D] of the prompts, whose keys and values enter the store."""
        model = self.qs.model
        return decode_rows(model, embeddings(model)(input_ids), store.layout.text_position_ids(), store.prefill())[:, -1]

    def _read_token(self, store: ThoughtStore, token: Tensor) -> Tensor:
        """Last hidden states [B,D] of the newest token [B,1], whose keys and values enter the store."""
        self.longest += 1
        self._check_room()
        store.hang(torch.ones_like(token[:, None], dtype=torch.int32), rows=1)
        hidden = decode_step(self.qs.model, embeddings(self.qs.model)(token), store, 0)
        store.keep()
        return hidden[:, 0]

    def _think(self, store: ThoughtStore, thinks: Tensor) -> Tensor:
        """Last hidden states [B,N,D] of the end rows of new thoughts, T + 2 steps at most; off where a row does not think."""
        qs, T = self.qs, self.qs.thought_config.thought_tokens
        store.hang(((T + 2) * thinks.int())[:, None, None].repeat(1, 1, self.N), rows=T + 2)
        thoughts = continue_thoughts(
            qs.model,
            qs.lm_head,
            qs._embedding(qs.start_embedding),
            store,
            self.sequence_ids,
            self.seed,
            T,
            self.temperature,
            qs.thought_config.banned,
            Stop.of(qs.thought_config),
        )
        if self.thinking.on_thoughts is not None:
            on = checks.sampled(thoughts.lengths[:, 0], T) & thinks[:, None, None]
            self.thinking.on_thoughts(thoughts.thought_ids[:, 0].masked_fill(~on, -1))
        return self._end(store, thoughts, thinks)

    def _end(self, store: ThoughtStore, thoughts: Thoughts, thinks: Tensor) -> Tensor:
        """Last hidden states [B,N,D] of the end rows, which are at different steps where thoughts stop themselves."""
        qs, ids, lengths = self.qs, thoughts.thought_ids[:, 0], thoughts.lengths[:, 0]
        embed, end, T = embeddings(qs.model), qs._embedding(qs.end_embedding), ids.shape[-1]
        shortest, longest = T, T
        if thoughts.thought_lengths is not None:
            shortest, longest = (int(x) for x in lengths[thinks].aminmax())
        hidden = None
        # Sampling ran the row of a thought's last token, but for row T. Longer thoughts run theirs again until all have ended.
        for step in range(min(shortest + 1, T), longest + 2):
            ends = (lengths + 1 == step)[..., None]
            last = decode_step(qs.model, torch.where(ends, end, embed(ids[..., min(step, T) - 1])), store, step)
            hidden = last if hidden is None else torch.where(ends, last, hidden)
        assert hidden is not None
        return hidden

    def _mix(self, h_base: Tensor, h_thought: Tensor) -> Tensor:
        """Logits [B,V] from states of the text [B,D] and of thoughts [B,N,D]; log-probabilities where several are averaged."""
        base, thought = h_base.float()[:, None].expand_as(h_thought), h_thought.float()
        logits = mixed_logits(self.qs, base, thought)
        return logits[:, 0] if self.N == 1 else logits.log_softmax(-1).logsumexp(1) - math.log(self.N)

    def _check_room(self, ahead: int = 0) -> None:
        checks.check_room(self.qs.model, self.limits, self.longest + ahead + self.qs.thought_config.thought_tokens + 2)
