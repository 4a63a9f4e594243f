"""The package's page on PyPI, which is the README: what it links to is reachable from there."""

import os
import re
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """What a built package says of itself."""
    folder = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"QUIETSTAR_BUILD": "python"}, check=True, capture_output=True)
    return message_from_string(next(folder.glob("*/PKG-INFO")).read_text(encoding="utf-8"))


def test_every_link_and_picture_has_its_whole_address(metadata):
    page, readme = metadata.get_payload(), (ROOT / "README.md").read_text()
    targets = [re.findall(r'\]\(([^)\s]+)\)|(?:src|srcset|href)="([^"]+)"', text) for text in (page, readme)]
    assert len(targets[0]) == len(targets[1]) > 10
    for link, picture in targets[0]:
        assert (link or picture).startswith("https://"), link or picture
    version = f"/v{metadata['Version']}/"
    assert version in next(picture for _, picture in targets[0] if picture)
    # What an address ends with is the file that the README names.
    paths = [a[0] + a[1] for a in targets[0] if version in a[0] + a[1]]
    assert paths and all((ROOT / path.split(version)[1].partition("#")[0]).exists() for path in paths)


def test_one_address_of_the_repository(metadata):
    urls = dict(line.split(", ") for line in metadata.get_all("Project-URL"))
    repository = urls["Repository"]
    assert f"git clone {repository}\n" in (ROOT / "README.md").read_text()
    assert all(url.startswith(repository) for url in urls.values())
    if os.environ.get("GITHUB_REF_TYPE") == "tag":  # a release
        assert repository == f"https://github.com/{os.environ['GITHUB_REPOSITORY']}"
