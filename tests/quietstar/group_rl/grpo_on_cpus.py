"""``python grpo_on_cpus.py SCRIPT ...`` runs a script of TRL's GRPO with FSDP2 on CPUs and a stand-in for vLLM's server.

The third generation of process 1 brings it Slurm's warning.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from sharded import shard_on_cpus
from trl.trainer import grpo_trainer

INFO = {"model_config": {"logprobs_mode": "processed_logprobs"}}


class Server:
    mode = "server"
    vllm_client = SimpleNamespace(get_server_info=lambda: INFO)

    def __init__(self, **options):
        Path(f"server-of-{os.environ['RANK']}").write_text(options["server_host"])
        self.calls = 0

    def sync_weights(self):
        pass

    def generate(self, prompts, num_generations, **_):
        self.calls += 1
        if self.calls == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGUSR1)
        lengths = torch.randint(1, 6, (len(prompts),)).tolist()
        rows = [torch.randint(2, 6, (length,)).tolist() for length in lengths]
        return prompts, rows, [[[-1.4]] * len(row) for row in rows], None


if __name__ == "__main__":
    torch.set_num_threads(1)
    grpo_trainer.is_vllm_available, grpo_trainer.VLLMGeneration = lambda *_: True, Server
    shard_on_cpus()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
