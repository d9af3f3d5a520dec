"""A merge killed by SIGKILL at any of its writes: its output is whole or absent, and the same command finishes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

DRIVER = """
import json, os, random, shutil, signal, sys
from pathlib import Path
import torch
from deltaw.merge import merge
from deltaw.models import CheckpointWriter, shard

shard._BUFFER, shard._ROOM, shard._STEP = 200, 512, 300  # shards begun early, moved for their headers, written in parts
root, trials, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
names = [f"layers.{i}.up_proj.{w}" for i in range(3) for w in ("weight", "bias")]
for t in range(3):
    g = torch.Generator().manual_seed(t)
    with CheckpointWriter(root / f"m{t}") as writer:
        for name in names:
            writer.write(name, torch.randn((12, 9) if name.endswith("weight") else (5,), generator=g))
        writer.text("config.json", "{}")
        writer.text("tokenizer.json", "{}")

def run(out, method, overwrite=False):
    merge(root / "m0", [root / "m1", root / "m2"], method, out, max_shard_bytes=700, overwrite=overwrite)

def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

def child(task):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            task()
            code = 0
        except BaseException as e:
            print(type(e).__name__, e, file=sys.stderr)
        os._exit(code)
    return os.waitpid(pid, 0)[1]

class Counter:
    '''Counts whatever changes the disk beside `out`, and kills this process at the `fatal`-th.'''
    def __init__(self, out, fatal):
        self.out, self.fatal, self.count = str(out), fatal, 0
        sys.addaudithook(self.hook)
        plain = shard.ShardFile._write
        def write(file, content):
            if self.step():
                half = memoryview(content)[: len(content) // 2]
                plain(file, half)
                self.kill()
            plain(file, content)
        shard.ShardFile._write = write
    def kill(self):
        os.kill(os.getpid(), signal.SIGKILL)
    def step(self):
        self.count += 1
        return self.count == self.fatal
    def hook(self, event, args):
        if event == "open":
            mode = args[1] if isinstance(args[1], str) else ""
            flags = args[2] if isinstance(args[2], int) else 0
            changes = any(c in mode for c in "wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        else:
            changes = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")
        if changes and self.out in str(args[0]) and self.step():
            self.kill()

whole, old = root / "whole", root / "old"
run(whole, "ties")
run(old, "linear")
expected, before = files(whole), files(old)
rng, killed = random.Random(seed), []
for overwrite in (False, True):
    def count():
        out = root / "counted"
        if overwrite:
            shutil.copytree(old, out)
        counter = Counter(out, -1)
        run(out, "ties", overwrite)
        (root / "count").write_text(str(counter.count))
    assert child(count) == 0
    shutil.rmtree(root / "counted")
    total = int((root / "count").read_text())
    assert total > 20, total
    for trial in range(trials // 2):
        out = root / f"out{overwrite}{trial}"
        if overwrite:
            shutil.copytree(old, out)
        fatal = rng.randint(1, total)
        def doomed():
            Counter(out, fatal)
            run(out, "ties", overwrite)
        status = child(doomed)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (fatal, total, status)
        aside = out.with_name(out.name + ".old")
        if out.exists():
            found = files(out)
            found.pop("resume.json", None)  # removed after the rename
            assert found == expected or overwrite and found == before, (fatal, sorted(found))
        else:
            assert not overwrite or files(aside) == before, fatal
        finished = out.exists() and files(out).keys() >= expected.keys() and files(out)["README.md"] == expected["README.md"]
        if not finished:
            assert child(lambda: run(out, "ties", overwrite)) == 0, fatal
        else:  # killed after the rename: the command sees a finished output, and replaces it when it may
            assert child(lambda: run(out, "ties", True)) == 0, fatal
        assert files(out) == expected, fatal
        assert not out.with_name(out.name + ".partial").exists()
        killed.append([overwrite, fatal, total])
        shutil.rmtree(out)
        shutil.rmtree(aside, ignore_errors=True)
print(json.dumps(killed))
"""


@pytest.mark.skipif(not hasattr(sys, "addaudithook") or sys.platform != "linux", reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("trials", "seed"), [(10, 0), pytest.param(50, 1, marks=pytest.mark.slow)])
def test_a_merge_killed_at_any_write_is_whole_or_absent_and_goes_on(trials, seed, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(trials), str(seed)],
        env=os.environ
        | {"OMP_NUM_THREADS": "1"},  # a forked process hangs in a parallel region if its parent was in one
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(json.loads(done.stdout.splitlines()[-1])) == trials
