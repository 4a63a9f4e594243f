"""Print how heavy a checkout is: ``python tests/weight.py [FOLDER ...]``, a column for each."""

import ast
import re
import sys
from pathlib import Path

SHIPPED = {".py", ".cpp", ".hpp", ".cu", ".cuh", ".h", ".js", ".css", ".html"}
RECIPES = ("quietstar_recipes", "quietstar/recipes")


def lines(files):
    return sum(len(file.read_bytes().splitlines()) for file in files)


def files(folder, *patterns):
    found = {file for pattern in patterns for file in folder.glob(pattern) if file.is_file()}
    return [file for file in found if not {"__pycache__", "build"} & set(file.parts) and ".egg-info" not in str(file)]


def public_names(modules):
    """How many ``__all__`` there are, and how many names in them."""
    found = []
    for module in modules:
        for node in ast.parse(module.read_text()).body:
            if isinstance(node, ast.Assign) and "__all__" in [getattr(target, "id", "") for target in node.targets]:
                found.append(len(ast.literal_eval(node.value)))
    return f"{sum(found)} in {len(found)}"


def printed_data(folder):
    """Lines of generated pages, and of JSON files that are laid out over lines instead of one row a line."""
    pages = files(folder, "docs/api.md", "docs/cli.md", "benchmarks/results/**/*.md")
    data = files(folder, "docs/**/*.json", "benchmarks/**/*.json")
    return lines(pages) + sum(not whole_row(line) for file in data for line in file.read_text().splitlines())


def whole_row(line):
    return re.fullmatch(r"\s*(\"[^\"]*\": )?[\[{].*[\]}],?", line) is not None


def weight(folder):
    python, tests = files(folder, "python/**/*"), files(folder, "tests/**/*")
    shipped = {name: files(folder, f"{name}/**/*") for name in ("python", "quietstar_kernels", "csrc")}
    shipped = {name: lines(file for file in found if file.suffix in SHIPPED) for name, found in shipped.items()}
    recipes = [file for file in python if any(name in file.as_posix() for name in RECIPES)]
    modules = [file for file in python if file.suffix == ".py"]
    raw = [file for file in tests if file.suffix != ".safetensors"]
    return {
        **{f"{name}/, lines": f"{count:,}" for name, count in shipped.items()},
        "  of them recipes": f"{lines(file for file in recipes if file.suffix in SHIPPED):,}",
        "shipped code, lines": f"{sum(shipped.values()):,}",
        "tests, lines": f"{lines(raw):,}",
        "public names in `__all__`": public_names(modules),
        "  without recipes": public_names(file for file in modules if file not in recipes),
        "generated pages, printed data": f"{printed_data(folder):,}",
    }


if __name__ == "__main__":
    columns = [weight(Path(folder).resolve()) for folder in sys.argv[1:] or [Path(__file__).parents[1]]]
    for row in columns[0]:
        print(f"{row:30}" + "".join(f"{column[row]:>18}" for column in columns))
