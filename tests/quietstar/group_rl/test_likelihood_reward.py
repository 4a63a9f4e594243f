"""LikelihoodReward: each form is that of a forward for each sequence, and a trainer's steps are those with such a reward."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer, RLOOTrainer

from quietstar import LikelihoodReward
from quietstar.group_rl.likelihood_reward import FORMS
from tests.quietstar.group_rl.trainers import END, PAIRS, SharedGRPO, config_of, number_tokenizer, weights_of

G = 4
JOINT, JOINT_IDS = "10 11", [10, 11]


# Of two prompts: ended, long and cut off, with an answer of its own, the same again; nothing but an end; parts of joints.
PROMPTS = [[5, 6, 7]] * G + [[5, 6, 8, 9]] * G
COMPLETIONS = [[20, 21, END], [20, 21] * 9, [20, 10, 10, 11, 30, END], [20, 21, END]]
COMPLETIONS += [[END], [20, 10], [11, 10, 20] * 5 + [END], [10, 11]]
THOUGHTS = [[20, 21], [20, 21] * 9, [20, 10], [20, 21], [], [20, 10], [11, 10, 20] * 5, []]
ANSWERS = ["40 41 42"] * G + ["40"] * G
COLUMNS = {"completions": COMPLETIONS, "prompts": PROMPTS, "answer": ANSWERS, "trainer_state": None}


@pytest.fixture
def trainer(tmp_path):
    rows = [{"prompt": " ".join(str(3 + 5 * i + j) for j in range(1 + 2 * i)), "answer": f"{20 + i} 30 31"} for i in range(4)]

    def make(cls, model, reward, peft_config=None, **options):
        usual = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_completion_length": 6}
        arguments = config_of(cls, tmp_path, **usual | {"logging_steps": 1} | options)
        data = Dataset.from_list(rows)
        return cls(model, reward, arguments, data, processing_class=number_tokenizer(), peft_config=peft_config)

    return make


def scored(model, before, answer):
    """Probabilities of an answer's tokens, by a forward of one sequence."""
    with torch.no_grad():
        logits = model(torch.tensor([before + answer])).logits[0, len(before) - 1 : -1].double()
    return [row[token] for row, token in zip(logits.softmax(-1).tolist(), answer, strict=True)]


def by_hand(form, model, prompts, thoughts, answers):
    """The forms, written out."""

    def mean(values):
        return sum(values) / len(values)

    rewards = []
    for prompt, thought, answer in zip(prompts, thoughts, answers, strict=True):
        p = scored(model, prompt + thought + JOINT_IDS, answer)
        if form == "logprob":
            rewards.append(mean([math.log(x) for x in p]))
        elif form == "verifree":
            rewards.append(math.prod(p))
        elif form == "rlpr":
            rewards.append(min(max(mean(p) - mean(scored(model, prompt + JOINT_IDS, answer)), 0), 1))
        else:
            long = 1 + math.log10(len(thought)) if thought else 1
            rewards.append(math.exp(-mean([math.log(x) for x in p]) / long))
    if form == "nover":
        groups = [rewards[i // G * G :][:G] for i in range(len(rewards))]
        rewards = [(G - sum(x < y - 1e-9 for x in group)) / G for y, group in zip(rewards, groups, strict=True)]
    return rewards


@pytest.fixture
def ready(tiny, trainer):
    """``ready(form)``: a reward whose trainer has completed these prompts, and a model that nobody has changed."""

    def make(form, name="llama", **options):
        model = tiny(name, num_hidden_layers=1).double()
        plain, reward = copy.deepcopy(model), LikelihoodReward(form, "answer", JOINT)
        made = trainer(SharedGRPO, model, reward, **options)
        made.model.train()
        made.prompt_ids = PROMPTS
        return reward, plain, made

    return make


IDS = [[int(word) for word in answer.split()] for answer in ANSWERS]


@pytest.mark.parametrize("form", FORMS)
def test_equals_a_forward_for_each(ready, form):
    reward, plain, made = ready(form)
    got = reward(completion_ids=COMPLETIONS, **COLUMNS)
    assert got == pytest.approx(by_hand(form, plain, PROMPTS, THOUGHTS, IDS), rel=1e-6, abs=1e-12)
    assert len(set(got)) > 2 and got[0] == got[3] and made.model.training
    if form == "nover":
        assert max(got[:G]) == max(got[G:]) == 1


def test_dropout_is_off(ready):
    reward, plain, made = ready("logprob", "gpt2")
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 and module.training for module in made.model.modules())
    want = by_hand("logprob", plain, PROMPTS, THOUGHTS, IDS)
    assert reward(completion_ids=COMPLETIONS, **COLUMNS) == pytest.approx(want, rel=1e-6)


def test_each_shared_token_is_computed_once(ready):
    """Of the answers after each thought and, as rlpr wants, after none."""
    reward, _, made = ready("rlpr", per_device_train_batch_size=8)
    rows = []
    made.model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: rows.append(inputs[0].numel()))
    reward(completion_ids=COMPLETIONS, **COLUMNS)
    whole = [p + t + JOINT_IDS + a for p, t, a in zip(PROMPTS * 2, THOUGHTS + [[]] * 8, IDS * 2, strict=True)]
    assert rows == [len({tuple(ids[:n]) for ids in whole for n in range(1, len(ids))})]


def test_a_group_over_two_processes(ready, monkeypatch):
    reward, _, made = ready("nover")
    completions, answers = [[20], [21], [22], [23]], ["40", "40", "40", "40"]
    made.prompt_ids = PROMPTS[:4]
    want, sent, real, got = reward(completion_ids=completions, answer=answers), {}, made.accelerator, {}
    made.prompt_ids = PROMPTS[:2]
    for process in (0, 1, 0, 1):  # the first two calls show what each one sends

        def gather(scores, process=process):
            sent[process] = scores
            return torch.cat([sent[0], sent.get(1, scores)])

        stub = SimpleNamespace(gather=gather, process_index=process, unwrap_model=real.unwrap_model, autocast=real.autocast)
        monkeypatch.setattr(made, "accelerator", stub)
        here = slice(2 * process, 2 * process + 2)
        got[process] = reward(completion_ids=completions[here], answer=answers[here])
    assert got[0] + got[1] == want and sorted(want) == [0.25, 0.5, 0.75, 1]


@pytest.mark.parametrize("cls, form", [(GRPOTrainer, "nover"), (RLOOTrainer, "logprob")])
def test_a_trainers_steps(tiny, trainer, cls, form):
    """Rewards that are logged, and weights; what TRL generates is drawn with the same seed."""

    def stock_reward(prompts, completion_ids, answer, **_):
        thoughts = []
        for ids in completion_ids:
            ends = [i for i in range(len(ids)) if ids[i : i + 2] == JOINT_IDS or ids[i:] == [END]]
            thoughts.append(ids[: min(ends, default=len(ids))])
        mode, tokenizer = plain.training, number_tokenizer()
        rewards = by_hand(form, plain.eval(), tokenizer(prompts)["input_ids"], thoughts, tokenizer(answer)["input_ids"])
        plain.train(mode)
        return rewards

    stock_reward.__name__ = f"answer_{form}"
    plain, model = (tiny("llama", num_hidden_layers=1).double() for _ in range(2))
    before, logs, after = weights_of(plain), [], []
    for one, weights, reward in ((cls, plain, stock_reward), (PAIRS[cls], model, LikelihoodReward(form, "answer", JOINT))):
        made = trainer(one, weights, reward, beta=0.0)
        made.train()
        after.append(weights_of(weights))
        names = [f"rewards/answer_{form}/{what}" for what in ("mean", "std")]
        logs.append([[entry[name] for name in names] for entry in made.state.log_history if names[0] in entry])
    assert len(logs[0]) == 2
    torch.testing.assert_close(torch.tensor(logs[1]), torch.tensor(logs[0]), rtol=1e-5, atol=1e-9)
    assert float((after[0] - before).norm()) > 1e-4
    assert float((after[1] - after[0]).norm() / (after[0] - before).norm()) < 1e-5


def test_lora(ready):
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    reward, plain, made = ready("logprob", peft_config=config)
    got = reward(completion_ids=COMPLETIONS, **COLUMNS)
    merged = copy.deepcopy(made.model).merge_and_unload()
    merged.set_attn_implementation("sdpa")
    assert got == pytest.approx(by_hand("logprob", merged, PROMPTS, THOUGHTS, IDS), rel=1e-5)
    assert got != pytest.approx(by_hand("logprob", plain, PROMPTS, THOUGHTS, IDS), rel=1e-2)


def test_refused_arguments():
    for arguments, message in (
        (("best", "answer", JOINT), "form must be one of logprob, verifree, rlpr, nover, got 'best'"),
        (("rlpr", 3, JOINT), "column must be a str, got int"),
        (("rlpr", "answer", None), "joint must be a str, got NoneType"),
    ):
        with pytest.raises(ValueError, match=f"^LikelihoodReward: {message}$"):
            LikelihoodReward(*arguments)
    with pytest.raises(ValueError, match="^LikelihoodReward: reward_funcs must be those of a trainer with SharedPrompts"):
        LikelihoodReward("logprob", "answer", JOINT)(completion_ids=COMPLETIONS, **COLUMNS)


def test_refused_columns(ready):
    reward, _, made = ready("logprob")
    for texts, message in (
        (None, "column must be one of the data set that TRL hands on, got 'answer'"),
        ([*ANSWERS[:7], 3], "column 'answer' must hold texts, each must be a str, got int"),
        ([*ANSWERS[:7], ""], "column 'answer' must hold texts of at least one token, got ''"),
    ):
        with pytest.raises(ValueError, match=f"^LikelihoodReward: {message}$"):
            reward(completion_ids=COMPLETIONS, answer=texts)
    made.prompt_ids = [[5] * 125] * 8
    with pytest.raises(ValueError, match="^LikelihoodReward: prompt, completion and answer need 148 positions and GPT2"):
        made.model = ready("logprob", "gpt2")[2].model
        reward(completion_ids=COMPLETIONS, **COLUMNS)
