"""QuietStar wraps an unmodified Hugging Face causal language model so that it thinks at every position of a text."""

from __future__ import annotations

import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quietstar import checks, objective
from quietstar.checkpoints import native, official
from quietstar.checkpoints.contents import Contents, TrainedOn
from quietstar.checkpoints.places import checkpoint_of
from quietstar.config import AdapterConfig, ThoughtConfig
from quietstar.hf import adapters
from quietstar.hf.architectures import check_model
from quietstar.hf.attention import WRAPPED_NAME, hand_on_layout
from quietstar.hf.ends import stopping_at_ends
from quietstar.hf.fused_layers import fuse_layers
from quietstar.hf.graphs import EAGER, Graphs
from quietstar.hf.lm_head import LMHead, find_lm_head
from quietstar.hf.modules import backbone, embeddings, initial_embedding, unmark_gguf, unwrapped
from quietstar.hf.verify import verify_once
from quietstar.texts import Texts, check_texts
from quietstar.thinking import base_model
from quietstar.thinking.anchors import Candidates, Gate, choose
from quietstar.thinking.chunks import AnchorChunk, predict_in_chunks
from quietstar.thinking.cohorts import sample_text_thoughts
from quietstar.thinking.forward import MixingHead, PackedInputs, Predictions, QuietStarOutput, Thinker
from quietstar.thinking.generate import Thinking, generate
from quietstar.thinking.matches import matches
from quietstar.thinking.rollout import RolloutOptions, Thoughts, draw_seed, sample_vector_thoughts
from quietstar.thinking.text_thoughts import Marks
from quietstar_kernels import ThoughtLayout
from quietstar_kernels.checks import FLOATS, file_path, flag, instance, integer, mapping, number, refusal, tensor

if TYPE_CHECKING:
    from peft import PeftConfig
    from typing_extensions import Self

# What TRL's trainers read of a model, before they give it a loss of their own.
OF_TRL = ("generation_config", "add_model_tags")


class QuietStar(nn.Module):
    """Wraps a causal language model so that it thinks before every token (Quiet-STaR, arXiv 2403.09629).

    The model keeps its class, weights and ``generate``. Calls to it without thoughts use plain sdpa attention, or its own
    eager code where it has soft caps or sinks. Thoughts are sampled in training mode and greedy in evaluation mode.

    Args:
        model: any causal LM whose attention goes through transformers' AttentionInterface. With adapters from
            ``peft.get_peft_model``, these are trained, and saved without the model's own weights.
        config: N, T, J and the objective; default ``ThoughtConfig()``.
        tokenizer: only used for ``embedding_init``, and saved with the model.
        verify: once per architecture, check on a small input that packed rows equal an ordinary forward.

    Attributes:
        model: the language model.
        mixing_head: Sequential of Linear(2D,D), ReLU, Linear(D,D), ReLU, Linear(D,1); input [text state; thought state].
        start_embedding, end_embedding: Parameter [D]; the decoder sees ``config.embedding_scale`` times these.
        anchor_chunk: how many anchors of each text think at a time, to save memory; None is all, "auto" by free memory.
        graphs: "auto" replays rollouts, and in ``train`` forward and backward, as CUDA graphs on a GPU, where they can be
            captured; False turns it off and frees them.
        gate: where to think, for ``anchors="gate"``, else None.
        base_model: a copy of the language model, for a ``base_model`` that is ema, or frozen without adapters; else None.
        base: a fingerprint of the weights that the adapters belong to, None where there are no adapters.
        trained_on: the texts of the training runs so far, written by ``quietstar train`` and saved with the model.

    Raises:
        ValueError: a model type that can't think, or that fails the check, with the reason; adapters that thoughts can't
            go through.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: ThoughtConfig | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        verify: bool = True,
    ):
        super().__init__()
        check_model(model)
        adapters.check(model)
        unmark_gguf(unwrapped(model))
        embed = embeddings(model)
        self.thought_config = config = checks.check_config(ThoughtConfig() if config is None else config, len(embed.weight))
        self.tokenizer = None if tokenizer is None else instance("tokenizer", tokenizer, PreTrainedTokenizerBase)
        with suppress(NotImplementedError):  # a tokenizer of one's own may have no length
            if tokenizer is not None and len(tokenizer) > len(embed.weight):
                cure = "model.resize_token_embeddings(len(tokenizer)) adds rows"
                sizes = f"the tokenizer has {len(tokenizer)} tokens and the model rows for {len(embed.weight)}"
                warnings.warn(f"QuietStar: {sizes}, so the others fail: {cure}", stacklevel=2)
        model.set_attn_implementation(WRAPPED_NAME)
        hand_on_layout(model)
        fuse_layers(model)
        if flag("verify", verify):
            verify_once(unwrapped(model))
        self._take(model)
        self.mixing_head = MixingHead(self.lm_head.linear.in_features, embed.weight.device)
        vector = initial_embedding(embed, config.embedding_init, tokenizer) / config.embedding_scale
        self.start_embedding = nn.Parameter(vector)
        self.end_embedding = nn.Parameter(vector.clone())
        self.anchor_chunk = None
        self.graphs = "auto"
        self.gate: Gate | None = None
        self.trained_on: tuple[TrainedOn, ...] = ()
        self.use_config(config)
        # transformers' Trainer writes state_dict() with safetensors, which refuses a tensor under two names.
        self.register_state_dict_post_hook(native.drop_tied)
        self.register_load_state_dict_pre_hook(native.add_tied)

    def with_config(self, config: ThoughtConfig) -> QuietStar:
        """The same weights, gate and base model under another config; nothing is copied."""
        one = object.__new__(type(self))  # copy.copy would make a new model of one that is sharded over processes
        vars(one).update({name: x for name, x in vars(self).items() if name != "forward"})  # accelerate's, bound to this one
        one.thought_config = checks.check_config(config, len(embeddings(self.model).weight))
        return one

    @property
    def thinker(self) -> Thinker:
        """The parts that functions below the wrapper work with; it shares every weight."""
        vectors = self.start_embedding, self.end_embedding
        marks = Marks.of(self.thought_config, self.tokenizer, self.model)
        return Thinker(self.model, self.lm_head, self.mixing_head, *vectors, self.thought_config, marks)

    @property
    def lm_head(self) -> LMHead:
        """The language model's output layer, with its scale and soft cap."""
        return self._lm_head.of(self.model)

    @property
    def config(self) -> Any:
        """The language model's own config."""
        return self.model.config

    @property
    def anchor_chunk(self) -> int | str | None:
        return self._anchor_chunk.setting

    @anchor_chunk.setter
    def anchor_chunk(self, size: int | str | None) -> None:
        self._anchor_chunk = AnchorChunk(size)

    @property
    def graphs(self) -> str | bool:
        return False if self._graphs is None else "auto"

    @graphs.setter
    def graphs(self, use: str | bool) -> None:
        if use is not False and not (isinstance(use, str) and use == "auto"):
            raise refusal("graphs", "'auto' or False", use)
        self._graphs = Graphs() if use else None

    def use_config(self, config: ThoughtConfig) -> None:
        """Switch to another config: create the gate and the base model that it asks for, drop those that it doesn't."""
        self.thought_config = checks.check_config(config, len(embeddings(self.model).weight))
        if config.anchors != "gate":
            self.gate = None
        elif self.gate is None:
            self.gate = Gate(len(self.start_embedding), config.anchor_share, self.start_embedding.device)
        marks = Marks.of(config, self.tokenizer, self.model)  # raises ValueError for strings without tokens
        for name, ids in {} if marks is None else {"thought_start": marks.start, "thought_end": marks.end}.items():
            text = getattr(config, name)  # of the usual <think>, several tokens are usual, too
            if len(ids) > 1 and re.fullmatch(r"[<\[]\S+[>\]]", text) and text not in ("<think>", "</think>"):
                cure = "add it to tokenizer and model before, or name a token that is there"
                warnings.warn(f"QuietStar: {name}={text!r} is {len(ids)} tokens, none of the vocabulary: {cure}", stacklevel=3)
        # What no loss reaches has no gradient: DistributedDataParallel would wait for one.
        self.mixing_head.requires_grad_(config.mixing != "none")
        self.start_embedding.requires_grad_(not config.written)
        self.end_embedding.requires_grad_(not config.written and config.mix_weight > 0)
        if config.reward == "match" and self.tokenizer is None:
            text = "without a tokenizer, reward='match' compares a thought's last token with the text's next one"
            warnings.warn(f"QuietStar: {text}", stacklevel=3)
        if config.base_model == "current":
            self.base_model = None
        elif self.base_model is None and not (config.base_model == "frozen" and adapters.can_be_off(self.model)):
            self.base_model = base_model.copy_model(self.model, averaged=config.base_model == "ema")

    def add_adapters(self, config: PeftConfig | AdapterConfig) -> None:
        """Freeze the language model and train adapters in its layers: a ``peft.LoraConfig``, or our short form of one.

        Raises:
            ValueError: peft is not installed, there are adapters already, no layer fits, or thoughts can't go through them.
        """
        self._take(adapters.add(self.model, config))
        self.use_config(self.thought_config)

    def merge_adapters(self) -> None:
        """Fold the adapters into the language model's weights: an ordinary model again. A frozen base model is from now on it.

        Raises:
            ValueError: there are no adapters.
        """
        self._take(adapters.merge(self.model))
        self.use_config(self.thought_config)

    def _take(self, model: PreTrainedModel) -> None:
        """The language model from now on; a base model copied from another is dropped."""
        self.model = model
        self._lm_head = find_lm_head(unwrapped(model))
        self.base = adapters.fingerprint(model) if adapters.there(model) else None
        self._rows = len(embeddings(model).weight)
        self.base_model = None

    @contextmanager
    def _compared_with(self) -> Iterator[PreTrainedModel]:
        """The language model that rewards and divergence compare with."""
        rows, own = (len(embeddings(x or self.model).weight) for x in (self.base_model, self.model))
        if rows != own:
            raise ValueError(
                f"base_model: its copy has {rows} tokens and the model {own}: "
                "add tokens before, or to both: qs.base_model.resize_token_embeddings"
            )
        if self.base_model is None and self.thought_config.base_model == "frozen":
            with adapters.off(self.model):
                yield self.model
        else:
            yield self.model if self.base_model is None else self.base_model

    def update_base_model(self) -> None:
        """Let an ``ema`` base model follow the weights; after each optimizer step. Others stay as they are."""
        if self.base_model is not None and self.thought_config.base_model == "ema":
            base_model.follow(self.base_model, self.model, self.thought_config.base_model_decay)

    def texts(
        self,
        input_ids: Tensor | Texts,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        thought_ids: Tensor | None = None,
        anchors: Tensor | None = None,
        document_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        seed: int | None = None,
        old_logprob: Tensor | None = None,
        thought_lengths: Tensor | None = None,
        chooses: bool = True,
    ) -> Texts:
        """Check a batch once and lay it out: ``forward``, ``think`` and ``count_targets`` take the result in place of tensors.

        Arguments and errors are those of ``forward``. The tensors may be on the CPU whatever the model is on: ``Texts.to``
        moves a batch that was checked there.

        Args:
            chooses: False for all positions where no anchors are given, even in training.
        """
        given = {"attention_mask": attention_mask, "labels": labels, "anchors": anchors, "document_ids": document_ids}
        given |= {"sequence_ids": sequence_ids, "thought_ids": thought_ids, "thought_lengths": thought_lengths}
        given |= {"old_logprob": old_logprob}
        config = self.thought_config
        if isinstance(input_ids, Texts):
            return input_ids.check_unchanged(config, given)
        vocabulary = self.lm_head.linear.out_features
        final, chooses = chooses, chooses and self.training and config.anchors != "all" and anchors is None
        texts = check_texts({"input_ids": input_ids} | given, self.model, config, self.thinker.most_rows, vocabulary, chooses)
        if chooses:
            texts = texts.with_anchors(self._chosen(texts, checks.check_seed(seed)))
        texts = texts.with_thoughts(config, thought_ids, thought_lengths, old_logprob)
        return self.with_tables(texts) if final and not (thought_ids is None and config.stops) else texts

    def with_tables(self, texts: Texts) -> Texts:
        """With everything that a forward reads of a batch and no model changes: where anchors and lengths are known, and where
        the texts are. On the CPU that spares a GPU some hundred launches in each forward.
        """
        return texts.with_tables(self.thought_config, checks.pad_id(self.config))

    def forward(
        self,
        input_ids: Tensor | Texts,
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
            input_ids: int64 [B,L], L at least J + 2; or what ``texts`` made of all tensors below.
            attention_mask: [B,L], 1 on text, 0 on padding, left or right.
            labels: int64 [B,L], -100 where a token is not to be predicted; default input_ids.
            thought_ids: int64 [B,P,N,T]; default sampled here.
            anchors: integer [B,P], positions that think, ascending, -1 in unused places; default all L, and in training those
                that the config chooses.
            document_ids: integer [B,L], of packed documents, which neither see nor predict each other.
            sequence_ids: integer [B] or [B,L], identifies each text for sampling; default the row index.
            seed: 64 bits for sampling; default drawn from torch's generator.
            counts: what the losses are divided by where this batch is part of a larger one; see ``count_targets``.
            old_logprob: [B,P,N,T], ``logprob`` of the output that these ``thought_ids`` came from; default the current one.
            thought_lengths: integer [B,P,N], sampled tokens of each thought, 0 to T, before its end; default T for all.

        Raises:
            ValueError: a wrong type or shape, an id outside the vocabulary, a text that holds the start or end id, one
                shorter than the look-ahead, or one whose thoughts pass the last learned position. On a GPU nothing waits for
                values: a wrong one is an assertion of the device.
        """
        # 1. The texts, checked, and where they think.
        config, seed = self.thought_config, checks.check_seed(seed)
        if seed is None and anchors is None and self.training and config.anchors != "all":
            seed = draw_seed()  # one for anchors and thoughts
        texts = self.texts(
            input_ids,
            attention_mask,
            labels,
            thought_ids,
            anchors,
            document_ids,
            sequence_ids,
            seed,
            old_logprob,
            thought_lengths,
        )
        embed = embeddings(self.model)
        texts.check_device(embed.weight.device)
        if texts.layout.L < config.lookahead + 2:
            needed = f"J+2={config.lookahead + 2} tokens to look {config.lookahead} ahead"
            raise ValueError(f"input_ids must hold at least {needed}, got L={texts.layout.L}")

        # 2. The thoughts, sampled unless they are given.
        texts = self.with_tables(self.with_sampled(texts, seed))
        layout, thought_ids, thought_lengths, tables = texts.layout, texts.thought_ids, texts.thought_lengths, texts.tables
        assert thought_ids is not None and tables is not None
        targets, on = tables.targets, tables.targets.on

        # 3. One packed pass, which predicts the text without and with each thought.
        drawn, broken = thought_ids.clamp(min=0), thought_ids < 0  # -1 marks logits that were not finite
        broken = broken if thought_lengths is None else broken & on
        inputs = PackedInputs(layout, texts.input_ids, drawn, thought_lengths, tables)
        if config.reward == "match":
            previous = texts.input_ids.gather(1, layout.anchor.long().clamp(min=0))
            found = matches(drawn, targets.sampled, previous, tables.following, self.tokenizer) & targets.rewarded[..., None]
            reward = found.to(torch.promote_types(embed.weight.dtype, torch.float32))
            # Known before the packed pass, which can leave out anchors whose thoughts all earn the same.
            if config.written and not config.mix_weight:
                inputs = inputs.without(objective.dead_groups(reward, targets))
        predicted = self.predict(inputs)

        # 4. The base model's predictions, with which rewards and divergence compare.
        nll_compared, base_logprob = predicted.nll_compared, None
        with self._compared_with() as model:
            if config.base_model != "current":
                nll_compared = base_model.target_nll(model, self.lm_head, texts.input_ids, layout, tables)
            if config.kl_weight:
                base_logprob = base_model.thought_logprob(
                    model, self.lm_head, texts.input_ids, inputs.thought_ids, layout, config.banned, self.chunk_size(layout)
                )

        # 5. Rewards, and the advantage of each thought over the others at its anchor.
        if config.reward != "match":
            reward = objective.rewards(nll_compared, predicted.nll_mix, targets, config.reward, config.lookahead_discount)
        dead = objective.dead_groups(reward, targets)
        advantage = objective.advantages(reward, dead, config.advantage)

        # 6. The loss: cross entropy, the policy's terms and a gate's.
        counts = tables.divisors if counts is None else instance("counts", counts, objective.Counts).divisors()
        loss_ce = objective.cross_entropy(predicted.nll_base, predicted.nll_mix, counts, config.base_weight, config.mix_weight)
        clip = (config.ratio_clip, config.ratio_clip_high)
        policy_inputs = objective.Sampled(predicted.logprob, advantage, on, texts.old_logprob, base_logprob, clip)
        policy_loss = objective.policy_loss(policy_inputs, counts, config.policy_terms, config.token_mean)
        loss = torch.add(loss_ce, policy_loss, alpha=config.policy_weight)
        if self.gate is not None and self.training:
            loss = loss + objective.gate_loss(
                self.gate.at_anchors(predicted.text, layout), reward, targets, config.gate_cost, counts
            )
        return QuietStarOutput(
            loss=loss.masked_fill(broken.any(), torch.nan),
            loss_ce=loss_ce,
            policy_loss=policy_loss,
            nll_base=predicted.nll_base,
            nll_mix=predicted.nll_mix,
            weight=predicted.weight,
            reward=reward,
            advantage=advantage,
            thought_ids=thought_ids,
            thought_lengths=thought_lengths,
            logprob=predicted.logprob.detach() * on,
            base_logprob=None if base_logprob is None else base_logprob * on,
            anchors=texts.anchors,
            dead=dead,
            leaks=objective.leaks(thought_ids, None if thought_lengths is None else on, tables.following),
        )

    def choose_anchors(
        self,
        input_ids: Tensor | Texts,
        attention_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Where the config's ``anchors`` says to think: int64 [B,P], ascending, -1 in unused places.

        Only positions whose next token is text of the same document are chosen; ``all`` means all of these. In training a
        gate is sampled from, with random numbers fixed by seed, sequence id and position; in evaluation it opens above 0.5.
        Arguments and errors are those of ``forward``.
        """
        given: dict[str, Any] = {"document_ids": document_ids, "sequence_ids": sequence_ids}
        texts, seed = self.texts(input_ids, attention_mask, chooses=False, **given), checks.check_seed(seed)
        return self._chosen(texts, seed)

    def _chosen(self, texts: Texts, seed: int | None) -> Tensor:
        seed = draw_seed() if seed is None else seed
        return choose(Candidates(self.thinker, self.gate, texts, seed, self.training, self.tokenizer))

    def think(
        self,
        input_ids: Tensor | Texts,
        attention_mask: Tensor | None = None,
        anchors: Tensor | None = None,
        seed: int | None = None,
        greedy: bool | None = None,
        document_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> Thoughts:
        """Only the thoughts, without a gradient: ``.thought_ids`` [B,P,N,T], ``.logprob`` at the config's temperature, and
        ``.thought_lengths`` [B,P,N] where they may be shorter than T.

        Args:
            greedy: the most likely token at each step, the same for all N; default in evaluation mode.

        Other arguments and errors are those of ``forward``; and a ValueError if the model's logits are not finite.
        """
        given: dict[str, Any] = {"anchors": anchors, "document_ids": document_ids, "thought_lengths": thought_lengths}
        texts = self.texts(input_ids, attention_mask, sequence_ids=sequence_ids, chooses=False, **given)
        seed = checks.check_seed(seed)
        texts.check_device(embeddings(self.model).weight.device)
        thoughts = self.sample(texts, seed, not self.training if greedy is None else flag("greedy", greedy))
        return thoughts.cut(texts.thought_lengths).checked(self.model, texts.layout)

    def sample(self, texts: Texts, seed: int | None, greedy: bool, anchor_chunk: int | None = None) -> Thoughts:
        """The thoughts of ``think``; ``anchor_chunk`` anchors of a text think at a time, by default as many as the model's."""
        thinker, P, N = self.thinker, texts.layout.P, texts.layout.N
        size = self.chunk_size(texts.layout) if anchor_chunk is None else anchor_chunk
        seed, temperature = draw_seed() if seed is None else seed, 0.0 if greedy else self.thought_config.temperature
        if thinker.marks is not None:
            return sample_text_thoughts(thinker, texts, seed, temperature, live=None if size >= P else size * N)
        eager_because = "anchor_chunk asks for less memory than a graph keeps" if size < P else None
        run = EAGER if self._graphs is None else self._graphs.runner(self.model, self.start_embedding.device, eager_because)
        how = RolloutOptions.of(self.thought_config, temperature)
        return sample_vector_thoughts(self.model, self.lm_head, thinker.start, texts, seed, how, size, run)

    def with_sampled(self, texts: Texts, seed: int | None) -> Texts:
        """The texts with the thoughts that ``forward`` samples at their anchors, unless they have some."""
        if texts.thought_ids is not None:
            return texts
        thoughts = self.sample(texts, seed, greedy=not self.training).cut(texts.thought_lengths)
        return texts.with_thoughts(self.thought_config, thoughts.thought_ids, thoughts.thought_lengths, texts.old_logprob)

    def graphs_of_steps(self) -> Graphs | None:
        """Graphs for forward and backward of training steps; None where ``graphs`` is False."""
        return None if self._graphs is None else self._graphs.apart("steps")

    def predict(self, inputs: PackedInputs) -> Predictions:
        """The differentiable pass of ``forward``, in chunks of anchors if ``anchor_chunk`` is set."""
        thinker, size = self.thinker, self.chunk_size(inputs.layout)
        if size < inputs.layout.P:
            return predict_in_chunks(thinker, inputs, size)
        return thinker.predict(inputs, *thinker.packed_states(*inputs[:4], inputs.tables.rows))

    def chunk_size(self, layout: ThoughtLayout) -> int:
        """How many anchors of each text of a layout think at a time, by ``anchor_chunk``."""
        return self._anchor_chunk.size(self.thinker, layout, self.parameters())

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
        **options: Any,
    ) -> Any:
        """Continue texts, with a thought before each new token. Returns what transformers' ``generate`` does: ids [B,L+new].

        A token costs one row over the cached keys and values of the text, and T + 2 more for each thought before it. Tokens
        behind a thought that is made once cost a forward of everything before them.

        Args:
            input_ids: int64 [B,L].
            attention_mask: [B,L], 1 on text, 0 on padding, on the left.
            think: "always"; "once", before the first new token, behind which the others are read as the next J are in training;
                "never", the plain model's own ``generate``; or a number: think where the entropy of the base model's prediction
                exceeds it, nats.
            thoughts: N, whose mixed predictions are averaged as probabilities. Greedy thoughts are identical, so only one is
                computed.
            sample_thoughts: sample them at temperature 1, instead of the likeliest token at each step.
            seed: 64 bits for sampling thoughts; default drawn from torch's generator, which also samples the text's tokens.
            sequence_ids: integer [B], identifies each text for sampling thoughts; default the row index.
            on_thoughts: called with the thoughts before a token that some text thinks for, int64 [B,N,T]; -1 in texts
                that don't and past the end of a thought.
            options: of transformers' ``generate``: do_sample, temperature, top_p, eos_token_id, streamer,
                stopping_criteria, logits_processor, generation_config, ... Thoughts allow no beams, assistants or other caches.
                A text ends where the model's generation config says, with the tokenizer's end-of-text token, and with what
                ends an answer in its chat template; ``eos_token_id`` replaces them all.

        Raises:
            ValueError: those of ``forward`` on the text; padding on the right; an option that has no meaning with thoughts.
        """
        thinking = Thinking(think, thoughts, sample_thoughts, seed, sequence_ids, on_thoughts)
        options |= {"attention_mask": attention_mask} | ({} if max_new_tokens is None else {"max_new_tokens": max_new_tokens})
        options = stopping_at_ends(options, self.tokenizer, self.model)
        return generate(self.thinker, self._graphs, input_ids, thinking, options)

    def count_targets(
        self,
        input_ids: Tensor | Texts,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        anchors: Tensor | None = None,
        document_ids: Tensor | None = None,
        thought_lengths: Tensor | None = None,
    ) -> objective.Counts:
        """Count the terms of each mean of the loss on this batch, without running the model.

        Add up the counts of all parts of a batch and pass the sum to ``forward`` for each part: the parts' losses then add up
        to the loss of the whole batch. Arguments and errors are those of ``forward``.
        """
        given: dict[str, Any] = {"anchors": anchors, "document_ids": document_ids, "thought_lengths": thought_lengths}
        tables = self.with_tables(self.texts(input_ids, attention_mask, labels, chooses=False, **given)).tables
        assert tables is not None
        return tables.counts

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
        getattr(self.model, "activation_checkpointing_disable", self.model.gradient_checkpointing_disable)()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` for the language model's decoder, in place; arguments as there.

        One graph serves all steps of a rollout. The code around the decoder is not compiled. CUDA graphs are captured anew.
        """
        # Text, first rows, other rows and both at once; in training, evaluation and generation; at one length and at any.
        # Older versions of torch have a single limit.
        limit = {"recompile_limit": 64} if "recompile_limit" in inspect.signature(torch.compile).parameters else {}
        backbone(self.model).compile(*args, **{**limit, **kwargs})

    def contents(self) -> Contents:
        """What a checkpoint of this model holds; the tensors are the parameters themselves."""
        if self.base is not None and (rows := len(embeddings(self.model).weight)) != self._rows:
            raise ValueError(
                f"the base had {self._rows} tokens when it got its adapters and has {rows} now, which are not saved with "
                "them: add tokens and save the model first, or merge_adapters"
            )
        tensors: dict[str, Tensor] = {name: x for name, x in self.named_parameters() if not name.startswith("model.")}
        return Contents(self.model, self.thought_config, self.tokenizer, tensors, self.base, self.trained_on)

    def save_pretrained(
        self, directory: str | os.PathLike, max_shard_size: int | str = "50GB", safe_serialization: bool = True
    ) -> None:
        """Write a checkpoint that ``AutoModelForCausalLM`` loads, with the thought parts beside it; renamed into place.

        Of a model with adapters, only these are written, as peft does it. Other files of the folder are kept, except the
        weights of another checkpoint.

        Args:
            max_shard_size: of a weights file of a whole model, in bytes or as "5GB".
            safe_serialization: always True, as transformers' method has it.

        Raises:
            ValueError: weights or tokens of the base were trained or added, which would be lost with adapters.
        """
        if flag("safe_serialization", safe_serialization) is False:
            raise ValueError("safe_serialization must be True: weights are saved as safetensors alone")
        native.save(self.contents(), file_path("directory", directory), _shard_size(max_shard_size))

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike, verify: bool = True, base: PreTrainedModel | str | None = None, **kwargs: Any
    ) -> Self:
        """Load what ``save_pretrained`` wrote, or a published checkpoint, from a folder or a hub name; of a run's folder, the
        newest checkpoint.

        Nothing is initialised anew. A published checkpoint doesn't say how long its thoughts are: ``thought_tokens`` is taken
        from its ``max_thoughts``, and ``qs.thought_config`` may be replaced.

        Args:
            verify: compare the SHA-256 of weights, config, vocabulary and thought parts with those that were saved, which takes
                0.6 seconds for a gigabyte, and check that packed rows equal an ordinary forward, once per architecture.
                False skips both, and loads a checkpoint whose config was edited; sizes of weights are compared all the same.
            base: for a checkpoint of adapters, what they belong to: a model, which gets them, a folder or a hub name; default
                the one that the checkpoint names.
            kwargs: for ``AutoModelForCausalLM.from_pretrained``; dtype defaults to the saved one.

        Raises:
            ValueError: a checkpoint that is damaged, foreign, pickled or of another model or vocabulary; adapters of another
                base.
        """
        path = checkpoint_of(file_path("path", path))
        contents = native.load(path, base, flag("verify", verify), **kwargs)
        try:
            qs = cls(contents.model, contents.config, contents.tokenizer, verify=verify)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        native.restore(qs.contents().tensors, contents.tensors, path)
        qs.trained_on = contents.trained_on
        return qs

    def save_official(self, directory: str | os.PathLike, max_shard_size: int | str = "5GB") -> None:
        """Write a checkpoint in the published format, which the published code and ``from_pretrained`` load.

        Args:
            max_shard_size: of a weights file, in bytes or as "5GB"; larger ones are cut into shards with an index.

        Raises:
            ValueError: not a Mistral, or a model that mixes log-probabilities: the published code knows neither.
        """
        official.save(self.contents(), file_path("directory", directory), _shard_size(max_shard_size))

    def load_official_state_dict(self, state: Mapping[str, Tensor], embedding_scale: float = 100.0) -> None:
        """Load a published checkpoint's tensors by their published names, all of them or none.

        Base weights, ``talk_head.0.{0,2,4}.*``, ``start_embedding`` and ``end_embedding`` [2,D] (row 0 is used).

        Args:
            embedding_scale: the published model's factor from stored to effective vector.

        Raises:
            ValueError: a name that is missing or unknown, or a shape that differs.
        """
        if not mapping("state", state):
            raise refusal("state", "a published checkpoint's tensors", state)
        for name, x in state.items():
            tensor(f"state: {name}", x, "...", {}, dtypes=FLOATS)
        embedding_scale = number("embedding_scale", embedding_scale, "above 0", above=0)
        official.load_state_dict(self.contents(), state, embedding_scale)

    def __getattr__(self, name: str) -> Any:
        if name in OF_TRL:
            raise AttributeError(
                f"{type(self).__name__} has no {name}, which TRL's trainers need: use `class ThoughtSFTTrainer(ThoughtTrainer, "
                "SFTTrainer): pass` with ThoughtTrainer from quietstar.trainer"
            )
        return super().__getattr__(name)


def _shard_size(size: int | str) -> int | str:
    if not isinstance(size, str):
        return integer("max_shard_size", size, 1)
    if not re.fullmatch(r"\d+(\.\d+)? ?[KMGT]B", size):
        raise refusal("max_shard_size", "bytes, or text such as 5GB", size)
    return size
