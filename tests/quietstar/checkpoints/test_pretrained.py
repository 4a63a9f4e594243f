"""Language models and tokenizers at the door: safetensors alone, no code of others, one sentence for what is wrong."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from quietstar.checkpoints.pretrained import load_config, load_model
from quietstar.cli import main as cli


class Code:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture
def pickled(model_folder):
    """The model in a pickle file."""
    torch.save(load_file(model_folder / "model.safetensors"), model_folder / "pytorch_model.bin")
    (model_folder / "model.safetensors").unlink()
    return model_folder


def commands(folder):
    """Each command that loads a plain language model, as short as it can be."""
    task, data = ["--task=addition", "--digits=1"], [f"--data={folder.parent / 'text.txt'}", "--no-pack", "--length=8"]
    return {
        "train": [*data, "--steps=1", "--held-out=0", "--thoughts=1", "--thought-tokens=1", "--lookahead=1", "--batch-size=2"],
        "star": [*task, "--rounds=1", "--problems=2"],
        "vstar": [*task, "--rounds=1", "--problems=2"],
        "score": [*task, "--first-steps=1", "--second-steps=1", "--problems=2"],
        "internalize": [*task, "--explicit-steps=1", "--final-steps=1", "--rows=2"],
        "fast": [*data, "--curriculum=1-1", "--steps=1", "--plain-steps=1"],
        "solve": [*task, "--problems=2", "--samples=2"],
        "doctor": ["--verify"],
    }


@pytest.mark.parametrize("command", ["train", "star", "vstar", "score", "internalize", "fast", "solve", "doctor"])
def test_every_command_refuses_pickles(pickled, tmp_path, capsys, command):
    out = [] if command == "doctor" else [f"--out={tmp_path / 'run'}"]
    typed = [command, f"--model={pickled}", *out, *commands(pickled)[command]]
    assert cli.main(typed) == cli.DATA
    assert (
        "its weights are pickle files (pytorch_model.bin), which can run code when read; --allow-bin" in capsys.readouterr().err
    )


@pytest.mark.long
def test_allow_bin_trains_from_pickles(pickled, tmp_path, capsys):
    typed = ["train", f"--model={pickled}", "--allow-bin", f"--out={tmp_path / 'run'}"]
    assert cli.main([*typed, *commands(pickled)["train"]]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["allow_bin"] is True


def test_allow_bin_runs_no_code_and_prefers_safetensors(pickled, tmp_path):
    weights = {name: x.clone() for name, x in load_model(pickled, allow_bin=True).state_dict().items()}  # they are mapped
    with open(pickled / "pytorch_model.bin", "wb") as file:
        pickle.dump({"lm_head.weight": Code(tmp_path / "run by the pickle")}, file)
    with pytest.raises(ValueError, match="cannot load a model"):
        load_model(pickled, allow_bin=True)
    assert not (tmp_path / "run by the pickle").exists()
    save_file(weights, pickled / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(load_model(pickled, allow_bin=True).lm_head.weight, weights["lm_head.weight"])
    assert not (tmp_path / "run by the pickle").exists()


def test_no_code_of_a_folder_is_run_and_nobody_is_asked(model_folder, tmp_path, monkeypatch):
    def asked(*_):
        raise AssertionError

    monkeypatch.setattr("builtins.input", asked)
    (model_folder / "code.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run')!r})\n")
    config = json.loads((model_folder / "config.json").read_text())
    remote = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoTokenizer": ["code.T", None]}
    (model_folder / "config.json").write_text(json.dumps({**config, "model_type": "mine", "auto_map": remote}))
    with pytest.raises(ValueError, match="cannot load a config") as error:
        load_config(model_folder)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
