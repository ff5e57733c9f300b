"""The run directory: nothing is overwritten, nothing half-written is ever read, one process at a time."""

import errno
import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch

from dstlib.errors import StateError
from dstlib.files import write_whole
from dstlib.zoo.e2enet.training.log import Log, epochs_of
from dstlib.zoo.e2enet.training.run_directory import _refuse_other_settings, open_run

CONFIG = {"training": {"seed": 0, "learning_rate": 0.05}, "patch": (4, 8, 8)}
STATE = {"weight": torch.arange(3.0), "iteration": 7, "metrics": [{"loss": 0.5}]}


@pytest.fixture
def folder(tmp_path):
    """A run with one checkpoint."""
    with open_run(tmp_path / "run", CONFIG) as run:
        run.save_checkpoint(STATE)
    return tmp_path / "run"


def test_the_configuration_is_there_before_anything_else(tmp_path):
    with open_run(tmp_path / "a" / "run", CONFIG) as run:
        saved = json.loads((run.path / "config.json").read_text())
    assert saved.pop("crc32")
    assert saved == {"training": {"seed": 0, "learning_rate": 0.05}, "patch": [4, 8, 8]}


def test_a_checkpoint_comes_back_as_it_was(folder):
    with open_run(folder, CONFIG, resume=True) as run:
        state = run.load_checkpoint()
    assert torch.equal(state["weight"], STATE["weight"])
    assert (state["iteration"], state["metrics"]) == (7, [{"loss": 0.5}])


def test_metrics_are_a_table_and_are_replaced_whole(folder):
    with open_run(folder, CONFIG, resume=True) as run:
        run.write_metrics([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}])
        run.write_metrics([{"epoch": 1, "loss": 0.5}])
        assert (run.path / "metrics.csv").read_text() == "epoch,loss\n1,0.5\n"


def test_a_run_is_not_overwritten(folder):
    with pytest.raises(StateError, match=r"config\.json and checkpoint\.pt\. Pass --resume"), open_run(folder, CONFIG):
        pass


def test_a_run_of_before_is_continued_where_nothing_new_is_asked_of_it(folder):
    with open_run(folder, {**CONFIG, "labels": None}, resume=True):
        pass
    with (
        pytest.raises(StateError, match=r"expected labels\.ignored nothing, got labels\.ignored 4"),
        open_run(folder, {**CONFIG, "labels": {"ignored": 4}}, resume=True),
    ):
        pass


def test_there_is_nothing_to_resume_in_an_empty_or_missing_folder(tmp_path):
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StateError, match="resume"), open_run(path, CONFIG, resume=True):
            pass
    assert not (tmp_path / "missing").exists()


def test_another_configuration_is_refused_by_naming_what_differs(folder):
    other = {"training": {"seed": 1, "learning_rate": 0.05}, "patch": (4, 8, 8), "extra": "x" * 100}
    with pytest.raises(StateError) as caught, open_run(folder, other, resume=True):
        pass
    message = str(caught.value)
    assert "expected training.seed 0, extra nothing, got training.seed 1, extra xxx" in message
    assert "learning_rate" not in message
    assert "x" * 60 not in message


def test_a_tensor_in_a_saved_configuration_is_another_setting():
    with pytest.raises(StateError, match=r"settings of .*: expected seed tensor"):
        _refuse_other_settings({"seed": torch.ones(2)}, {"seed": 0}, Path("checkpoint.pt"))


def test_a_damaged_configuration_is_refused(folder):
    (folder / "config.json").write_text('{"training": ')
    with pytest.raises(StateError, match=r"config\.json"), open_run(folder, CONFIG, resume=True):
        pass


def damage_truncated(file):
    file.write_bytes(file.read_bytes()[:-200])


def damage_empty(file):
    file.write_bytes(b"")


def damage_text(file):
    file.write_text("this is no checkpoint")


def damage_foreign(file):
    torch.save({"state_dict": {}}, file)


def damage_bit(file):
    content = bytearray(file.read_bytes())
    content[content.index(torch.arange(3.0).numpy().tobytes())] ^= 1
    file.write_bytes(content)


def damage_keys(file):
    torch.save({"format": "dstlib.e2enet.run/1"}, file)


def damage_code(file):
    torch.save(torch.nn.Linear(1, 1), file)  # a whole module: loading it would run code


def damage_missing(file):
    file.unlink()


@pytest.mark.parametrize(
    "damage",
    [value for name, value in list(globals().items()) if name.startswith("damage_")],
    ids=lambda damage: damage.__name__,
)
def test_a_checkpoint_that_cannot_be_used_is_one_error_with_the_file_and_the_remedy(folder, damage):
    damage(folder / "checkpoint.pt")
    with (
        open_run(folder, CONFIG, resume=True) as run,
        pytest.raises(StateError, match=rf"checkpoint\.pt of run {folder}.*Delete"),
    ):
        run.load_checkpoint()


def test_a_checkpoint_copied_from_another_run_is_refused(folder, tmp_path):
    with open_run(tmp_path / "other", {"training": {"seed": 5}}) as other:
        other.save_checkpoint(STATE)
    (tmp_path / "other" / "checkpoint.pt").replace(folder / "checkpoint.pt")
    with (
        open_run(folder, CONFIG, resume=True) as run,
        pytest.raises(StateError, match=r"checkpoint\.pt: expected training.seed 5"),
    ):
        run.load_checkpoint()


def test_a_folder_in_use_is_refused_and_freed_again(folder):
    with (
        open_run(folder, CONFIG, resume=True),
        pytest.raises(
            StateError, match=r"in use by another process\. Wait for it or stop it, or train in another folder\."
        ),
        open_run(folder, CONFIG, resume=True),
    ):
        pass
    with open_run(folder, CONFIG, resume=True) as run:
        assert run.load_checkpoint()["iteration"] == 7


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="Pass a folder you may write to"), open_run(tmp_path / "file", CONFIG):
        pass


def test_on_a_full_disk_the_previous_checkpoint_stays(folder, monkeypatch):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (folder / "checkpoint.pt").read_bytes()
    with open_run(folder, CONFIG, resume=True) as run:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StateError, match=r"checkpoint\.pt.*No space left on device.*Make room"):
            run.save_checkpoint({"iteration": 8})
        monkeypatch.undo()
        assert run.load_checkpoint()["iteration"] == 7
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert list(folder.glob("*.tmp")) == []


def test_an_interruption_while_writing_leaves_the_previous_file(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    write_whole(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_run_whose_folder_has_a_name_that_is_no_text(tmp_path):
    path = tmp_path / os.fsdecode(b"run-\xff")
    with open_run(path, CONFIG) as run:
        run.save_checkpoint(STATE)
    with open_run(path, CONFIG, resume=True) as run:
        assert run.load_checkpoint()["iteration"] == 7
    (path / "checkpoint.pt").write_bytes(b"?")
    with open_run(path, CONFIG, resume=True) as run, pytest.raises(StateError) as caught:
        run.load_checkpoint()
    assert str(caught.value).isprintable()


def writes(run):
    """Everything that a training writes."""
    return (
        lambda: run.save_checkpoint(STATE),
        lambda: run.write_model({"weight": torch.ones(1)}),
        lambda: run.write_metrics(ROWS),
        lambda: run.write_flows(ROWS),
        lambda: Log(run.path).session(0, {}),
        lambda: Log(run.path).complete(ROWS),
    )


def test_a_folder_that_vanishes_is_one_error_at_each_write(folder):
    with open_run(folder, CONFIG, resume=True) as run:
        shutil.rmtree(folder)
        for write in writes(run):
            with pytest.raises(StateError, match=r"No such file or directory"):
                write()
    assert not folder.exists()


def test_a_disk_that_turns_read_only_is_one_error_at_each_write(folder, monkeypatch):
    def open_file(name, flags, *arguments, **options):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", name)
        return open_before(name, flags, *arguments, **options)

    def open_log(file, mode="r", *arguments, **options):
        if "a" in mode and str(file).endswith("log.jsonl"):
            raise OSError(errno.EROFS, "Read-only file system", str(file))
        return built_in(file, mode, *arguments, **options)

    open_before, built_in = os.open, open
    with open_run(folder, CONFIG, resume=True) as run, monkeypatch.context() as patch:
        patch.setattr(os, "open", open_file)
        patch.setattr("builtins.open", open_log)
        for write in writes(run):
            with pytest.raises(StateError, match=r"Read-only file system"):
                write()
    monkeypatch.setattr(os, "open", open_file)
    with pytest.raises(StateError, match="Read-only file system"), open_run(folder, CONFIG, resume=True):
        pass


def test_figures_that_are_a_file_are_one_error(folder):
    (folder / "figures").rmdir()
    (folder / "figures").touch()
    with pytest.raises(StateError, match=r"figures of folder .* File exists"), open_run(folder, CONFIG, resume=True):
        pass


# ---- the log


ROWS = [{"epoch": n, "iteration": 50 * n, "loss": 1.0 / n} for n in (1, 2, 3)]


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def a_log(folder, rows):
    log = Log(folder)
    log.session(0, {"workers": 0})
    for row in rows:
        log.epoch(row, torch.device("cpu"), cpu=time.process_time())
    return (folder / "log.jsonl").read_bytes()


@pytest.mark.parametrize("keep", [*range(0, 1000, 37), None])
def test_a_log_that_was_cut_anywhere_is_completed(tmp_path, keep):
    content = a_log(tmp_path, ROWS)
    (tmp_path / "log.jsonl").write_bytes(content[:keep])
    Log(tmp_path).complete(ROWS)
    epochs = [event for event in logged(tmp_path) if event["event"] == "epoch"]
    assert [{name: event[name] for name in ROWS[0]} for event in epochs] == ROWS
    num_whole = content[:keep].count(b'"epoch"') if keep is None else content[:keep].count(b"\n") - 1
    assert [event["seconds_per_iteration"] is None for event in epochs] == [n >= num_whole for n in range(3)]


def test_no_epoch_is_logged_twice(tmp_path):
    a_log(tmp_path, ROWS[:2])
    again = Log(tmp_path)
    again.complete(ROWS[:2])
    again.session(75, {})
    # stopped at once: the last epoch is that of the process before
    again.epoch(ROWS[1], torch.device("cpu"), cpu=time.process_time())
    again.epoch(ROWS[2], torch.device("cpu"), cpu=time.process_time())
    assert [event.get("epoch") for event in logged(tmp_path)] == [None, 1, 2, None, 3]


def test_a_damaged_line_of_the_log_is_written_anew(tmp_path):
    lines = a_log(tmp_path, ROWS).splitlines(keepends=True)
    (tmp_path / "log.jsonl").write_bytes(
        b"".join([lines[0], b'{"event": "ep\xff"}\n', b"[" * 10_000 + b"\n", lines[3]])
    )
    Log(tmp_path).complete(ROWS)
    assert [event.get("epoch") for event in logged(tmp_path)] == [None, 3, 1, 2]


def test_of_a_damaged_log_the_whole_lines_of_epochs_are_read(tmp_path):
    lines = [
        '{"event": "session", "iteration": 0}',
        '{"event": "epoch", "iteration": 50, "cpu_seconds_per_iteration": 0.5, "loss": 1.0}',
        '{"event": "epoch", "iteration": "100", "cpu_seconds_per_iteration": 0.5}',
        '{"event": "epoch", "cpu_seconds_per_iteration": 0.5}',
        '{"event": "epoch", "iteration": 100, "cpu_seconds_per_iteration": "0.5"}',
        '{"event": "epoch", "iteration": 150, "cpu_seconds_per_iteration": null}',
        '{"event": "epoch", "iteration": 200, "cpu_sec',
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines))
    assert [(of.iteration, of.cpu_seconds_per_iteration) for of in epochs_of(tmp_path)] == [(50, 0.5), (150, None)]


def test_a_log_that_cannot_be_read_is_one_error(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(StateError, match=r"log\.jsonl of run .* Is a directory"):
        Log(tmp_path)
