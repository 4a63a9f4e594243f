"""What several commands share: options, loading, tables."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor
from tyro.conf import arg

from quietstar.checkpoints import native, pretrained
from quietstar.checkpoints.contents import TrainedOn
from quietstar.checkpoints.pretrained import load_tokenizer
from quietstar.cli.errors import UsageError
from quietstar.config import Dtype, ThoughtConfig
from quietstar.data.held_out import check_held_out
from quietstar.data.rows import chat_text
from quietstar.data.sources import names, sources
from quietstar.data.texts import Data, DataConfig
from quietstar.evaluation.alarms import alarms
from quietstar.evaluation.intervals import format_gain, verdict
from quietstar.memory.fit import Machine
from quietstar.model import QuietStar
from quietstar.run.processes import process_state
from quietstar.thinking.chunks import free_memory


def typed(name: str, value: str) -> str:
    """An option as a shell takes it; a value that begins with a dash needs the equals sign."""
    return f"--{name}{'=' if value.startswith('-') else ' '}{shlex.quote(value)}"


Checkpoint = Annotated[str, arg(help="a checkpoint, a run's folder (its newest checkpoint), or a hub name")]
WeightsDtype = Annotated[Dtype, arg(help="dtype of the weights; use half precision only with LoRA, or without training")]
AllowBin = Annotated[bool, arg(help="take weights from pickle files (.bin) too, read with weights_only")]
Chat = Annotated[bool, arg(help="write the text as a user's message, by the tokenizer's chat template")]
Controls = Annotated[
    bool, arg(help="predict with another text's thoughts too, to tell the gain of content from that of mixing")
]


def check_out_file(out: str, source: str = "", what: str = "a file") -> None:
    """Refuse an ``--out`` that can't be written, before hours of work are lost by it, or that would overwrite ``source``."""
    path, wanted = Path(out), f"--out must be {what} in an existing folder, got {out}"
    if not path.name or (os.path.lexists(path) and not path.is_file()):
        raise UsageError(wanted)
    trial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        trial.touch()
        trial.unlink()
    except FileNotFoundError as error:
        raise UsageError(wanted) from error
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    if path.exists() and any(os.path.exists(x) and path.samefile(x) for x in sources(source)):
        raise UsageError(f"--out must be another file than {source}")


def check_report_file(out: str, source: str) -> None:
    """``check_out_file`` for JSON, beside which a page or a plot gets the same name."""
    if Path(out).suffix in (".md", ".png"):
        raise UsageError(f"--out must be a JSON file in an existing folder, got {out}")
    check_out_file(out, source, "a JSON file")


def check_out_folder(out: str) -> None:
    """Refuse an ``--out`` that is no folder and can't become one."""
    path = Path(out)
    try:
        while path.name and not (path.exists() or path.is_symlink()):
            path = path.parent
        fits = path.is_dir() and os.access(path, os.W_OK)
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from error
    if not fits:
        raise UsageError(f"--out must be a folder that can be written to, got {out}")


def load_model(name: str, thoughts: ThoughtConfig, tokenizer: Any, dtype: str, allow_bin: bool = False) -> QuietStar:
    """Wrap a plain language model, or continue with ``thoughts`` from one that thinks already."""
    if not native.thinks(name):
        return QuietStar(pretrained.load_model(name, allow_bin, dtype=dtype), thoughts, tokenizer)
    qs = QuietStar.from_pretrained(name, dtype=dtype)
    scale = qs.thought_config.embedding_scale
    if scale != thoughts.embedding_scale:
        raise ValueError(f"{name}: it was made with embedding_scale={scale}, not {thoughts.embedding_scale}")
    qs.use_config(thoughts)
    return qs


def this_machine(processes: int) -> Machine:
    """Where a run of so many processes trains, with what is free now."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Machine(device, free_memory(device), processes)


def load_checkpoint(name: str, plain: bool = False) -> QuietStar:
    """A model that thinks, or a ``plain`` one to ask without thoughts, in evaluation mode, on the GPU if there is one."""
    qs = load_model(name, ThoughtConfig(), load_tokenizer(name), "auto") if plain else QuietStar.from_pretrained(name)
    qs.eval()
    return qs.to("cuda") if torch.cuda.is_available() else qs


def check_unseen(model: str, trained_on: Sequence[TrainedOn], config: DataConfig, data: Data, remedy: str) -> None:
    """Refuse held-out texts that the model was trained on, since they would prove nothing; print what can't be checked."""
    try:
        unknown = check_held_out(trained_on, config, data)
    except ValueError as error:
        raise ValueError(f"{model}: {error}: {remedy}") from error
    if process_state().is_main_process:
        for sentence in unknown:
            print(f"{model}: {sentence}", file=sys.stderr)


def text_tokenizer(qs: QuietStar) -> Any:
    if qs.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer")
    return qs.tokenizer


def as_message(tokenizer: Any, text: str) -> str:
    """A text as a user's message, up to where the answer begins; the tokenizer must add no special tokens to it."""
    return chat_text(tokenizer, (("user", text),), begin_answer=True)


def prompt_ids(qs: QuietStar, text: str, chat: bool) -> Tensor:
    """Token ids of a text to continue, int64 [1,L]."""
    tokenizer = text_tokenizer(qs)
    text = as_message(tokenizer, text) if chat else text
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if not ids.numel():
        raise ValueError("the prompt has no tokens")
    return ids.long().to(qs.start_embedding.device)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A line for each row; values that a row lacks are left empty. Names break at underscores, to fit 80 columns."""
    names = [name.split("_") for name in columns]
    height = max(map(len, names))
    lines = [list(line) for line in zip(*([""] * (height - len(name)) + name for name in names), strict=True)]
    lines += [[cell(row.get(name)) for name in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("  ".join(f"{text:>{width}}" for text, width in zip(line, widths, strict=True)) for line in lines)


def cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def source_name(data: str) -> str:
    """The names of data sets; of a file in the working folder, or below it, without the folders above."""
    here = os.path.join(os.getcwd(), "")
    return ", ".join(x.removeprefix(here) for x in names(data))


def held_out_text(data: Data) -> str:
    """How much of the data is held out, and why it is not more."""
    held = f"{len(data.held_out):,} texts held out"
    tokens = sum(len(x["input_ids"]) for x in data.held_out)
    if data.held_out:
        held += f" ({tokens:,} tokens)"
    return held + (f", {data.repeated} more occur in training, word for word" if data.repeated else "")


LOSSES = {"base": "language model", "another": "with another's thoughts", "mixed": "with thoughts"}
GAINS = {"gain": "gain from thoughts", "mixing": "  = mixing, any thought", "content": "  + content, what was thought"}


def held_out_losses(figures: Mapping[str, float]) -> str:
    """The losses and gains of ``quietstar.evaluate``, and what they say."""
    lines = [f"held-out loss, nats per token, {figures['tokens']:,} tokens of {figures['texts']} texts"]
    lines += [f"  {label:<31} {figures[name]:.4f}" for name, label in LOSSES.items() if name in figures]
    lines += [f"  {label:<31}{format_gain(figures, name, 4)}" for name, label in GAINS.items() if name in figures]
    return "\n".join([*lines, verdict(figures), *alarms(figures)])
