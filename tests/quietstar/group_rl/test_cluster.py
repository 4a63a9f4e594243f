"""GRPO on a cluster: SLURM's commands, vLLM's server and FSDP2's choice of GPUs are stand-ins, all else is run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("trl", minversion="1.16")  # Python 3.10 has an older one

HERE = Path(__file__).parent
COMMANDS = {
    "srun": """#!/bin/bash
for option; do
    case $option in --ntasks=*) count=${option#*=} ;; --nodelist=*) nodes=${option#*=} ;; --*) ;; *) break ;; esac
    shift
done
echo "$count on $nodes" >>srun.log
for ((i = 0; i < count; i++)); do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & tasks+=($!); done
trap 'kill "${tasks[@]}"' TERM
for task in "${tasks[@]}"; do wait "$task"; code=$?; done
exit "$code"
""",
    "scontrol": """#!/bin/bash
case $1 in
    show) echo 127.0.0.1; echo other ;;
    *) echo "$@" >>scontrol.log ;;
esac
""",
    "vllm": """#!/bin/bash
kill -USR1 $$
echo "dev mode $VLLM_SERVER_DEV_MODE: $@" >>vllm.log
exec sleep 300
""",
    "python": f"""#!/bin/bash
exec {sys.executable} {HERE / "grpo_on_cpus.py"} "$@"
""",
}
SLURM = {"SLURM_JOB_NODELIST": "nodes", "SLURM_JOB_ID": "8", "SLURM_NTASKS_PER_NODE": "2"}
OPTIONS = "--data data.jsonl --output_dir run --max_steps 5 --use_cpu --bf16 false --per_device_train_batch_size 4 "
OPTIONS += "--num_generations 4 --max_completion_length 5 --learning_rate 1e-2 --logging_steps 1 --ddp_timeout 60"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1, **{str(i): i for i in range(2, 6)}}, "<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>").save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, eos_token_id=1, pad_token_id=0, bos_token_id=None)).save_pretrained(
        tmp_path / "model"
    )
    rows = [{"prompt": f"2 {2 + i % 4} 4", "answer": str(2 + i % 4)} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "examples").symlink_to(HERE.parents[2] / "examples")
    (tmp_path / "bin").mkdir()
    for name, text in COMMANDS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.long
def test_it_stops_at_the_warning_and_goes_on(folder):
    def submit():
        command = ["bash", "examples/cluster/grpo.sh", "model", *OPTIONS.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        print(done.stdout, done.stderr)
        return done

    first = submit()
    assert first.returncode == 75 and [(folder / f"server-of-{rank}").read_text() for rank in range(2)] == ["other"] * 2
    assert (folder / "scontrol.log").read_text() == "requeue 8\n"
    assert sorted((folder / "srun.log").read_text().splitlines()) == ["1 on other", "2 on 127.0.0.1"]
    served = (folder / "vllm.log").read_text()
    assert served.startswith("dev mode 1: serve model --tensor-parallel-size 2 --weight-transfer-config")
    assert (folder / "run/checkpoint-3/pytorch_model_fsdp_0").is_dir() and not (folder / "run/model.safetensors").exists()
    number = (folder / "run/tracker-id").read_text()

    (folder / "run/checkpoint-4").mkdir()  # of a run that was killed while it saved
    assert submit().returncode == 0
    state = json.loads((folder / "run/checkpoint-5/trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "reward" in line] == [1, 2, 3, 4, 5]
    assert (folder / "run/tracker-id").read_text() == number and (folder / "scontrol.log").read_text() == "requeue 8\n"
    AutoModelForCausalLM.from_pretrained("run")
    before, after = load_file("model/model.safetensors"), load_file("run/model.safetensors")
    assert before.keys() == after.keys() and all((after[name] - before[name]).abs().max() > 0 for name in before)
