"""Set-up of the whole suite: upstream's markers, threads under xdist, and the report on upstream's tests."""

import os
import sys
from collections import Counter, defaultdict

import pytest


if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: markers of transformers' tests
UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "torch_compile_test",
)

#: key of the report property that names the family of an upstream test
FAMILY = "upstream_family"


def pytest_configure(config):
    config.addinivalue_line("markers", "upstream: transformers' own common tests, run on a family of the catalogue")
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: a mark of transformers' own tests")


def pytest_collection_modifyitems(items):
    for item in items:
        # The same classes also inherit tests of this package.
        if item.get_closest_marker("upstream") and item.function.__module__ != "tests.batteries.generation":
            item.user_properties.append((FAMILY, item.cls.model_type))


def pytest_runtest_setup(item):
    """Reset compiled graphs between tests, because torch limits the number of recompilations of a function."""
    if "compil" in item.name and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _family(report) -> str | None:
    return dict(getattr(report, "user_properties", ())).get(FAMILY)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Report for each family how many upstream tests ran, and why the others were skipped.

    pytest's list of skipped tests contains only tests of this package, which upstream's would hide.
    """
    stats = terminalreporter.stats
    skipped = stats.get("skipped", [])
    stats["skipped"] = [report for report in skipped if _family(report) is None]
    try:
        return (yield)
    finally:
        stats["skipped"] = skipped
        _report_families(terminalreporter)


def _report_families(terminalreporter) -> None:
    outcomes = defaultdict(Counter)
    reasons = defaultdict(Counter)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            family = _family(report)
            if family is None:
                continue
            outcomes[family][outcome] += 1
            if outcome == "skipped":
                reasons[family][report.longrepr[2].removeprefix("Skipped: ")] += 1
    if not outcomes:
        return
    terminalreporter.section("transformers' common model tests")
    for family, counts in sorted(outcomes.items()):
        terminalreporter.line(
            f"{family}: {counts['passed'] + counts['failed']} ran, {counts['passed']} passed, "
            f"{counts['failed']} failed, {counts['skipped']} skipped"
        )
        for reason, count in reasons[family].most_common():
            terminalreporter.line(f"    {count:3} skipped: {reason}")
