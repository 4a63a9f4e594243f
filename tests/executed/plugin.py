"""Plugin of ``python -m ttsem.sanitize pytest``: mends what ttsem 0.1.0 lacks, and writes what was executed to a file."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import re
import time
from pathlib import Path
from typing import Any

import adversary
import pytest
import torch
from ttsem import harness, mlir, ops, races, validate

DESCRIPTOR_LOAD = "tt.descriptor_load"
ASYNCHRONOUS = re.compile(r'"tt\w+\.async_(tma_)?copy')
PROGRAMS = 4  # of a launch whose shared memory is looked at


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--executed", type=Path, help="write the launches of each kernel and the outcome of each case here")
    parser.addoption("--modules", type=int, metavar="CC", help="also execute every module of each kernel's first launch")
    parser.addoption("--schedule", choices=adversary.SCHEDULES, help="of partitions, copies and products: see adversary.py")


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    blocks_without_leading_ones()
    products_in_another_dtype()
    gluon_from_its_first_stage()
    if schedule := config.getoption("--schedule"):
        adversary.schedule = schedule
        adversary.install()
    if config.getoption("--executed"):
        config.pluginmanager.register(Executed(config), "executed")


@pytest.fixture
def launches(pytestconfig: pytest.Config) -> collections.Counter[str]:
    """How often each kernel has been launched so far; the counter goes on."""
    return pytestconfig.pluginmanager.get_plugin("executed").launches


def blocks_without_leading_ones() -> None:
    """A descriptor's block has as many dimensions as its tensor; the loaded tile may lack some of length 1."""
    load = ops.OPS[DESCRIPTOR_LOAD]

    def of_the_result(interp: Any, op: Any, args: list[Any]) -> list[Any]:
        (block,) = load(interp, op, args)
        return [block.reshape(op.result_types[0].shape)]

    ops.OPS[DESCRIPTOR_LOAD] = of_the_result


def products_in_another_dtype() -> None:
    """PyTorch has ``out_dtype`` for CUDA alone, where 16-bit factors are summed in fp32."""

    def of_cpu(function: Any) -> Any:
        def product(*factors: torch.Tensor, out_dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
            return function(*(x if out_dtype is None else x.to(out_dtype) for x in factors), **options)

        return product

    torch.mm, torch.addmm = of_cpu(torch.mm), of_cpu(torch.addmm)


def gluon_from_its_first_stage() -> None:
    """A kernel in Gluon has no module before "ttgir". ttsem reads that from a dump of all passes, which takes a minute."""
    ir_for_launch = harness.ir_for_launch

    def first(record: Any, stage: str, target: Any, *rest: Any) -> Any:
        if not record.fn.is_gluon():
            return ir_for_launch(record, stage, target, *rest)
        mlir.enable_generic_printing()
        return mlir.to_generic(harness._stage_text(record, "ttgir", target), None)

    harness.ir_for_launch = first


class Executed:
    """Counts launches by kernel and by case."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.launches: collections.Counter[str] = collections.Counter()
        self.cases: list[dict[str, Any]] = []
        self.before = 0
        self.modules: dict[str, dict[str, Any]] = {}
        self.inside = False  # a launch whose modules are executed
        execute = harness.execute

        def counted(record: Any, module: str, *arguments: Any, **options: Any) -> Any:
            result = execute(record, module, *arguments, **options)
            if not self.inside:
                self.launches[record.fn_name] += 1
                self.inside = True
                try:
                    self.take_apart(record, module)
                finally:
                    self.inside = False
            return result

        harness.execute = counted

    def take_apart(self, record: Any, first: str) -> None:
        """Execute what each pass of the compiler receives, and compare it with the first module's results."""
        cc = self.config.getoption("--modules")
        kernel = variant(record)
        if cc is None or kernel in self.modules:
            return
        began = time.monotonic()
        results = harness.final_state(record, first)
        if isinstance(results, harness.Comparison):
            self.modules[kernel] = {"verdicts": {results.verdict: 1}, "why": results.message}
            return
        target = harness.target_for("cpu", cc)
        stages = validate.split_dump(harness.dump_for_launch(record, target))
        different: dict[str, str] = {}  # most passes change nothing
        for name, text in stages:
            different.setdefault(text, name)
        todo = [(name, text) for text, name in different.items()]
        report = validate.validate_stages(dataclasses.replace(record, post=record.post | results), todo)
        verdicts = collections.Counter(x.verdict for x in report.passes)
        unjudged = {f"{x.pass_name}: {x.message} {' '.join(x.unsupported)}"[:200] for x in report.passes if x.n_diff}
        last = [text for _, text in stages if "llvm.func" not in text][-1]
        shared = races_in_shared_memory(record, last)
        shared["races_without_waits"] = races_in_shared_memory(record, without_waits(last))["races"]
        seconds = round(time.monotonic() - began, 1)
        before_llvm = sum("llvm.func" not in text for _, text in stages)
        self.modules[kernel] = {
            "modules": before_llvm,
            "verdicts": verdicts,
            "unjudged": sorted(unjudged),
            "shared": shared,
            "seconds": seconds,
        }

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        launched = self.launches.total() - self.before
        self.before += launched
        case = {"case": report.nodeid, "outcome": report.outcome, "launches": launched, "seconds": round(report.duration, 1)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            case["why"] = (crash.message if crash else report.longreprtext).strip()[:500]
        if report.user_properties:
            case["properties"] = dict(report.user_properties)
        if report.skipped:
            case["why"] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        self.cases.append(case)

    def pytest_sessionfinish(self) -> None:
        (summary,) = (
            x for x in self.config.pluginmanager.get_plugins() if hasattr(x, "state") and hasattr(x.state, "races_unchecked")
        )
        found = {
            "launches": self.launches,
            "modules": self.modules,
            "races_unchecked": summary.state.races_unchecked,
            "cases": self.cases,
        }
        self.config.getoption("--executed").write_text(json.dumps(found))


def races_in_shared_memory(record: Any, module: str) -> dict[str, Any]:
    """Copies to shared memory that may still be on their way when another access touches it, in the launch's first programs.

    Only asynchronous copies: between other accesses the compiler puts barriers later, while it makes LLVM of the module.
    """
    found: dict[str, Any] = {"programs": 0, "races": 0, "unjudged": []}
    interp = harness.Interp
    programs = itertools.product(*map(range, harness._grid3(record.grid)))
    for program in itertools.islice(programs, PROGRAMS):
        ran: list[Any] = []

        class OfOneProgram(races.RaceInterp):
            def __init__(self, module: Any, memory: Any, grid: tuple[int, int, int]) -> None:
                numbers = (races._attr_int(module.attrs, f"ttg.{name}") for name in ("num-warps", "threads-per-warp"))
                super().__init__(module, memory, grid, *numbers)
                ran.append(self)  # noqa: B023, as ``program`` below: both are of this turn

            def run_grid(self, function: str, arguments: list[Any]) -> None:
                self.run(function, arguments, program)  # noqa: B023

        harness.Interp = OfOneProgram
        try:
            failure = harness.execute(record, module).failure
        finally:
            harness.Interp = interp
        found["programs"] += 1
        pairs = [(race.first.op, race.second.op) for x in ran for race in x.races]
        found["races"] += sum(bool(ASYNCHRONOUS.search(a) or ASYNCHRONOUS.search(b)) for a, b in pairs)
        found["unjudged"] += [failure.message] if failure else []
    return found


def without_waits(module: str) -> str:
    """With waits that leave all copies on their way: there must be races then."""
    module = "\n".join(line for line in module.split("\n") if '"ttng.wait_barrier"' not in line)
    return re.sub(r'("ttg.async_wait"\(.*num = )\d+', r"\g<1>99", module)


def variant(record: Any) -> str:
    """The kernel's name, with the options that change its code."""
    given = [name for name in ("tree", "ranges", "window", "softcap", "dk", "dv") if record.bound.get(name) is not None]
    return " ".join([record.fn_name, *given])
