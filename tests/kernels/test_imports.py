"""Changes to modules once they are imported reach these modules alone."""

import importlib
import sys
import zipfile

from quietstar_kernels import imports


def test_modules_of_a_zip_file(tmp_path, monkeypatch):
    """All have one loader."""
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as file:
        for name in ("quietstar_test_first", "quietstar_test_second"):
            file.writestr(f"{name}.py", "value = 1\n")
            monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "some.zip"))
    monkeypatch.setattr(imports, "_waiting", {})
    changed = []
    imports.when_imported("quietstar_test_first", changed.append)
    first = importlib.import_module("quietstar_test_first")
    importlib.import_module("quietstar_test_second")
    assert changed == [first] and first.value == 1
    importlib.reload(first)
    assert changed == [first, first]
