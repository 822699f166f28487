"""save() replaces a file whole or not at all, whatever stops it and whoever else does the same."""

import errno
import itertools
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from attacks import Net, packed_net
from files import contents

import pyengine as pe

pytestmark = pytest.mark.usefixtures("quiet")


@pytest.fixture
def old(path):
    """The model that the file holds before."""
    model = packed_net(seed=0)
    pe.save(model, path)
    return contents(model)


CHILD = """
import logging, sys
sys.path.insert(0, sys.argv[1])
logging.disable()
import torch
torch.set_num_threads(1)
import pyengine as pe
from attacks import packed_net
models = [packed_net(seed) for seed in (0, 1)]
"""


def child(script, *arguments):
    command = [sys.executable, "-c", CHILD + script, os.path.dirname(__file__), *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd="/")


class Stop(BaseException):
    pass


ERRORS = [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt(), Stop(), MemoryError()]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "name", ["chmod", "fsync", "replace", "fsync of a new file", "replace of a new file"]
)
def test_an_error_of_the_system_leaves_the_old_file_and_nothing_else(
    tmp_path, path, old, monkeypatch, name, error
):
    name, _, new = name.partition(" of ")
    target = tmp_path / "new" if new else path

    def fail(*_):
        raise error

    monkeypatch.setattr(os, name, fail)
    with pytest.raises(type(error)):
        pe.save(packed_net(seed=1), target)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == [path.name]
    assert contents(pe.load(path, Net)) == old


def test_an_error_at_any_write_leaves_the_old_file_and_nothing_else(tmp_path, path, old, monkeypatch):
    """Also one from the model, whose layers are unpacked while the file is written."""
    model = packed_net(seed=1)
    for stop in itertools.count():
        calls = iter(range(1000))

        def count(content, calls=calls, stop=stop, plain=pe.container.as_bytes):
            if next(calls) == stop:
                raise Stop
            return plain(content)

        monkeypatch.setattr(pe.container, "as_bytes", count)
        try:
            pe.save(model, path)
        except Stop:
            assert os.listdir(tmp_path) == [path.name]
            monkeypatch.undo()
            assert contents(pe.load(path, Net)) == old
            continue
        break
    assert stop > 20  # tensors, once for the checksums and once for the file
    monkeypatch.undo()
    assert contents(pe.load(path, Net)) == contents(model)


def test_the_temporary_file_is_whole_and_on_disk_before_it_is_renamed(path, monkeypatch):
    """A crash of the machine must not leave a new name on bytes that were never written."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(("fsync", os.fstat(fd).st_size)), fsync(fd)))

    def note(source, target):
        events.append(("replace", os.path.getsize(source)))
        assert os.path.dirname(source) == os.path.dirname(target)  # else it would be a copy
        replace(source, target)

    monkeypatch.setattr(os, "replace", note)
    pe.save(packed_net(), path)
    size = os.path.getsize(path)
    assert events == [("fsync", size), ("replace", size)]


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(path, old):
    """Processes that save in a loop are killed, each in another save, at a moment that nobody chooses."""
    expected = [old, contents(packed_net(seed=1))]
    script = """
import os
for _ in sys.stdin:
    saver = os.fork()
    if not saver:
        print(os.getpid(), flush=True)
        for i in range(10**6):
            pe.save(models[i % 2], sys.argv[2])
            os.write(1, b"%d\\n" % i)  # in one piece, or not at all
    print(os.waitstatus_to_exitcode(os.waitpid(saver, 0)[1]), flush=True)
"""
    process = child(script, path)
    seen = set()
    for round in range(40):
        process.stdin.write("go\n")
        process.stdin.flush()
        saver = int(process.stdout.readline())
        for _ in range(1 + round % 4):
            process.stdout.readline()
        # Now it is somewhere in a save: look while it runs, and after it has been killed.
        seen.add(expected.index(contents(pe.load(path, Net))))
        os.kill(saver, signal.SIGKILL)
        while (line := process.stdout.readline()) != f"{-signal.SIGKILL}\n":
            assert int(line) >= 0
        seen.add(expected.index(contents(pe.load(path, Net))))
    process.communicate()
    assert seen == {0, 1}


def test_a_process_that_dies_at_any_call_of_the_system_leaves_the_old_file_or_the_new_one(path, old):
    """Dies before the n-th of the calls that save() makes, for every n: no kill can come between them."""
    new = contents(packed_net(seed=1))
    script = """
import os
def fatal(function, count=[0]):
    def call(*args, **kwargs):
        count[0] += 1
        if count[0] == stop:
            os._exit(9)
        return function(*args, **kwargs)
    return call
import builtins, pyengine.container as container
class File:
    def __init__(self, file):
        self.file = file
        self.write, self.flush, self.seek = fatal(file.write), fatal(file.flush), fatal(file.seek)
        self.fileno = file.fileno
    def __enter__(self):
        return self
    def __exit__(self, *_):
        self.file.close()
plain = open
container.open = fatal(lambda *args: File(plain(*args, buffering=0)))
os.fsync, os.replace, os.chmod = fatal(os.fsync), fatal(os.replace), fatal(os.chmod)
for line in sys.stdin:
    stop = int(line)
    child = os.fork()
    if not child:
        pe.save(models[1], sys.argv[2])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
    process = child(script, path)
    codes = []
    for stop in range(1, 200):
        process.stdin.write(f"{stop}\n")
        process.stdin.flush()
        codes.append(int(process.stdout.readline()))
        found = contents(pe.load(path, Net))
        if codes[-1] == 0:
            assert found == new
            break
        assert found in (old, new)
        pe.save(packed_net(seed=0), path)
    process.communicate()
    assert codes == [9] * (len(codes) - 1) + [0]
    assert len(codes) > 2 * 16  # seek and write of each of 16 tensors, and the others


def test_a_full_disk_leaves_the_old_file(tmp_path, path, old):
    """The limit on the size of files stands in for it: writes fail in the same way, with another number."""
    script = """
import os, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder, path = os.path.dirname(sys.argv[2]), sys.argv[2]
whole = os.path.getsize(path)
for size in (0, 1, 4096 // 4, whole - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        pe.save(models[1], path)
    except OSError as error:
        print(error.errno)
    assert os.listdir(folder) == [os.path.basename(path)]
"""
    process = child(script, path)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert [int(line) for line in out.split()] == [errno.EFBIG] * 4
    assert contents(pe.load(path, Net)) == old


@pytest.mark.parametrize("mmap", [True, False], ids=["mapped", "read"])
def test_saving_onto_the_file_that_the_model_lies_on_works(path, old, mmap):
    model = pe.load(path, Net, mmap=mmap)
    assert contents(model) == old
    with torch.no_grad():
        model.tied.fill_(3)
    changed = contents(model)
    pe.save(model, path)
    pe.save(packed_net(seed=1), path)
    assert contents(model) == changed  # still on the file of before, which has no name any more
    pe.save(model, path)
    again = pe.load(path, model)
    assert again is model
    assert contents(model) == changed


def test_concurrent_savers_and_readers_see_whole_files_only(tmp_path, path, old):
    """Two processes and two threads save into one file, while it is loaded again and again."""
    expected = [old, contents(packed_net(seed=1))]
    script = """
for i in range(30):
    pe.save(models[i % 2], sys.argv[2])
"""
    processes = [child(script, path) for _ in range(2)]
    models = [packed_net(seed) for seed in (0, 1)]
    threads = [
        threading.Thread(target=lambda i=i: [pe.save(models[(i + j) % 2], path) for j in range(30)])
        for i in range(2)
    ]
    for thread in threads:
        thread.start()
    loads = 0
    while loads < 20 or any(p.poll() is None for p in processes) or any(t.is_alive() for t in threads):
        assert contents(pe.load(path, Net)) in expected
        loads += 1
    for process in processes:
        process.communicate()
        assert process.returncode == 0
    assert os.listdir(tmp_path) == [path.name]
