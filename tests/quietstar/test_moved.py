"""Old names of modules, fields and attributes: the error gives the new one."""

import importlib
from importlib.util import find_spec

import pytest

import quietstar
from quietstar._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_gives_the_new_one(old):
    with pytest.raises(ModuleNotFoundError) as error:
        importlib.import_module(old)
    assert str(error.value) == f"{old} is now {MOVED[old]}"
    assert find_spec(MOVED[old]) is not None


def test_every_kind_of_import():
    for line in ("import quietstar.harness", "from quietstar.harness import QuietStarLM", "from quietstar import harness"):
        with pytest.raises(ModuleNotFoundError, match=r"^quietstar\.harness is now quietstar\.evaluation\.lm_eval$"):
            exec(line)
    with pytest.raises(ModuleNotFoundError, match=r"^quietstar\.recipes\.icot is now quietstar\.recipes\.internalize$"):
        exec("from quietstar.recipes import icot")


def test_names_of_a_module_that_is_a_package_now():
    for line in ("from quietstar.data import load_data", "quietstar.data.load_data"):
        with pytest.raises(ImportError, match=r"^quietstar\.data\.load_data is now quietstar\.data\.texts\.load_data$"):
            exec(line)
    exec("from quietstar.data import texts")
    assert not hasattr(quietstar.data, "nothing")


def test_other_names_fail_as_always():
    with pytest.raises(ModuleNotFoundError, match="No module named 'quietstar.nothing'"):
        importlib.import_module("quietstar.nothing")
    assert callable(quietstar.verify)


def test_old_names_of_fields_and_attributes(tiny):
    with pytest.raises(TypeError, match="^ThoughtConfig: reference_decay is now base_model_decay$"):
        quietstar.ThoughtConfig(reference_decay=0.5)
    qs = quietstar.QuietStar(tiny("llama"), verify=False)
    with pytest.raises(AttributeError, match="^QuietStar.update_reference is now update_base_model$"):
        qs.update_reference()
    assert not hasattr(qs, "reference") and not hasattr(qs, "nothing")
