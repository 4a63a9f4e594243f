"""A thinking model in EleutherAI's lm-evaluation-harness, under the name ``quietstar``.

``python -m quietstar.evaluation.lm_eval`` takes the arguments of ``lm_eval``::

    python -m quietstar.evaluation.lm_eval --model quietstar --model_args pretrained=runs/first,think=always --tasks arc_easy

Releases of lm_eval after 0.4.13 look for entry points, and find the model without this command.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, cast

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from quietstar.checks import check_think, pad_id
from quietstar.evaluation.questions.answers import batches_by_length, continue_texts
from quietstar.evaluation.scoring import score_tokens
from quietstar.model import QuietStar

logger = logging.getLogger(__name__)
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names that tasks have for the same number


@register_model("quietstar")
class QuietStarLM(TemplateLM):
    """Probabilities and text of a QuietStar checkpoint, with one greedy thought before each token.

    Args:
        pretrained: a checkpoint, a run's folder or a hub name.
        think: always, never, or the entropy of the base model's prediction, in nats, above which to think.
        max_length: positions of text and thought; default the model's own.
        max_gen_toks: tokens to generate if a task does not say.
        dtype: of the weights; default the saved one.
        device: default a GPU, or the CPU if there is none: lm_eval asks for a GPU even then.
        max_batch_size: ignored; lm_eval always passes it.
    """

    def __init__(
        self,
        pretrained: str,
        think: str | float = "always",
        batch_size: int | str = 1,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        dtype: str = "auto",
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"quietstar: batch_size must be a number of texts, 1 or more, got {batch_size!r}")
        check_think("quietstar: think", think)
        self._device = torch.device(device or "cuda")
        if self._device.type == "cuda" and not torch.cuda.is_available():
            self._device = torch.device("cpu")
        self.qs = QuietStar.from_pretrained(pretrained, dtype=dtype).eval().to(self._device)
        if self.qs.tokenizer is None:
            raise ValueError(f"{pretrained}: the checkpoint has no tokenizer")
        self.name, self.think, self.batch_size, self.max_gen_toks = pretrained, think, int(batch_size), int(max_gen_toks)
        self.tokenizer = cast(PreTrainedTokenizerBase, self.qs.tokenizer)
        positions = max_length or getattr(self.qs.config.get_text_config(), "max_position_embeddings", None) or 2048
        # Tokens of text that are run; one more may be predicted after them.
        self.max_length = positions - (self.qs.thought_config.thought_tokens + 2)
        if self.max_length < 2:
            raise ValueError(f"quietstar: max_length must leave room for a thought and 2 tokens, got {positions}")

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer.eos_token_id
        return pad_id(self.qs.config) if token is None else token

    @property
    def prefix_token_id(self) -> int:
        token = self.tokenizer.bos_token_id
        return self.eot_token_id if token is None else token

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        bos = self.tokenizer.bos_token
        special = not (bos and string.startswith(bos)) if add_special_tokens is None else add_special_tokens
        ids = list(self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"])
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, counting each token once; texts longer than the model's positions are cut into windows."""
        windows, owner = [], []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owner.append(i)
        totals = [0.0] * len(requests)
        for i, (logprob, _) in zip(owner, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Text up to a task's stop strings; greedy unless the task samples."""
        prompts = [self.tok_encode(request.args[0]) or [self.prefix_token_id] for request in requests]
        groups = defaultdict(list)  # by generation arguments: a batch has one set of them
        for i, request in enumerate(requests):
            groups[repr(request.args[1])].append(i)
        texts: dict[int, str] = {}
        with tqdm(total=len(requests), desc="texts", disable=disable_tqdm) as bar:
            for group in groups.values():
                new_tokens, stop, options = self._generation_options(dict(requests[group[0]].args[1]))
                for chosen in batches_by_length([prompts[i] for i in group], self.batch_size):
                    indices = [group[k] for k in chosen]
                    batch = [self._fit(prompts[i], self.max_length - new_tokens) for i in indices]
                    written = continue_texts(self.qs, batch, new_tokens, stop, think=self.think, **options)
                    for i, text in zip(indices, written, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(indices))
        return [texts[i] for i in range(len(requests))]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """log p of each continuation, and whether greedy decoding would produce it."""
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise ValueError(f"quietstar: a continuation has {longest} tokens, more than the {self.max_length} that fit")
        texts = [self._fit(context + continuation, self.max_length + 1) for _, context, continuation in requests]
        places = [range(len(text) - len(x[2]), len(text)) for text, x in zip(texts, requests, strict=True)]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(texts), desc="continuations", disable=disable_tqdm) as bar:
            for chosen in batches_by_length(texts, self.batch_size):
                scores = score_tokens(self.qs, [texts[i] for i in chosen], [places[i] for i in chosen], self.think)
                for i, (_, score) in zip(chosen, scores, strict=True):
                    found[i] = float(score.logprob.double().sum()), bool(score.likeliest.all())
                    if requests[i][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[i][0], found[i])
                bar.update(len(chosen))
        return [found[i] for i in range(len(texts))]

    def _fit(self, ids: list[int], most: int) -> list[int]:
        """The last ``most`` tokens of a text."""
        if len(ids) > most:
            logger.warning(f"a text of {len(ids)} tokens is cut on the left to the {most} that fit")
        return ids[-most:]

    def _generation_options(self, options: dict[str, Any]) -> tuple[int, list[str], dict[str, Any]]:
        """From a task's generation arguments: the number of new tokens, the stop strings, and the options of ``generate``."""
        stop = options.pop("until", None) or []
        stop = [stop] if isinstance(stop, str) else [x for x in stop if x]
        new_tokens = next((int(options[name]) for name in LIMITS if name in options), self.max_gen_toks)
        if not 0 < new_tokens < self.max_length:
            raise ValueError(
                f"quietstar: new tokens must be from 1 to {self.max_length - 1}, the number that fit, got {new_tokens}"
            )
        options.setdefault("do_sample", float(options.get("temperature", 0)) > 0)
        unused = LIMITS if options["do_sample"] else (*LIMITS, "temperature", "top_p", "top_k")
        return new_tokens, stop, {name: value for name, value in options.items() if name not in unused}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
