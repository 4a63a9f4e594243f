"""The experiment on natural text: losses, cost and report, and all of it at the smallest size, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "experiments"
COMMAND = [sys.executable, str(FOLDER / "natural_text.py"), "--tiny", "--seeds=1", "--steps=8"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def tiny(scripts, tmp_path):
    """The smallest experiment, with its files, in a folder of its own."""
    script = scripts("natural_text")
    return script.with_files(replace(script.TINY, out=str(tmp_path), seeds=1))


def test_the_plain_arm_trains_the_text_alone(scripts, tiny):
    """The loss of its objective is the language model's own, and the mixing head gets no gradient."""
    evaluation = scripts("natural_text")
    qs = evaluation.model(tiny, evaluation.BASE).train()
    ids = torch.randint(1, 250, (2, tiny.length), generator=torch.Generator().manual_seed(0))
    out = qs(ids, anchors=torch.zeros(2, 1, dtype=torch.int64), seed=0)
    assert out.loss.item() == pytest.approx(qs.model(ids, labels=ids).loss.item(), abs=1e-5)
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in qs.mixing_head.parameters())


def test_losses_are_those_of_the_evaluation(scripts, tiny):
    from quietstar.evaluation.losses import evaluate

    evaluation = scripts("natural_text")
    qs = evaluation.model(tiny, evaluation.BASE)
    qs.use_config(tiny.thought_config("small"))
    torch.nn.init.normal_(qs.mixing_head[-1].weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(1, 250, (length,), generator=generator)} for length in (20, 32, 9)]
    found, whole = evaluation.held_out_losses(qs, texts, True, 2), evaluate(qs, texts)
    assert sum(found["base"]) / 3 == pytest.approx(whole["base"], abs=1e-5)
    assert sum(found["own"]) / 3 == pytest.approx(whole["mixed"], abs=1e-5)
    assert len({round(sum(found[way]), 6) for way in ("own", "another", "constant", "random")}) == 4
    assert evaluation.held_out_losses(qs, texts, False, 2) == {"base": pytest.approx(found["base"], abs=1e-5)}


def test_operations_are_those_that_pytorch_counts(scripts, tmp_path):
    costs = scripts("natural_text")
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
    ids = torch.zeros(2, 48, dtype=torch.int64)
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # PyTorch doesn't count every kernel of the others
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    expected = 2 * costs.Model.of(config).forward(48, 48, 48)  # two texts, whose rows see all 48
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)
    config.save_pretrained(tmp_path)
    said = costs.cost(costs.Experiment(model=str(tmp_path)), costs.Machine())
    assert said.startswith("memory of training: ") and "\ntraining, official " in said and "\ntogether " in said


def test_what_the_gains_say(scripts):
    report = scripts("natural_text")
    losses = {
        "base model": [[3.0, 2.0, 4.0]],
        "trained without thoughts": [[2.9, 1.9, 3.91], [2.9, 1.89, 3.9]],
        "official, without a thought": [[2.9, 1.9, 3.9]] * 2,
        "official, own thoughts": [[2.7, 1.71, 3.7]] * 2,
        "official, another text's thoughts": [[2.8, 1.8, 3.81]] * 2,
        "official, one constant thought": [[2.8, 1.81, 3.8]] * 2,
        "official, random tokens": [[3.3, 1.3, 3.9]] * 2,
    }
    rows = {name: {report.LOSS: [4 * seed for seed in scores]} for name, scores in losses.items()}
    found = report.gains_of(rows, "official")
    means = {name: round(figure.mean, 3) for (name, _), figure in found.items()}
    assert means["of thinking"] == pytest.approx(means["of mixing"] + means["of content"])
    assert means["of content"] == 0.1 and means["over the base model"] == 0.297
    assert report.verdict(found).startswith("Thinking helped on held-out text, by +0.1000 (+0.1000 to +0.1000)")
    assert found["over random tokens", report.LOSS].low < 0  # not needed for the verdict
    rows["official, own thoughts"] = rows["official, another text's thoughts"]
    said = report.verdict(report.gains_of(rows, "official"))
    assert said.endswith("Not above 0 with its interval: gain of content, over one constant thought.")
    few = {name: {report.LOSS: [seed[:9] for seed in row[report.LOSS]]} for name, row in rows.items()}
    assert "9 held-out texts are too few" in report.verdict(report.gains_of(few, "official"))
    # Another text's thoughts mislead more than its own.
    worse = {"own thoughts": 0.2, "another text's thoughts": 0.3, "one constant thought": 0.4}
    without = rows["official, without a thought"][report.LOSS]
    for name, harm in worse.items():
        rows[f"official, {name}"] = {report.LOSS: [[x + harm * (1 + i % 2) for i, x in enumerate(seed)] for seed in without]}
    rows["trained without thoughts"] = {report.LOSS: [[x + 1 for x in seed] for seed in without]}
    said = report.verdict(report.gains_of(rows, "official"))
    assert said == "Thinking hurts on held-out text; its own thoughts hurt less than another text's."
    rows["official, own thoughts"] = rows["official, without a thought"]
    assert report.verdict(report.gains_of(rows, "official")).endswith("with its interval: gain of thinking.")
    del rows["trained without thoughts"]
    assert "can't be said" in report.verdict(report.gains_of(rows, "official"))


def figures(folder):
    """All that was measured, without the times it took."""
    found = {path.relative_to(folder): json.loads(path.read_text()) for path in folder.glob("*/*-*.json")}
    found |= {path.relative_to(folder): json.loads(path.read_text()) for path in folder.glob("*/losses.json")}
    for values in found.values():
        del values["seconds"]
    return found, json.loads((folder / "results.json").read_text())


def kill_once_there(path, out):
    """Start the experiment in ``out`` and end it with SIGKILL as soon as ``path`` is there."""
    process = subprocess.Popen([*COMMAND, f"--out={out}"], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < limit, f"{path} was not written"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_killed_and_resumed_it_measures_the_same(scripts, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_once_there(killed / "base/gsm8k-00000.json", killed)  # between phases
    assert not (killed / "plain-0").exists()
    kill_once_there(killed / "small-0/checkpoints/step-000002/manifest.json", killed)  # in the middle of training
    assert not (killed / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("base/*.json")}
    for out in (killed, whole):
        done = subprocess.run([*COMMAND, f"--out={out}"], env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was done is not done again
    assert figures(killed) == figures(whole)
    for name in ("report.md", "report.png"):
        assert (whole / name).stat().st_size
    assert "What thinking gains: small" in (whole / "report.md").read_text()
    script = scripts("natural_text")
    e = replace(script.TINY, out=str(whole), steps=8, seeds=2)
    left = [phase.result.relative_to(whole).parts[0] for phase in script.phases(e) if not phase.result.exists()]
    assert set(left) == {"plain-1", "small-1"}  # another seed only adds to what is there
    other = subprocess.run([*COMMAND, f"--out={whole}", "--steps=9"], env=ENVIRONMENT, capture_output=True, text=True)
    assert other.returncode and "the run there has steps=8, not 9" in other.stderr
