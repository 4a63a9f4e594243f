"""Checkpoints that were changed on purpose, with sizes and hashes that fit."""

import hashlib
import json


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
