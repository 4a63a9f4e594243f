"""transformers' and TRL's trainers on the wrapper: what they write loads, and a killed run goes on as if nothing had been."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from quietstar import QuietStar, ThoughtConfig
from quietstar.config import AdapterConfig
from quietstar.evaluation.losses import evaluate
from quietstar.evaluation.scoring import one_thought
from quietstar.testing import byte_tokenizer, tiny_model
from quietstar.trainer import ThoughtTrainer, newest_checkpoint, pad_texts

V = 41
END = V - 1  # in no text
SIZES = {"vocab_size": V, "n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
THOUGHTS = {"thoughts": 2, "thought_tokens": 2, "lookahead": 2, "policy_weight": 1.0}


def make_qs(dropout=0.0, **fields):
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **SIZES, resid_pdrop=dropout, attn_pdrop=0, embd_pdrop=0)
    model = AutoModelForCausalLM.from_config(config)
    qs = QuietStar(model, ThoughtConfig(**{**THOUGHTS, **fields}), verify=False)
    torch.nn.init.normal_(qs.mixing_head[4].weight, 0, 1)  # so that thoughts change something
    return qs


def rows(texts, seed=0):
    """Texts of different lengths, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(1, END, (8 + i % 4,), generator=generator).tolist()} for i in range(texts)]


def make_trainer(folder, qs, kind=ThoughtTrainer, **options):
    usual = {"max_steps": 6, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2}
    arguments = TrainingArguments(str(folder), **usual | QUIET | options)
    return kind(qs, arguments, train_dataset=rows(12), eval_dataset=rows(5, seed=1))


def logged(trainer, *names):
    return [[line[name] for name in names] for line in trainer.state.log_history if "loss" in line]


def same(one, other):
    pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
    return all(torch.equal(p, q) for (_, p), (_, q) in pairs)


RESUMED = {"dropout": 0.1, "base_model": "ema", "base_model_decay": 0.5}


@pytest.mark.long
def test_a_killed_run_goes_on(tmp_path):
    """Killed inside a save: the losses after it, and the weights, are those of a run that was not."""
    ended = subprocess.run([sys.executable, __file__, "killed", str(tmp_path / "killed")], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert (tmp_path / "killed/checkpoint-4").is_dir()
    assert newest_checkpoint(tmp_path / "killed") == tmp_path / "killed/checkpoint-2"

    whole = make_trainer(tmp_path / "whole", make_qs(**RESUMED))
    whole.train()
    resumed = make_trainer(tmp_path / "killed", make_qs(**RESUMED))
    resumed.train(resume_from_checkpoint=True)
    assert logged(resumed, "step", "loss", "reward", "weight") == logged(whole, "step", "loss", "reward", "weight")
    assert same(resumed.model, whole.model)
    for trainer in (whole, resumed):
        trainer.save_model()
        for path in (trainer.args.output_dir, newest_checkpoint(trainer.args.output_dir)):
            loaded = QuietStar.from_pretrained(path, verify=False)
            assert loaded.thought_config == whole.model.thought_config
            assert same(loaded, whole.model)


@pytest.mark.long
def test_adapters(tmp_path):
    make_qs().model.save_pretrained(tmp_path / "base")

    def with_adapters():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        qs = QuietStar(model, ThoughtConfig(**THOUGHTS), verify=False)
        qs.add_adapters(AdapterConfig(lora_rank=2))
        return qs

    whole = make_trainer(tmp_path / "run", with_adapters())
    whole.train()
    files = {file.name for file in (tmp_path / "run/checkpoint-6").iterdir()}
    assert {"adapter_model.safetensors", "quietstar.safetensors"} <= files and "model.safetensors" not in files
    assert same(QuietStar.from_pretrained(tmp_path / "run/checkpoint-6", verify=False), whole.model)

    resumed = make_trainer(tmp_path / "run", with_adapters())
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert logged(resumed, "step", "loss") == logged(whole, "step", "loss")
    assert same(resumed.model, whole.model)


FIGURES = ("loss", "policy_loss", "reward", "weight", "grad_norm")
THREE_STEPS = {"max_steps": 3, "save_steps": 3, "optim": "sgd", "learning_rate": 0.1}


def assert_close(got, wanted):
    torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), rtol=1e-3, atol=1e-5)


GATE, STOPPING = {"anchors": "gate", "gate_cost": 0.01}, {"stop_threshold": 0.03, "end_token_id": END}


@pytest.mark.parametrize("fields", [pytest.param(GATE, marks=pytest.mark.long), STOPPING])
def test_accumulation_changes_rounding_alone(tmp_path, fields):
    """Texts of different lengths: each mean is over the whole step, and each text thinks the same in any part of it."""
    two_steps = THREE_STEPS | {"max_steps": 2}
    whole = make_trainer(tmp_path, make_qs(**fields), per_device_train_batch_size=4, **two_steps)
    steps = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, **two_steps}
    parts = make_trainer(tmp_path, make_qs(**fields), **steps)
    whole.train()
    parts.train()
    assert_close(logged(parts, *FIGURES), logged(whole, *FIGURES))


@pytest.mark.long
def test_processes_change_rounding_alone(tmp_path):
    whole = make_trainer(tmp_path / "one", make_qs(), per_device_train_batch_size=4, **THREE_STEPS)
    whole.train()
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    subprocess.run([sys.executable, *launch, __file__, "processes", str(tmp_path / "two")], check=True, timeout=240)
    lines = json.loads((tmp_path / "two/checkpoint-3/trainer_state.json").read_text())["log_history"]
    assert_close([[line[name] for name in FIGURES] for line in lines if "loss" in line], logged(whole, *FIGURES))
    want = whole.evaluate()
    for name in ("eval_gain", "eval_content", "eval_content_low"):
        assert_close([line[name] for line in lines if name in line], [want[name]])
    saved = QuietStar.from_pretrained(tmp_path / "two", verify=False)
    for one, other in zip(saved.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.long
def test_the_log(tmp_path):
    """A line for two steps has the means over both."""
    options = {"max_steps": 2, "save_strategy": "no", "lr_scheduler_type": "constant"}
    each = make_trainer(tmp_path, make_qs(), **options)
    both = make_trainer(tmp_path, make_qs(), **options, logging_steps=2)
    each.train()
    both.train()
    (line,) = [line for line in both.state.log_history if "loss" in line]
    one, two = (line for line in each.state.log_history if "loss" in line)
    for name in ("loss", "loss_ce", "policy_loss"):
        assert line[name] == pytest.approx((one[name] + two[name]) / 2, rel=1e-6)
    for name in ("reward", "weight", "advantage"):
        assert min(one[name], two[name]) <= line[name] <= max(one[name], two[name]) and line[name] != 0
    assert line["thoughts_per_second"] > 0 and line["tokens_per_second"] > 0

    assert each.predict(rows(3)).predictions[:, 2].tolist() == [7, 8, 9]  # tokens that are predicted


def test_another_text_is_chosen_among_all_batches(tmp_path):
    """Of different lengths, so that padding depends on the batches."""
    trainer = make_trainer(tmp_path, make_qs(), per_device_eval_batch_size=2)
    torch.nn.init.normal_(trainer.model.mixing_head[4].weight, 0, 0.2, generator=torch.Generator().manual_seed(1))
    found = trainer.evaluate()
    wanted = evaluate(trainer.model, [{"input_ids": torch.tensor(row["input_ids"])} for row in rows(5, seed=1)])
    assert abs(wanted["content"]) > 1e-4
    assert {name: found[f"eval_{name}"] for name in wanted} == pytest.approx(wanted, abs=1e-6)
    assert found["eval_loss"] == found["eval_mixed"]
    without = partial(ThoughtTrainer, controls=False)
    alone = make_trainer(tmp_path, trainer.model, without, per_device_eval_batch_size=2).evaluate()
    assert "eval_content" not in alone and alone["eval_gain"] == found["eval_gain"]
    assert "eval_content" not in trainer.evaluate(rows(1))


def test_the_alarms_of_rlp_sound(tmp_path):
    """The log has what `quietstar train` logs, and a warning says once that a bound was crossed."""
    config = ThoughtConfig(preset="rlp", thoughts=2, thought_tokens=6, anchor_count=2, thought_start="<t>", thought_end="</t>")
    trainer = make_trainer(tmp_path, QuietStar(tiny_model(256), config, byte_tokenizer(), verify=False), max_steps=2)
    trainer.model.model.get_output_embeddings().weight.data.zero_()  # whatever was thought, all tokens are as likely
    with pytest.warns(UserWarning, match="dead groups: at 100% of the anchors") as said:
        trainer.train()
    first = trainer.state.log_history[0]
    assert first["dead_groups"] == 1 and first["leak_rate"] >= 0 and 0 < first["thought_length"] <= 6
    assert sum("dead groups" in str(one.message) for one in said) == 1
    assert {"eval_leak_rate", "eval_thought_length"} <= trainer.evaluate().keys()


@pytest.fixture
def fresh_accelerate():
    """A precision is the whole process's: it must end with the test."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_loss_that_is_not_finite(tmp_path):
    qs = make_qs()
    with torch.no_grad():
        qs.start_embedding[0] = torch.nan
    with pytest.raises(FloatingPointError, match="ThoughtTrainer: the loss is not finite .* weight .* holds NaN"):
        make_trainer(tmp_path, qs).train()


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="^ThoughtTrainer: model must be a QuietStar, got GPT2LMHeadModel$"):
        make_trainer(tmp_path, make_qs().model)
    with pytest.raises(ValueError, match="leave out label_smoothing_factor"):
        make_trainer(tmp_path, make_qs(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="leave out neftune_noise_alpha"):
        make_trainer(tmp_path, make_qs(), neftune_noise_alpha=5)
    with pytest.raises(ValueError, match="there is no whole checkpoint"):
        make_trainer(tmp_path, make_qs()).train(resume_from_checkpoint=True)


def test_empty_and_short_texts(tmp_path):
    """They change no figure of the others, and a step of them alone is said."""
    trainer, found = make_trainer(tmp_path, make_qs(), max_steps=1, per_device_train_batch_size=8, save_strategy="no"), []
    short = [{"input_ids": []}, {"input_ids": [3]}, {"input_ids": []}]
    for texts in (rows(4), [*rows(4), *short]):
        figures = trainer.evaluate(texts)
        found.append([figures[f"eval_{name}"] for name in ("loss", "base")])
    torch.testing.assert_close(found[1], found[0])
    trainer.train_dataset = [*rows(4), *short]
    trainer.train()
    assert all(loss[0] > 0 for loss in logged(trainer, "loss"))
    for nothing in (short[0], {"input_ids": [3, 4, 5, 6, 7], "labels": [-100] * 5}):
        trainer.train_dataset = [nothing] * 4
        with pytest.warns(UserWarning, match="no token of a step was to be predicted: every label is -100"):
            trainer.train()


def test_what_is_warned_about(tmp_path):
    with pytest.warns(UserWarning, match=r"ThoughtTrainer: a policy_weight of 1e\+06 .* with 0.01 the loss may explode"):
        make_trainer(tmp_path, make_qs(policy_weight=1e6), max_steps=1, save_steps=1, save_only_model=True).train()
    with pytest.warns(UserWarning, match=r"checkpoint-1 has no state of the optimizer \(save_only_model=True\)"):
        make_trainer(tmp_path, make_qs(policy_weight=1e6), max_steps=2).train(resume_from_checkpoint=True)


@pytest.mark.long
def test_what_a_stock_trainer_writes_is_refused_with_a_remedy(tmp_path):
    qs, began = make_qs(), make_qs()
    trainer = make_trainer(tmp_path, qs, kind=Trainer, max_steps=2)
    trainer.data_collator = lambda rows: (batch := pad_texts(rows)) | {"labels": batch["input_ids"]}
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()["eval_loss"] > 0
    assert not any(map(torch.equal, qs.parameters(), began.parameters()))
    began.load_state_dict(load_file(tmp_path / "checkpoint-2/model.safetensors"))  # one copy of the tied weights
    assert same(began, qs)
    for path in (tmp_path, tmp_path / "checkpoint-2"):
        with pytest.raises(ValueError, match="a state dict without configs.*quietstar.trainer.ThoughtTrainer"):
            QuietStar.from_pretrained(path)
        with pytest.raises(ValueError, match="not a QuietStar checkpoint"):
            make_trainer(tmp_path, make_qs()).train(resume_from_checkpoint=str(path))


@pytest.mark.long
def test_sft(tmp_path, fresh_accelerate):  # in bf16, which is SFTConfig's default
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.quietstar.group_rl.trainers import number_tokenizer

    class ThoughtSFTTrainer(ThoughtTrainer, SFTTrainer):
        pass

    tokenizer = number_tokenizer()
    data = Dataset.from_list([{"prompt": f"{i} {i + 1} ", "completion": f"{2 * i + 1} 7"} for i in range(3, 11)])
    usual = {"max_steps": 2, "per_device_train_batch_size": 2} | QUIET
    arguments = SFTConfig(str(tmp_path), **usual, logging_steps=1, save_steps=1, activation_checkpointing=True)
    options = {"train_dataset": data, "eval_dataset": data, "processing_class": tokenizer}
    qs = make_qs()
    with pytest.raises(AttributeError, match=r"^QuietStar has no generation_config, .* quietstar\.trainer$"):
        SFTTrainer(qs, arguments, **options)

    trainer = ThoughtSFTTrainer(qs, arguments, **options)
    assert "forward" not in vars(qs)  # TRL's, with a head for its own loss
    trainer.train()
    assert len(logged(trainer, "loss", "reward", "weight", "thoughts_per_second")) == 2
    # accelerate gives the model a forward of its own; the copies that evaluation makes must not run with its config.
    assert "forward" in vars(qs) and one_thought(qs)(torch.arange(1, 9)[None]).thought_ids.shape == (1, 8, 1, 2)
    assert abs(trainer.evaluate()["eval_gain"]) > 0
    trainer.save_model()
    loaded = QuietStar.from_pretrained(tmp_path)
    assert same(loaded, qs) and loaded.tokenizer.get_vocab() == tokenizer.get_vocab()

    resumed = ThoughtSFTTrainer(make_qs(), arguments, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert logged(resumed, "loss") == logged(trainer, "loss")

    with pytest.raises(ValueError, match="^ThoughtSFTTrainer: a row must hold one text"):
        ThoughtSFTTrainer(qs, SFTConfig(str(tmp_path), **usual, packing=True), **options)


def run_until_killed(folder):
    """A run whose process is killed while it writes the checkpoint after step 4."""
    torch.set_num_threads(2)  # as in conftest.py: sums depend on it
    trainer = make_trainer(folder, make_qs(**RESUMED))
    save = trainer._save_optimizer_and_scheduler

    def killed(output_dir):
        if Path(output_dir).name == "checkpoint-4":
            os.kill(os.getpid(), signal.SIGKILL)
        save(output_dir)

    trainer._save_optimizer_and_scheduler = killed
    trainer.train()


def run_in_processes(folder):
    options = {"per_device_train_batch_size": 2, "eval_strategy": "steps", "eval_steps": 3, **THREE_STEPS}
    trainer = make_trainer(folder, make_qs(), **options)
    trainer.train()
    trainer.save_model()
    trainer.end()
    # Not past destructors: that of DDP waits for Gloo's threads and these for the GIL, which it holds (pytorch/pytorch#56297).
    os._exit(0)


if __name__ == "__main__":
    {"killed": run_until_killed, "processes": run_in_processes}[sys.argv[1]](sys.argv[2])
