"""What takes long is listed in one place, ``tests/slow.txt``, a node id a line, and marked as slow from there.

``make test`` leaves it out and ``make test-all`` runs it. To bring the list up to date: ``pytest --durations=0``.
"""

from pathlib import Path

import pytest

LISTED = frozenset((Path(__file__).parent / "slow.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.nodeid in LISTED:
            item.add_marker(pytest.mark.slow)
    everything = config.args == config.getini("testpaths")
    if everything and (gone := LISTED - {item.nodeid for item in items}):
        raise pytest.UsageError(
            f"tests/slow.txt lists {sorted(gone)[0]!r}, which is no test: take the line out"
        )
