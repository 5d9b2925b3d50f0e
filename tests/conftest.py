"""Set-up of the whole suite: upstream's markers, threads under xdist, and the report on upstream's tests."""

import os
import sys
from collections import Counter, defaultdict

import pytest


if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

#: marks that transformers' tests carry
UPSTREAM_MARKERS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "torch_compile_test",
)

#: key of the property by which a report says whose upstream test it is about
FAMILY = "upstream_family"


def pytest_configure(config):
    config.addinivalue_line("markers", "upstream: transformers' own common tests, run on a family of the catalogue")
    for marker in UPSTREAM_MARKERS:
        config.addinivalue_line("markers", f"{marker}: a mark of transformers' own tests")


def pytest_collection_modifyitems(items):
    for item in items:
        # The same classes inherit tests of our own.
        if item.get_closest_marker("upstream") and item.function.__module__ != "tests.batteries.generation":
            item.user_properties.append((FAMILY, item.cls.model_type))


def pytest_runtest_setup(item):
    """Let no test meet the graphs of others: torch refuses to compile a function again and again."""
    if "compil" in item.name and "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()


def _family(report) -> str | None:
    return dict(getattr(report, "user_properties", ())).get(FAMILY)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """Say for each family how many of the upstream tests ran, and why the others did not.

    pytest's own list of skipped tests is left to those that are not upstream's, which would bury them.
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
