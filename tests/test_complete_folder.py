"""A reader finds the old folder or the new one, whatever happens to the writer."""

import os

import pytest

from megatron_dgpo.complete_folder import complete_folder, partial_folder


def write(target, content, **options):
    with complete_folder(target, **options) as folder:
        (folder / "inner").mkdir(exist_ok=True)
        (folder / "inner" / content).write_text(content)


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_it_replaces_what_was_there(tmp_path):
    target = tmp_path / "runs" / "model"
    write(target, "old")
    assert names(target) == ["old"]
    write(target, "new")
    assert names(tmp_path) == ["new"] and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("resume, expected", [(False, ["new"]), (True, ["half", "new"])])
def test_after_a_failure_the_old_one_is_there(tmp_path, resume, expected):
    target = tmp_path / "model"
    write(target, "old")
    with pytest.raises(OSError), complete_folder(target) as folder:
        (folder / "half").touch()
        raise OSError("no space left")
    assert names(target) == ["old"] and names(partial_folder(target)) == ["half"]
    write(target, "new", resume=resume)
    assert names(target) == expected and list(tmp_path.iterdir()) == [target]


def test_what_cannot_be_flushed_does_not_appear(tmp_path, monkeypatch):
    target = tmp_path / "model"
    write(target, "old")

    def fail(descriptor):
        raise OSError("input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "fsync", fail)
        write(target, "new")
    assert names(target) == ["old"]


@pytest.mark.parametrize("kept", [True, False])
def test_what_a_kill_left_of_a_replacement_is_no_obstacle(tmp_path, kept):
    """It came before the new folder had its name, or before all of the old one was gone."""
    target, replaced = tmp_path / "model", tmp_path / ".replaced_model"
    write(replaced, "older")
    if kept:
        write(target, "old")
    write(target, "new")
    assert names(target) == ["new"] and list(tmp_path.iterdir()) == [target]
