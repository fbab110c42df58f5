"""What threads are told before torch starts: a container's quota bounds them, and what the user set stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunus.machine import bound_threads, cores


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that what the test sets is undone
        monkeypatch.delenv(name)


def set_(monkeypatch: pytest.MonkeyPatch, **values: str) -> dict[str, str]:
    """The variables after `bound_threads` with these values set."""
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    bound_threads()
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return {name: cores.os.environ[name] for name in names if name in cores.os.environ}


@pytest.mark.parametrize(("quota", "threads"), [(None, None), (1e6, None), (0.5, "1"), (0.9, "1")])
def test_threads_go_by_the_quota(quota: float | None, threads: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "quota", lambda: quota)
    found = set_(monkeypatch)
    assert found.pop("GOMP_SPINCOUNT") == "5000"
    assert found == ({} if threads is None else {"OMP_NUM_THREADS": threads})


def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "quota", lambda: 0.5)
    own = {"OMP_NUM_THREADS": "7", "OMP_WAIT_POLICY": "active"}
    assert set_(monkeypatch, **own) == own
    monkeypatch.delenv("OMP_WAIT_POLICY")
    assert set_(monkeypatch, GOMP_SPINCOUNT="9") == {"OMP_NUM_THREADS": "7", "GOMP_SPINCOUNT": "9"}


@pytest.mark.parametrize(
    ("files", "group", "found"),
    [
        ({}, "0::/\n", None),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "250000 100000\n"}, "0::/\n", 2.5),
        ({"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, "1:cpu:/x\n0::/a/b\n", 4.0),
        ({"cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu:/\n", 1.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, "2:cpu:/\n", None),
    ],
)
def test_the_smallest_quota_of_the_groups_counts(
    files: dict[str, str], group: str, found: float | None, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "own").write_text(group)
    assert cores.quota(tmp_path, tmp_path / "own") == found
