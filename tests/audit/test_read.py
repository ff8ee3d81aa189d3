"""Logs to windows of conversations, from any position on."""

import csv
import json
import pickle
import random
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guard.audit.inputs import find_inputs
from guard.audit.read import Logs, facts_of, read_again, sample
from guard.audit.records import Place, Position, Record, Reject
from guard.audit.rows import Limits
from guard.audit.shapes import detect
from guard.audit.stop import Stop, Stopped
from guard.errors import ConfigError
from guard.types import Role, Turn

LIMITS = Limits()
BEGINNING = Position()


def logs(*paths: Path, spool: Path) -> Logs:
    inputs = find_inputs(map(str, paths))
    return Logs(inputs, detect(sample(inputs, LIMITS)), LIMITS, spool)


def items(read: Logs, start: Position = BEGINNING, characters: int = 100) -> list[Record | Reject]:
    return [item for window in read.windows(start, characters) for item in window.items]


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Logs:
    """Three files, with a bad line here and there, and one that ends in the middle."""
    folder = tmp_path_factory.mktemp("logs")
    for name in "abc":
        lines = [json.dumps({"id": f"{name}{row}", "text": "x" * (row % 7 * 20)}) for row in range(25)]
        lines[5] = "no"
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(b"no gzip")
    return logs(folder, spool=folder / "spool")


@given(st.integers(1, 3000), st.integers(1, 3000), st.data())
@settings(max_examples=30)
def test_reading_goes_on_from_the_end_of_any_window(some: Logs, first: int, later: int, data: st.DataObject) -> None:
    """What comes then is what came then, however large the windows are; and all of it is in one of them."""
    whole = items(some, characters=first)
    assert len(whole) == 76
    assert sum(isinstance(item, Reject) and item.rest for item in whole) == 1
    windows = list(some.windows(Position(), first))
    place = data.draw(st.integers(0, len(windows) - 1))
    before = sum(len(window.items) for window in windows[: place + 1])
    assert items(some, windows[place].end, later) == whole[before:]
    assert windows[-1].read == pytest.approx(1.0)
    assert [window.read for window in windows] == sorted(window.read or 0.0 for window in windows)


def test_windows_are_as_long_as_they_should_be(some: Logs) -> None:
    """Memory does not grow with the input."""
    assert max(len(window.items) for window in some.windows(Position(), 500)) <= 500 / 64 + 1


def test_logs_can_be_sent_to_other_processes(some: Logs) -> None:
    """And are the same there."""
    assert items(pickle.loads(pickle.dumps(some))) == items(some)


def test_texts_are_found_again(some: Logs, tmp_path: Path) -> None:
    """By their places, from what an audit says of its inputs."""
    wanted = [item for item in items(some) if isinstance(item, Record)][7]
    facts = json.loads(json.dumps(facts_of(some)))
    assert read_again(facts, tmp_path)([wanted.place, Place("nowhere", 1)]) == {wanted.place: wanted.turns}


def test_texts_of_inputs_that_changed_are_not_found(tmp_path: Path) -> None:
    """Other texts might stand at the same places."""
    (tmp_path / "a.jsonl").write_text('{"text": "Hi!"}\n')
    read = logs(tmp_path / "a.jsonl", spool=tmp_path / "spool")
    again = read_again(json.loads(json.dumps(facts_of(read))), tmp_path)
    place = Place(read.inputs[0].url, 1)
    assert again([place]) == {place: (Turn(Role.USER, "Hi!"),)}
    (tmp_path / "a.jsonl").write_text('{"text": "Something else."}\n')
    with pytest.raises(ConfigError, match=r"a\.jsonl: has changed since it was audited"):
        again([place])


def mixed(folder: Path, seed: int) -> tuple[Logs, dict[str, list[tuple[str, str]]]]:
    """Turns of several conversations, mixed, in two files; and what was said in each."""
    choose = random.Random(seed)
    events: list[dict[str, Any]] = []
    said: dict[str, list[tuple[str, str]]] = {}
    for step in range(60):
        id = f"c{choose.randrange(9)}"
        role = choose.choice(["user", "agent"])
        said.setdefault(id, []).append((role, f"{id} {step}"))
        events.append(
            {"conversation_id": id, "role": role, "text": f"{id} {step}", "time": f"2026-10-01T00:00:{step:02}"}
        )
    for name, part in (("1.csv", events[:35]), ("2.csv", events[35:])):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(events[0]))
            writer.writeheader()
            writer.writerows(part)
            file.write("cut\n")
    return logs(folder / "1.csv", folder / "2.csv", spool=folder / "spool"), said


@pytest.mark.parametrize("seed", range(3))
def test_turns_are_gathered_into_conversations(seed: int, tmp_path: Path) -> None:
    """However they are mixed, and over how many files; in the order in which they began, and from any of them on."""
    read, said = mixed(tmp_path, seed)
    read.gather(Stop())
    found = items(read)
    records = [item for item in found if isinstance(item, Record)]
    assert {item.id: [(turn.role.value, turn.text) for turn in item.turns] for item in records} == said
    assert [item.id for item in records] == list(said)
    assert [item.place for item in found if isinstance(item, Reject)] == [
        Place(read.inputs[0].url, 37),
        Place(read.inputs[1].url, 27),
    ]
    for window in list(read.windows(Position(), 100)):
        later = items(read, window.end, 1000)
        assert later == found[len(found) - len(later) :]


def test_what_is_gathered_is_for_no_one_else_and_goes_away(tmp_path: Path) -> None:
    """It holds texts; an audit that goes on finds it there, and in the end it is gone."""
    read, _ = mixed(tmp_path, 0)
    read.gather(Stop())
    (sorted_rows,) = read.spool.iterdir()
    assert stat.S_IMODE(read.spool.stat().st_mode) == 0o700
    made = sorted_rows.stat().st_mtime_ns
    read.gather(Stop())
    assert sorted_rows.stat().st_mtime_ns == made
    read.forget()
    assert not read.spool.exists()


def test_gathering_can_be_stopped_and_begun_again(tmp_path: Path) -> None:
    """Nothing that is half done counts."""
    read, said = mixed(tmp_path, 0)
    stop = Stop()
    stop.ask()
    with pytest.raises(Stopped):
        read.gather(stop)
    read.gather(Stop())
    assert {item.id for item in items(read) if isinstance(item, Record)} == set(said)


def test_turns_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """Where rows tell them; a conversation of too many is rejected, and one without an id stands by itself."""
    rows: list[dict[str, Any]] = [{"id": "a", "role": "user", "text": str(turn), "turn": turn} for turn in (2, 0, 1)]
    rows += [{"id": "long", "role": "user", "text": "x", "turn": turn} for turn in range(1001)]
    rows += [{"id": None, "role": "user", "text": str(turn)} for turn in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = logs(tmp_path / "a.jsonl", spool=tmp_path / "spool")
    read.gather(Stop())
    first, long, *alone = items(read)
    assert isinstance(first, Record)
    assert [turn.text for turn in first.turns] == ["0", "1", "2"]
    assert isinstance(long, Reject)
    assert long.reason == "has more than 1000 turns"
    assert [item.id for item in alone if isinstance(item, Record)] == [
        f"{read.inputs[0].url}:{row}" for row in (1005, 1006)
    ]
