"""How many lines a checkout has, by area, and how many it may have.

    python tests/weight.py [FOLDER ...]   a column for each checkout
    python tests/weight.py --check        fail where this one is above tests/weight.json; part of make lint

tests/weight.json gives each area its most lines and, since the last change of it, why. Raise a number in the commit that needs
it, with its reason; lower it when an area got smaller.
"""

import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
CODE = {".py", ".cpp", ".hpp", ".cu", ".cuh", ".h", ".js", ".css", ".html"}


def lines(folder, *patterns, suffixes=CODE):
    """Lines of the files of some folders or names, without what is built."""
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.suffix in suffixes}
    kept = [file for file in found if not {"__pycache__", "build"} & set(file.parts) and ".egg-info" not in str(file)]
    return sum(len(file.read_bytes().splitlines()) for file in kept)


def words(readme):
    """Words outside code and the generated tables."""
    text = re.sub(r"<!-- (\w+): begin.*?<!-- \1: end -->|```.*?```", "", readme.read_text(), flags=re.DOTALL)
    return len(text.split())


def weight(folder):
    shipped = {name: lines(folder, f"{name}/**/*") for name in ("quietstar_kernels", "csrc", "python/quietstar")}
    shipped["python/quietstar_recipes"] = lines(folder, "python/quietstar_recipes/**/*")
    rest = {name: lines(folder, f"{name}/**/*") for name in ("benchmarks", "experiments", "examples")}
    return (
        shipped
        | rest
        | {
            "shipped": sum(shipped.values()),
            "tests": lines(folder, "tests/**/*"),
            "docs": lines(folder, "docs/**/*", suffixes={".md"}),
            "docs/log.md": lines(folder, "docs/log.md", suffixes={".md"}),
            "README.md, words": words(folder / "README.md"),
        }
    )


def check():
    found, most = weight(HERE), json.loads((HERE / "tests" / "weight.json").read_text())
    if found.keys() != most.keys():
        return [f"tests/weight.json has other areas than tests/weight.py: {', '.join(sorted(found.keys() ^ most.keys()))}"]
    over = [f"{area}: {found[area]:,}, above {limit['most']:,}" for area, limit in most.items() if found[area] > limit["most"]]
    return over and [*over, "Make it smaller, or raise tests/weight.json and say there why."]


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        sys.exit("\n".join(check()) or None)
    columns = [weight(Path(folder).resolve()) for folder in sys.argv[1:] or [HERE]]
    for row in columns[0]:
        print(f"{row:28}" + "".join(f"{column[row]:>12,}" for column in columns))
