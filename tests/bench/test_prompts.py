from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.bench.prompts import Prompts, build_prompts, random_tokens
from lmc.bench.tokenizer import ModelTokenizer
from lmc.bench.workload import Workload
from lmc.errors import ModelError, TraceError, WorkloadError
from tests.bench.conftest import small_workload


def _build(tokenizer: ModelTokenizer, base: Path, **changes: Any) -> Prompts:
    return build_prompts(Workload.model_validate(small_workload(bars=[]) | changes), tokenizer, base)


def _part(tokenizer: ModelTokenizer, base: Path, part: dict[str, Any], **changes: Any) -> Prompts:
    return _build(tokenizer, base, parts={"p": part}, **changes)


def _write(base: Path, rows: list[dict[str, Any]]) -> None:
    (base / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))


ROWS = {"kind": "file", "path": "rows.jsonl"}


def test_groups_are_complete_and_keep_the_order_of_the_file(tokenizer: ModelTokenizer, data_folder: Path) -> None:
    prompts = _build(tokenizer, data_folder)
    texts = [tokenizer.backend.decode(session[0].prompt.tolist()) for session in prompts.parts["chat"]]
    assert [text.split("question ")[1][0] for text in texts] == ["0", "2", "4", "1", "3", "5"]
    assert all(text.startswith(f"<system>policy {index // 3}") for index, text in enumerate(texts))
    assert [session[0].id for session in prompts.parts["chat"]] == [f"chat/{index}/0" for index in range(6)]


def test_a_repeat_sends_the_very_tokens_again(tokenizer: ModelTokenizer, data_folder: Path) -> None:
    prompts = _build(tokenizer, data_folder)
    first, again = prompts.parts["chat"][-2:], prompts.parts["again"]
    assert [a[0].prompt.tolist() for a in first] == [b[0].prompt.tolist() for b in again]
    assert [b[0].id for b in again] == ["again/0/0", "again/1/0"]


def test_prompts_are_the_same_every_time_and_differ_by_seed(tokenizer: ModelTokenizer, data_folder: Path) -> None:
    def tokens(seed: int) -> list[list[int]]:
        prompts = _build(tokenizer, data_folder, seed=seed)
        return [request.prompt.tolist() for session in prompts.sessions for request in session]

    assert tokens(1) == tokens(1)
    assert tokens(1)[-3:] != tokens(2)[-3:]
    assert tokens(1)[:8] == tokens(2)[:8]


def test_random_tokens_are_ordinary_text_tokens(tokenizer: ModelTokenizer) -> None:
    special = tokenizer.backend.token_to_id("<s>")
    drawn = random_tokens(tokenizer, 20_000, 1, "part", 0)
    assert special not in drawn
    assert len(np.unique(drawn)) == 256
    assert not np.array_equal(drawn, random_tokens(tokenizer, 20_000, 1, "part", 1))


def test_each_turn_extends_the_turn_before_it(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    _write(tmp_path, [{"q": ["one", "two", "three"], "a": ["1", "2", "3"]}])
    part = {"source": ROWS, "session": {"turns": "row.q", "replies": "row.a"}, "think": "2s"}
    (session,) = _part(tokenizer, tmp_path, part).parts["p"]
    texts = [tokenizer.backend.decode(request.prompt.tolist()) for request in session]
    assert texts[0] == "<user>one\n<assistant>"
    assert texts[2] == "<user>one\n<assistant>1\n<user>two\n<assistant>2\n<user>three\n<assistant>"
    assert [later.startswith(earlier) for earlier, later in itertools.pairwise(texts)] == [True, True]
    assert [request.think_s for request in session] == [0.0, 2.0, 2.0]


def test_several_turns_need_replies_for_their_history(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    _write(tmp_path, [{"q": ["one", "two"]}])
    with pytest.raises(WorkloadError, match=r"session\.replies: 0 replies for 2 turns \(row 0\)"):
        _part(tokenizer, tmp_path, {"source": ROWS, "session": {"turns": "row.q"}})


def test_rows_of_one_session_become_its_turns(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    _write(tmp_path, [{"s": "a", "t": "x"}, {"s": "b", "t": "y"}, {"s": "a", "t": "xz"}])
    part = {"source": ROWS, "session_by": "row.s", "session": {"prompt": "{{ row.t }}"}}
    prompts = _part(tokenizer, tmp_path, part)
    assert [[len(request.prompt) for request in session] for session in prompts.parts["p"]] == [[1, 2], [1]]
    assert [request.id for request in prompts.parts["p"][0]] == ["p/0/0", "p/0/1"]


def test_too_long_prompts_are_left_out_with_the_turns_after_them_and_counted(
    tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    _write(tmp_path, [{"q": ["a", "b" * 100, "c"], "a": ["1", "2", "3"]}, {"q": ["d"], "a": []}])
    part = {"source": ROWS, "session": {"turns": "row.q", "replies": "row.a"}, "output_tokens": 10}
    prompts = _part(tokenizer, tmp_path, part, engine={"context": 60})
    assert [len(session) for session in prompts.parts["p"]] == [1, 1]
    assert prompts.too_long == {"p": 2}
    with pytest.raises(WorkloadError, match=r"every prompt is longer than engine.context \(12\)"):
        _part(tokenizer, tmp_path, part, engine={"context": 12})


def test_pick_by_length_number_and_turns(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    _write(tmp_path, [{"q": ["x" * n, "y"], "a": ["z"]} for n in (5, 50, 6, 7, 8)])
    session = {"turns": "row.q", "replies": "row.a"}
    pick = {"sessions": 3, "turns": 1, "max_prompt_tokens": 40, "min_prompt_tokens": 24}
    prompts = _part(tokenizer, tmp_path, {"source": ROWS, "session": session, "pick": pick})
    assert [[len(r.prompt) for r in s] for s in prompts.parts["p"]] == [[24], [25], [26]]


def test_documents_values_and_where(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    _write(tmp_path, [{"n": n} for n in range(4)])
    (tmp_path / "policy.md").write_text("rules")
    part = {
        "source": ROWS,
        "documents": {"policy": {"kind": "file", "path": "policy.md", "format": "text"}, "shots": ROWS},
        "where": "row.n >= 2 and index > 2",
        "session": {
            "prompt": "{{ documents.policy }}{% for s in documents.shots[:2] %}{{ s.n }}{% endfor %}{{ row.n }}"
        },
    }
    (session,) = _part(tokenizer, tmp_path, part).parts["p"]
    assert tokenizer.backend.decode(session[0].prompt.tolist()) == "rules013"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"session": {"turns": "row.absent"}}, "expression 'row.absent' fails on row 0: .*absent"),
        (
            {"session": {"turns": "row.n"}},
            r"session\.turns: the expression gives int \(row 0\); it must give a list of texts",
        ),
        ({"session": {"turns": "row.n +"}}, r"expression 'row\.n \+' fails"),
        ({"session": {"prompt": "{{ row.absent.more }}"}}, "a template fails on row 0"),
        ({"session": {"prompt": "x"}, "where": "row.n > 5"}, "no session is left"),
    ],
)
def test_bad_templates_are_one_line(
    tokenizer: ModelTokenizer, tmp_path: Path, part: dict[str, Any], message: str
) -> None:
    _write(tmp_path, [{"n": 1}])
    with pytest.raises(WorkloadError, match=message) as raised:
        _part(tokenizer, tmp_path, {"source": ROWS, **part})
    assert "\n" not in str(raised.value)


def test_empty_data_set(tokenizer: ModelTokenizer, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(WorkloadError, match=r"parts\.p: no session is left; give a data set that is not empty"):
        _part(tokenizer, tmp_path, {"source": ROWS, "session": {"prompt": "x"}})


def test_a_trace_expands_equal_ids_to_equal_tokens_and_scales_lengths(
    tokenizer: ModelTokenizer, tmp_path: Path
) -> None:
    rows = [
        {"timestamp": 4000, "input_length": 1000, "output_length": 64, "hash_ids": [7, 8]},
        {"timestamp": 7000, "input_length": 1536, "output_length": 640, "hash_ids": [7, 8, 9]},
        {"timestamp": 7000, "input_length": 512, "output_length": 1, "hash_ids": [10]},
    ]
    _write(tmp_path, rows)
    part = {
        "source": {"kind": "trace", "path": "rows.jsonl", "block_tokens": 512, "tokens_per_block": 64},
        "output_tokens": 16,
    }
    requests = [session[0] for session in _part(tokenizer, tmp_path, part).parts["p"]]
    assert [len(r.prompt) for r in requests] == [125, 192, 64]
    assert [r.output_tokens for r in requests] == [8, 16, 1]
    assert [r.at_s for r in requests] == [4.0, 7.0, 7.0]
    assert requests[0].prompt.tolist() == requests[1].prompt[:125].tolist()
    assert requests[2].prompt.tolist() != requests[1].prompt[:64].tolist()
    (tmp_path / "rows.jsonl").write_text('{"timestamp": 1}\n')
    with pytest.raises(TraceError, match=r"rows\.jsonl, line 1: "):
        _part(tokenizer, tmp_path, part)


def test_model_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"tokenizer\.json: no such file"):
        ModelTokenizer.load(tmp_path)


def test_model_without_chat_template_takes_raw_prompts_only(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text((model_folder / "tokenizer.json").read_text())
    bare = ModelTokenizer.load(tmp_path)
    assert len(bare.encode("abc")) == 3
    with pytest.raises(WorkloadError, match="no chat template"):
        bare.encode_chat([{"role": "user", "content": "x"}])
