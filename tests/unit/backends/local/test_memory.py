"""Free memory of the machine, and of handmade control groups."""

from __future__ import annotations

import psutil
import pytest

from labkeeper.backends.local.memory import free_memory

MIB = 2**20


def group(place, files):
    place.mkdir()
    for name, value in files.items():
        (place / name).write_text(value)
    return place


def test_without_a_container_the_machines_memory_counts(tmp_path):
    found = free_memory([tmp_path / "none"])
    assert found.total == psutil.virtual_memory().total
    assert 0 < found.available < found.total


@pytest.mark.parametrize(
    "files",
    [
        {
            "memory.max": "67108864\n",
            "memory.current": "62914560\n",
            "memory.stat": "anon 1\ninactive_file 10485760\n",
        },
        {
            "memory.limit_in_bytes": "67108864\n",
            "memory.usage_in_bytes": "62914560\n",
            "memory.stat": "inactive_file 5\ntotal_inactive_file 10485760\n",
        },
    ],
    ids=["version 2", "version 1"],
)
def test_a_containers_limit_counts_if_it_is_lower(tmp_path, files):
    """Reclaimable file cache counts as free."""
    found = free_memory([group(tmp_path / "group", files)])
    assert (found.total, found.available) == (64 * MIB, 14 * MIB)


@pytest.mark.parametrize("most", ["max", str(2**62)])
def test_a_group_without_a_limit_is_ignored(tmp_path, most):
    found = free_memory(
        [group(tmp_path / "group", {"memory.max": most, "memory.current": "1", "memory.stat": ""})]
    )
    assert found.total == psutil.virtual_memory().total
