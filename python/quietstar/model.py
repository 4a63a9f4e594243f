"""QuietStar: thoughts at every position of a text, around an unmodified Hugging Face causal language model."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from quietstar import anchors as thinking_places
from quietstar import base_model as reference
from quietstar import checks, chunks, objective
from quietstar import generate as generation
from quietstar.checkpoints import native as checkpoint
from quietstar.checkpoints import official
from quietstar.config import AdapterConfig, ThoughtConfig, check_anchor_chunk
from quietstar.explain.report import Report, explain
from quietstar.hf import adapters
from quietstar.hf.architectures import check_architecture
from quietstar.hf.attention import WRAPPED_NAME, hand_on_layout
from quietstar.hf.cache import PackedPass
from quietstar.hf.decoder import decode_rows
from quietstar.hf.graphs import EAGER, Graphs, Runner
from quietstar.hf.lm_head import find_lm_head
from quietstar.hf.modules import backbone, embeddings, unwrapped
from quietstar.hf.verify import verify_once
from quietstar.rollout import Sampling, Thoughts, draw_seed, sample_thoughts, split
from quietstar_kernels import ThoughtLayout

if TYPE_CHECKING:
    from peft import PeftConfig


@dataclass
class QuietStarOutput(ModelOutput):
    """What ``QuietStar.forward`` returns. All fp32; positions where something is undefined hold 0.

    Attributes:
        loss: loss_ce + policy_weight * policy_loss, plus the gate's loss where there is a gate in training.
        loss_ce: base_weight * mean base + mix_weight * mean mixed cross entropy, nats.
        policy_loss: the policy's terms before their weight.
        nll_base: [B,L-1], -log p_base of text token t+1, nats.
        nll_mix: [B,P,N,J], -log p_mix of text token anchor+j+1, nats.
        weight: [B,P,N,J], mixing weight on the thought.
        reward: [B,P,N], nats, no gradient.
        advantage: [B,P,N], no gradient.
        thought_ids: int64 [B,P,N,T].
        thought_lengths: int64 [B,P,N], sampled tokens of each thought; None where all have T.
        logprob: [B,P,N,T], of the thoughts at the policy temperature, no gradient; ``old_logprob`` of further updates.
        base_logprob: [B,P,N,T], of the thoughts as the reference's continuation of the text; None where kl_weight is 0.
        anchors: integer [B,P], the positions that thought; None where all did.
    """

    loss: Tensor = None  # type: ignore[assignment]
    loss_ce: Tensor = None  # type: ignore[assignment]
    policy_loss: Tensor = None  # type: ignore[assignment]
    nll_base: Tensor = None  # type: ignore[assignment]
    nll_mix: Tensor = None  # type: ignore[assignment]
    weight: Tensor = None  # type: ignore[assignment]
    reward: Tensor = None  # type: ignore[assignment]
    advantage: Tensor = None  # type: ignore[assignment]
    thought_ids: Tensor = None  # type: ignore[assignment]
    thought_lengths: Tensor | None = None
    logprob: Tensor = None  # type: ignore[assignment]
    base_logprob: Tensor | None = None
    anchors: Tensor | None = None


class QuietStar(nn.Module):
    """Wraps a causal language model so that it thinks before every token (Quiet-STaR, arXiv 2403.09629).

    The model keeps its class, weights and ``generate``. Calls to it without thoughts run plain sdpa attention (its own eager
    code where it has soft caps or sinks). In training mode thoughts are sampled, in evaluation mode they are greedy.

    Args:
        model: any causal LM whose attention goes through transformers' AttentionInterface, also with adapters of
            ``peft.get_peft_model``: then they are trained, and saved without the model's own weights.
        config: N, T, J and the objective; default ``ThoughtConfig()``.
        tokenizer: only used for ``embedding_init`` and saved beside the model.
        verify: run a small self-test once per architecture: packed rows must equal an ordinary forward.

    Attributes:
        model: the language model.
        mixing_head: Sequential of Linear(2D,D), ReLU, Linear(D,D), ReLU, Linear(D,1); input [text state; thought state].
        start_embedding, end_embedding: Parameter [D]; the decoder sees ``config.embedding_scale`` times these.
        anchor_chunk: how many anchors of each text think at a time, for less memory; None: all, "auto": by free memory.
        graphs: "auto" replays rollouts as CUDA graphs on a GPU, where they can be captured; False turns it off and frees them.
        gate: where to think, for ``anchors="gate"``, else None.
        reference: a copy of the language model, for a ``reference`` that is frozen or ema, else None. A frozen one of a model
            with adapters is the model without them, and needs no copy.
        base: a fingerprint of the weights that the adapters belong to, None where there are no adapters.

    Raises:
        ValueError: a model type that can't think, or one that fails the self-test, with the reason; adapters that thoughts
            can't go through.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ThoughtConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verify: bool = True,
    ):
        super().__init__()
        self.thought_config = config = config or ThoughtConfig()
        self.tokenizer = tokenizer
        check_architecture(model.config)
        adapters.check(model)
        embed = embeddings(model)
        checks.check_special_ids(self.thought_config, len(embed.weight))
        model.set_attn_implementation(WRAPPED_NAME)
        hand_on_layout(model)
        if verify:
            verify_once(unwrapped(model))
        self._take(model)
        device, D = embed.weight.device, self.lm_head.linear.in_features
        last = nn.Linear(D, 1, bias=False, device=device)
        nn.init.zeros_(last.weight)
        self.mixing_head = nn.Sequential(
            nn.Linear(2 * D, D, device=device), nn.ReLU(), nn.Linear(D, D, device=device), nn.ReLU(), last
        )
        vector = initial_embedding(embed, self.thought_config.embedding_init, tokenizer)
        self.start_embedding = nn.Parameter(vector / self.thought_config.embedding_scale)
        self.end_embedding = nn.Parameter(vector / self.thought_config.embedding_scale)
        self.anchor_chunk = None
        self.graphs = "auto"
        self.gate: thinking_places.Gate | None = None
        self.use_config(config)
        # transformers' Trainer writes state_dict() with safetensors, which refuses a tensor under two names.
        self.register_state_dict_post_hook(checkpoint.drop_tied)
        self.register_load_state_dict_pre_hook(checkpoint.add_tied)

    def __copy__(self) -> QuietStar:
        """Another config for the same weights. Of a model that is cut over processes ``copy.copy`` would make a new one."""
        one = object.__new__(type(self))
        one.__dict__.update(self.__dict__)
        return one

    @property
    def config(self) -> Any:
        """The language model's own config."""
        return self.model.config

    @property
    def anchor_chunk(self) -> int | str | None:
        return self._anchor_chunk

    @anchor_chunk.setter
    def anchor_chunk(self, size: int | str | None) -> None:
        check_anchor_chunk(size)
        self._anchor_chunk = size
        self.room: chunks.Room | None = None

    @property
    def graphs(self) -> str | bool:
        return False if self._graphs is None else "auto"

    @graphs.setter
    def graphs(self, use: str | bool) -> None:
        if use is not False and use != "auto":
            raise ValueError(f"graphs must be 'auto' or False, got {use!r}")
        self._graphs = Graphs() if use else None

    def use_config(self, config: ThoughtConfig) -> None:
        """Go on with another config: makes the gate and the reference that it asks for, drops those that it doesn't."""
        self.thought_config = config
        if config.anchors != "gate":
            self.gate = None
        elif self.gate is None:
            self.gate = thinking_places.Gate(len(self.start_embedding), config.anchor_share, self.start_embedding.device)
        if config.reference == "current":
            self.reference = None
        elif self.reference is None and not (config.reference == "frozen" and adapters.can_be_off(self.model)):
            self.reference = reference.copy_model(self.model, averaged=config.reference == "ema")

    def add_adapters(self, config: PeftConfig | AdapterConfig) -> None:
        """Freeze the language model and train adapters in its layers: a ``peft.LoraConfig``, or our short form of one.

        Raises:
            ValueError: peft is not installed, there are adapters already, no layer fits, or thoughts can't go through them.
        """
        self._take(adapters.add(self.model, config))
        self.use_config(self.thought_config)

    def merge_adapters(self) -> None:
        """Fold the adapters into the language model's weights: an ordinary model again. A frozen reference is from now on it.

        Raises:
            ValueError: there are no adapters.
        """
        self._take(adapters.merge(self.model))
        self.use_config(self.thought_config)

    def _take(self, model: PreTrainedModel) -> None:
        """The language model from now on; a reference copied from another is dropped."""
        self.model = model
        self.lm_head = find_lm_head(unwrapped(model))
        self.base = adapters.fingerprint(model) if adapters.there(model) else None
        self.reference = None

    @contextmanager
    def _compared_with(self) -> Iterator[PreTrainedModel]:
        """The language model that rewards and divergence compare with."""
        if self.reference is None and self.thought_config.reference == "frozen":
            with adapters.off(self.model):
                yield self.model
        else:
            yield self.model if self.reference is None else self.reference

    def update_reference(self) -> None:
        """Let an ``ema`` reference follow the weights; after each optimizer step. Others stay as they are."""
        if self.reference is not None and self.thought_config.reference == "ema":
            reference.follow(self.reference, self.model, self.thought_config.reference_decay)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        thought_ids: Tensor | None = None,
        anchors: Tensor | None = None,
        document_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        seed: int | None = None,
        counts: objective.Counts | None = None,
        old_logprob: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> QuietStarOutput:
        """Think, predict J tokens after every thought, and return the loss and its parts.

        Args:
            input_ids: int64 [B,L], L at least J + 2.
            attention_mask: [B,L], 1 on text, 0 on padding, left or right.
            labels: int64 [B,L], -100 where a token is not to be predicted; default input_ids.
            thought_ids: int64 [B,P,N,T]; default sampled here.
            anchors: integer [B,P], positions that think, ascending, -1 in unused places; default all L, and in training those
                of the config's policy.
            document_ids: integer [B,L], for packed documents: nothing sees or predicts another document.
            sequence_ids: integer [B] or [B,L], names each text for sampling; default the row index.
            seed: 64 bits for sampling; default drawn from torch's generator.
            counts: what the losses are divided by, where this batch is a part of a larger one; see ``count_targets``.
            old_logprob: [B,P,N,T], ``logprob`` of the output that these ``thought_ids`` came from; default now.
            thought_lengths: integer [B,P,N], sampled tokens of each thought, 0 to T; the end comes right after the last one.
                Default T for all.

        Raises:
            ValueError: a wrong shape, an id outside the vocabulary, a text that holds the start or end id, one shorter than
                the look-ahead, or one whose thoughts pass the last learned position.
        """
        config = self.thought_config
        if anchors is None and self.training and config.anchors != "all":
            seed = draw_seed() if seed is None else seed
            anchors = self.choose_anchors(input_ids, attention_mask, document_ids, sequence_ids, seed)
        layout = self._layout(input_ids, attention_mask, anchors, document_ids, thought_lengths)
        checks.check_lookahead(layout, config)
        labels = checks.check_labels(labels, input_ids, self.lm_head.linear.out_features)
        if thought_ids is None:
            thoughts = self._sample(layout, input_ids, sequence_ids, seed, greedy=not self.training).cut(thought_lengths)
            thought_ids, thought_lengths = thoughts.thought_ids, thoughts.thought_lengths
            layout = checks.with_lengths(layout, thought_lengths, config)
        else:
            checks.check_thought_ids(thought_ids, thought_lengths, layout, config, self.lm_head.linear.out_features)
        if old_logprob is not None:
            checks.check_tensor("old_logprob", old_logprob, "B,P,N,T", tuple(thought_ids.shape), layout.device)

        targets = objective.make_targets(labels, attention_mask, layout, config.lookahead)
        size = chunks.chunk_size(self, layout)
        if size < layout.P:
            given = chunks.Given(layout, input_ids, thought_ids, thought_lengths, targets)
            text, nll_base, (nll_reference, nll_mix, weight, logprob) = chunks.see_in_chunks(self, given, size)
        else:
            text, thought = self._hidden_states(layout, input_ids, thought_ids)
            nll_base, nll_mix, weight = self._predict(layout, text, thought, targets, thought_lengths)
            nll_reference = objective.at_anchors(nll_base, layout, config.lookahead)
            logprob = self._logprob(thought, thought_ids, thought_lengths)
        if config.reference != "current":
            with self._compared_with() as model:
                nll_reference = reference.text_nll(model, self.lm_head, input_ids, layout, targets)
            nll_reference = objective.at_anchors(nll_reference, layout, config.lookahead)
        reward = objective.rewards(nll_reference, nll_mix, targets, config.reward)
        advantage = torch.where(targets.rewarded[:, :, None], objective.ADVANTAGES[config.advantage](reward), 0)
        counts = counts or objective.count(targets)
        loss_ce = objective.cross_entropy(nll_base, nll_mix, counts, config.base_weight, config.mix_weight)
        base_logprob = None
        if config.kl_weight:
            with self._compared_with() as model:
                parts = [
                    reference.thought_logprob(
                        model, self.lm_head, input_ids, thought_ids[:, places], layout.select(places), config.banned
                    )
                    for places in split(layout.P, size)
                ]
            base_logprob = torch.cat(parts, 1)
        thinks = layout.live()[:, :, :, 0] & targets.rewarded[:, :, None]
        on = checks.sampled(targets.sampled, config.thought_tokens) & thinks[..., None]
        sampled = objective.Sampled(logprob, advantage, on, old_logprob, base_logprob, config.ratio_clip)
        policy_loss = objective.policy_loss(sampled, counts, config.policy_terms)
        loss = loss_ce + config.policy_weight * policy_loss
        if self.gate is not None and self.training:
            probability = self.gate(
                text[torch.arange(layout.B, device=text.device)[:, None], layout.anchor.long().clamp(min=0)]
            )
            loss = loss + objective.gate_loss(probability, reward, targets, config.gate_cost, counts)
        return QuietStarOutput(
            loss=loss,
            loss_ce=loss_ce,
            policy_loss=policy_loss,
            nll_base=nll_base,
            nll_mix=nll_mix,
            weight=weight,
            reward=reward,
            advantage=advantage,
            thought_ids=thought_ids,
            thought_lengths=thought_lengths,
            logprob=torch.where(on, logprob.detach(), 0),
            base_logprob=None if base_logprob is None else torch.where(on, base_logprob, 0),
            anchors=anchors,
        )

    def choose_anchors(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Where the config's ``anchors`` policy thinks: int64 [B,P], ascending, -1 in unused places.

        Only positions whose next token is text of the same document are chosen; ``all`` means all of these. In training a
        gate is drawn from, with random numbers fixed by seed, sequence id and position; in evaluation it opens above 0.5.
        Arguments and errors are those of ``forward``.
        """
        layout = self._layout(input_ids, attention_mask, None, document_ids)
        names = checks.check_sequence_ids(sequence_ids, input_ids)
        return thinking_places.choose(self, layout, input_ids, names, draw_seed() if seed is None else seed)

    def think(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        seed: int | None = None,
        greedy: bool | None = None,
        document_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> Thoughts:
        """Thoughts alone, without a gradient: ``.thought_ids`` [B,P,N,T] and ``.logprob`` at the sampling temperature 1, and
        ``.thought_lengths`` [B,P,N] where they may be shorter than T.

        Args:
            greedy: the most likely token at each step, the same for all N; default in evaluation mode.

        Other arguments and errors are those of ``forward``.
        """
        layout = self._layout(input_ids, attention_mask, anchors, document_ids, thought_lengths)
        greedy = not self.training if greedy is None else greedy
        return self._sample(layout, input_ids, sequence_ids, seed, greedy).cut(thought_lengths)

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int | None = None,
        think: str | float = "always",
        thoughts: int = 1,
        sample_thoughts: bool = False,
        seed: int | None = None,
        sequence_ids: Tensor | None = None,
        on_thoughts: Callable[[Tensor], None] | None = None,
        **usual: Any,
    ) -> Any:
        """Continue texts, with a thought before each new token. What transformers' ``generate`` returns: ids [B,L+new].

        A token costs one row over the kept keys and values of the text, and a thinking one T + 2 more for each thought.

        Args:
            input_ids: int64 [B,L].
            attention_mask: [B,L], 1 on text, 0 on padding, on the left.
            think: "always"; "never", the plain model's own ``generate``; or a number: think where the entropy of the base
                model's prediction exceeds it, nats.
            thoughts: N, whose mixed predictions are averaged as probabilities. Greedy ones are all the same: one is made.
            sample_thoughts: sample them at temperature 1, instead of the likeliest token at each step.
            seed: 64 bits for sampling thoughts; default drawn from torch's generator, which also samples the text's tokens.
            sequence_ids: integer [B], names each text for sampling thoughts; default the row index.
            on_thoughts: called with the thoughts before a token that some text thinks for, int64 [B,N,T]; -1 in texts
                that don't and past the end of a thought.
            usual: what transformers' ``generate`` takes: do_sample, temperature, top_p, eos_token_id, streamer,
                stopping_criteria, logits_processor, generation_config, ... With thoughts there are no beams, no assistant,
                and no cache but our own.

        Raises:
            ValueError: those of ``forward`` on the text; padding on the right; an argument that has no meaning with thoughts.
        """
        thinking = generation.Thinking(think, thoughts, sample_thoughts, seed, sequence_ids, on_thoughts)
        usual |= {"attention_mask": attention_mask} | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
        return generation.generate(self, input_ids, thinking, usual)

    def explain(self, text: str, seed: int | None = None) -> Report:
        """What thinking does to each token of a text: ``.html``, ``.to_dict()``, ``.save(path)``, ``.summary``, ``.tokens``.

        Args:
            text: at least 3 tokens by the tokenizer that was given to QuietStar.
            seed: sample N thoughts before each token; default one greedy thought.

        Raises:
            ValueError: no tokenizer, or a text that is empty, too long for the model's positions or holds the start or end id.
        """
        return explain(self, text, seed)

    def count_targets(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        anchors: Tensor | None = None,
        document_ids: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> objective.Counts:
        """How many terms each mean of the loss on this batch has, without running the model.

        Add up those of all parts of a batch and pass the sum to ``forward`` for each: the parts' losses then add up to the
        loss of the whole batch. Arguments and errors are those of ``forward``.
        """
        layout = self._layout(input_ids, attention_mask, anchors, document_ids, thought_lengths)
        labels = checks.check_labels(labels, input_ids, self.lm_head.linear.out_features)
        return objective.count(objective.make_targets(labels, attention_mask, layout, self.thought_config.lookahead))

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write a checkpoint that ``AutoModelForCausalLM`` loads, with the thought parts beside it; renamed into place.

        Of a model with adapters, those alone are written, as peft does it. Raises ValueError where weights of the base were
        trained, which would be lost.
        """
        checkpoint.save(self, directory)

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, verify: bool = True, base: PreTrainedModel | str | None = None, **kwargs: Any
    ) -> QuietStar:
        """Load what ``save_pretrained`` wrote, or a published checkpoint, from a folder or a hub name.

        Nothing is initialised anew. A published checkpoint doesn't say how long its thoughts are: ``thought_tokens`` is taken
        from its ``max_thoughts``, and ``qs.thought_config`` may be replaced.

        Args:
            base: for a checkpoint of adapters, what they belong to: a model, which gets them, a folder or a hub name; default
                the one that the checkpoint names.
            kwargs: for ``AutoModelForCausalLM.from_pretrained``; dtype defaults to the saved one.

        Raises:
            ValueError: a checkpoint that is damaged, foreign, pickled or of another model or vocabulary; adapters of another
                base.
        """
        model, config, tokenizer, tensors = checkpoint.load(path, base, **kwargs)
        qs = cls(model, config, tokenizer, verify=verify)
        checkpoint.restore(qs, tensors, path)
        return qs

    def save_official(self, directory: str | os.PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint in the published format, which the published code and ``from_pretrained`` load.

        Args:
            max_shard_size: of a weights file, in bytes or as "5GB"; larger ones are cut into shards with an index.

        Raises:
            ValueError: not a Mistral, or a model that mixes log-probabilities: the published code knows neither.
        """
        official.save(self, directory, max_shard_size)

    def load_official_state_dict(self, state: Mapping[str, Tensor], embedding_scale: float = 100.0) -> None:
        """Load a published checkpoint's tensors by their published names, all of them or none.

        Base weights, ``talk_head.0.{0,2,4}.*``, ``start_embedding`` and ``end_embedding`` [2,D] (row 0 is used).

        Args:
            embedding_scale: the published model's factor from stored to effective vector.

        Raises:
            ValueError: a name that is missing or unknown, or a shape that differs.
        """
        official.load_state_dict(self, state, embedding_scale)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **options: Any) -> None:
        """Recompute the decoder's layers in backward instead of keeping their activations; arguments as in transformers."""
        # transformers renames the method: the new name where there is one, since the old one warns.
        enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
        enable(gradient_checkpointing_kwargs, **options)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs: dict | None = None, **options: Any) -> None:
        """The newer name of ``gradient_checkpointing_enable``, which transformers' Trainer calls."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        """Keep activations again."""
        self.model.gradient_checkpointing_disable()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` for the language model's decoder, in place; arguments as there.

        One graph serves all steps of a rollout. What stands around the decoder looks at values and stays as it is:
        ``torch.compile(qs)`` gives the same numbers with breaks at these places.
        """
        # Text, first rows, other rows and both at once; in training, evaluation and generation; at one length and at any.
        # Older versions of torch have one limit for everything.
        limit = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
        backbone(self.model).compile(*args, **{**limit, **kwargs})

    def _layout(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        anchors: Tensor | None,
        document_ids: Tensor | None,
        thought_lengths: Tensor | None = None,
    ) -> ThoughtLayout:
        config = self.thought_config
        checks.check_text(input_ids, attention_mask, config, embeddings(self.model))
        layout = checks.make_layout(input_ids, attention_mask, anchors, document_ids, config)
        checks.check_positions(self.model, layout)
        return checks.with_lengths(layout, thought_lengths, config)

    def _sample(
        self, layout: ThoughtLayout, input_ids: Tensor, sequence_ids: Tensor | None, seed: int | None, greedy: bool
    ) -> Thoughts:
        config, size = self.thought_config, chunks.chunk_size(self, layout)
        return sample_thoughts(
            self.model,
            self.lm_head,
            self._embedding(self.start_embedding),
            input_ids,
            layout,
            checks.check_sequence_ids(sequence_ids, input_ids),
            draw_seed() if seed is None else seed,
            Sampling.of(config, temperature=0.0 if greedy else 1.0),
            anchor_chunk=size,
            run=self._runner("anchor_chunk asks for less memory than a graph keeps" if size < layout.P else None),
        )

    def _runner(self, but: str | None = None) -> Runner:
        """Runs what may be a graph, unless there is a reason ``but``."""
        return EAGER if self._graphs is None else self._graphs.runner(self.model, self.start_embedding.device, but)

    def _embedding(self, parameter: Tensor) -> Tensor:
        """The vector that the decoder sees, in its dtype."""
        return (self.thought_config.embedding_scale * parameter).to(embeddings(self.model).weight.dtype)

    def _hidden_states(self, layout: ThoughtLayout, input_ids: Tensor, thought_ids: Tensor) -> tuple[Tensor, Tensor]:
        """One packed forward: last hidden states of the text [B,L,D] and of the thought rows [B,P,N,S,D]."""
        embeds = torch.cat([embeddings(self.model)(input_ids), self._thought_rows(layout, input_ids, thought_ids)], 1)
        hidden = decode_rows(self.model, embeds, layout.position_ids(), PackedPass(layout))
        text, thought = hidden.split([layout.L, layout.R], 1)
        return text, thought.unflatten(1, (layout.P, layout.N, layout.S))

    def _thought_rows(self, layout: ThoughtLayout, input_ids: Tensor, thought_ids: Tensor) -> Tensor:
        """Embeddings [B,R,D] of start, sampled tokens, end and the text that follows, whatever the lengths."""
        pad, T = checks.pad_id(self.model.config), self.thought_config.thought_tokens
        tokens = layout.token_ids(input_ids, thought_ids, pad, pad, pad)[:, layout.L :]
        tokens = tokens.unflatten(1, (layout.P, layout.N, layout.S))
        end = (layout.length.long() - self.thought_config.lookahead).clamp(min=1)[..., None]  # [B,P,N,1]
        s = torch.arange(layout.S, device=tokens.device)
        # A shorter thought leaves out its last sampled tokens.
        tokens = tokens.gather(3, torch.where(s < end, s, s + T + 1 - end).clamp(max=layout.S - 1))
        embeds = torch.where((s == end)[..., None], self._embedding(self.end_embedding), embeddings(self.model)(tokens))
        return torch.where((s == 0)[:, None], self._embedding(self.start_embedding), embeds).flatten(1, 3)

    def _predict(
        self,
        layout: ThoughtLayout,
        text: Tensor,
        thought: Tensor,
        targets: objective.Targets,
        thought_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """nll_base [B,L-1], nll_mix [B,P,N,J] and the mixing weight [B,P,N,J]."""
        h_base = self._base_states(layout, text)
        return self._mix(text[:, :-1], targets.base, h_base, self._ahead(thought, thought_lengths), targets.mix)

    def _base_states(self, layout: ThoughtLayout, text: Tensor) -> Tensor:
        """Text states [B,P,J,D] at the positions that predict the targets of each anchor."""
        steps = torch.arange(self.thought_config.lookahead, device=text.device)
        index = (layout.anchor.long()[:, :, None] + steps).clamp(0, layout.L - 1)  # [B,P,J]
        return text[torch.arange(layout.B, device=text.device)[:, None, None], index]

    def _ahead(self, thought: Tensor, thought_lengths: Tensor | None) -> Tensor:
        """States [B,P,N,J,D] of the end rows and those behind, from all rows [B,P,N,S,D]."""
        if thought_lengths is None:
            return thought[:, :, :, self.thought_config.thought_tokens + 1 :]
        steps = torch.arange(1, self.thought_config.lookahead + 1, device=thought.device)
        rows = thought_lengths.long()[..., None] + steps
        return thought.gather(3, rows[..., None].expand(*rows.shape, thought.shape[-1]))

    def _logprob(self, thought: Tensor, thought_ids: Tensor, thought_lengths: Tensor | None) -> Tensor:
        """Log-probabilities [B,P,N,T] of the sampled tokens at the policy temperature; 0 past the end of a thought."""
        config = self.thought_config
        if thought_lengths is not None:
            on = checks.sampled(thought_lengths, config.thought_tokens)
            thought_ids = torch.where(on, thought_ids, objective.IGNORED)
        states = thought[:, :, :, : config.thought_tokens]
        return self.lm_head.logprob(states, thought_ids, config.policy_temperature, config.banned)

    def _mix(
        self, predicting: Tensor, base_targets: Tensor, h_base: Tensor, h_thought: Tensor, mix_targets: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses of the base model at ``predicting`` [...,D] and of the mix [B,P,N,J], and the mixing weight [B,P,N,J].

        Args:
            base_targets: [...], those of ``predicting``.
            h_base: [B,P,J,D].
            h_thought: [B,P,N,J,D].
            mix_targets: [B,P,N,J].
        """
        h_thought = h_thought.float()
        h_base = h_base.float()[:, :, None].expand_as(h_thought)
        weight = self._weight(h_base, h_thought)
        if self.thought_config.mixing == "logits":
            # Base and mix share one call: with w = 0 their difference must be exactly nothing, for 1e6 multiplies it.
            mixed = (1 - weight) * h_base + weight * h_thought
            hidden = torch.cat([predicting.flatten(0, -2).float(), mixed.flatten(0, 3)])
            logprob = self.lm_head.logprob(hidden, torch.cat([base_targets.flatten(), mix_targets.flatten()]))
            base, mix = (-logprob).split([base_targets.numel(), mix_targets.numel()])
            return base.view_as(base_targets), mix.view_as(mix_targets), weight[..., 0]
        weight = weight[..., 0]
        base = -self.lm_head.logprob(predicting, base_targets)
        mix_base = -self.lm_head.logprob(h_base, mix_targets)
        mix = (1 - weight) * mix_base - weight * self.lm_head.logprob(h_thought, mix_targets)
        return base, mix, weight

    def _weight(self, h_base: Tensor, h_thought: Tensor) -> Tensor:
        """Mixing weight on the thought, fp32 [...,1], from two fp32 hidden states [...,D]."""
        with torch.autocast(h_base.device.type, enabled=False):
            weight = self.mixing_head(torch.cat([h_base, h_thought], -1).to(next(self.mixing_head.parameters()).dtype)).float()
        return weight if self.thought_config.mixing == "logits" else torch.sigmoid(weight)


@torch.no_grad()
def initial_embedding(embed: nn.Embedding, init: int | str | None, tokenizer: PreTrainedTokenizerBase | None) -> Tensor:
    """The vector, fp32 [D], that start and end begin with: of a token id, of text, of "---", or the mean embedding."""
    if init is None and tokenizer is not None:
        init = "---"
    ids: Sequence[int]
    if isinstance(init, str):
        if tokenizer is None:
            raise ValueError(f"embedding_init: text {init!r} needs a tokenizer; pass one, or a token id")
        ids = tokenizer(init, add_special_tokens=False)["input_ids"]
        if not ids:
            raise ValueError(f"embedding_init: the tokenizer gives no tokens for {init!r}")
    elif init is not None:
        if not 0 <= init < len(embed.weight):
            raise ValueError(f"embedding_init must be from 0 to V-1={len(embed.weight) - 1}, got {init}")
        ids = [init]
    else:
        ids = range(len(embed.weight))
    chunks = torch.as_tensor(list(ids), device=embed.weight.device).split(4096)
    return torch.stack([embed(chunk).float().sum(0) for chunk in chunks]).sum(0) / len(ids)
