"""Distillation of a chain into states: where they are read and written, which model learns when, and what a run saves."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import layer_norm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from quietstar_recipes.common import plots
from quietstar_recipes.common.models import small_model
from quietstar_recipes.internalize import kd
from quietstar_recipes.internalize import stepwise as icot
from quietstar_recipes.internalize.kd import (
    Config,
    Emulator,
    Pair,
    Student,
    completion_loss,
    decoder_layers,
    diagonal,
    distill,
    emulation_loss,
    teacher_states,
    writing,
)
from quietstar_recipes.tasks import Addition
from tests.recipes.conftest import same, seeded


def gpt2(seed=0):
    return small_model(Addition(1), layers=3, width=32, heads=2, positions=64, seed=seed).double().eval()


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 19, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)).double().eval()


MODELS = pytest.mark.parametrize("make", [gpt2, llama])
IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]])


def test_the_diagonal_goes_from_the_start_in_the_first_layer_to_the_end_in_the_last():
    """Four layers; each row has its own steps, even if its chain is as short as two tokens."""
    hidden = tuple(torch.randn(2, 12, 8, dtype=torch.float64) for _ in range(5))
    found = diagonal(hidden, torch.tensor([1, 4]), torch.tensor([10, 6]))
    places = [[1, 4, 7, 10], [4, 5, 5, 6]]
    for row in range(2):
        for l in range(4):
            torch.testing.assert_close(found[row, l], layer_norm(hidden[l][row, places[row][l]], (8,)))


@MODELS
def test_states_are_written_at_one_position_of_each_layers_input(make):
    """Each layer sees the state at that position, and unchanged inputs before it."""
    model = make()
    states, inputs = torch.randn(3, 2, 32, dtype=torch.float64), []
    plain = model(IDS, output_hidden_states=True).hidden_states
    with writing(model, 2, lambda l, hidden: states[l]):
        for layer in decoder_layers(model):  # hooks run in the order in which they were registered
            layer.register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
        model(IDS)
    for l in range(3):
        assert torch.equal(inputs[l][:, 2], states[l])
        assert torch.equal(inputs[l][:, :2], plain[l][:, :2])
        changed = (inputs[l][:, 3:] - plain[l][:, 3:]).abs().max()
        assert changed == 0 if l == 0 else changed > 1e-3


@MODELS
def test_cached_answers_are_those_of_whole_forwards(make):
    """Compared with decoding token by token without a cache, with the states written each time."""
    task = Addition(1)
    pair = Pair(Emulator(make(1)), Student(make(2))).eval()
    prompts = [[8, 2], [5, 6, 7, 2], [9, 10, 2], [11, 2]]
    found = pair.answer(task, prompts, 5)
    for prompt, one in zip(prompts, found, strict=True):
        states, ids = pair.emulator([prompt]), list(prompt)
        while len(ids) < len(prompt) + len(one.ids):
            with pair.student.reading(states, len(prompt) - 1):
                ids.append(int(pair.student.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert one.ids == ids[len(prompt) :]


@pytest.mark.parametrize("components", [1, 3])
def test_padding_changes_no_emulated_state(components):
    emulator = Emulator(gpt2(), components)
    prompts = [[5, 6, 7, 2], [8, 2]]
    together = emulator(prompts)
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(together[i], emulator([prompt])[0])


def test_later_layers_know_what_earlier_ones_predicted():
    """A change of the first layer's prediction reaches later layers through what is written, and only through that."""
    emulator = Emulator(gpt2())
    before = emulator([[5, 6, 2]])
    with torch.no_grad():
        emulator.perceptrons[0][2].bias += 1
    change = (emulator([[5, 6, 2]]) - before).abs().amax((0, 2))
    assert (change > 1e-4).all()
    torch.nn.init.zeros_(emulator.write.weight)
    before = emulator([[5, 6, 2]])
    with torch.no_grad():
        emulator.perceptrons[0][2].bias += 1
    change = (emulator([[5, 6, 2]]) - before).abs().amax((0, 2))
    assert float(change[0].detach()) == pytest.approx(1) and change[1:].max() < 1e-12


def touched(model):
    return any(p.grad is not None and bool(p.grad.any()) for p in model.parameters())


def test_which_gradient_each_phase_has():
    task, teacher = Addition(1), gpt2()
    rows = task.sample(6, "train", seeded(0))
    prompts = [row.prompt_ids for row in rows]
    answers = [icot.shortened(task, row, 9) for row in rows]

    def answer_loss(pair, states):
        with pair.student.reading(states, len(prompts[0]) - 1):
            return completion_loss(pair.student.model, prompts, answers)

    for loss, moves in (
        (lambda pair, shown: answer_loss(pair, shown), (False, True)),
        (lambda pair, shown: emulation_loss(pair.emulator(prompts), shown), (True, False)),
        (lambda pair, shown: answer_loss(pair, pair.emulator(prompts)), (True, True)),
    ):
        pair = Pair(Emulator(gpt2(1)), Student(gpt2(2)))
        loss(pair, teacher_states(teacher, task, rows)).backward()
        assert (touched(pair.emulator), touched(pair.student)) == moves
        assert not touched(teacher)


def test_the_teacher_reads_the_whole_chain():
    """Another chain gives other states, except in the first layer, whose state is from before the chain."""
    task, teacher = Addition(1), gpt2()
    (row,) = task.sample(1, "train", seeded(0))
    a, b = (teacher_states(teacher, task, [x])[0] for x in (row, replace(row, cot_ids=[7, 8])))
    assert torch.equal(a[0], b[0]) and (a[1] - b[1]).abs().max() > 1e-3
    assert a.mean(-1).abs().max() < 1e-6
    end = len(row.prompt_ids + row.cot_ids + task.separator_ids) - 1
    ids = torch.tensor([row.prompt_ids + task.completion_ids(row)])
    torch.testing.assert_close(a[2], layer_norm(teacher(ids, output_hidden_states=True).hidden_states[2][0, end], (32,)))


def test_emulation_loss():
    a, b = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    by_hand = sum(0.5 * float(((a[i] - b[i]) ** 2).sum()) for i in range(4)) / 4
    assert float(emulation_loss(a, b)) == pytest.approx(by_hand)


@pytest.fixture
def run(tmp_path, monkeypatch):
    def start(out="run", task=None, resume=False, panels=lambda *_: None, **changes):
        monkeypatch.setattr(kd, "panels", panels)  # a picture takes longer than a run
        task = task or Addition(1)
        fixed = {"explicit_steps": 3, "batch_size": 8, "rows": 40, "held_out": 6, "save_every": 100}
        teacher = icot.Config(out=str(tmp_path / out), **fixed)
        model = small_model(task, width=32, heads=2, positions=64)
        before = copy.deepcopy(model)
        pair, report = distill(model, task, teacher, Config(**{**dict.fromkeys(NUMBERS, 3), **changes}), resume=resume)
        assert same(model, before)
        right = {name: x["right"] if isinstance(x, dict) else x for name, x in report.items()}
        return pair, right | {"steps": [x["steps"] for x in report.values() if isinstance(x, dict)]}

    return start


NUMBERS = ("student_steps", "emulator_steps", "coupled_steps")


def test_what_the_emulator_learns_and_the_rate_of_each_phase(run, monkeypatch):
    shown, wanted, rates = [], [], []

    def noting(name, note):
        function = getattr(kd, name)

        def noted(*arguments):
            found = function(*arguments)
            note(found, *arguments)
            return found

        monkeypatch.setattr(kd, name, noted)

    noting("teacher_states", lambda states, *_: shown.append(states))
    noting("emulation_loss", lambda _, states, targets: wanted.append(targets))
    noting("adamw", lambda _, module, rate, decay: rates.append(rate))
    run()
    assert len(wanted) == 3 and all(any(targets is states for states in shown) for targets in wanted)
    assert rates == pytest.approx([1e-3, 1e-3, 1e-3, 3e-4])


def test_a_run_and_what_it_saves(run, tmp_path):
    pair, report = run(panels=plots.panels)
    assert list(report) == ["full chain", "shown states", "emulated states", "emulation", "internalized", "steps"]
    assert len(report["emulation"]) == 2
    task = Addition(1)
    saved = Pair.from_pretrained(tmp_path / "run" / "pair")
    prompts = [row.prompt_ids for row in task.sample(5, "test", seeded(0))]
    assert [x.logprob for x in saved.answer(task, prompts, 6)] == [x.logprob for x in pair.answer(task, prompts, 6)]
    for name in ("teacher/model", "pair/student", "pair/emulator"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name)
    assert json.loads((tmp_path / "run" / "kd.json").read_text())["emulation"] == report["emulation"]
    assert (tmp_path / "run" / "kd.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "run" / "pair" / "states.safetensors").unlink()
    with pytest.raises(ValueError, match="could not load the emulator and student"):
        Pair.from_pretrained(tmp_path / "run" / "pair")


def test_a_resumed_run_gives_the_same_numbers(run, continues, ended):
    """Stopped in the second and in the last of the four phases."""
    continues(run, ended(torch.nn.utils, "clip_grad_norm_", 4), ended(torch.nn.utils, "clip_grad_norm_", 5))


def test_a_model_whose_layers_are_in_no_list():
    model = gpt2()
    model.config.n_layer = 7
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list of its 7 layers"):
        decoder_layers(model)
