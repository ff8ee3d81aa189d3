"""What an audit writes: whole whenever it is stopped, gone on with by the same arguments, and by no others."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from guard.audit.judge import Judge
from guard.audit.output import is_complete, open_output, part_files, read_facts, read_manifest
from guard.audit.records import Place, Position, Reject, Window
from guard.audit.run import Local, Progress, run
from guard.audit.stop import Stop, Stopped
from guard.engine.moderator import model_thread
from guard.errors import ConfigError, InputError
from guard.policy.store import PolicyStore
from tests.audit.sources import Item, Listed, many, said
from tests.audit.stopped import audit
from tests.causal import CausalModel
from tests.stand_ins import POLICY

ROOT = Path(__file__).parent.parent.parent
ROWS = 60


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in part_files(out) for row in pq.read_table(path).to_pylist()]


def rejects(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]


def run_all(out: Path, items: Sequence[Item], facts: dict[str, Any] | None = None, **options: Any) -> list[Progress]:
    thread = model_thread()
    judging = Local(Judge(CausalModel(), PolicyStore([POLICY], "default"), max_batch_tokens=1), thread)
    try:
        with open_output(out, facts or {"rows": len(items)}, judging.schema, 0.0) as output:
            return list(run(Listed(items), judging, output, Stop(), **options))
    finally:
        thread.shutdown()


def test_an_audit_that_is_killed_goes_on_without_loss_or_duplicates(tmp_path: Path) -> None:
    """Whenever kill -9 comes, and however often: rows and rejects are those of the run that was never stopped."""
    audit(tmp_path / "whole", ROWS)
    out = tmp_path / "stopped"
    for windows in (2, 7):
        command = [sys.executable, "-m", "tests.audit.stopped", str(out), str(ROWS), str(windows)]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert not is_complete(out)
    assert 0 < len(read_manifest(out)) < len(read_manifest(tmp_path / "whole"))
    audit(out, ROWS)
    assert is_complete(out)
    assert rows(out) == rows(tmp_path / "whole")
    assert rejects(out) == rejects(tmp_path / "whole")
    assert len(rejects(out)) == 9


def test_what_a_kill_leaves_half_written_is_taken_away(tmp_path: Path) -> None:
    """A part that is not in the manifest, rejects beyond it, and a line of it that was cut off."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_all(whole, many(ROWS))
    run_all(out, many(ROWS))
    lines = (out / "manifest.jsonl").read_text().splitlines(keepends=True)
    (out / "manifest.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    (out / "parts" / ".part").write_bytes(b"PAR1")
    assert len(part_files(out)) == 3
    assert len(list((out / "parts").iterdir())) > 4
    run_all(out, many(ROWS))
    assert rows(out) == rows(whole)
    assert rejects(out) == rejects(whole)
    assert sorted((out / "parts").iterdir()) == sorted(part_files(out))


def test_a_kill_before_anything_is_judged_is_gone_on_from(tmp_path: Path) -> None:
    """What is in force may have been half written."""
    out = tmp_path / "out"
    out.mkdir()
    (out / ".audit.json").write_text('{"form')
    audit(out, ROWS)
    assert is_complete(out)


def test_a_finished_audit_is_not_done_again(tmp_path: Path) -> None:
    """The same command finds that nothing is left."""
    assert run_all(tmp_path, many(ROWS))
    before = (tmp_path / "manifest.jsonl").read_text()
    assert run_all(tmp_path, many(ROWS)) == []
    assert (tmp_path / "manifest.jsonl").read_text() == before


def test_other_arguments_are_refused_with_the_difference(tmp_path: Path) -> None:
    """Each of them, with what it was and what it is now; nothing is touched."""
    facts = {"policy": {"name": "default", "revision": "1"}, "inputs": [{"url": "a"}, {"url": "b"}], "version": "1"}
    run_all(tmp_path, many(3), facts)
    changed = {"policy": {"name": "default", "revision": "2"}, "inputs": [{"url": "a"}], "version": "2"}
    with pytest.raises(ConfigError) as raised:
        run_all(tmp_path, many(3), changed)
    assert str(raised.value).splitlines() == [
        f"{tmp_path}: holds an audit with other arguments; take another folder",
        '  inputs[1]: was {"url": "b"}, now null',
        '  policy.revision: was "1", now "2"',
    ]
    assert read_facts(tmp_path)["policy"]["revision"] == "1"


def test_a_folder_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    """So that nobody's files get lost among those of an audit."""
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"expected an empty folder or an audit, found thesis\.tex"):
        run_all(tmp_path, many(3))


def test_one_audit_at_a_time_writes_a_folder(tmp_path: Path) -> None:
    """The second one is told."""
    with (
        open_output(tmp_path, {}, pq.read_schema(_some_part(tmp_path.with_name("other")))),
        pytest.raises(ConfigError, match="another audit is at work there"),
    ):
        run_all(tmp_path, many(3), {})


def _some_part(out: Path) -> Path:
    run_all(out, many(3))
    return part_files(out)[0]


def test_too_many_bad_rows_stop_it(tmp_path: Path) -> None:
    """What was judged until then is kept, and the same command with a higher limit goes on."""
    with pytest.raises(InputError, match="max-bad: 3 rows are rejected, more than 2"):
        run_all(tmp_path, many(ROWS), max_bad=2)
    assert len(rejects(tmp_path)) == 3
    run_all(tmp_path, many(ROWS), max_bad=9)
    run_all(tmp_path.with_name("whole"), many(ROWS))
    assert rows(tmp_path) == rows(tmp_path.with_name("whole"))


def test_rejects_say_where_and_why(tmp_path: Path) -> None:
    """Also where nothing but them is there."""
    run_all(tmp_path, [Reject(Place("a.jsonl", 3), "is not JSON"), Reject(Place("a.jsonl", 4), "cut", rest=True)])
    assert rejects(tmp_path) == [
        {"input": "a.jsonl", "row": 3, "reason": "is not JSON"},
        {"input": "a.jsonl", "row": 4, "reason": "cut"},
    ]
    assert part_files(tmp_path) == []
    assert sum(part["incomplete"] for part in read_manifest(tmp_path)) == 1


def test_an_interrupted_audit_keeps_what_it_has_judged(tmp_path: Path) -> None:
    """Asked to stop, or by whatever is raised, it loses nothing, even where the part was not due yet."""
    thread = model_thread()
    judging = Local(Judge(CausalModel(), PolicyStore([POLICY], "default"), max_batch_tokens=1), thread)

    def interrupted(out: Path, interrupt: Callable[[Stop], None]) -> None:
        stop = Stop()
        with open_output(out, {"rows": ROWS}, judging.schema, part_seconds=3600) as output:
            for number, _ in enumerate(run(Listed(many(ROWS)), judging, output, stop)):
                if number == 2:
                    interrupt(stop)

    def ctrl_c(stop: Stop) -> None:
        raise KeyboardInterrupt

    for interrupt, raised in ((Stop.ask, Stopped), (ctrl_c, KeyboardInterrupt)):
        out = tmp_path / raised.__name__
        with pytest.raises(raised):
            interrupted(out, interrupt)
        (part,) = read_manifest(out)
        assert 0 < part["conversations"] + part["rejected"] == part["end"]["rows"] < ROWS
    thread.shutdown()


def test_a_disk_that_is_full_is_told_and_loses_nothing(tmp_path: Path) -> None:
    """What is written stays whole, and the same command goes on once there is room."""
    judged = Judge(CausalModel(), PolicyStore([POLICY], "default"), max_batch_tokens=64)
    window = Window((said("Hi!"),), Position(0, 1), 1.0)
    told = judged.tell(judged.score(judged.prepare(window), Stop()))
    with open_output(tmp_path, {}, judged.schema, part_seconds=0.0) as output:
        output.add(told)
        (tmp_path / "rejects.jsonl").unlink()
        (tmp_path / "rejects.jsonl").symlink_to("/dev/full")
        with pytest.raises(ConfigError, match="cannot be written: No space left on device; what the manifest names"):
            output.add(told._replace(end=Position(0, 2), rejects=(Reject(Place("listed", 2), "is not JSON"),)))
    (tmp_path / "rejects.jsonl").unlink()
    assert [part["end"]["rows"] for part in read_manifest(tmp_path)] == [1]
    with open_output(tmp_path, {}, judged.schema, part_seconds=0.0) as output:
        assert output.position == Position(0, 1)
        output.add(told._replace(end=Position(0, 2), rejects=(Reject(Place("listed", 2), "is not JSON"),)))
    assert len(rows(tmp_path)) == 2
