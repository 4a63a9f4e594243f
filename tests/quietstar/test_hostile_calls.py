"""The entry points of the wrapper under calls with hostile arguments; the rule is in tests/hostile.py."""

from functools import partial

import pytest
import torch

from quietstar import QuietStar, ThoughtConfig, explain
from quietstar.config import AdapterConfig, TrainConfig
from quietstar.data.texts import DataConfig, load_data
from quietstar.data.thoughts import OfflineThoughts, export_thoughts
from quietstar.evaluation.losses import evaluate
from quietstar.evaluation.questions.asking import Asking, ask
from quietstar.evaluation.questions.reading import Question, read_questions
from quietstar.training import train
from tests.hostile import Target, attack
from tests.quietstar.conftest import make_byte_tokenizer

B, L, V, N, T, J = 2, 8, 257, 2, 2, 2
IDS = torch.arange(B * L).view(B, L) + 60


class World:
    """What good arguments are made of."""

    def __init__(self, make_model, tokenizer, folder):
        self.tokenizer, self.folder = tokenizer, folder
        sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
        self.model = lambda name="llama": make_model(name, **sizes)
        self.qs = self.wrapper().eval()
        self.learned = QuietStar(make_model("gpt2", vocab_size=V, n_embd=32, n_head=2), self.qs.thought_config, verify=False)

    def wrapper(self, name="llama", **fields):
        config = ThoughtConfig(thoughts=N, thought_tokens=T, lookahead=J, **fields)
        return QuietStar(self.model(name), config, self.tokenizer, verify=False)

    def text(self):
        mask = torch.ones(B, L, dtype=torch.int64)
        mask[1, :2] = 0
        return {"input_ids": IDS.clone(), "attention_mask": mask}

    def places(self):
        """Chosen anchors, and thoughts at them."""
        return {"anchors": torch.tensor([[0, 3, 5], [2, 4, -1]]), "thought_lengths": torch.ones(B, 3, N, dtype=torch.int64)}

    def drawn(self):
        """What random numbers depend on."""
        return {"document_ids": torch.tensor([[0] * 4 + [1] * 4] * B), "sequence_ids": torch.arange(B), "seed": 5}

    def examples(self):
        return [{"input_ids": torch.arange(6 + i) + 60, "labels": torch.arange(6 + i) + 60} for i in range(4)]

    def write(self, name, text):
        (self.folder / name).write_text(text)
        return str(self.folder / name)


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    return World(tiny, make_byte_tokenizer(), tmp_path_factory.mktemp("hostile"))


def two_tokens(qs, **arguments):
    """Generation that stops after two tokens, since a large number of them is no error."""
    return qs.generate(**arguments, stopping_criteria=[lambda ids, scores: ids[:, 0] * 0 + (ids.shape[1] >= L + 2) > 0])


def forward(world):
    given = {"labels": IDS.clone(), "thought_ids": torch.arange(B * 3 * N * T).view(B, 3, N, T) + 1, "seed": 5}
    given |= {"counts": world.qs.count_targets(IDS), "old_logprob": -torch.rand(B, 3, N, T), "sequence_ids": torch.arange(B)}
    return world.text() | world.places() | given


def generation(world):
    options = {"max_new_tokens": 2, "think": "always", "thoughts": 2, "sample_thoughts": True, "seed": 5}
    return world.text() | options | {"sequence_ids": torch.arange(B), "on_thoughts": lambda ids: None}


def fields_of(config, **changes):
    """The fields that differ from None, so that each has a kind."""
    return {name: value for name, value in vars(config).items() if value is not None} | changes


def saved(world):
    world.qs.save_pretrained(world.folder / "loaded")
    return str(world.folder / "loaded")


def exported(world):
    path = str(world.folder / "offline.jsonl")
    export_thoughts(world.qs, world.examples(), path)
    return path


def training(world):
    """One step; each call has its own wrapper."""
    run = TrainConfig(steps=1, batch_size=2, out=str(world.folder / "run"), warmup=0, eval_every=1, save_every=1)
    good = {"config": run, "evaluate": lambda qs: {}, "resume": "auto", "progress": False}
    return train, lambda: {"qs": world.wrapper(), "data": world.examples(), **good}


def reading(world):
    path = world.write("texts.jsonl", '{"text": "some text, long enough"}\n' * 20)
    config = DataConfig(data=path, length=8, held_out=1)
    return load_data, lambda: {"config": config, "tokenizer": world.tokenizer, "lookahead": 2}


def asking(world):
    questions = [Question("1+1?", {}, "2", "2"), Question("Which?", {"A": "this", "B": "that"}, "A", "A")]
    config = Asking(max_new_tokens=2, votes=1, batch_size=2)
    return ask, lambda: {"qs": world.qs, "questions": list(questions), "asking": config, "progress": False}


def constant(function, **good):
    return function, lambda: dict(good)


# Each entry point with arguments that work, made anew for each call; the paths among them have these names.
PATHS = {"directory", "path", "resume", "source"}
TARGETS = {
    "QuietStar": lambda w: (
        QuietStar,
        lambda: {"model": w.model(), "config": w.qs.thought_config, "tokenizer": w.tokenizer, "verify": False},
    ),
    "QuietStar.with_config": lambda w: constant(w.qs.with_config, config=w.qs.thought_config),
    "QuietStar.add_adapters": lambda w: (
        lambda config: w.wrapper().add_adapters(config),
        lambda: {"config": AdapterConfig(lora_rank=2)},
    ),
    "QuietStar.forward": lambda w: (w.qs.forward, lambda: forward(w)),
    "QuietStar.forward, sampling": lambda w: (w.wrapper().train().forward, lambda: w.text() | w.drawn()),
    "QuietStar.forward, learned positions": lambda w: constant(w.learned.forward, input_ids=IDS, labels=IDS),
    "QuietStar.choose_anchors": lambda w: (w.wrapper(anchors="random").choose_anchors, lambda: w.text() | w.drawn()),
    "QuietStar.think": lambda w: (w.qs.think, lambda: w.text() | w.places() | w.drawn() | {"greedy": False}),
    "QuietStar.count_targets": lambda w: (w.qs.count_targets, lambda: w.text() | w.places() | {"labels": IDS.clone()}),
    "QuietStar.generate": lambda w: (partial(two_tokens, w.qs), lambda: generation(w)),
    "QuietStar.generate, learned positions": lambda w: (
        partial(two_tokens, w.learned.eval()),
        lambda: {"input_ids": IDS.clone(), "max_new_tokens": 2, "think": 0.5},
    ),
    "explain": lambda w: constant(explain, qs=w.qs, text="some text", seed=5, another="another text"),
    "QuietStar.save_pretrained": lambda w: constant(w.qs.save_pretrained, directory=str(w.folder / "saved")),
    "QuietStar.from_pretrained": lambda w: constant(QuietStar.from_pretrained, path=saved(w), verify=False),
    "QuietStar.save_official": lambda w: constant(
        w.wrapper("mistral").save_official, directory=str(w.folder / "official"), max_shard_size=100_000
    ),
    "ThoughtConfig": lambda w: constant(
        ThoughtConfig, **fields_of(ThoughtConfig(), start_token_id=1, end_token_id=2, stop_threshold=0.5, embedding_init="---")
    ),
    "TrainConfig": lambda w: constant(TrainConfig, **fields_of(TrainConfig(), anchor_chunk=4)),
    "train": training,
    "load_data": reading,
    "OfflineThoughts": lambda w: constant(OfflineThoughts, path=exported(w), examples=w.examples(), qs=w.qs),
    "evaluate": lambda w: constant(evaluate, qs=w.qs, examples=w.examples(), batch_size=2, progress=False, controls=True),
    "ask": asking,
    "read_questions": lambda w: constant(
        read_questions, source=w.write("questions.jsonl", '{"question": "1+1?", "answer": "2"}\n' * 3), split="test", limit=2
    ),
}


@pytest.mark.parametrize("calls, seed", [pytest.param(5, 0, id="5"), pytest.param(80, 1, id="80", marks=pytest.mark.long)])
@pytest.mark.parametrize("name", TARGETS)
def test_hostile_calls(name, calls, seed, world, record_property, monkeypatch):
    monkeypatch.chdir(world.folder)
    function, good = TARGETS[name](world)
    tally = attack(Target(name, function, good, paths=tuple(PATHS & good().keys())), calls, seed)
    record_property("counts", ["hostile calls of the wrapper", tally.counts])
    assert not tally.broken, "\n\n".join(tally.broken)
