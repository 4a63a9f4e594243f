"""Checkpoints that were changed on purpose, with sizes and hashes that fit."""

import hashlib
import json

from safetensors.torch import load_file, save_file


def checksum(settings):
    """What quietstar.json says of itself."""
    others = {name: value for name, value in settings.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def sign(folder, settings=None):
    """Make quietstar.json agree with the files beside it as they are now; ``settings`` replaces what it says."""
    path = folder / "quietstar.json"
    settings = json.loads(path.read_text()) if settings is None else settings
    for name in settings["files"]:
        settings["files"][name] = (folder / name).stat().st_size
    for name in settings.get("sha256", {}):
        settings["sha256"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    if "checksum" in settings:
        settings["checksum"] = checksum(settings)
    path.write_text(json.dumps(settings))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change(file, **tensors):
    """Tensors are replaced by what functions make of them, or left out."""
    found = load_file(file)
    for name, function in tensors.items():
        found[name] = function(found.pop(name, None))
    kept = {name: x.contiguous() for name, x in found.items() if x is not None}
    save_file(kept, file, metadata={"format": "pt"})
