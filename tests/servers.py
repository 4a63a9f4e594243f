"""What this package writes, in vLLM, mlx-lm and llama.cpp: ``make vllm-check`` runs it in an environment that holds them.

Every command that saves a model runs once, and so does GRPO with SharedPrompts, whose completions vLLM generates. Each folder
with a model is then loaded by vLLM and mlx-lm, and those with a tokenizer that llama.cpp knows are converted for it. In fp32
all must give transformers' greedy answers. ``python tests/servers.py FOLDER CONVERTER``: where to work, and llama.cpp's script.
"""

# ruff: noqa: E402, since vLLM reads the environment when it is imported
import contextlib
import copy
import functools
import gc
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT)]
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # which would move this process to other cores
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
warnings.filterwarnings("ignore")

import mlx.core as mx
import mlx_lm
import pretrained
import torch
import xllamacpp
from datasets import Dataset
from mlx_lm.generate import generate_step
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MistralConfig
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_generation
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.request import LoRARequest

from benchmarks.harness.machine import device_name
from quietstar import QuietStar, SharedPrompts, ThoughtConfig
from quietstar.cli import main as cli
from quietstar.testing import byte_tokenizer

logging.disable_progress_bar()
NEW = 12  # most tokens of an answer
SMOLLM2 = 49_152  # tokens of its vocabulary
BOUND = 1e-3  # of log-probabilities in fp32
ADAPTERS = "adapter_config.json"
Answer = tuple[list[int], Tensor]  # greedy tokens and their log-probabilities
ENGINE = {"dtype": "float32", "enforce_eager": True, "use_tqdm_on_load": False, "max_model_len": 64, "max_num_seqs": 8}
# vLLM has no attention for CPUs with heads narrower than 32.
SIZES = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "initializer_range": 0.1}
OPTIONS = {
    "TEXT": "--data=text.txt --length=16 --batch-size=2",
    "THOUGHTS": "--steps=1 --warmup=0 --held-out=0 --thoughts=2 --thought-tokens=2 --lookahead=2",
    "SUMS": "--task=addition --digits=1 --max-new=10",
    "FEW": "--task=addition --digits=1 --batch-size=4 --rows=20 --held-out=3",
}
COMMANDS = """
train --model=smollm2 --out=whole --learning-rate=1e-4 TEXT THOUGHTS
train --model=smollm2 --out=lora --learning-rate=1e-2 --lora-rank=4 TEXT THOUGHTS
merge --model=lora --out=lora-merged
merge --model=official --out=official-merged
star --out=star SUMS --sft-steps=150 --learning-rate=3e-3 --rounds=1 --problems=100 --steps=2 --warmup=0
vstar --out=vstar --model=star/best SUMS --rounds=1 --problems=40 --samples=4 --steps=2 --test-problems=8 --test-samples=4
solve --out=solve --model=vstar/best SUMS --problems=8 --process-steps=2 --process-problems=8 --process-samples=4 --rollouts=2
score --out=score --model=star/best SUMS --first-steps=1 --second-steps=1 --problems=8 --held-out=4 --chains=1
internalize --out=internalize --model=star/best FEW --explicit-steps=0 --steps-per-token=2 --final-steps=2
internalize --out=kd --method=kd FEW --explicit-steps=2 --student-steps=2 --emulator-steps=2 --coupled-steps=2
fast --out=fast --model=llama TEXT --held-out=4 --curriculum=3-2,2-1 --steps=2 --eval-every=2 --plain-steps=2
"""


def make() -> None:
    """Every kind of folder that this package writes."""
    torch.manual_seed(0)
    Path("text.txt").write_text("\n\n".join(f"Paragraph {i} has a few words." for i in range(40)))
    tokenizer = byte_tokenizer()
    for config in (LlamaConfig(**SIZES), MistralConfig(**SIZES)):
        model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(config.model_type)
        tokenizer.save_pretrained(config.model_type)
        qs = QuietStar(model, ThoughtConfig(thoughts=2, thought_tokens=2, lookahead=2), tokenizer)
        qs.save_pretrained(f"saved-{config.model_type}")
        qs.save_pretrained(f"shards-{config.model_type}", max_shard_size="100KB")
    qs.save_official("official")
    for command in COMMANDS.strip().splitlines():
        words = " ".join(OPTIONS.get(word, word) for word in command.split()).split()
        with contextlib.redirect_stdout(None):
            code = cli.main(words)
        if code:
            sys.exit(f"quietstar {' '.join(words)} ended with exit code {code}")


def reward(completion_ids, **_):
    return [sum(x % 7 for x in ids) / len(ids) for ids in completion_ids]


class SharedGRPO(SharedPrompts, GRPOTrainer):
    pass


def group_rl(name: str, adapters: bool, **options) -> None:
    """Three steps of GRPO whose completions vLLM generates in the same process, then TRL's trainer with these completions."""
    usual = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True, "optim": "sgd"}
    usual |= {"learning_rate": 1.0, "max_steps": 3, "num_generations": 4, "per_device_train_batch_size": 4, "logging_steps": 4}
    usual |= {"gradient_accumulation_steps": 2, "max_completion_length": 8, "vllm_max_model_length": 64, "use_vllm": True}
    first = flat(plain := AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32))

    def make(trainer_class, engine):
        torch.manual_seed(0)
        model, tokenizer = copy.deepcopy(plain), AutoTokenizer.from_pretrained("llama")
        tokenizer.pad_token, tokenizer.eos_token = "~", "|"
        data = Dataset.from_list([{"prompt": f"{i} + {i + 1} = "} for i in range(8)])
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if adapters else None
        with mock.patch.object(vllm_generation, "LLM", engine):
            arguments = GRPOConfig(f"{name}-run", **usual | options)
            return trainer_class(model, reward, arguments, data, processing_class=tokenizer, peft_config=lora)

    ours = make(SharedGRPO, functools.partial(LLM, enforce_eager=True))
    vllm = ours.vllm_generation
    generate, made = vllm.generate, []
    vllm.generate = lambda *args, **kwargs: made.append(generate(*args, **kwargs)) or made[-1]
    ours.train()
    ours.save_model(name)
    vllm.sync_weights()
    stock = make(GRPOTrainer, mock.MagicMock())
    completions = iter(made)
    stock.vllm_generation.generate = lambda *_, **__: next(completions)
    stock.train()
    apart = (flat(ours.model) - flat(stock.model)).abs().max().item()
    trained = ours.model.merge_and_unload() if adapters else ours.model
    moved = (flat(trained) - first).abs().max().item()
    own, before = difference(vllm.llm, trained, plain)
    assert len(made) == 3 and 0 < apart < 1e-4 * moved, (apart, moved)
    assert 10 * own < before, "vLLM does not have the weights after the last step"
    print(
        f"{name}: weights moved by {moved:.1e}, those of TRL's own trainer end {apart:.1e} apart; log-probabilities of vLLM in "
        f"{vllm.llm.llm_engine.model_config.dtype} are {own:.1e} from the trained model's, {before:.1e} from the first one's"
    )
    del vllm.llm
    cleanup_dist_env_and_memory()


def flat(model) -> Tensor:
    return torch.cat([x.detach().flatten() for x in model.parameters()])


def difference(llm, *models) -> list[float]:
    """Of the log-probabilities of vLLM's greedy tokens from those of each model, the largest."""
    prompts = prompts_of(256)
    found = list(zip(prompts, of_vllm(llm, prompts), strict=True))
    return [max((logprobs(model, p, ids) - x).abs().max().item() for p, (ids, x) in found) for model in models]


def prompts_of(vocabulary: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in (5, 9, 17)]


@torch.no_grad()
def logprobs(model, prompt: list[int], ids: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def of_transformers(model, prompts) -> list[Answer]:
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=0)
        written = made[0, len(prompt) :].tolist()
        found.append((written, logprobs(model, prompt, written)))
    return found


def of_vllm(llm, prompts, **options) -> list[Answer]:
    sampling = SamplingParams(temperature=0, max_tokens=NEW, logprobs=0)
    made = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False, **options)
    found = []
    for output in (x.outputs[0] for x in made):
        ids = list(output.token_ids)
        found.append((ids, torch.tensor([x[i].logprob for i, x in zip(ids, output.logprobs, strict=True)])))
    return found


def in_vllm(folder: Path, tokenizer, prompts) -> list[Answer]:
    options = {}
    if (folder / ADAPTERS).exists():
        options["lora_request"] = LoRARequest("own", 1, str(folder.absolute()))
        llm = LLM(PeftConfig.from_pretrained(folder).base_model_name_or_path, enable_lora=True, **ENGINE)
    else:
        llm = LLM(str(folder), **ENGINE)
    text = tokenizer.decode(prompts[0])
    (read,) = llm.generate([text], SamplingParams(max_tokens=1), use_tqdm=False)
    assert read.prompt_token_ids == tokenizer(text)["input_ids"], "its tokens are others"
    return of_vllm(llm, prompts, **options)


def in_mlx(folder: Path, prompts) -> list[Answer]:
    model, tokenizer = mlx_lm.load(str(folder))
    found = []
    for prompt in prompts:
        made: Answer = ([], [])
        for token, values in generate_step(mx.array(prompt), model, max_tokens=NEW):
            made[0].append(int(token))
            made[1].append(float(values[int(token)]))
            if int(token) in tokenizer.eos_token_ids:
                break
        found.append((made[0], torch.tensor(made[1])))
    return found


def in_llama_cpp(folder: Path, converter: str, prompts) -> list[Answer]:
    command = [sys.executable, converter, str(folder), "--outtype", "f32", "--outfile", "converted.gguf"]
    subprocess.run(command, check=True, capture_output=True)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = "converted.gguf", 128, 1, False
    # Its flash attention on CPUs, and by default its cache, round to fp16.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    found = []
    for prompt in prompts:
        made = server.handle_completions({"prompt": prompt, "max_tokens": NEW, "temperature": 0, "logprobs": 1})
        tokens = made["choices"][0]["logprobs"]["content"]
        found.append(([x["id"] for x in tokens], torch.tensor([x["logprob"] for x in tokens])))
    del server
    Path("converted.gguf").unlink()
    return found


def apart(found: list[Answer], expected: list[Answer]) -> str:
    """The largest difference of log-probabilities of answers, which must be the same tokens."""
    for (ids, _), (wanted, _) in zip(found, expected, strict=True):
        assert ids == wanted, f"wrote {ids}, and transformers {wanted}"
    worst = max((x - y).abs().max().item() for (_, x), (_, y) in zip(found, expected, strict=True))
    assert worst < BOUND, f"log-probabilities differ by {worst}"
    return f"{worst:.0e}"


def versions() -> str:
    names = ("vllm-cpu", "torch", "transformers", "trl", "peft", "mlx-lm", "mlx", "xllamacpp")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names) + f"; {device_name(torch.device('cpu'))}"


def main(folder: str, converter: str) -> None:
    work, converter = Path(folder), os.path.abspath(converter)
    work.mkdir(parents=True, exist_ok=True)
    os.chdir(work)
    for path in Path().iterdir():
        if path.name != "smollm2":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not Path("smollm2").exists():
        pretrained.fetch(Path("smollm2"))
    make()
    # As on GPUs. On CPUs vLLM packs the weights of linear layers as it loads them, and TRL can't put others in their place.
    with mock.patch("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", unpacked):
        group_rl("grpo", False)
        group_rl("grpo-lora", True, vllm_importance_sampling_mode="token_truncate")
    print("largest differences from transformers' log-probabilities of the same greedy tokens:")
    failed = check_all(converter)
    print("official:", refusal() or failed.append("official was not refused"))
    print(versions())
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def unpacked(layer, remove_weight):
    """A linear layer of vLLM that uses the weight which it has."""
    layer.cpu_linear = torch.nn.functional.linear


def check_all(converter: str) -> list[str]:
    """Prints a line for each folder with a model; what failed."""
    failed = []
    # smollm2 is as transformers saves it, and mlx-lm misreads its rotary embeddings: docs/serving.md.
    others = {Path("official"), Path("smollm2")}
    for folder in sorted({file.parent for file in Path().rglob("*model*.safetensors")} - others):
        adapters = (folder / ADAPTERS).exists()
        model = (AutoPeftModelForCausalLM if adapters else AutoModelForCausalLM).from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = prompts_of(model.config.vocab_size)
        expected = of_transformers(model, prompts)
        if adapters:
            with model.disable_adapter():
                plain = logprobs(model, prompts[0], expected[0][0])
            assert (plain - expected[0][1]).abs().max() > 10 * BOUND, f"the adapters of {folder} change nothing"
        engines = {"vLLM": functools.partial(in_vllm, folder, tokenizer, prompts)}
        # mlx-lm takes no adapters of peft's, and GPT-2 by the names of its first checkpoints alone.
        if not adapters and model.config.model_type != "gpt2":
            engines["mlx-lm"] = functools.partial(in_mlx, folder, prompts)
        if not adapters and model.config.vocab_size == SMOLLM2:  # llama.cpp's converter knows tokenizers one by one
            engines["llama.cpp"] = functools.partial(in_llama_cpp, folder, converter, prompts)
        said = []
        for name, answers in engines.items():
            try:
                said.append(f"{name} {apart(answers(), expected)}")
            except Exception as error:
                said.append(f"{name} FAILED: {type(error).__name__}: {str(error)[:500]}")
                failed.append(f"{folder} in {name}")
            gc.collect()
        print(f"{folder}: {', '.join(said)}", flush=True)
    return failed


def refusal() -> str:
    """What vLLM says about a checkpoint in the published format, whose thought parts are among the model's weights."""
    try:
        LLM("official", **ENGINE)
    except ValueError as error:
        return re.search("There is no module or parameter named .* in MistralForCausalLM", str(error))[0]
    return ""


if __name__ == "__main__":
    main(*sys.argv[1:])
