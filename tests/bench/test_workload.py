from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lmc.bench.check import check_caches
from lmc.bench.workload import load_workload, overlay
from lmc.errors import WorkloadError
from tests.bench.conftest import small_workload

SHIPPED = sorted((Path(__file__).parents[2] / "workloads").glob("*.yaml"))


def _load(tmp_path: Path, document: Any, quick: bool = False) -> Any:
    path = tmp_path / "w.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
    return load_workload(path, quick)


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_workloads_are_correct(path: Path, quick: bool) -> None:
    workload = load_workload(path, quick)
    assert workload.name == path.stem
    assert workload.about and workload.licence
    check_caches(workload)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 3}, "unknown key 'sede'; did you mean 'seed'?"),
        ({"limits": {"request": 3}}, "limits: unknown key 'request'; did you mean 'requests'?"),
        ({"limits": {"seconds": "3 parsecs"}}, "limits.seconds: '3 parsecs' is not a duration"),
        ({"limits": {"requests": -3}}, "limits.requests: -3 is not a count"),
        ({"load": {"kind": "poison", "rate": 1}}, "load: Input tag 'poison'"),
        ({"load": {"kind": "poisson", "rate": 0}}, "load.rate: Input should be greater than 0"),
        ({"load": {"kind": "poisson"}}, "load.rate: Field required"),
        ({"arms": {}}, "arms: Dictionary should have at least 1 item"),
        ({"name": "No Good"}, "name: String should match"),
        ({"prime": ["chatt"]}, "prime: no part 'chatt'; did you mean 'chat'?"),
        ({"bars": [{"a": "lcm", "b": "none"}]}, "bars: no arm 'lcm'; did you mean 'lmc'?"),
        ({"bars": [{"a": "lmc", "b": "none", "over": "chats"}]}, "over 'chats' is no part; did you mean 'chat'?"),
        ({"arms": {"x": {"restart_of": "y"}}}, "arms.x.restart_of: 'y' is not an arm before it"),
        ({"arms": {"x": {"url": "http://h", "args": ["--a"]}}}, "arms.x: an arm with a url takes no args"),
        ({"parts": {"p": {"source": {"kind": "random", "tokens": 3}, "where": "row"}}}, "a random source takes no"),
        ({"parts": {"p": {"source": {"kind": "file", "path": "x"}}}}, "parts.p: session is missing"),
        ({"parts": {"p": {"source": {"kind": "repeat", "part": "q"}}}}, "'q' is not a part before it"),
    ],
)
def test_bad_workloads_name_the_place_and_the_remedy(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    document = small_workload() | {"bars": []} | change
    with pytest.raises(WorkloadError) as raised:
        _load(tmp_path, document)
    text = str(raised.value)
    assert message in text
    assert "\n" not in text
    assert text.startswith(str(tmp_path / "w.yaml"))


def test_restart_needs_a_cache_to_keep(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="has no cache whose disk could be kept"):
        _load(tmp_path, small_workload(bars=[], arms={"none": {}, "again": {"restart_of": "none"}}))


def test_files_that_are_no_workload(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot read the workload"):
        load_workload(tmp_path / "absent.yaml")
    with pytest.raises(WorkloadError, match="not YAML"):
        _load(tmp_path, "a: [1")
    with pytest.raises(WorkloadError, match="not a workload; it must be a mapping"):
        _load(tmp_path, "- 1")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(WorkloadError, match="not a text file"):
        load_workload(tmp_path / "b.yaml")


def test_quick_overlay_merges_mappings_and_is_checked(tmp_path: Path) -> None:
    document = small_workload(quick={"parts": {"random": {"pick": {"sessions": 1}}}, "limits": {"requests": 4}})
    assert _load(tmp_path, document).parts["random"].pick.sessions == 3
    quick = _load(tmp_path, document, quick=True)
    assert quick.parts["random"].pick.sessions == 1
    assert quick.parts["random"].source.tokens == 300
    assert quick.limits.requests == 4
    with pytest.raises(WorkloadError, match="unknown key 'limit'; did you mean 'limits'"):
        _load(tmp_path, small_workload(quick={"limit": {}}), quick=True)


def test_overlay_replaces_lists_and_leaves_its_arguments_alone() -> None:
    base = {"a": {"b": [1, 2], "c": 1}}
    assert overlay(base, {"a": {"b": [3]}}) == {"a": {"b": [3], "c": 1}}
    assert overlay(base, {"a": {"c": None, "absent": None}}) == {"a": {"b": [1, 2]}}
    assert base == {"a": {"b": [1, 2], "c": 1}}


def test_cache_settings_are_checked_by_lmcs_own_schema(tmp_path: Path) -> None:
    workload = _load(tmp_path, small_workload(bars=[], arms={"x": {"cache": {"host": {"capacityy": "1GiB"}}}}))
    with pytest.raises(WorkloadError, match=r"arms\.x\.cache: .*host\.capacityy.*did you mean host\.capacity"):
        check_caches(workload)
