"""Every public function of the wrapper under calls with hostile arguments; the rule is in tests/hostile.py."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import quietstar
from quietstar import QuietStar, ThoughtConfig, Thoughts, trainer
from quietstar.config import AdapterConfig, TrainConfig
from quietstar.data.held_out import check_held_out, data_config, describe
from quietstar.data.texts import DataConfig, load_all, load_data
from quietstar.data.thoughts import OfflineThoughts, export_thoughts, text_hash, tokenizer_hash
from quietstar.evaluation.anchor_choices import by_anchor_choice
from quietstar.evaluation.difficulty import by_difficulty
from quietstar.evaluation.intervals import mean_interval, paired, wilson
from quietstar.evaluation.losses import evaluate, summary, token_losses
from quietstar.evaluation.questions.asking import Asking, ask
from quietstar.evaluation.questions.reading import Question, read_questions
from quietstar.evaluation.scoring import one_thought, score_tokens
from quietstar.objective import make_targets
from quietstar.packed import PackedInputs
from quietstar.recipes import fast, internalize, score, solve, star, vstar
from quietstar.train import thought_loss, train
from tests.hostile import Target, attack, public_functions

# Modules with what is left out of them: records that hold what they are given, types, and helpers that no page names.
MODULES = {
    "quietstar": "QuietStarOutput Report Thinker Thoughts VerifyReport",
    "quietstar.config": "option",
    "quietstar.train": "Interrupted Loss",
    # Its arguments are those of transformers' Trainer, which refuses them in its own words.
    "quietstar.trainer": " ".join(name for name in public_functions(trainer) if name.startswith("ThoughtTrainer")),
    "quietstar.data.texts": "Data json_lines",
    "quietstar.data.held_out": "TrainedOn",
    "quietstar.data.thoughts": "",
    "quietstar.evaluation.anchor_choices": "",
    "quietstar.evaluation.difficulty": "",
    "quietstar.evaluation.intervals": "",
    "quietstar.evaluation.losses": "TokenLosses",
    "quietstar.evaluation.questions.asking": "prompt",
    "quietstar.evaluation.questions.reading": "MARK Question Row parse question_of",
    "quietstar.evaluation.scoring": "",
}
B, L, V, D = 2, 8, 257, 32
N, T, J = 2, 2, 2
TARGETS: dict[str, Callable[["World"], tuple[Callable[..., Any], Callable[[], dict[str, Any]]]]] = {}


def target(name, replaces=(), paths=()):
    def add(make):
        TARGETS[name] = lambda world: Target(name, *make(world), replaces, paths)
        return make

    return add


@dataclass
class World:
    """What good arguments are made of."""

    make_model: Callable[..., Any]
    tokenizer: Any
    folder: Path

    def __post_init__(self):
        self.qs = self.wrapper().eval()
        self.learned = QuietStar(self.make_model("gpt2", vocab_size=V, n_embd=D, n_head=2), self.config(), verify=False).eval()
        self.layout = self.qs.thinker.layout(self.ids())

    def model(self):
        return self.make_model("llama", vocab_size=V, hidden_size=D, intermediate_size=32, num_attention_heads=2)

    def wrapper(self, **fields):
        return QuietStar(self.model(), self.config(**fields), self.tokenizer, verify=False)

    def config(self, **fields):
        return ThoughtConfig(**{"thoughts": N, "thought_tokens": T, "lookahead": J, **fields})

    def ids(self):
        return torch.arange(B * L).view(B, L) + 60

    def thoughts(self, P=L):
        ids = torch.arange(B * P * N * T).view(B, P, N, T) % 200 + 1
        return Thoughts(ids, -torch.rand(B, P, N, T), torch.ones(B, P, N, dtype=torch.int64))

    def text(self):
        mask = torch.ones(B, L, dtype=torch.int64)
        mask[1, :2] = 0
        return {"input_ids": self.ids(), "attention_mask": mask}

    def documents(self):
        return torch.tensor([[0] * 4 + [1] * 4] * B)

    def anchors(self):
        return torch.tensor([[0, 3, 5], [2, 4, -1]])

    def examples(self):
        return [{"input_ids": torch.arange(6 + i) + 60, "labels": torch.arange(6 + i) + 60} for i in range(4)]

    def losses(self):
        return token_losses(self.qs, self.examples())

    def inputs(self):
        targets = make_targets(self.ids(), None, self.layout, J)
        thoughts = self.thoughts()
        return PackedInputs(self.layout, self.ids(), thoughts.thought_ids, None, targets)

    def questions(self):
        return [Question("1+1?", {}, "2", "2"), Question("Which?", {"A": "this", "B": "that"}, "A", "A")]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    from tests.quietstar.conftest import byte_tokenizer

    make_tokenizer = getattr(byte_tokenizer, "__wrapped__", None) or byte_tokenizer.__pytest_wrapped__.obj
    return World(tiny, make_tokenizer(), tmp_path_factory.mktemp("hostile"))


# The wrapper


@target("QuietStar")
def _(world):
    return QuietStar, lambda: {
        "model": world.model(),
        "config": world.config(),
        "tokenizer": world.tokenizer,
        "verify": False,
    }


@target("QuietStar, its embeddings", replaces=["embedding_init", "start_token_id", "end_token_id"])
def _(world):
    model = world.model()

    def make(tokenizer, **fields):
        return QuietStar(model, ThoughtConfig(**fields), tokenizer, verify=False)

    return make, lambda: {"embedding_init": 7, "start_token_id": 1, "end_token_id": 2, "tokenizer": world.tokenizer}


@target("QuietStar.with_config")
def _(world):
    return world.qs.with_config, lambda: {"config": world.config()}


@target("QuietStar.use_config")
def _(world):
    return world.wrapper().use_config, lambda: {"config": world.config()}


@target("QuietStar.anchor_chunk")
def _(world):
    qs = world.wrapper()
    return lambda anchor_chunk: setattr(qs, "anchor_chunk", anchor_chunk), lambda: {"anchor_chunk": 3}


@target("QuietStar.graphs")
def _(world):
    qs = world.wrapper()
    return lambda graphs: setattr(qs, "graphs", graphs), lambda: {"graphs": "auto"}


@target("QuietStar.add_adapters")
def _(world):
    return lambda config: world.wrapper().add_adapters(config), lambda: {"config": AdapterConfig(lora_rank=2)}


def forward_arguments(world):
    # counts without a gradient are those of any batch
    thoughts = world.thoughts(3)
    return {
        **world.text(),
        "labels": world.ids(),
        "thought_ids": thoughts.thought_ids,
        "anchors": world.anchors(),
        "sequence_ids": torch.arange(B),
        "seed": 5,
        "counts": world.qs.count_targets(world.ids()),
        "old_logprob": thoughts.logprob,
        "thought_lengths": thoughts.thought_lengths,
    }


@target("QuietStar.forward")
def _(world):
    return world.qs.forward, lambda: forward_arguments(world)


@target("QuietStar.forward, sampling")
def _(world):
    qs = world.wrapper().train()
    return qs.forward, lambda: {
        **world.text(),
        "document_ids": world.documents(),
        "sequence_ids": torch.arange(B),
        "seed": 5,
    }


@target("QuietStar.forward, learned positions")
def _(world):
    return world.learned.forward, lambda: {"input_ids": world.ids(), "labels": world.ids(), "anchors": world.anchors()}


@target("QuietStar.choose_anchors")
def _(world):
    qs = world.wrapper(anchors="random")
    return qs.choose_anchors, lambda: {
        **world.text(),
        "document_ids": world.documents(),
        "sequence_ids": torch.arange(B),
        "seed": 5,
    }


@target("QuietStar.think")
def _(world):
    return world.qs.think, lambda: {
        **world.text(),
        "anchors": world.anchors(),
        "seed": 5,
        "greedy": False,
        "document_ids": world.documents(),
        "sequence_ids": torch.arange(B),
        "thought_lengths": torch.ones(B, 3, N, dtype=torch.int64),
    }


@target("QuietStar.sample")
def _(world):
    return world.qs.sample, lambda: {
        "layout": world.layout,
        "input_ids": world.ids(),
        "sequence_ids": torch.arange(B),
        "seed": 5,
        "greedy": False,
    }


@target("QuietStar.predict")
def _(world):
    return world.qs.predict, lambda: {"inputs": world.inputs()}


@target("QuietStar.chunk_size")
def _(world):
    qs = world.wrapper()
    qs.anchor_chunk = 3
    return qs.chunk_size, lambda: {"layout": world.layout}


@target("QuietStar.generate")
def _(world):
    return partial(generate_two, world.qs), lambda: {
        **world.text(),
        "max_new_tokens": 2,
        "think": "always",
        "thoughts": 2,
        "sample_thoughts": True,
        "seed": 5,
        "sequence_ids": torch.arange(B),
        "on_thoughts": lambda ids: None,
    }


@target("QuietStar.generate, learned positions", replaces=["input_ids", "max_new_tokens", "think"])
def _(world):
    return partial(generate_two, world.learned), lambda: {
        "input_ids": world.ids(),
        "attention_mask": torch.ones(B, L, dtype=torch.int64),
        "max_new_tokens": 2,
        "think": 0.5,
        "do_sample": True,
    }


def generate_two(qs, **arguments):
    """Stops after two tokens, since a large number of them is no error."""
    return qs.generate(**arguments, stopping_criteria=[lambda ids, scores: ids[:, 0] * 0 + (ids.shape[1] >= L + 2) > 0])


@target("QuietStar.explain")
def _(world):
    return world.qs.explain, lambda: {"text": "some text", "seed": 5, "another": "another text"}


@target("QuietStar.count_targets")
def _(world):
    return world.qs.count_targets, lambda: {
        **world.text(),
        "labels": world.ids(),
        "anchors": world.anchors(),
        "document_ids": world.documents(),
        "thought_lengths": torch.ones(B, 3, N, dtype=torch.int64),
    }


@target("QuietStar.save_pretrained", paths=["directory"])
def _(world):
    return world.qs.save_pretrained, lambda: {"directory": str(world.folder / "saved")}


@target("QuietStar.from_pretrained", paths=["path"])
def _(world):
    path = world.folder / "loaded"
    world.qs.save_pretrained(path)
    return QuietStar.from_pretrained, lambda: {"path": str(path), "verify": False}


@target("QuietStar.save_official", paths=["directory"])
def _(world):
    qs = QuietStar(world.make_model("mistral", vocab_size=V), world.config(), verify=False)
    return qs.save_official, lambda: {"directory": str(world.folder / "official"), "max_shard_size": 100_000}


@target("QuietStar.load_official_state_dict")
def _(world):
    from quietstar.checkpoints.official import state_dict

    qs = QuietStar(world.make_model("mistral", vocab_size=V), world.config(), verify=False)
    return qs.load_official_state_dict, lambda: {"state": dict(state_dict(qs.contents())), "embedding_scale": 100.0}


# Its parts


@target("Thinker.layout")
def _(world):
    return world.qs.thinker.layout, lambda: {
        **world.text(),
        "anchors": world.anchors(),
        "document_ids": world.documents(),
        "thought_lengths": torch.ones(B, 3, N, dtype=torch.int64),
    }


def packed_arguments(world):
    return {"layout": world.layout, "input_ids": world.ids(), "thought_ids": world.thoughts().thought_ids}


@target("Thinker.thought_rows")
def _(world):
    return world.qs.thinker.thought_rows, lambda: packed_arguments(world)


@target("Thinker.states")
def _(world):
    return world.qs.thinker.states, lambda: packed_arguments(world)


@target("Thinker.base_states")
def _(world):
    return world.qs.thinker.base_states, lambda: {"layout": world.layout, "text": torch.rand(B, L, D)}


@target("Thinker.end_states")
def _(world):
    return world.qs.thinker.end_states, lambda: {
        "thought": torch.rand(B, L, N, T + J + 1, D),
        "thought_lengths": world.thoughts().thought_lengths,
    }


@target("Thinker.thought_logprob")
def _(world):
    return world.qs.thinker.thought_logprob, lambda: {
        "thought": torch.rand(B, L, N, T + J + 1, D),
        "thought_ids": world.thoughts().thought_ids,
        "thought_lengths": world.thoughts().thought_lengths,
    }


def two_states():
    return {"h_base": torch.rand(B, L, 1, D), "h_thought": torch.rand(B, L, N, D)}


@target("Thinker.mix")
def _(world):
    return world.qs.thinker.mix, two_states


@target("Thinker.mixed_logprobs")
def _(world):
    return world.qs.thinker.mixed_logprobs, two_states


@target("Thinker.mixed_nll")
def _(world):
    return world.qs.thinker.mixed_nll, lambda: {
        "mixture": world.qs.thinker.mix(**two_states()),
        "targets": torch.arange(B * L * N).view(B, L, N),
        "predicting": torch.rand(B, L - 1, D),
        "base_targets": torch.arange(B * (L - 1)).view(B, L - 1),
    }


@target("Thinker.logprobs")
def _(world):
    return world.qs.thinker.logprobs, lambda: {"hidden": torch.rand(B, L, D)}


@target("Thinker.logits")
def _(world):
    return world.qs.thinker.logits, lambda: {"hidden": torch.rand(B, L, D)}


@target("Thinker.predict")
def _(world):
    return world.qs.thinker.predict, lambda: {
        "inputs": world.inputs(),
        "text": torch.rand(B, L, D),
        "thought": torch.rand(B, L, N, T + J + 1, D),
    }


@target("Thoughts.cut")
def _(world):
    return world.thoughts().cut, lambda: {"thought_lengths": torch.ones(B, L, N, dtype=torch.int64)}


@target("Thoughts.checked")
def _(world):
    return world.thoughts().checked, lambda: {"model": world.qs.model, "layout": world.layout}


@target("Thoughts.copies")
def _(world):
    one = Thoughts(world.thoughts().thought_ids[:, :, :1], world.thoughts().logprob[:, :, :1])
    return one.copies, lambda: {"N": 3}


@target("Thoughts.join")
def _(world):
    return Thoughts.join, lambda: {"parts": [world.thoughts(), world.thoughts(3)]}


@target("Report.save", paths=["path"])
def _(world):
    return world.qs.explain("some text").save, lambda: {"path": str(world.folder / "report.html")}


@target("register_attention")
def _(world):
    return quietstar.register_attention, lambda: {"without_layout": "sdpa"}


@target("a model with thought_layout", replaces=["thought_layout"])
def _(world):
    model = world.model()
    model.set_attn_implementation(quietstar.register_attention())
    position_ids = world.layout.position_ids()
    return model, lambda: {"input_ids": position_ids, "position_ids": position_ids, "thought_layout": world.layout}


@target("verify")
def _(world):
    return quietstar.verify, lambda: {"model": world.model()}


# Configs


def fields_of(config, **changes):
    """The fields that differ from None, so that each has a kind."""
    return {name: value for name, value in vars(config).items() if value is not None} | changes


CONFIGS = {
    "ThoughtConfig": fields_of(ThoughtConfig(), start_token_id=1, end_token_id=2, stop_threshold=0.5, embedding_init="---"),
    "TrainConfig": fields_of(TrainConfig(), anchor_chunk=4),
    "AdapterConfig": fields_of(AdapterConfig(), lora_alpha=2.0),
    "DataConfig": fields_of(DataConfig()),
    "Asking": fields_of(Asking()),
}
CLASSES = {"ThoughtConfig": ThoughtConfig, "TrainConfig": TrainConfig, "AdapterConfig": AdapterConfig, "Asking": Asking}
CLASSES["DataConfig"] = DataConfig
for recipe in (fast, internalize, score, solve, star, vstar):
    name = f"{recipe.__name__.rpartition('.')[2]}.Config"
    CLASSES[name] = recipe.Config
    CONFIGS[name] = fields_of(recipe.Config())
for name in CLASSES:
    target(name)(lambda world, name=name: (CLASSES[name], lambda: dict(CONFIGS[name])))


@target("TrainConfig.rate")
def _(world):
    return TrainConfig(schedule="cosine").rate, lambda: {"step": 30}


@target("ThoughtConfig.from_dict")
def _(world):
    return ThoughtConfig.from_dict, lambda: {"values": dict(CONFIGS["ThoughtConfig"])}


# Training and data


@target("train", paths=["resume"])
def _(world):
    config = TrainConfig(steps=1, batch_size=2, out=str(world.folder / "run"), warmup=0, eval_every=1, save_every=1)
    return train, lambda: {
        "qs": world.wrapper(),
        "data": world.examples(),
        "config": replace(config),
        "loss": thought_loss,
        "evaluate": lambda qs: {},
        "resume": "auto",
        "progress": False,
    }


@target("thought_loss", replaces=["batch", "counts", "seed"])
def _(world):
    qs = world.wrapper()
    return thought_loss, lambda: {
        "model": qs,
        "batch": world.text(),
        "counts": qs.count_targets(**world.text()),
        "seed": 5,
    }


@target("load_data")
def _(world):
    path = world.folder / "texts.jsonl"
    path.write_text('{"text": "some text, long enough"}\n' * 20)
    config = DataConfig(data=str(path), length=8, held_out=1)
    return load_data, lambda: {"config": config, "tokenizer": world.tokenizer, "lookahead": 2}


@target("load_all")
def _(world):
    config, _ = held_out_data(world)
    return load_all, lambda: {"config": config, "tokenizer": world.tokenizer, "lookahead": 2}


@target("describe")
def _(world):
    config, data = held_out_data(world)
    return describe, lambda: {"config": config, "data": data, "base": "some/model"}


@target("data_config")
def _(world):
    config, data = held_out_data(world)
    return data_config, lambda: {"run": describe(config, data, "some/model")}


@target("check_held_out")
def _(world):
    config, data = held_out_data(world)
    return check_held_out, lambda: {"trained_on": [describe(config, data, "some/model")], "config": config, "data": data}


def held_out_data(world):
    path = world.folder / "lines.jsonl"
    path.write_text("".join(f'{{"text": "some text, long enough, {i}"}}\n' for i in range(20)))
    config = DataConfig(data=str(path), length=8, held_out=2)
    return config, load_data(config, world.tokenizer, 2)


@target("export_thoughts", paths=["path"])
def _(world):
    return export_thoughts, lambda: {
        "qs": world.qs,
        "examples": world.examples(),
        "path": str(world.folder / "thoughts.jsonl"),
        "seed": 5,
        "batch_size": 2,
    }


@target("text_hash")
def _(world):
    return text_hash, lambda: {"input_ids": world.ids()[0]}


@target("tokenizer_hash")
def _(world):
    return tokenizer_hash, lambda: {"tokenizer": world.tokenizer}


@target("OfflineThoughts", paths=["path"])
def _(world):
    path = str(world.folder / "offline.jsonl")
    export_thoughts(world.qs, world.examples(), path)
    return OfflineThoughts, lambda: {"path": path, "examples": world.examples(), "qs": world.qs}


# Evaluation


@target("pad_texts")
def _(world):
    return trainer.pad_texts, lambda: {"examples": world.examples()}


@target("evaluate")
def _(world):
    return evaluate, lambda: {
        "qs": world.qs,
        "examples": world.examples(),
        "batch_size": 2,
        "progress": False,
        "controls": True,
    }


@target("token_losses")
def _(world):
    options = {"batch_size": 2, "progress": False, "controls": True}
    return token_losses, lambda: {"qs": world.qs, "examples": world.examples(), **options}


@target("summary")
def _(world):
    losses = world.losses()
    return summary, lambda: {"losses": losses}


@target("by_difficulty")
def _(world):
    losses = world.losses()
    return by_difficulty, lambda: {"losses": losses}


@target("by_anchor_choice")
def _(world):
    losses = world.losses()
    return by_anchor_choice, lambda: {"qs": world.qs, "examples": world.examples(), "losses": losses, "batch_size": 2}


@target("score_tokens")
def _(world):
    return score_tokens, lambda: {
        "qs": world.qs,
        "texts": [[5, 6, 7], [8, 9]],
        "places": [[1, 2], [1]],
        "think": "always",
        "allowed": [torch.arange(20), torch.arange(20)],
    }


@target("one_thought")
def _(world):
    return one_thought, lambda: {"qs": world.qs}


@target("ask")
def _(world):
    asking = Asking(max_new_tokens=2, votes=1, batch_size=2)
    return ask, lambda: {"qs": world.qs, "questions": world.questions(), "asking": asking, "progress": False}


@target("read_questions", paths=["source"])
def _(world):
    path = world.folder / "questions.jsonl"
    path.write_text('{"question": "1+1?", "answer": "2"}\n' * 3)
    return read_questions, lambda: {"source": str(path), "split": "test", "limit": 2}


@target("wilson")
def _(world):
    return wilson, lambda: {"right": 3, "questions": 5}


@target("paired")
def _(world):
    return paired, lambda: {"first": [True, False, True], "second": [True, True, False]}


@target("mean_interval")
def _(world):
    return mean_interval, lambda: {"values": [0.5, 1.5, 0.25]}


def run(name, world, calls, seed, record_property, monkeypatch):
    monkeypatch.chdir(world.folder)
    tally = attack(TARGETS[name](world), calls, seed)
    record_property("counts", ["hostile calls of the wrapper", tally.counts])
    assert not tally.broken, "\n\n".join(tally.broken)


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_calls(name, world, record_property, monkeypatch):
    run(name, world, 14, 0, record_property, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_more_hostile_calls(name, world, record_property, monkeypatch):
    run(name, world, 34, 1, record_property, monkeypatch)


@pytest.mark.parametrize("module, left_out", MODULES.items())
def test_every_public_function_is_attacked(module, left_out):
    assert public_functions(importlib.import_module(module)) - set(left_out.split()) <= TARGETS.keys()
