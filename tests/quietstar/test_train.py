"""The loop gives the same numbers from a seed however a run is split or resumed; checkpoints are whole or refused."""

import errno
import json
import math
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import TrainConfig
from quietstar.run import snapshots
from quietstar.run.batches import collate
from quietstar.run.processes import Interrupted
from quietstar.training import thought_loss, train

CONFIG = ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2, policy_weight=5.0, embedding_scale=1.0)
TIMES = {"seconds", "tokens_per_second", "thoughts_per_second"}
DATA = [
    {"input_ids": torch.randint(3, 61, (7 + i % 3,), generator=torch.Generator().manual_seed(i))}
    for i in range(11)  # two steps of 6 are more than an epoch
]


@pytest.fixture
def run(tiny, tmp_path):
    """``run(out, ...)`` trains a new model of the same weights; returns the metrics without times."""

    def run(out="run", model="llama", data=DATA, resume=None, loss=None, evaluate=None, first=False, **changes):
        sizes = {"llama": {"num_hidden_layers": 1}, "gpt2": {"n_layer": 1, "attn_pdrop": 0.0}}
        qs = QuietStar(tiny(model, **sizes[model]), CONFIG, verify=False)
        settings = {"steps": 6, "batch_size": 6, "learning_rate": 1e-3, "warmup": 2, "save_every": 2, "keep": 3, **changes}
        config = TrainConfig(out=str(tmp_path / out), **settings)
        given = {} if loss is None else {"loss": loss}
        lines = train(qs, data, config, evaluate=evaluate, resume=resume, progress=False, evaluate_first=first, **given)
        return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]

    return run


def checkpoints(folder):
    return [path.name for path in snapshots.every(folder)]


def test_the_same_seed_gives_the_same_losses_bitwise(run):
    first, second = run("first"), run("second")
    assert first == second
    assert run("third", seed=1) != first


def test_metrics_are_written_a_line_a_step(run, tmp_path):
    lines = run()
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 2, 3, 4, 5, 6]
    assert [{name: line[name] for name in lines[0]} for line in written] == lines
    assert all(math.isfinite(value) for line in written for value in line.values())
    assert set(written[0]) - set(lines[0]) == TIMES
    assert {"loss", "loss_ce", "policy_loss", "reward", "advantage", "weight", "grad_norm", "learning_rate"} < set(lines[0])


def test_another_cut_into_parts_changes_rounding_only(run):
    whole, cut = run("whole", steps=3), run("cut", steps=3, accumulation=3)
    for a, b in zip(whole, cut, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


def test_thoughts_that_stop_count_the_same_however_the_batch_is_cut(run, monkeypatch):
    """Their tokens are counted over the whole step before a part is divided by them."""
    monkeypatch.setitem(run.__globals__, "CONFIG", replace(CONFIG, end_token_id=2, stop_threshold=1 / 61))
    counted = []

    def loss(model, batch, counts, seed):
        assert batch["thought_lengths"].unique().tolist() == [0, 1, 2]
        counted.append((int(counts.tokens), int(counts.places)))
        return thought_loss(model, batch, counts, seed)

    whole, cut = run("whole", steps=1, loss=loss), run("cut", steps=1, loss=loss, accumulation=3)
    assert whole[0] == pytest.approx(cut[0], rel=1e-4, abs=1e-5)
    tokens, places = counted[0]
    assert counted == [(tokens, places)] * 4 and 0 < tokens < 2 * places


def test_a_resumed_run_gives_the_unbroken_ones_metrics_bitwise(run, tmp_path, model="gpt2"):
    """With dropout, whose random numbers go on too."""
    unbroken = run("unbroken", model=model)
    shutil.copytree(tmp_path / "unbroken", tmp_path / "broken")
    for name in ("step-000004", "step-000006"):
        shutil.rmtree(tmp_path / "broken" / "checkpoints" / name)
    with open(tmp_path / "broken" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed while it wrote
    assert run("broken", model=model, resume="auto") == unbroken
    elsewhere = run("elsewhere", model=model, resume=tmp_path / "unbroken" / "checkpoints" / "step-000004")
    assert elsewhere == unbroken[4:]
    for a, b in zip(snapshots.every(tmp_path / "unbroken"), snapshots.every(tmp_path / "broken"), strict=True):
        for name in ("model.safetensors", "quietstar.safetensors", "optimizer.safetensors"):
            assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("change", [{"seed": 1}, {"learning_rate": 2e-3}, {"batch_size": 5}, {"steps": 7}])
def test_another_config_is_refused(run, change):
    run(steps=6)
    with pytest.raises(ValueError, match=f"the run there has {next(iter(change))}="):
        run(resume="auto", **change)


def test_another_model_is_refused(run):
    run("a")
    with pytest.raises(ValueError, match="another model"):
        run("a", model="gpt2", resume="auto")


def test_only_the_newest_are_kept(run, tmp_path):
    run(steps=5, save_every=1, keep=2)
    assert checkpoints(tmp_path / "run") == ["step-000004", "step-000005"]


def test_a_new_run_in_an_old_folder_keeps_its_own_checkpoints(run, tmp_path):
    run(steps=6, keep=1)
    run(steps=3, keep=1, seed=1)
    assert checkpoints(tmp_path / "run") == ["step-000003"]


@pytest.mark.parametrize(
    "error", [SafetensorError("os error 28"), pytest.param(OSError(errno.ENOSPC, "No space left"), marks=pytest.mark.long)]
)
def test_a_full_disk_leaves_the_last_checkpoint_whole(run, tmp_path, monkeypatch, error):
    unbroken = run("unbroken")
    write, calls = snapshots.save_file, []

    def full(tensors, path, **options):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half a fi")
            raise error
        write(tensors, path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(snapshots, "save_file", full)
        with pytest.raises(OSError, match="No space left|os error 28"):
            run()
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step-000002"]
    snapshots.check(folder / "step-000002")
    assert run(resume="auto") == unbroken


@pytest.mark.parametrize("during", ["the step", "its checkpoint"])
def test_a_signal_in_the_last_step_is_not_lost(run, monkeypatch, during):
    """The caller of ``train`` may have more to do."""
    unbroken = run("unbroken", steps=1)
    original = {"the step": thought_loss, "its checkpoint": snapshots.save_file}[during]

    def terminated(*arguments, **options):
        signal.raise_signal(signal.SIGTERM)
        return original(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="after step 1; resume from .*step-000001"):
        if during == "its checkpoint":
            patch.setattr(snapshots, "save_file", terminated)
        run("stopped", steps=1, loss=terminated if during == "the step" else None)
    assert run("stopped", steps=1, resume="auto") == unbroken


@pytest.mark.long
def test_a_checkpoint_truncated_anywhere_is_named_and_the_one_before_loads(run, tmp_path, capsys):
    """20 offsets over all files, each file at least twice; resumed from the checkpoint before for each."""
    unbroken = run(steps=3, save_every=1)
    whole = tmp_path / "run"
    files = sorted(file.name for file in snapshots.every(whole)[-1].iterdir())
    generator = torch.Generator().manual_seed(0)
    for i in range(20):
        broken = shutil.copytree(whole, tmp_path / "broken")
        newest = snapshots.every(broken)[-1]
        file = newest / files[i % len(files)]
        # The last byte of a json file may be its last line break, which nobody misses.
        offset = 0 if i == 0 else int(torch.randint(file.stat().st_size - 1, (), generator=generator))
        with open(file, "r+b") as opened:
            opened.truncate(offset)
        with pytest.raises(ValueError, match=f"{newest}: {file.name} is .*damaged"):
            run("broken", steps=3, resume=newest)
        assert run("broken", steps=3, save_every=1, resume="auto") == unbroken
        assert f"{file.name} is" in capsys.readouterr().out
        shutil.rmtree(broken)


def test_a_save_that_was_killed_is_cleaned_up(run, tmp_path):
    rest = tmp_path / "run" / "checkpoints" / ".step-000002"
    rest.mkdir(parents=True)
    (rest / "model.safetensors").write_bytes(b"half")
    run(steps=2, save_every=2)
    assert [path.name for path in rest.parent.iterdir()] == ["step-000002"]


def test_what_a_kill_after_the_last_save_left_is_removed(run, tmp_path):
    """It came before older checkpoints were removed, or while one was: the next run has nothing to save."""
    run(steps=3, save_every=1, keep=3)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000001").rename(folder / ".step-000001-old")
    run(steps=3, save_every=1, keep=1, resume="auto")
    assert [path.name for path in folder.iterdir()] == ["step-000003"]


def test_a_loss_that_is_not_finite_ends_the_run(run, tmp_path):
    def loss(model, batch, counts, seed):
        out = model(**batch, counts=counts, seed=seed)
        return out.loss * math.nan, out

    with pytest.raises(FloatingPointError, match="^train: the loss is nan at step 1: the model's weights are finite$"):
        run(loss=loss)
    assert checkpoints(tmp_path / "run") == []


def test_a_custom_loss(run):
    def doubled(model, batch, counts, seed):
        out = model(**batch, counts=counts, seed=seed)
        return 2 * out.loss_ce, out

    lines = run(loss=doubled, accumulation=2)
    assert [line["loss"] for line in lines] == pytest.approx([2 * line["loss_ce"] for line in lines])
    assert lines[-1]["loss_ce"] < lines[0]["loss_ce"]


def test_an_evaluation_before_the_first_step_changes_no_step(run, tmp_path, capfd):
    calls = []

    def evaluate(qs):
        assert not qs.training and not torch.is_grad_enabled()
        torch.rand(3)  # may use random numbers of its own
        calls.append(1)
        return {"score": len(calls)}

    lines = run("with", steps=4, evaluate=evaluate, eval_every=2, first=True)
    assert [lines[0]["eval_0_score"], lines[1]["eval_score"], lines[3]["eval_score"]] == [1, 2, 3]
    without = run("without", steps=4)
    assert [{name: x for name, x in line.items() if not name.endswith("_score")} for line in lines] == without
    assert capfd.readouterr() == ("", "")  # progress=False
    shutil.rmtree(tmp_path / "with" / "checkpoints" / "step-000004")
    resumed = run("with", steps=4, evaluate=evaluate, eval_every=2, first=True, resume="auto")
    assert resumed[0]["eval_0_score"] == 1 and len(calls) == 4
    assert run("none", steps=1, evaluate=evaluate, eval_every=0, first=True) == without[:1]


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
    of_documents = [set(ids[0, :5].tolist()), set(ids[0, 5:].tolist()), set(ids[1, :5].tolist()), set(ids[2, :5].tolist())]
    assert all(len(numbers) == 1 for numbers in of_documents) and len(set.union(*of_documents)) == 4
    assert torch.equal(torch.cat([part["sequence_ids"] for part in collate([row, short, row], [8, 2, 3], 3)]), ids)
