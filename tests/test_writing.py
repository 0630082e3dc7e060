import ast
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from backdoor_gym import writing
from backdoor_gym.errors import BackdoorGymError, WriteError
from backdoor_gym.files.tensors import read_tensors, write_tensors
from backdoor_gym.writing import as_json, beside, check_place, escaped, replacing, sweep, write_text

CLONE = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """With two old files."""
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"old {name}", encoding="utf-8")
    return tmp_path


def contents(folder):
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.iterdir())}


def test_text_is_utf_8_and_its_line_ends_stay(tmp_path):
    write_text(tmp_path / "deeper" / "x.txt", "ü\r\n\udce4")
    assert (tmp_path / "deeper" / "x.txt").read_bytes() == b"\xc3\xbc\r\n\\udce4"
    assert contents(tmp_path / "deeper").keys() == {"x.txt"}


def test_files_of_a_block_appear_together(folder):
    with beside(folder) as new:
        for name in ("a", "c"):
            (new / name).write_text(f"new {name}", encoding="utf-8")
        assert (folder / "a").read_text(encoding="utf-8") == "old a"
        assert not (folder / "c").exists()
    assert contents(folder) == {"a": "new a", "b": "old b", "c": "new c"}


def test_an_error_leaves_the_old_files_and_nothing_else(folder):
    with pytest.raises(ZeroDivisionError), beside(folder) as new:
        (new / "a").write_text(f"half {1 // 0}", encoding="utf-8")
    assert contents(folder) == {"a": "old a", "b": "old b"}


def test_where_the_last_file_cannot_be_moved_the_first_ones_come_back(folder, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "c" and writing.NEW in Path(source).parts:
            raise OSError(errno.EPERM, "Operation not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(WriteError, match="not permitted"):
        write_both(folder, "a", "b", "bb", "c")
    assert contents(folder) == {"a": "old a", "b": "old b"}


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_every_error_of_the_system_names_the_file_and_keeps_its_number(folder, error):
    with pytest.raises(WriteError) as caught, replacing(folder / "a"):
        raise error
    assert str(caught.value) == f"{folder / 'a'} cannot be written: No space left on device"
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value, BackdoorGymError)
    assert contents(folder) == {"a": "old a", "b": "old b"}


def test_other_errors_of_safetensors_are_no_errors_of_writing(folder):
    with pytest.raises(SafetensorError), replacing(folder / "a"):
        raise SafetensorError("two tensors share memory")


def write_both(folder, *names):
    with beside(folder) as new:
        for name in names:
            (new / name).write_text("new", encoding="utf-8")


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sub").mkdir()
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "to_sub").symlink_to("sub")
    (tmp_path / "to_null").symlink_to(os.devnull)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket")[:100])
        before = sorted(path.name for path in tmp_path.iterdir())
        for name, words in {
            "pipe": "a named pipe",
            "sub": "a folder",
            "to_sub": "a folder",
            "to_null": "a device",
            "socket": "a socket",
            "nowhere": "a link to nothing",
        }.items():
            with pytest.raises(WriteError, match=f"{name} cannot be written: it is {words}"):
                check_place(tmp_path / name)
            with pytest.raises(WriteError, match=words):
                write_text(tmp_path / name, "")
            with pytest.raises(WriteError, match=words):
                write_both(tmp_path, "first", name)
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_what_a_link_points_to_is_written_and_the_link_stays(folder):
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "real").write_text("old", encoding="utf-8")
    (folder / "link").symlink_to(Path("elsewhere") / "real")
    write_text(folder / "link", "once")
    assert (folder / "elsewhere" / "real").read_text(encoding="utf-8") == "once"
    with beside(folder) as new:
        (new / "link").write_text("twice", encoding="utf-8")
    assert (folder / "link").is_symlink()
    assert (folder / "elsewhere" / "real").read_text(encoding="utf-8") == "twice"
    assert contents(folder / "elsewhere").keys() == {"real"}


def test_new_files_are_for_whom_the_user_wants(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x", {"a": torch.zeros(1)}, {})  # the library makes it for its owner alone
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


WRITING = """
import sys, time
from pathlib import Path
from backdoor_gym.writing import beside
with beside(Path(sys.argv[1])) as new:
    (new / "a").write_text("half", encoding="utf-8")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_swept_and_not_what_others_are_writing(folder):
    process = subprocess.Popen([sys.executable, "-c", WRITING, folder], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        sweep(folder)
        assert len(list(folder.glob(f"{writing.PREFIX}*"))) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    write_text(folder / "b", "new b")
    assert contents(folder) == {"a": "old a", "b": "new b"}


def test_json_has_no_word_for_what_is_not_finite():
    figures = {"a": float("nan"), "b": [1, -float("inf"), (2.5, True)], "c": {"d": "NaN", "e": None}}
    assert json.loads(as_json(figures)) == {"a": None, "b": [1, None, [2.5, True]], "c": {"d": "NaN", "e": None}}
    with pytest.raises(TypeError):
        as_json({"a": object()})


def test_what_is_no_picture_of_a_character_is_escaped():
    assert escaped("a\nb\x1b[31mü\u2028\udc80") == "a\\nb\\x1b[31mü\\u2028\\udc80"


def modules():
    """The syntax trees of everything that a user runs."""
    for name in ("backdoor_gym", "agents", "baselines", "benchmarks", "docs", "tutorials"):
        for path in sorted((CLONE / name).rglob("*.py")):
            yield path.relative_to(CLONE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            method = isinstance(node.func, ast.Attribute)
            name = node.func.attr if method else getattr(node.func, "id", "")
            owner = node.func.value.id if method and isinstance(node.func.value, ast.Name) else ""
            yield name, owner, node


@pytest.mark.slow
def test_nothing_is_read_or_written_in_the_encoding_of_the_locale():
    unclear = []
    for path, tree in modules():
        for name, owner, call in calls(tree):
            opens = name in ("open", "read_text", "write_text") and owner not in ("Image", "os", "archive")
            ours = name == "write_text" and isinstance(call.func, ast.Name)
            modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            binary = any(isinstance(mode, str) and "b" in mode and len(mode) <= 3 for mode in modes)
            if opens and not ours and not binary and not any(keyword.arg == "encoding" for keyword in call.keywords):
                unclear.append(f"{path}:{call.lineno}")
    assert not unclear


#: What writes files, all of it in blocks of ``beside`` or ``replacing`` but ``cells.jsonl``, which is appended to.
WRITERS = {
    "backdoor_gym/benchmarking/resuming.py": {"open"},
    "backdoor_gym/benchmarking/figures.py": {"savefig"},
    "backdoor_gym/benchmarking/memory.py": {"write_text"},  # a file of the system
    "backdoor_gym/cli/common.py": {"open"},  # the null device
    "backdoor_gym/reporting/pictures.py": {"savefig"},  # to memory
    "backdoor_gym/reporting/result.py": {"imsave"},
    "backdoor_gym/writing.py": {"write_text", "open"},
    "backdoor_gym/models/family.py": {"write_bytes"},
    "backdoor_gym/files/tensors.py": {"save_file"},
    "backdoor_gym/models/layout.py": {"save_file", "save_pretrained", "write_bytes"},
}


def test_nothing_is_written_past_the_helper():
    found = {}
    for path, tree in modules():
        if path.startswith(("backdoor_gym", "agents", "baselines")):
            for name, _, call in calls(tree):
                method = isinstance(call.func, ast.Attribute)
                modes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
                opens = name == "open" and any(str(mode)[:1] in "wax" or "+" in str(mode) for mode in modes)
                plain = name in ("savefig", "imsave", "save_file", "save_pretrained", "write_bytes")
                if plain or opens or (name == "write_text" and method):
                    found.setdefault(path, set()).add(name)
    assert found == WRITERS


def test_json_is_made_in_one_place():
    places = [
        path for path, tree in modules() for name, owner, _ in calls(tree) if (name[:4], owner) == ("dump", "json")
    ]
    assert {path for path in places if path.startswith(("backdoor_gym", "agents", "baselines"))} == {
        "backdoor_gym/writing.py",
        "backdoor_gym/files/tensors.py",
    }


def test_a_model_whose_folder_is_a_file_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(WriteError, match=r"m\.safetensors cannot be written: Not a directory"):
        write_tensors(tmp_path / "file" / "m.safetensors", {"a": torch.zeros(1)}, {})


def test_a_written_file_can_be_read_while_it_is_replaced(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.arange(4.0)}, {})
    tensors, _ = read_tensors(tmp_path / "x")
    write_tensors(tmp_path / "x", {"a": torch.zeros(4)}, {})
    assert torch.equal(tensors["a"], torch.arange(4.0))
