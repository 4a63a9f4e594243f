"""Damaged checkpoints: each loads the same model, if the damage is outside of what is read, or is refused in one sentence."""

import hashlib
import json
import os
import random
import shutil
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import quietstar
from quietstar.checkpoints import places, pretrained
from quietstar.cli import common
from quietstar.config import TrainConfig
from quietstar.run import snapshots
from quietstar.run.optimizers import load_optimizer, make_optimizer
from quietstar.run.resume import find_checkpoint
from quietstar.training import train
from tests.limits import Hang, limits
from tests.quietstar.checkpoints.signing import checksum, sign
from tests.quietstar.cli import wrong_commands

CONFIG = quietstar.ThoughtConfig(thought_tokens=2, lookahead=2, policy_weight=3.0)
SIZES = {"vocab_size": 257, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
RUN = {"steps": 1, "batch_size": 2, "learning_rate": 1e-3, "warmup": 0, "eval_every": 0, "keep": 9}
GROWN = 2**40  # bytes of a file that was made larger


def flip(file, generator):
    content = bytearray(file.read_bytes())
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)


def truncate(file, generator):
    os.truncate(file, generator.randrange(file.stat().st_size))


def empty(file, generator):
    os.truncate(file, 0)


def remove(file, generator):
    file.unlink()


def grow(file, generator):
    os.truncate(file, GROWN)


def folder(file, generator):
    file.unlink()
    file.mkdir()


def pipe(file, generator):
    file.unlink()
    os.mkfifo(file)


def device(file, generator):
    file.unlink()
    file.symlink_to("/dev/zero")


def loop(file, generator):
    file.unlink()
    file.symlink_to(file.name)


UNSIGNED = (flip, flip, flip, truncate, empty, remove, grow, folder, pipe, device, loop)


def document(file, generator):
    """The whole of a JSON file is another value."""
    file.write_text(generator.choice(list(wrong_commands.HOSTILE_JSON.values())))


def value(file, generator):
    """A value somewhere in a JSON file is another, missing or nested."""
    file.write_bytes(wrong_commands.mutated(generator, file.read_text()))


def tensor(file, generator):
    """A tensor has another name, shape, dtype or values that are not finite, is missing, or there is one more."""
    tensors = load_file(file)
    name = generator.choice([name for name, x in tensors.items() if x.is_floating_point() and x.ndim])
    x = tensors[name]
    changes = {
        "nan": {name: x * float("nan")},
        "inf": {name: x.clone().fill_(float("inf"))},
        "complex": {name: x.to(torch.complex64)},
        "int": {name: x.to(torch.int8)},
        "double": {name: x.double()},
        "shape": {name: x[None].contiguous()},
        "empty": {name: x[:0].clone()},
        "more": {"999.exp_avg": x.clone()},
        "odd": {"x": x.clone()},
    }
    kind = generator.choice([*changes, "missing", "renamed"])
    if kind in ("missing", "renamed"):
        x = tensors.pop(name)
    save_file(tensors | (changes.get(kind, {}) if kind != "renamed" else {name + ".x": x}), file, metadata={"format": "pt"})


def shard(file, generator):
    """An index names files elsewhere, odd ones, or the wrong ones."""
    content = json.loads(file.read_text())
    names = content["weight_map"]
    wrong = ["../x.safetensors", "/dev/zero", "a/../../x", "", ".", "..", "\0", "x\\y", "nowhere.safetensors", "config.json"]
    names[generator.choice(sorted(names))] = generator.choice(wrong + sorted(set(names.values())))
    file.write_text(json.dumps(content))


def signed(path):
    """What may be wrong with a file in a checkpoint whose hashes fit."""
    if path.name.endswith(".index.json"):
        return (document, value, value, shard, shard, shard, shard)
    if path.suffix == ".json":
        return (document, document, value, value, value, value)
    return (tensor, tensor, tensor, tensor) if path.suffix == ".safetensors" else ()


def state_of(qs):
    return {
        "tensors": {name: x.detach().clone() for name, x in qs.state_dict().items()},
        "thoughts": qs.thought_config,
        "model": {name: x for name, x in qs.model.config.to_dict().items() if name != "_name_or_path"},
    }


def load_checkpoint(path):
    return state_of(quietstar.QuietStar.from_pretrained(path))


def load_plain(path):
    torch.manual_seed(0)  # for the mixing head
    tokenizer = pretrained.load_tokenizer(str(path))
    return state_of(common.load_model(str(path), CONFIG, tokenizer, "float32"))


class Snapshot:
    """A run's checkpoint, loaded as a run that continues does."""

    def __init__(self, make):
        self.make = make

    def __call__(self, path):
        qs = quietstar.QuietStar(self.make("llama", **SIZES), CONFIG, verify=False)
        found = find_checkpoint(path, TrainConfig(out=str(path.parent), **RUN), CONFIG)
        step = snapshots.load(found, qs)
        weights = [x for x in qs.parameters() if x.requires_grad]
        optimizer = make_optimizer("adamw", weights, 1e-3, 0.1)
        load_optimizer(found, optimizer)
        moments = {f"{i}.{name}": x.clone() for i, own in optimizer.state_dict()["state"].items() for name, x in own.items()}
        state = state_of(qs)
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return {**state, "tensors": state["tensors"] | moments, "step": step}


def make_hashes_fit(path, file):
    """Make hashes fit what was damaged, except what the damaged file itself says."""
    if file.name == "quietstar.json":  # a checksum of the rest
        with suppress(ValueError, RecursionError):  # it may be no JSON
            settings = json.loads(file.read_text())
            if isinstance(settings, dict) and "checksum" in settings:
                file.write_text(json.dumps({**settings, "checksum": checksum(settings)}))
    elif (path / "quietstar.json").exists():
        sign(path)
    if (path / "manifest.json").exists() and file.name != "manifest.json":
        manifest = {}
        for name in json.loads((path / "manifest.json").read_text()):
            content = (path / name).read_bytes()
            manifest[name] = [len(content), hashlib.sha256(content).hexdigest()]
        (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    """By name: a folder, and the function that loads it."""
    home = tmp_path_factory.mktemp("whole")
    tokenizer = Tokenizer(models.BPE(vocab={x: i for i, x in enumerate("-abcdefgh")}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a")
    torch.manual_seed(0)
    qs = quietstar.QuietStar(tiny("llama", **SIZES), CONFIG, tokenizer)
    qs.save_pretrained(home / "whole")
    shutil.copytree(home / "whole", home / "sharded")
    (home / "sharded" / "model.safetensors").unlink()
    qs.model.save_pretrained(home / "sharded", max_shard_size=20_000)
    settings = json.loads((home / "sharded" / "quietstar.json").read_text())
    shards = [file.name for file in (home / "sharded").glob("model*.safetensors*")]
    for names in (settings["files"], settings.get("sha256", {})):
        names.pop("model.safetensors", None)
        names |= dict.fromkeys(shards)
    sign(home / "sharded", settings)
    tiny("llama", **SIZES).save_pretrained(home / "plain", max_shard_size=20_000)
    tokenizer.save_pretrained(home / "plain")
    texts = [{"input_ids": torch.arange(5) + i} for i in range(2)]
    train(quietstar.QuietStar(tiny("llama", **SIZES), CONFIG), texts, TrainConfig(out=str(home / "run"), **RUN), progress=False)
    found = {
        "whole": (home / "whole", load_checkpoint),
        "sharded": (home / "sharded", load_checkpoint),
        "snapshot": (places.folder(home / "run", 1), Snapshot(tiny)),
        "plain": (home / "plain", load_plain),
    }
    if find_spec("peft"):
        qs = quietstar.QuietStar(AutoModelForCausalLM.from_pretrained(home / "plain"), CONFIG)
        qs.add_adapters(quietstar.config.AdapterConfig(lora_rank=2))
        qs.save_pretrained(home / "adapters")
        found["adapters"] = (home / "adapters", load_checkpoint)
    return found


def cases(path, name):
    """(file, damage, whether hashes are made to fit) for every file of a checkpoint."""
    for file in sorted(path.iterdir()):
        for damage in UNSIGNED:
            if name != "plain" or damage is not flip:  # a plain model has no hashes
                yield file.name, damage, False
        for damage in signed(file):
            if name != "plain" or damage is not tensor:
                yield file.name, damage, True


def attempt(load, path):
    """What loading gives, or the error that it raises."""
    try:
        with limits(memory=2 * GROWN):
            return load(path)
    except (Exception, Hang) as error:
        return error


def same(one, other):
    a, b = one["tensors"], other["tensors"]
    return (
        a.keys() == b.keys()
        and all(torch.equal(a[name], b[name]) for name in a)
        and all(one[name] == other[name] for name in one.keys() - {"tensors"})
    )


def outcome(found, want, path, file, hashes_fit):
    if isinstance(found, ValueError):
        text = str(found)
        one_sentence = "\n" not in text and (str(path) in text or file in text)
        return "refused" if one_sentence and type(found) is ValueError else f"no sentence: {text[:200]!r}"
    if isinstance(found, (Exception, Hang)):
        return f"raised {type(found).__name__}: {str(found)[:100]!r}"
    if same(found, want):
        return "the same model"
    return "another that was saved so" if hashes_fit else "another model, silently"


HELD = ("refused", "the same model", "another that was saved so")


NAMES = ("whole", "sharded", "snapshot", "plain", "adapters")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", [8, pytest.param(40, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_checkpoint_loads_the_same_or_is_refused(name, part, checkpoints, tmp_path, record_property):
    if name not in checkpoints:
        pytest.skip("needs peft")
    whole, load = checkpoints[name]
    want = load(whole)
    all_cases = list(cases(whole, name))
    generator = random.Random(f"{name} {part}")
    chosen = generator.sample(all_cases, min(part, len(all_cases)))
    counts, bad = Counter(), []
    for number, (file, damage, hashes_fit) in enumerate(chosen):
        path = tmp_path / f"{name}-{number}"
        shutil.copytree(whole, path)
        damage(path / file, generator)
        if hashes_fit:
            make_hashes_fit(path, path / file)
        result = outcome(attempt(load, path), want, path, file, hashes_fit)
        counts[result if result in HELD else "not held"] += 1
        if result not in HELD:
            bad.append(f"{file}, {damage.__name__}{', signed' * hashes_fit}: {result}")
        shutil.rmtree(path)
    found = {kind: counts[kind] for kind in (*HELD, "not held")}
    record_property("counts", ["damaged checkpoints", {"tried": len(chosen), **found}])
    assert not bad, "\n".join([str(found), *bad])
