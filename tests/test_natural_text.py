"""The experiment on natural text: losses, gains, and all of it at the smallest size, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from quietstar.data.texts import builtin_texts
from quietstar.testing import byte_tokenizer, tiny_model

FOLDER = Path(__file__).parents[1] / "experiments"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
SMALLEST = {"held_out": 8, "length": 32, "arms": ("plain", "small"), "seeds": 1, "thought_tokens": 3, "lookahead": 2}
SMALLEST |= {"steps": 8, "batch_size": 2, "learning_rate": 1e-3, "checkpointing": False, "save_every": 2, "precision": "no"}
SMALLEST |= {"gsm8k_tokens": 8, "commonsense_qa_tokens": 4, "block": 2, "eval_batch": 4}


@pytest.fixture
def tiny(scripts, tmp_path):
    """``tiny(out, ...)``: the smallest experiment in this folder, with a random model of bytes."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    torch.manual_seed(0)
    model = tiny_model(len(tokenizer))
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "model")
    choices = {"label": list("ABC"), "text": ["mouse", "horse", "whale"]}
    rows = {
        "data": [{"text": text} for text in builtin_texts()[:80]],
        "gsm8k": [{"question": f"Ann has {n} pens and buys 5. How many?", "answer": f"#### {n + 5}"} for n in range(4)],
        "commonsense_qa": [{"question": f"{n}. Which is the largest?", "choices": choices, "answerKey": "C"} for n in range(4)],
    }
    for name, several in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in several))
    files = {"model": str(tmp_path / "model"), **{name: str(tmp_path / f"{name}.jsonl") for name in rows}}
    return lambda out, **changes: scripts("natural_text").Experiment(
        **{**SMALLEST, **files, "out": str(tmp_path / out), **changes}
    )


def test_the_plain_arm_trains_the_text_alone(scripts, tiny):
    """The loss of its objective is the language model's own, and the mixing head gets no gradient."""
    evaluation = scripts("natural_text")
    qs = evaluation.model(tiny("run"), evaluation.BASE).train()
    ids = torch.randint(1, 250, (2, SMALLEST["length"]), generator=torch.Generator().manual_seed(0))
    out = qs(ids, anchors=torch.zeros(2, 1, dtype=torch.int64), seed=0)
    assert out.loss.item() == pytest.approx(qs.model(ids, labels=ids).loss.item(), abs=1e-5)
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in qs.mixing_head.parameters())


def test_losses_are_those_of_the_evaluation(scripts, tiny):
    from quietstar.evaluation.losses import evaluate

    evaluation = scripts("natural_text")
    qs = evaluation.model(tiny("run"), evaluation.BASE)
    qs.use_config(tiny("run").thought_config("small"))
    torch.nn.init.normal_(qs.mixing_head[-1].weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    texts = [{"input_ids": torch.randint(1, 250, (length,), generator=generator)} for length in (20, 32, 9)]
    found, whole = evaluation.held_out_losses(qs, texts, True, 2), evaluate(qs, texts)
    assert sum(found["base"]) / 3 == pytest.approx(whole["base"], abs=1e-5)
    assert sum(found["own"]) / 3 == pytest.approx(whole["mixed"], abs=1e-5)
    assert len({round(sum(found[way]), 6) for way in ("own", "another", "constant", "random")}) == 4
    assert evaluation.held_out_losses(qs, texts, False, 2) == {"base": pytest.approx(found["base"], abs=1e-5)}


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
    found = {name: row[report.LOSS] for name, row in report.gains_of(rows, "official").items()}
    means = {name: round(figure["mean"], 3) for name, figure in found.items()}
    assert means["of thinking"] == pytest.approx(means["of mixing"] + means["of content"])
    assert means["of content"] == 0.1 and means["over the base model"] == 0.297
    assert report.cell(found["over one constant thought"], "+") == "+0.1000 (+0.1000 to +0.1000)"
    assert found["over random tokens"]["low"] < 0 < found["over random tokens"]["mean"]
    assert found["over training without thoughts"]["seeds"] == pytest.approx([0.2, 0.193], abs=1e-3)
    del rows["trained without thoughts"]
    assert "over training without thoughts" not in report.gains_of(rows, "official")


def figures(folder):
    """All that was measured, without the times it took."""
    found = {path.relative_to(folder): json.loads(path.read_text()) for path in folder.glob("*/*-*.json")}
    found |= {path.relative_to(folder): json.loads(path.read_text()) for path in folder.glob("*/losses.json")}
    for values in found.values():
        del values["seconds"]
    return found, json.loads((folder / "results.json").read_text())


def options(e):
    """The options that make this experiment of the default one."""
    values = {name.replace("_", "-"): value for name, value in asdict(e).items() if name not in ("checkpointing", "arms")}
    return [*(f"--{name}={value}" for name, value in values.items()), "--no-checkpointing", "--arms", *e.arms]


def kill_once_there(path, e):
    """Start the experiment and end it with SIGKILL as soon as ``path`` is there."""
    command = [sys.executable, str(FOLDER / "natural_text.py"), *options(e)]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < limit, f"{path} was not written"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.long
def test_killed_and_resumed_it_measures_the_same(scripts, tiny, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    kill_once_there(killed / "base/gsm8k-00000.json", tiny("killed"))  # between phases
    assert not (killed / "plain-0").exists()
    kill_once_there(killed / "small-0/checkpoints/step-000002/manifest.json", tiny("killed"))  # in the middle of training
    assert not (killed / "results.json").exists()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("base/*.json")}
    script = scripts("natural_text")
    for e in (tiny("killed"), tiny("whole")):
        assert script.main(options(e)) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before  # what was done is not done again
    assert figures(killed) == figures(whole)
    assert "What thinking gains: small" in (whole / "report.md").read_text()
    phases = script.phases(tiny("whole", seeds=2))
    left = [phase.result.relative_to(whole).parts[0] for phase in phases if not phase.result.exists()]
    assert set(left) == {"plain-1", "small-1"}  # another seed only adds to what is there
    with pytest.raises(ValueError, match="the run there has steps=8, not 9"):
        script.main(options(tiny("whole", steps=9)))
