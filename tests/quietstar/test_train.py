"""The loop gives the same numbers from a seed however a run is split or resumed; checkpoints are whole or refused."""

import json
import math
import shutil
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints import places
from quietstar.config import TrainConfig
from quietstar.evaluation import losses
from quietstar.run import sharding, snapshots
from quietstar.run.batches import collate
from quietstar.run.parts import prepare_parts
from quietstar.run.processes import Interrupted
from quietstar.training import thought_loss
from tests.quietstar.common import TIMES, short_run, texts_of

CONFIG = ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2, policy_weight=5.0, embedding_scale=1.0)
DATA = texts_of([7 + i % 3 for i in range(11)])  # two steps of 6 are more than an epoch


def run_in(folder, tiny):
    def run(out="run", model="llama", resume=None, thoughts=CONFIG, **changes):
        sizes = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1, "attn_pdrop": 0.0}}
        qs = QuietStar(tiny(model, **sizes[model]), thoughts, verify=False)
        settings = {"batch_size": 6, "learning_rate": 1e-3, "warmup": 2, "keep": 3, **changes}
        return short_run(qs, DATA, folder / out, resume, **settings)

    return run


@pytest.fixture
def run(tiny, tmp_path):
    """``run(out, ...)`` trains a new model of the same weights for 4 steps; returns the metrics without times."""
    return run_in(tmp_path, tiny)


@pytest.fixture(scope="module")
def unbroken(tiny, tmp_path_factory):
    """The metrics of a run that nothing happens to."""
    return run_in(tmp_path_factory.mktemp("unbroken"), tiny)()


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_metrics_are_written_a_line_a_step(run, unbroken, tmp_path):
    lines = run()
    assert lines == unbroken and run("other", steps=1, seed=1) != lines[:1]
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    assert [{name: line[name] for name in lines[0]} for line in written] == lines
    assert all(math.isfinite(value) for line in written for value in line.values())
    assert set(written[0]) - set(lines[0]) == TIMES
    assert {"loss", "loss_ce", "policy_loss", "reward", "advantage", "weight", "grad_norm", "learning_rate"} < set(lines[0])


def test_another_cut_into_parts_changes_rounding_only(run, unbroken):
    for a, b in zip(unbroken[:3], run(steps=3, accumulation=3), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_thoughts_that_stop_count_the_same_however_the_batch_is_cut(run):
    """Their tokens are counted over the whole step before a part is divided by them."""
    counted = []

    def loss(model, texts, counts, seed):
        assert len(texts.thought_lengths.unique()) > 1
        counted.append((int(counts.tokens), int(counts.places)))
        return thought_loss(model, texts, counts, seed)

    options = {"thoughts": replace(CONFIG, end_token_id=2, stop_threshold=1 / 61), "steps": 1, "loss": loss}
    whole, cut = run("whole", **options), run("cut", accumulation=3, **options)
    assert whole[0] == pytest.approx(cut[0], rel=1e-4, abs=1e-5)
    tokens, places = counted[0]
    assert counted == [(tokens, places)] * 4 and 0 < tokens < 2 * places


def test_a_resumed_run_gives_the_unbroken_ones_metrics_bitwise(run, tmp_path):
    """With dropout, whose random numbers go on too."""
    run = partial(run, model="gpt2")
    unbroken = run("unbroken")
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "checkpoints" / "step-000004")
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')  # killed while it wrote
    assert run("broken", resume="auto") == unbroken
    run("grown", steps=2)
    assert run("grown", resume="auto") == unbroken
    elsewhere = run("elsewhere", resume=tmp_path / "unbroken" / "checkpoints" / "step-000002")
    assert elsewhere == unbroken[2:]
    for a, b, c in zip(*(places.every(tmp_path / name) for name in ("unbroken", "broken", "grown")), strict=True):
        for name in ("model.safetensors", "quietstar.safetensors", "optimizer.safetensors"):
            assert (a / name).read_bytes() == (b / name).read_bytes() == (c / name).read_bytes()


def test_another_config_or_model_is_refused(run):
    run(steps=2)
    for change in ({"seed": 1}, {"learning_rate": 2e-3}, {"batch_size": 5}):
        with pytest.raises(ValueError, match=f"the run there has {next(iter(change))}="):
            run(resume="auto", **{"steps": 2, **change})
    with pytest.raises(ValueError, match="another model"):
        run(steps=2, model="gpt2", resume="auto")


def test_only_the_newest_are_kept(run, tmp_path):
    """By a run that has nothing to save too, as after a kill in the middle of a removal; and by a new run in an old folder."""
    run(save_every=1, keep=3)
    folder = tmp_path / "run" / "checkpoints"
    assert checkpoints(tmp_path / "run") == ["step-000002", "step-000003", "step-000004"]
    (folder / "step-000002").rename(folder / ".step-000002-old")
    run(save_every=1, keep=1, resume="auto")
    assert checkpoints(tmp_path / "run") == ["step-000004"]
    run(steps=3, keep=1, seed=1)
    assert checkpoints(tmp_path / "run") == ["step-000003"]


def test_a_full_disk_leaves_the_last_checkpoint_whole(run, unbroken, tmp_path, monkeypatch):
    write, calls = snapshots.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half a fi")
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        write(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "save_file", full)
        with pytest.raises(OSError, match="No space left on device: '.*run/checkpoints/step-000004'$"):
            run()
    assert checkpoints(tmp_path / "run") == ["step-000002"]
    places.check(tmp_path / "run" / "checkpoints" / "step-000002")
    assert run(resume="auto") == unbroken


def test_a_lost_process_does_not_cost_the_finished_steps_where_an_older_run_was(run, tmp_path):
    run()
    calls = []

    def lost(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("[gloo] connection closed by peer")
        return thought_loss(*arguments)

    with pytest.raises(ConnectionError, match="another process ended"):
        run(seed=1, save_every=4, loss=lost)
    saved = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "run.json").read_text())
    assert saved["config"]["train"]["seed"] == 1 and checkpoints(tmp_path / "run") == ["step-000002"]


@pytest.mark.parametrize("during", ["the step", "its checkpoint"])
def test_a_signal_in_the_last_step_is_not_lost(run, unbroken, monkeypatch, during):
    """The caller of ``train`` may have more to do."""
    original = {"the step": thought_loss, "its checkpoint": snapshots.save_file}[during]

    def terminated(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 1; resume from .*step-000001"):
        if during == "its checkpoint":
            patch.setattr(snapshots, "save_file", terminated)
        run(steps=1, loss=terminated if during == "the step" else thought_loss)
    assert run(steps=1, resume="auto") == unbroken[:1]


def test_a_signal_in_an_evaluation_leaves_it_and_the_run_goes_on_as_if_it_had_not_come(run, tmp_path, monkeypatch):
    """Before the first step and after the last: one run that is stopped in each evaluation, and goes on twice."""
    options = {"evaluate": partial(losses.evaluate, examples=DATA[:4], batch_size=1, controls=False), "evaluate_first": True}
    options |= {"eval_every": 2, "steps": 2}
    want = run("unbroken", **options)
    batches, batch = [], losses._losses

    def terminated(*arguments):
        batches.append(1)
        if len(batches) in (2, 8):  # the second of four in each evaluation
            signal.raise_signal(signal.SIGTERM)
        return batch(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "_losses", terminated)
        for step, seen in ((0, 2), (2, 8)):
            with pytest.raises(Interrupted, match=f"after step {step}"):
                run(**options, resume="auto")
            assert len(batches) == seen
    assert checkpoints(tmp_path / "run") == ["step-000002"]
    assert run(**options, resume="auto") == want


def test_a_custom_loss(run):
    def doubled(model, texts, counts, seed):
        out = model(texts, counts=counts, seed=seed)
        return 2 * out.loss_ce, out

    lines = run(loss=doubled, accumulation=2)
    assert [line["loss"] for line in lines] == pytest.approx([2 * line["loss_ce"] for line in lines])
    assert lines[-1]["loss_ce"] < lines[0]["loss_ce"]


def test_evaluations_before_the_first_step_and_after_the_last_change_no_step(run, unbroken, tmp_path, capfd):
    calls = []

    def evaluate(qs):
        assert not qs.training and not torch.is_grad_enabled()
        torch.rand(3)  # may use random numbers of its own
        calls.append(1)
        return {"score": len(calls)}

    options = {"evaluate": evaluate, "evaluate_first": True}
    lines = run(**options, eval_every=3)
    assert [lines[0]["eval_0_score"], lines[2]["eval_score"], lines[3]["eval_score"]] == [1, 2, 3]
    assert [{name: x for name, x in line.items() if not name.endswith("_score")} for line in lines] == unbroken
    assert capfd.readouterr() == ("", "")  # progress=False
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000004")
    resumed = run(**options, eval_every=3, resume="auto")
    assert resumed[0]["eval_0_score"] == 1 and len(calls) == 5
    assert run("none", steps=1, **options, eval_every=0) == unbroken[:1]


def test_the_schedules():
    def rates(**options):
        config = TrainConfig(steps=6, warmup=2, learning_rate=1.0, **options)
        return [config.rate(step) for step in range(6)]

    assert rates() == [0.5, 1, 1, 1, 1, 1]
    assert rates(schedule="linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    assert rates(schedule="cosine") == pytest.approx([0.5, 1, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5])


def test_packed_documents_share_no_random_numbers():
    text = torch.arange(5)
    row = {"input_ids": text.repeat(2), "document_ids": torch.tensor([4] * 5 + [5] * 5)}
    short = {"input_ids": text, "document_ids": torch.full((5,), 5)}
    (batch,) = collate([row, short, row], [8, 2, 3], 1)
    ids = batch["sequence_ids"]
    assert ids.shape == (3, 10)
    of_documents = [set(part.tolist()) for part in (ids[0, :5], ids[0, 5:], ids[1, :5], ids[2, :5], ids[2, 5:])]
    assert all(len(numbers) == 1 for numbers in of_documents) and len(set.union(*of_documents)) == 5
    assert torch.equal(torch.cat([part["sequence_ids"] for part in collate([row, short, row], [8, 2, 3], 3)]), ids)


@pytest.mark.parametrize("fields", [{"anchors": "gate"}, {"anchors": "entropy"}, {"end_token_id": 2, "stop_threshold": 1 / 61}])
def test_before_its_losses_a_step_runs_the_model_only_in_methods_that_fsdp_knows(tiny, fields, monkeypatch):
    """Sharded weights are gathered for these alone."""
    inside = []
    qs = QuietStar(tiny("llama"), replace(CONFIG, **fields), verify=False).train()

    def called(own, *args, **options):
        inside.append(own)
        found = own(*args, **options)
        inside.pop()
        return found

    for name in sharding.FORWARDS:
        monkeypatch.setattr(qs, name, partial(called, getattr(qs, name)))
    runs = []
    qs.model.model.register_forward_pre_hook(lambda *_: runs.append(bool(inside)))
    prepare_parts(Accelerator(cpu=True), qs, [{"input_ids": torch.arange(4, 28).view(2, 12)}], seed=0)
    assert runs and all(runs)
