"""The journal: what survives a kill, a cut, a flipped byte, a full disk and a second process."""

import errno
import json
import os
import subprocess
import sys
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import RunError
from halfstep.evaluate import Score
from halfstep.journal import FILE, Entry, Journal, read
from halfstep.ladder.evaluation import Evaluation, Verdict, keep, kept

WHOLE = Verdict(True, Score(0.5), complete=True)


def written(folder, count=5):
    with Journal(folder) as journal:
        journal.claim("model", "abc")
        for index in range(count):
            journal.write(
                "decision", sentence=f"sentence {index} with ünïcode", measured={"seconds": index / 7}
            )
    return (folder / FILE).read_bytes()


def data(entries):
    return [(entry.kind, entry.data) for entry in entries]


def test_what_was_written_is_read_again(tmp_path):
    with Journal(tmp_path) as journal:
        keep(journal, Evaluation("max", 0.5, 1.25, key="k"), WHOLE)
        before = data(journal.entries)
    assert data(read(tmp_path)) == before
    with Journal(tmp_path) as journal:
        assert journal.resumed
        assert data(journal.entries) == before


def test_every_line_is_json(tmp_path):
    lines = written(tmp_path).decode().splitlines()
    assert [json.loads(line)["entry"]["kind"] for line in lines] == ["claim", *["decision"] * 5]


def test_the_same_entry_is_not_written_twice_whatever_it_measured(tmp_path):
    for seconds in (1.0, 2.0):
        with Journal(tmp_path) as journal:
            journal.write("decision", sentence="a", measured={"seconds": seconds})
            journal.write("decision", sentence="a", measured={"seconds": seconds + 1})
    (entry,) = read(tmp_path)
    assert entry.data["measured"] == {"seconds": 1.0}


def test_what_is_asked_last_is_written_last_though_it_was_asked_before(tmp_path):
    asked = [["ptq"], ["ptq"], ["ptq", "partial"], ["ptq"]]
    for rungs in asked:
        with Journal(tmp_path) as journal:
            journal.write("settings", rungs=rungs)
            journal.write("decision", sentence="once")
            for name, digest in (("ptq", 1), ("partial", len(rungs))):
                journal.write("checkpoint", name=name, sha256=digest)
    entries = read(tmp_path)
    assert [e.data["rungs"] for e in entries if e.kind == "settings"] == [asked[0], asked[2], asked[3]]
    assert [e.data["sha256"] for e in entries if e.kind == "checkpoint" and e.data["name"] == "ptq"] == [1]
    assert [e.data["sha256"] for e in entries if e.kind == "checkpoint" and e.data["name"] == "partial"] == [
        1,
        2,
        1,
    ]
    assert len([e for e in entries if e.kind == "decision"]) == 1


@pytest.mark.parametrize("lost", [1, 2, 30, 100])
def test_a_line_cut_short_is_dropped_and_the_run_goes_on(tmp_path, lost):
    whole = written(tmp_path)
    (tmp_path / FILE).write_bytes(whole[:-lost])
    assert len(read(tmp_path)) == 5
    with Journal(tmp_path) as journal:
        assert len(journal.entries) == 5
        journal.write("decision", sentence="new")
    assert [entry.data.get("sentence", "")[-1:] for entry in read(tmp_path)] == ["", "e", "e", "e", "e", "w"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_flipped_byte_is_never_believed(tmp_path_factory, offset, flip):
    folder = tmp_path_factory.mktemp("flipped")
    whole = written(folder)
    first_line = whole.index(b"\n") + 1
    place = first_line + offset % (len(whole) - first_line)
    damaged = bytearray(whole)
    damaged[place] ^= flip
    (folder / FILE).write_bytes(damaged)
    line = whole[:place].count(b"\n")
    good = [json.loads(text)["entry"] for text in whole.splitlines()[:line]]
    last = place == len(whole) - 1  # without its end, the last line is one cut short: no warning
    with nullcontext() if last else pytest.warns(UserWarning, match="is damaged from line"):
        journal = Journal(folder)
    journal.close()
    assert [{"kind": entry.kind, "at": entry.at, **entry.data} for entry in journal.entries] == good


def test_damage_is_refused_when_reading_and_kept_aside_when_resuming(tmp_path):
    whole = written(tmp_path)
    damaged = whole.replace(b"sentence 2", b"sentence 3")
    (tmp_path / FILE).write_bytes(damaged)
    with pytest.raises(
        RunError, match=r"journal.jsonl, line 4 is damaged; run the same quantize command again"
    ):
        read(tmp_path)
    with pytest.warns(UserWarning, match=r"is damaged from line 4 on: going on from the lines before"):
        Journal(tmp_path).close()
    assert len(read(tmp_path)) == 3
    assert (tmp_path / f"{FILE}.damaged").read_bytes() == b"".join(damaged.splitlines(keepends=True)[3:])


def test_a_line_taken_out_is_damage(tmp_path):
    lines = written(tmp_path).splitlines(keepends=True)
    (tmp_path / FILE).write_bytes(b"".join(lines[:2] + lines[3:]))
    with pytest.raises(RunError, match="line 3 is damaged"):
        read(tmp_path)


def test_a_damaged_first_line_is_refused(tmp_path):
    whole = written(tmp_path)
    (tmp_path / FILE).write_bytes(b"x" + whole[1:])
    with pytest.raises(RunError, match="line 1 is damaged: nothing in it can be trusted; delete"):
        Journal(tmp_path)
    assert (tmp_path / FILE).read_bytes() == b"x" + whole[1:]


def test_no_journal_there(tmp_path):
    with pytest.raises(RunError, match=r"No such file.*needed the directory of a run"):
        read(tmp_path / "nowhere")


def test_a_second_journal_on_the_same_directory_is_refused(tmp_path):
    with Journal(tmp_path), pytest.raises(RunError, match="is in use by another process; wait for it"):
        Journal(tmp_path)
    Journal(tmp_path).close()


def test_a_second_process_is_refused(tmp_path):
    code = f"from halfstep.journal import Journal; Journal({str(tmp_path)!r})"
    with Journal(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is in use by another process" in done.stderr


def test_a_forked_child_does_not_hold_the_lock(tmp_path):
    code = (
        "import os, sys, time\n"
        "from halfstep.journal import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "read, write = os.pipe()\n"
        "if os.fork() == 0:\n"
        "    os.write(write, b'x')\n"
        "    time.sleep(60)\n"
        "    os._exit(0)\n"
        "os.read(read, 1)  # the child is on its way\n"
        "os.kill(os.getpid(), 9)"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)], start_new_session=True
        )
    assert process.wait() == -9
    try:
        Journal(tmp_path).close()
    finally:
        os.killpg(process.pid, 9)


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match=r"cannot be locked \(No locks available\): see to it that no other"):
        Journal(tmp_path).close()


def test_a_directory_of_another_model_is_refused(tmp_path):
    written(tmp_path)
    with Journal(tmp_path) as journal:
        journal.claim("model", "abc")
        with pytest.raises(RunError, match="belongs to a run with another model; choose another directory"):
            journal.claim("model", "abd")


def test_what_was_claimed_in_words_is_told(tmp_path):
    written(tmp_path)
    with Journal(tmp_path) as journal:
        journal.claim("configuration", "max_drop 0.01", words=True)
        with pytest.raises(
            RunError, match=r"with another configuration \(max_drop 0.01, now max_drop 0.2\); choose another"
        ):
            journal.claim("configuration", "max_drop 0.2", words=True)


def test_checkpoints_come_back_to_the_last_bit(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5, dtype=torch.int32), "c": torch.tensor(2.5)}
    with Journal(tmp_path) as journal:
        assert journal.load("best") is None
        journal.save("best", {"a": torch.zeros(2)})
        journal.save("best", tensors, data={"words": "and figures", "count": 2})
        again = journal.load("best")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())
    with Journal(tmp_path) as journal:
        again = journal.load("best")
    assert torch.equal(again.tensors["a"], tensors["a"])
    assert again.data == {"words": "and figures", "count": 2}


def test_there_is_a_checkpoint_for_each_key(tmp_path):
    with Journal(tmp_path) as journal:
        for key in ("abc", "abd"):
            journal.save("best", {"a": torch.tensor(len(key) + ord(key[-1]))}, key)
    with Journal(tmp_path) as journal:
        assert int(journal.load("best", "abc").tensors["a"]) == 3 + ord("c")
        assert int(journal.load("best", "abd").tensors["a"]) == 3 + ord("d")
        assert journal.load("best", "abe") is None and journal.load("best") is None


def test_without_a_directory_nothing_is_kept():
    journal = Journal()
    journal.save("best", {"a": torch.zeros(2)})
    assert journal.load("best") is None and not journal.entries


def test_what_changed_is_told(tmp_path):
    with Journal(tmp_path) as journal:
        assert not journal.changed("surroundings", digest="a")
    with Journal(tmp_path) as journal:
        assert not journal.changed("surroundings", digest="a")
        assert journal.changed("surroundings", digest="b")


def test_a_fresh_start_sets_aside_what_was_there(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for number in (1, 2):
        before = written(tmp_path)
        (tmp_path / "model.onnx").write_text("file")
        with Journal(tmp_path, fresh=True) as journal:
            assert not journal.entries and not journal.resumed
        aside = tmp_path / f"earlier-{number}"
        assert (aside / FILE).read_bytes() == before
        assert (aside / "model.onnx").read_text() == "file"
        assert (tmp_path / "notes.txt").read_text() == "mine"
    Journal(tmp_path / "new", fresh=True).close()


def test_a_checkpoint_of_aliases_and_views_is_kept(tmp_path):
    base = torch.randn(4, 6)
    with Journal(tmp_path) as journal:
        journal.save("tied", {"a": base, "b": base, "c": base.T})
        again = journal.load("tied")
    assert torch.equal(again.tensors["b"], base) and torch.equal(again.tensors["c"], base.T)


def test_a_missing_or_damaged_checkpoint_is_not_used(tmp_path):
    with Journal(tmp_path) as journal:
        journal.save("best", {"a": torch.randn(30)})
    path = tmp_path / "checkpoints" / "best.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with (
        Journal(tmp_path) as journal,
        pytest.warns(UserWarning, match="is damaged: what it held is computed"),
    ):
        assert journal.load("best") is None
    path.unlink()
    with (
        Journal(tmp_path) as journal,
        pytest.warns(UserWarning, match="is missing: what it held is computed"),
    ):
        assert journal.load("best") is None


def test_a_full_disk_says_so_and_leaves_what_was_written(tmp_path, monkeypatch):
    before = written(tmp_path)
    with Journal(tmp_path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(RunError, match=r"No space left on device; once that is cured, run the same"):
                journal.write("decision", sentence="lost")
            with pytest.raises(RunError, match=r"cannot write .*best.safetensors: No space left on device"):
                journal.save("best", {"a": torch.zeros(2)})
        assert (tmp_path / FILE).read_bytes() == before
        assert not list((tmp_path / "checkpoints").iterdir())
        journal.write("decision", sentence="kept")
    assert read(tmp_path)[-1].data == {"sentence": "kept"}


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk, with options such as "ro"."""
    mounted = []

    def mount(*options):
        place = tmp_path / "disk"
        place.mkdir()
        what = ",".join(("size=64k", *options))
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", what, "none", place], capture_output=True, check=False
        )
        if done.returncode:
            pytest.skip("needs the right to mount a file system")
        mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(disk):
    place = disk()
    with Journal(place) as journal:
        journal.write("decision", sentence="kept")
        before = (place / FILE).read_bytes()
        (place / "filler").write_bytes(b"x" * (64 * 1024 - 2 * 4096))
        with pytest.raises(RunError, match=r"cannot write .*journal.jsonl: No space left on device"):
            journal.write("decision", sentence="x" * 50_000)
        with pytest.raises(RunError, match=r"cannot write .*best.safetensors: No space left on device"):
            journal.save("best", {"a": torch.zeros(20_000)})
        assert (place / FILE).read_bytes() == before
        (place / "filler").unlink()
        journal.write("decision", sentence="kept too")
    assert [entry.data["sentence"] for entry in read(place)] == ["kept", "kept too"]


def test_a_read_only_directory_is_refused_at_once(disk):
    place = disk("ro")
    message = r"directory .* cannot be written: Read-only file system; choose another one"
    for folder in (place, place / "run"):
        with pytest.raises(RunError, match=message):
            Journal(folder)


def test_a_directory_without_permission_is_refused_at_once(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr("pathlib.Path.open", forbidden)  # root may write anywhere
    with pytest.raises(
        RunError, match=r"directory .* cannot be written: Permission denied; choose another one"
    ):
        Journal(tmp_path)


def forbidden(*_):
    raise PermissionError(13, os.strerror(13))


def full(_):
    raise OSError(28, os.strerror(28))


@given(
    st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=50),
    st.sampled_from([torch.float64, torch.float32, torch.bool]),
)
def test_evaluations_are_kept_to_the_last_bit(values, dtype):
    per_example = torch.tensor(values).to(dtype)
    score = Score(float(np.float64(values[0]) / 3), per_example)
    made = Evaluation("entropy", score.value, 0.5, len(values), 2 * len(values), "key", "ptq")
    journal = Journal()
    keep(journal, made, Verdict(False, score, complete=False, allowed=0.01))
    (entry,) = journal.entries
    again, verdict = kept(Entry(entry.kind, entry.at, json.loads(json.dumps(entry.data))))
    assert again == made and verdict.score.others == {}
    assert (verdict.met, verdict.complete, verdict.score.value) == (False, False, score.value)
    assert verdict.allowed == 0.01
    assert verdict.score.per_example.dtype == dtype and torch.equal(verdict.score.per_example, per_example)


def test_evaluations_of_several_metrics_are_kept():
    score = Score(0.5, torch.tensor([0.0, 1.0]), {"loss": Score(0.25), "top 5": Score.mean(torch.ones(2))})
    journal = Journal()
    keep(journal, Evaluation("max", 0.5, 1.0, key="k"), Verdict(True, score, complete=True))
    again = kept(Entry("evaluation", 0.0, json.loads(json.dumps(journal.entries[0].data))))[1].score
    assert again.others["loss"] == Score(0.25)
    assert torch.equal(again.others["top 5"].per_example, torch.ones(2))
