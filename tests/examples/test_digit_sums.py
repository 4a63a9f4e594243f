"""examples/digit_sums.py: its lines and scores, every run for three steps, one full seed, and adapters."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from quietstar import QuietStar
from quietstar.checkpoints import places
from quietstar.config import AdapterConfig, TrainConfig
from quietstar.evaluation.scoring import one_thought

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def digit_sums(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import digit_sums

    return digit_sums


@pytest.fixture
def sums(digit_sums):
    import sums

    return sums


@pytest.fixture
def strings(sums):
    return sums.split_strings(seed=0)


def kinds_of_lines(text):
    """(kind, right) of each line, from its text alone."""
    for line in text:
        digits, answer = re.fullmatch(r"(\d{5})=(?:-\d{4}-)?(\d)", line).groups()
        aside = re.search(r"-(\d{4})-", line)
        sums = "".join(str(sum(map(int, digits[:n])) % 10) for n in range(2, 6))
        kind = "direct" if aside is None else "helpful" if aside[1] == sums else "junk" if aside[1] == digits[:4] else "wrong"
        yield kind, int(answer) == sum(map(int, digits)) % 10


def test_lines_hold_right_sums_and_the_share_of_asides(sums, strings) -> None:
    generator = torch.Generator().manual_seed(0)
    lines = sums.mixed_lines(sums.draw(strings[0], 4000, generator), generator)
    text = [sums.as_text(line).replace(" ", "").split("\n") for line in lines]
    assert all(set(after) <= {"_"} for _, after in text)
    kinds, right = zip(*kinds_of_lines(line for line, _ in text), strict=True)
    assert all(right) and "wrong" not in kinds
    shares = {kind: kinds.count(kind) / len(kinds) for kind in ("direct", "helpful", "junk")}
    # Three standard errors. For a string such as 00000 both asides are the same, which is rare.
    assert shares == pytest.approx({"direct": 0.4, "helpful": 0.24, "junk": 0.36}, abs=0.024)


def test_held_out_strings_are_never_trained_on(strings) -> None:
    training, held_out = ({tuple(row) for row in part.tolist()} for part in strings)
    assert (len(training), len(held_out)) == (90_000, 10_000) and not training & held_out


@pytest.fixture
def wrapped(sums):
    """An untrained model whose mixing weights are not 0."""
    qs = sums.think_with(sums.new_model(0), sums.EVERYWHERE, seed=0)
    torch.nn.init.normal_(qs.mixing_head[-1].weight)
    return qs


@pytest.mark.parametrize("mixing", ["logits", "logprobs"])
def test_predictions_are_those_of_the_wrapper(sums, strings, wrapped, mixing) -> None:
    wrapped = wrapped.with_config(replace(wrapped.thought_config, mixing=mixing))
    digits, anchors = strings[1][:50], sums.EVERYWHERE.anchors
    thoughts = sums.own_thoughts(wrapped, digits, anchors, seed=0)
    prediction = sums.predict(wrapped, digits, thoughts, anchors)
    lines = sums.direct_lines(digits)
    with torch.no_grad():
        out = one_thought(wrapped)(lines, thought_ids=thoughts, anchors=torch.tensor(anchors).expand(50, -1))
        plain = wrapped.model(lines).logits[:, :-1].log_softmax(-1)
    assert out.weight.abs().max() > 0.1
    torch.testing.assert_close(prediction.weight, out.weight[:, :, 0, 0])
    torch.testing.assert_close(prediction.base, plain)
    for logprobs, nll in ((prediction.base, out.nll_base), (prediction.mixed, out.nll_mix[:, :, 0, 0])):
        torch.testing.assert_close(-logprobs.gather(2, lines[:, 1:, None])[..., 0], nll)
    assert wrapped.thought_config.thoughts == sums.EVERYWHERE.thoughts


def test_scores_of_an_oracle_and_of_a_model_one_off(sums, strings) -> None:
    digits = strings[1][:300]
    answers = digits.sum(1) % 10
    oracle = (torch.nn.functional.one_hot(answers, 14)[:, None].float() * 100).log_softmax(-1)
    assert sums.score(oracle, digits) == {"nll": pytest.approx(0, abs=1e-6), "right": 300, "lines": 300}
    assert sums.score(oracle.roll(1, -1), digits)["right"] == 0
    wrong_in_100 = torch.cat([oracle[:200], oracle[200:].roll(1, -1)])
    assert sums.score(wrong_in_100, digits)["right"] == 200
    # The answer must beat every token: the dash, which an aside starts with, too.
    oracle[:, :, sums.DASH] = 200
    assert sums.score(oracle, digits)["right"] == 0


def test_equals_is_rewarded_wherever_it_thinks(sums, strings) -> None:
    """The objective leaves out the last position with all its targets, which must not be "="."""
    for setting in (sums.EQUALS_ONLY, sums.EVERYWHERE):
        data = sums.DirectLines(strings[0][:4], setting)
        batch = {name: torch.stack([data[i][name] for i in range(4)]) for name in data[0]}
        qs = sums.think_with(sums.new_model(0), setting, seed=0)
        assert int(qs.count_targets(**batch).places) == 4 * setting.thoughts * (setting.anchors.index(sums.AT_EQUALS) + 1)


@pytest.mark.long
def test_every_run_for_three_steps(digit_sums, sums, monkeypatch, tmp_path, capsys) -> None:
    real_gate = sums.measure_gate
    monkeypatch.setattr(sums, "measure_gate", lambda *args: {**real_gate(*args), "passed": True})
    monkeypatch.setattr(digit_sums, "CURVE_LINES", 16)
    runs = {replace(setting, lines=4, steps=3): names for setting, names in digit_sums.ALL_RUNS.items()}
    seed = digit_sums.run_seed(0, runs, tmp_path, pretraining_steps=3, test_lines=64)
    assert all(
        0 <= row[how]["right"] <= 64 == row[how]["lines"] for row in seed["rows"] for how in ("sampled", "greedy") if how in row
    )
    assert len(seed["rows"]) == sum(map(len, runs.values())) + 3 * len(runs)
    assert [point["step"] for point in seed["rows"][0]["curve"]] == [1, 2, 3]
    assert len(seed["positions"]["w"]) == 7
    assert seed["gains"].keys() == {setting.name for setting in runs}
    for found in seed["gains"].values():
        assert found["gain"] == pytest.approx(found["mixing"] + found["content"])
    assert not all(check["passed"] for check in seed["checks"])  # three steps teach nothing, and the checks say so

    results = {**digit_sums.report.describe_machine(), "seeds": [seed]}
    digit_sums.report.show(results, tmp_path)
    said = capsys.readouterr().out
    assert "FAIL" in said and "What thinking gains at the answer" in said
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["seeds"][0]["rows"][0]["run"] == "Quiet-STaR"
    pytest.importorskip("matplotlib")
    assert len(list(tmp_path.glob("*.png"))) == 3
    digit_sums.report.write_docs(written, tmp_path)
    assert json.loads((tmp_path / "digit_sums.json").read_text()) == written
    assert f"begin -->\n{digit_sums.report.block(written)}\n<!--" in (tmp_path / "results.md").read_text()


@pytest.mark.long
def test_a_seed_that_pretraining_failed_trains_nothing(digit_sums, sums, tmp_path, capsys) -> None:
    seed = digit_sums.run_seed(0, digit_sums.QUICK_RUNS, tmp_path, pretraining_steps=2, test_lines=64)
    assert seed["rows"] == [] and seed["pretraining"]["steps"] == 4
    assert not any(check["passed"] for check in seed["checks"])
    digit_sums.report.show({**digit_sums.report.describe_machine(), "seeds": [seed]}, tmp_path)
    assert "pretraining did not teach" in capsys.readouterr().out


def test_the_docs_are_written_from_their_numbers(digit_sums) -> None:
    docs = EXAMPLES.parent / "docs"
    results = json.loads((docs / "digit_sums.json").read_text())
    assert digit_sums.report.block(results) in (docs / "results.md").read_text()
    assert len(results["seeds"]) >= 3


@pytest.fixture
def one_thread():
    """The default of the script. Two threads are hardly faster on an idle machine, and far slower on a busy one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_resume_keeps_the_seeds_that_are_done(digit_sums, one_thread, monkeypatch, tmp_path, capsys) -> None:
    ran = []

    def run_seed(seed, runs, out, **quick):
        ran.append(seed)
        if ran == [0, 1, 2]:
            raise KeyboardInterrupt
        return {"seed": seed, "checks": [], "time": len(ran)}

    def main(*options):
        monkeypatch.setattr("sys.argv", ["digit_sums.py", f"--out={tmp_path}", *options])
        assert digit_sums.main() == 0
        return json.loads((tmp_path / "results.json").read_text())["seeds"]

    monkeypatch.setattr(digit_sums, "run_seed", run_seed)
    monkeypatch.setattr(digit_sums.report, "show", lambda *arguments: None)
    with pytest.raises(KeyboardInterrupt):
        main("--seeds=4")
    resumed = main("--seeds=4", "--resume")
    assert [(x["seed"], x["time"]) for x in resumed] == [(0, 1), (1, 2), (2, 4), (3, 5)]
    assert main("--seeds=4", "--resume") == resumed and len(ran) == 5
    for option, said in (("--quick", "quick=False, not True"), ("--threads=2", "threads=1, not 2")):
        with pytest.raises(SystemExit):
            main("--resume", option)
        assert f"results.json was made with {said}: take another --out" in capsys.readouterr().err
    assert [x["time"] for x in main()] == [6]  # without --resume it starts over


@pytest.fixture
def pretrained(digit_sums, sums, strings, one_thread, tmp_path_factory):
    """The language model that all runs start from, and its gate; trained by the first test that needs it."""
    folder = tmp_path_factory.getbasetemp() / "digit-sums"
    if not folder.exists():
        model, gate = sums.pretrain(*strings, seed=0, steps=digit_sums.QUICK_PRETRAINING)
        model.save_pretrained(folder)
        (folder / "gate.json").write_text(json.dumps(gate))
    return lambda: (LlamaForCausalLM.from_pretrained(folder), json.loads((folder / "gate.json").read_text()))


@pytest.mark.long
def test_thinking_at_equals_helps(digit_sums, sums, pretrained, tmp_path, monkeypatch) -> None:
    """One seed of fewer steps meets every threshold; about a minute and a half, with pretraining."""
    monkeypatch.setattr(sums, "pretrain", lambda *arguments: pretrained())
    runs = {replace(sums.EQUALS_ONLY, steps=120): (digit_sums.QUIET_STAR, digit_sums.FROZEN, digit_sums.PAUSES)}
    seed = digit_sums.run_seed(0, runs, tmp_path, test_lines=1024)
    assert len(seed["checks"]) == 11
    assert [check for check in seed["checks"] if not check["passed"]] == []


@pytest.mark.long
def test_thinking_helps_with_adapters(digit_sums, sums, pretrained, strings, tmp_path, monkeypatch) -> None:
    """Only LoRA, the mixing head and the two vectors are trained; the checkpoint thinks on the unchanged base model."""
    pytest.importorskip("peft")
    model, gate = pretrained()
    assert gate["passed"]
    setting, digits = replace(sums.EQUALS_ONLY, steps=50), strings[1][:512]
    qs = sums.think_with(model, setting, seed=0)
    qs.add_adapters(AdapterConfig(lora_rank=8))
    generator = torch.Generator().manual_seed(0)
    lines = sums.DirectLines(sums.draw(strings[0], setting.lines * setting.steps, generator), setting)
    monkeypatch.setattr(sums, "TrainConfig", lambda **given: TrainConfig(**given | {"learning_rate": 5e-3}))
    sums.train_to_think(qs, lines, setting, tmp_path, seed=0)

    qs = QuietStar.from_pretrained(places.folder(tmp_path, 50), base=pretrained()[0]).eval()
    row = digit_sums.evaluate(qs, digit_sums.QUIET_STAR, digits, seed=0)
    scores, _ = digit_sums.measure_gain(qs, digits)
    assert digit_sums.exact_match(row, "greedy") >= 0.9 and digit_sums.exact_match(row, "sampled") >= 0.85
    assert row["sampled"]["nll"] <= 0.6 and scores["right"] / scores["lines"] <= 0.15
