"""Two and four processes against one: the same thoughts, losses and weights, however texts and weights are split over them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig

from quietstar import ThoughtConfig
from quietstar.checkpoints import places
from quietstar.cli import main as cli
from quietstar.config import TrainConfig
from quietstar.memory.processes import Processes, chunk_count, count_weights, step_traffic
from quietstar.run import signals
from quietstar.run.processes import Signals, find_strategy, process_state
from tests.quietstar.common import without_times
from tests.quietstar.run import processes

EXAMPLES = Path(__file__).parents[3] / "examples/cluster"
THOUGHTS = {"thoughts": 2, "thought_tokens": 2, "lookahead": 2, "policy_weight": 5.0, "embedding_scale": 1.0}
# 5 texts a step of 7 to 9 tokens: one process has 2 of them, the other 3, and all are padded; the third step ends an epoch.
LENGTHS = [7 + i % 3 for i in range(11)]
FAMILY = {"anchors": "random", "anchor_share": 0.5, "base_model": "ema", "ratio_clip": 0.2}
FAMILY |= {"kl_weight": 0.01, "policy_temperature": 1.0, "advantage": "leave_one_out"}
# What is trained, by name; those of one process and of several differ in ``sharding`` alone.
RUNS = {
    "plain": {},
    "tied weights": {"model": "gpt2"},
    "parts": {"batch_size": 7, "accumulation": 2, "evaluate": 1, "eval_every": 1, "save_every": 1},
    "family": {"thoughts": FAMILY, "updates": 2, "anchor_chunk": 3, "checkpointing": True},
    "gate": {"thoughts": {"anchors": "gate", "base_model": "frozen"}, "accumulation": 2, "batch_size": 6},
    "adapters": {"rank": 4, "thoughts": {"base_model": "frozen"}, "checkpointing": True},
    "stopping": {"thoughts": {"end_token_id": 2, "stop_threshold": 1 / 61}},
}
# Thoughts end at a quarter of all tokens, and so at other steps in each process.
WORDS = {"thought_tokens": 20, "thought_start": "<", "thought_end": ">", "anchor_count": 4}
RUNS |= {
    "rlp": {"thoughts": {"preset": "rlp"}, "evaluate": 1, "eval_every": 2, "use": 1},
    "rlp adapters": {"thoughts": {"preset": "rlp", "base_model": "frozen"}, "rank": 4, "anchor_chunk": 2},
    "grlp": {"thoughts": {"preset": "grlp"}, "batch_size": 7, "accumulation": 2, "updates": 2, "checkpointing": True},
    "rpt": {"thoughts": {"preset": "rpt", "base_weight": 0.1}, "anchor_chunk": 2},
}
for run in ("rlp", "rlp adapters", "grlp", "rpt"):
    RUNS[run] |= {"model": "bytes", "words": 1, "thoughts": WORDS | RUNS[run]["thoughts"]}
CUTS = [("plain", "no"), ("plain", "full_shard"), ("plain", "shard_grad_op"), ("parts", "no")]
CUTS += [(name, "full_shard") for name in ("tied weights", "parts", "family", "gate", "adapters", "stopping")]
# With full_shard; "gathered" has whole weights for the rollout.
OWN = [("rlp", "full_shard"), ("rlp", "shard_grad_op"), ("rlp", "gathered"), ("rlp adapters", "full_shard")]
OWN += [("grlp", "full_shard"), ("rpt", "full_shard"), ("rpt", "gathered")]
CUTS += [*OWN, ("family", "gathered")]
TRAFFIC = [("no", None), ("full_shard", None), ("full_shard", 3), ("shard_grad_op", None), ("gathered", None)]


def make_job(home, out, model="llama", thoughts=None, checkpointing=False, resume=None, **changes):
    flags = {name: changes.pop(name, 0) for name in ("traffic", "rank", "evaluate", "words", "use")}
    if changes.get("sharding") == "gathered":
        changes |= {"sharding": "full_shard", "rollout_weights": "gathered"}
    settings = {"steps": 4, "batch_size": 5, "learning_rate": 1e-3, "warmup": 2, "save_every": 2, "keep": 3, **changes}
    return {
        "model": str(home / model),
        "thoughts": THOUGHTS | (thoughts or {}),
        "lengths": LENGTHS,
        "checkpointing": checkpointing,
        "resume": resume and str(resume),
        **flags,
        "train": {"out": str(home / out), **settings},
    }


def assert_same_lines(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(without_times(ours), without_times(theirs), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)


@pytest.fixture(scope="module")
def home(tiny, tmp_path_factory):
    home = tmp_path_factory.mktemp("processes")
    tiny("llama").save_pretrained(home / "llama")
    words = tiny("llama", vocab_size=256)
    words.generation_config.eos_token_id = list(range(0, 256, 4))
    words.save_pretrained(home / "bytes")
    tiny("gpt2", resid_pdrop=0.0, attn_pdrop=0.0, embd_pdrop=0.0).save_pretrained(home / "gpt2")
    return home


@pytest.fixture(scope="module")
def alone(home):
    """What one process computes: ``alone(name)`` of ``RUNS``."""
    done = {}

    def alone(name):
        if name not in done:
            done[name] = processes.run_job(make_job(home, f"alone {name}", **RUNS[name]))
        return done[name]

    return alone


@pytest.fixture(scope="module")
def together(home, alone):
    """What two processes compute, all in one launch: results of each by the job's name."""
    alone("plain")
    jobs = {cut: make_job(home, f"{cut[0]} {cut[1]}", **RUNS[cut[0]], sharding=cut[1]) for cut in CUTS}
    half = places.folder(home / "alone plain", 2)
    for sharding in ("no", "full_shard"):
        jobs[f"resumed {sharding}"] = make_job(home, f"resumed {sharding}", resume=half, sharding=sharding)
    jobs["too few texts"] = make_job(home, "refused", batch_size=1)
    jobs["auto"] = make_job(home, "refused", sharding="full_shard", anchor_chunk="auto")
    for sharding, chunk in TRAFFIC:
        options = {"sharding": sharding, "anchor_chunk": chunk, "steps": 1, "traffic": True}
        jobs[f"traffic {sharding} {chunk}"] = make_job(home, "traffic", **options)
    jobs["ema"] = make_job(home, "refused", rank=2, thoughts={"base_model": "ema"}, sharding="full_shard")
    jobs["whole"] = make_job(home, "refused", sharding="shard_grad_op", rollout_weights="gathered")
    for sharding in ("full_shard", "gathered"):
        jobs[f"words bf16 {sharding}"] = make_job(
            home, "bf16", **RUNS["rlp"] | {"use": 0}, sharding=sharding, precision="bf16", steps=2
        )
    jobs["bf16"] = make_job(home, "bf16", sharding="full_shard", precision="bf16", steps=1)
    return dict(zip(jobs, processes.run_in_processes(list(jobs.values()), 2, home), strict=True))


@pytest.mark.long
@pytest.mark.parametrize("cut", CUTS, ids=" ".join)
def test_two_processes_compute_what_one_does(home, alone, together, cut):
    one, two = alone(cut[0]), together[cut]
    seen = [set(result["thoughts"]) for result in two]
    assert all(seen) and seen[0] != seen[1]
    assert two[0]["thoughts"] | two[1]["thoughts"] == one["thoughts"]
    for result in two:
        assert_same_lines(result["lines"], one["lines"])
    steps = one["lines"][-1]["step"]
    theirs, ours = (places.folder(home / out, steps) for out in (" ".join(cut), f"alone {cut[0]}"))
    places.check(theirs)
    files = [file.name for file in ours.glob("*.safetensors")]
    assert len(files) == 3
    for name in files:
        a, b = load_file(theirs / name), load_file(ours / name)
        assert a.keys() == b.keys()
        for key, wanted in b.items():
            got = a[key]
            assert got.shape == wanted.shape, key
            if key.endswith("c_attn.bias"):
                # Softmax doesn't see a bias of keys, so its gradient is rounding alone, which AdamW makes whole steps of.
                got, wanted = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (got, wanted))
            assert (got - wanted).norm() <= 1e-3 * wanted.norm() + 1e-6, key


@pytest.mark.long
@pytest.mark.parametrize("cut", OWN, ids=" ".join)
def test_thoughts_that_end_themselves(home, alone, together, cut):
    """Weights differ by rounding, which AdamW enlarges where gradients are small; a text that is left out would be 1e4 times
    that. Where layers are gathered one by one, both processes wait."""
    one, two = alone(cut[0]), together[cut]
    steps, first = one["lines"][-1]["step"], load_file(home / "bytes/model.safetensors")
    theirs, ours = (places.folder(home / out, steps) for out in (" ".join(cut), f"alone {cut[0]}"))
    file = "adapter_model.safetensors" if RUNS[cut[0]].get("rank") else "model.safetensors"
    got, want = load_file(theirs / file), load_file(ours / file)
    assert got.keys() == want.keys()
    differ = sum(float((got[key] - want[key]).square().sum()) for key in want)
    moved = sum(float((want[key] - first.get(key, 0)).square().sum()) for key in want)
    assert differ**0.5 <= 1e-4 * moved**0.5 > 0
    waited = [result["rollout"]["empty"] for result in two]
    if cut[1] == "full_shard":
        assert min(waited) > 0 and len({result["rollout"]["steps"] for result in two}) == 1
    else:
        assert waited == [0, 0] and len({result["rollout"]["steps"] for result in two}) == 2


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["full_shard", "gathered"])
def test_evaluation_and_generation(alone, together, sharding):
    for one, result in zip(alone("rlp")["used"], together["rlp", sharding], strict=True):
        (two,) = result["used"]
        assert two.pop("sharded") and not one["sharded"]
        assert two["figures"] == pytest.approx(one["figures"], rel=1e-4, abs=1e-5)
        for name in ("text", "thoughts", "again"):
            assert two[name] == one[name], name
        other, score, think = two["refused"]
        assert other.startswith("evaluate: examples must be the same in each process where weights are sharded, but there are ")
        assert score == "score_tokens: weights are sharded: in quietstar.run.sharding.gathered(qs) each process has all of them"
        assert think.startswith("generate: think='always': weights are sharded")


@pytest.mark.long
def test_half_precision_is_the_same_however_weights_are_gathered(together):
    one, two = ([without_times(result["lines"]) for result in together[f"words bf16 {x}"]] for x in ("full_shard", "gathered"))
    assert one == two


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["no", "full_shard"])
def test_a_checkpoint_of_two_processes_goes_on_in_one(home, alone, together, sharding):
    assert together["plain", sharding]
    half = places.folder(home / f"plain {sharding}", 2)
    again = processes.run_job(make_job(home, f"one after two, {sharding}", resume=half))
    assert_same_lines(again["lines"], alone("plain")["lines"][2:])


@pytest.mark.long
@pytest.mark.parametrize("sharding", ["no", "full_shard"])
def test_a_checkpoint_of_one_process_goes_on_in_two(alone, together, sharding):
    for result in together[f"resumed {sharding}"]:
        assert_same_lines(result["lines"], alone("plain")["lines"][2:])


@pytest.mark.long
def test_what_several_processes_cannot_do_is_one_sentence(together):
    assert [x["error"] for x in together["too few texts"]] == [
        "train: batch_size must be at least the number of processes, 2, got 1"
    ] * 2
    assert "anchor_chunk must be a number" in together["auto"][0]["error"]
    wanted = "train: rollout_weights='gathered' needs sharding full_shard, got 'shard_grad_op'"
    assert together["whole"][0]["error"] == wanted
    wanted = "train: base_model must be 'frozen' or 'current' for adapters with sharding, got 'ema'"
    assert together["ema"][0]["error"] == wanted


def test_one_process_has_nothing_to_cut(home):
    result = processes.run_job(make_job(home, "refused", sharding="full_shard"))
    assert "sharding must be 'no'" in result["error"]


@pytest.mark.long
def test_half_precision_is_that_of_the_layers_alone(alone, together):
    """Rewards are fp32 differences of log-probabilities: most are not representable in bf16."""
    (result, _) = together["bf16"]
    line = result["lines"][0]
    assert line["loss_ce"] == pytest.approx(alone("plain")["lines"][0]["loss_ce"], rel=0.03)
    assert set(result["dtypes"].values()) == {"torch.float32"}
    assert result["rounded"] < 0.5


@pytest.mark.long
@pytest.mark.parametrize("sharding, chunk", TRAFFIC)
def test_traffic_is_what_doctor_says(home, together, sharding, chunk):
    counted = together[f"traffic {sharding} {chunk}"][0]["traffic"]
    weights = count_weights(AutoConfig.from_pretrained(home / "llama"))
    gathered = sharding == "gathered"
    how = Processes(2, "full_shard" if gathered else sharding, gathered=gathered)
    expected = step_traffic(weights, ThoughtConfig(**THOUGHTS), how, chunk_count(max(LENGTHS), chunk))
    assert 0 <= counted["allreduce_"] - expected.all_reduce < 1000  # counts and figures are summed too
    if sharding != "no":
        # Three weights have an odd number of rows, and get another. FSDP fetches a layer of the rollout ahead of no need.
        row = 4 * 64
        assert counted["_reduce_scatter_base_"] == expected.reduce_scatter + 3 * row
        more = counted["_allgather_base_"] - expected.all_gather - (not gathered) * 4 * weights.layer
        assert 3 * row <= more <= 10 * row


def test_the_strategy_is_the_runs_or_accelerates(monkeypatch):
    def found(sharding="no", **variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return find_strategy(TrainConfig(sharding=sharding))

    assert found() == "no" and found("full_shard") == "full_shard"
    assert found(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2") == "full_shard"
    assert found("shard_grad_op") == "shard_grad_op"
    assert found(FSDP_RESHARD_AFTER_FORWARD="false") == "shard_grad_op"
    with pytest.raises(ValueError, match="fsdp_version must be 2"):
        found(FSDP_VERSION="1")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading must be false"):
        found(FSDP_VERSION="2", FSDP_CPU_RAM_EFFICIENT_LOADING="true")


@pytest.fixture
def folder(model_folder, monkeypatch):
    """Where the command line finds a model and a text."""
    monkeypatch.chdir(model_folder.parent)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return model_folder.parent


def arguments(out, *more):
    small = "--no-pack --length=12 --batch-size=5 --thoughts=2 --thought-tokens=2 --lookahead=2 --held-out=0"
    small += " --learning-rate=1e-3 --policy-weight=3 --embedding-scale=1"
    return ["-m", "quietstar", "train", "--model=model", "--data=text.txt", f"--out={out}", *small.split(), *more]


def metrics(out):
    file = out / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def begin(out, *more):
    """Two processes that have done two steps."""
    running = processes.start(arguments(out.name, "--steps=100000", "--save-every=100000", *more), 2)
    deadline = time.monotonic() + 120
    while metrics(out) < 2 and time.monotonic() < deadline and all(x.poll() is None for x in running):
        time.sleep(0.01)
    return running


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_RANK"])
def test_a_variable_that_is_no_number_is_named(monkeypatch, name):
    monkeypatch.setenv(name, "x")
    with pytest.raises(ValueError, match=f"^{name} must be a whole number in the environment, got 'x'$"):
        process_state()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_run_of_nohup_goes_on(number):
    """What else was ignored when the run began stops it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals() as signals:
            signal.raise_signal(number)
            assert signals.caught == (number != signal.SIGHUP)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_signals_of_a_forked_process_are_its_own():
    with Signals():
        child = os.fork()
        if child == 0:
            os._exit(signal.set_wakeup_fd(-1) != -1)
        assert os.waitpid(child, 0)[1] == 0
        assert signal.set_wakeup_fd(-1) != -1


@pytest.mark.long
def test_a_signal_to_one_process_ends_all_with_a_checkpoint(folder):
    running = begin(folder / "run", "--sharding=full_shard")
    running[1].send_signal(signal.SIGTERM)
    errors = processes.end(running, 120)
    assert [x.returncode for x in running] == [cli.SAVED] * 2, errors
    (saved,) = places.every(folder / "run")
    places.check(saved)
    assert saved.name == f"step-{metrics(folder / 'run'):06d}"


@pytest.mark.long
def test_a_second_signal_ends_a_process_that_waits_for_another(folder):
    running = begin(folder / "run", "--sharding=full_shard", "--save-every=1")
    running[1].send_signal(signal.SIGSTOP)
    time.sleep(1)
    running[0].send_signal(signal.SIGTERM)
    time.sleep(1)
    running[0].send_signal(signal.SIGTERM)  # as launchers do: too soon
    time.sleep(signals.PATIENCE + 1)
    assert running[0].poll() is None
    running[0].send_signal(signal.SIGTERM)
    try:
        _, error = running[0].communicate(timeout=30)
    finally:
        for process in running:
            process.kill()
    assert running[0].returncode == cli.SAVED and "stopped by SIGTERM in the middle of a call" in error
    assert "another signal ends this one" in error
    places.check(places.newest_whole(places.every(folder / "run")))


@pytest.mark.long
def test_a_process_that_dies_ends_the_other_and_whole_weights_are_saved(folder):
    running = begin(folder / "run")
    running[1].kill()
    errors = processes.end(running, 120)
    assert running[0].returncode == cli.RUNTIME and "another process ended" in errors[0], errors
    (saved,) = places.every(folder / "run")
    places.check(saved)
    assert saved.name == f"step-{metrics(folder / 'run'):06d}" and str(saved.relative_to(folder)) in errors[0]


# SLURM's commands as the example uses them, for two tasks on this machine: a signal to srun reaches the tasks.
SRUN = """#!/bin/bash
[ "$1" = --kill-on-bad-exit=1 ] && shift
for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
trap 'kill -USR1 "${tasks[@]}"' USR1
echo $$ >srun.pid
for task in "${tasks[@]}"; do
    while wait "$task"; code=$?; kill -0 "$task" 2>/dev/null; do :; done
done
exit "$code"
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) echo 127.0.0.1; echo other ;;
    *) echo "$@" >>scontrol.log ;;
esac
"""
SLURM = {"SLURM_JOB_NODELIST": "node", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.mark.long
def test_the_example_for_slurm(folder, monkeypatch):
    """It saves at Slurm's warning before the time limit and queues itself again; the next run goes on from there."""
    (folder / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)

    command = ["bash", EXAMPLES / "slurm.sh", *arguments("run", "--steps=40", "--save-every=40")[3:]]
    submitted = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not metrics(folder / "run") and time.monotonic() < deadline and submitted.poll() is None:
        time.sleep(0.01)
    os.kill(int((folder / "srun.pid").read_text()), signal.SIGUSR1)
    (error,) = processes.end([submitted], 120)
    assert submitted.returncode == cli.SAVED and metrics(folder / "run") < 40, error
    assert (folder / "scontrol.log").read_text() == "requeue 7\n"
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert metrics(folder / "run") == 40 and len(places.every("run")) == 2


@pytest.mark.long
def test_the_command_line_under_accelerate(folder):
    """With the examples' configuration, but for the number of processes."""
    text = (EXAMPLES / "fsdp2.yaml").read_text()
    assert "num_processes: 8\n" in text
    (folder / "fsdp2.yaml").write_text(text.replace("num_processes: 8\n", "num_processes: 2\n"))
    launch = ["-m", "accelerate.commands.launch", "--config_file=fsdp2.yaml"]
    command = [sys.executable, *launch, *arguments("run", "--steps=2", "--save-every=2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nwrote\n  run/checkpoints/step-000002\n") == 1
    (saved,) = places.every("run")
    places.check(saved)


def test_the_examples_configurations_differ_in_sharding_alone():
    ddp, fsdp2 = (yaml.safe_load((EXAMPLES / name).read_text()) for name in ("ddp.yaml", "fsdp2.yaml"))
    assert fsdp2.pop("fsdp_config")["fsdp_version"] == 2
    assert (ddp.pop("distributed_type"), fsdp2.pop("distributed_type")) == ("MULTI_GPU", "FSDP")
    assert ddp == fsdp2
