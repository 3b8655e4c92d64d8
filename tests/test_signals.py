"""SIGTERM and SIGINT: a checkpoint, the right exit status, and the same bits after resuming."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from small_runs import assert_same_bits, make_trainer, resume, signal_at
from transformers import TrainerCallback

from src.trainer import interruption
from src.trainer.checkpoints import checkpoints_of, fault_of, newest_valid
from src.trainer.interruption import stops_on_signals
from tests.conftest import run_python

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("event", "at", "step"),
    [
        ("on_substep_end", 1, 0),  # in the middle of the first step: there is nothing to keep
        ("on_substep_end", 4, 3),  # in the middle of a step's accumulation
        ("on_substep_end", 7, 6),  # in the middle of an epoch's first step
        ("on_step_end", 5, 5),  # after a step that neither logs nor saves
        ("on_step_end", 6, 6),  # after a step that logs, validates and saves; an epoch ends
        ("on_prediction_step", 2, 3),  # in the middle of a validation
        ("on_prediction_step", 8, 9),  # in the last one
        ("on_log", 2, 3),  # in the middle of bookkeeping
    ],
)
def test_stopped_and_resumed_is_undisturbed(tiny_lm, tmp_path, undisturbed, event, at, step):
    cut = make_trainer(tiny_lm, tmp_path)
    cut.add_callback(signal_at(event, at))
    with pytest.raises(SystemExit) as stop:
        stops_on_signals(cut.train)()
    assert stop.value.code == 143
    newest = newest_valid(tmp_path)
    assert (newest.name if newest else "checkpoint-0") == f"checkpoint-{step}"
    assert interruption.requested() is None
    assert_same_bits(undisturbed(make_trainer), resume(make_trainer(tiny_lm, tmp_path)))


@pytest.fixture
def hangup_is_heard():
    """Tests that run under nohup ignore SIGHUP, as a training there does."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGUSR1, 138),
        (signal.SIGUSR2, 140),
        (signal.SIGXCPU, 152),
        (signal.SIGHUP, 129),
    ],
)
def test_signals_of_schedulers_and_lost_terminals(
    tiny_lm, tmp_path, hangup_is_heard, number, status
):
    cut = make_trainer(tiny_lm, tmp_path)
    for at in (2, 3):  # schedulers repeat them: that does not end the run at once
        cut.add_callback(signal_at("on_substep_end", at, number))
    with pytest.raises(SystemExit) as stop:
        stops_on_signals(cut.train)()
    assert stop.value.code == status
    assert newest_valid(tmp_path) is not None


def test_an_ignored_hangup_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stops_on_signals(lambda: os.kill(os.getpid(), signal.SIGHUP) or 7)() == 7
    finally:
        signal.signal(signal.SIGHUP, before)


def test_workers_end_with_their_parent_and_with_nobody_else():
    """multiprocessing ends them by SIGTERM at exit and waits: they must not ignore that one."""
    code = (
        "import os, signal, sys, multiprocessing\n"
        "from torch.utils.data import DataLoader\n"
        "from src.trainer.interruption import quiet_workers\n"
        "batches = iter(quiet_workers(DataLoader(range(1000), num_workers=2)))\n"
        "next(batches)\n"
        "sys.kept = batches\n"  # as a traceback keeps it
        "other = 'import os, sys; [os.kill(int(p), 15) for p in sys.argv[1:]]'\n"
        "pids = [str(worker.pid) for worker in multiprocessing.active_children()]\n"
        "os.spawnv(os.P_WAIT, sys.executable, [sys.executable, '-c', other, *pids])\n"
        "print(sum(1 for _ in batches), flush=True)\n"
        "again = sys.again = iter(quiet_workers(DataLoader(range(1000), num_workers=2)))\n"
        "next(again)\n"
        "sys.exit(143)\n"
    )
    done = run_python("-c", code)
    assert done.stdout == "999\n"
    assert done.returncode == 143, done.stderr


def test_a_lost_terminal_does_not_break_what_is_printed():
    """Writing to a terminal that is gone fails, and must not end the run before its checkpoint."""
    code = (
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests may run under nohup
        "from src.trainer.interruption import deferred, requested, stops_on_signals\n"
        "@stops_on_signals\n"
        "def work():\n"
        "    with deferred():\n"
        "        print('ready', flush=True)\n"
        "        while requested() is None:\n"
        "            time.sleep(0.05)\n"
        "        print('said into the void', file=sys.stderr, flush=True)\n"
        "        os._exit(7)\n"
        "work()\n"
    )
    ours, theirs = os.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,  # not the terminal: its end would fail a write that is not yet done
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        try:
            assert process.wait(30) == 7
        finally:
            process.kill()


def test_stopped_again_and_again(tiny_lm, tmp_path, undisturbed):
    """A signal in every step, in the validation owed from the last one too."""
    statuses = []
    for number in range(60):
        cut = make_trainer(tiny_lm, tmp_path, packed=True)
        event = ("on_step_end", "on_prediction_step", "on_substep_end")[number % 3]
        cut.add_callback(signal_at(event, 1, signal.SIGINT))
        try:
            stops_on_signals(resume)(cut)
            break
        except SystemExit as stop:
            statuses.append(stop.code)
    assert statuses
    assert set(statuses) == {130}
    assert_same_bits(undisturbed(make_trainer, packed=True), resume(cut))


def test_a_signal_outside_the_loop_ends_at_once(capsys):
    reached = []

    @stops_on_signals
    def prepare():
        os.kill(os.getpid(), signal.SIGTERM)
        reached.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        prepare()
    assert stop.value.code == 143
    assert not reached
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_other_threads_train_without_handlers():
    results = []
    thread = threading.Thread(target=lambda: results.append(stops_on_signals(lambda: 7)()))
    thread.start()
    thread.join()
    assert results == [7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once(number):
    code = (
        "import time\n"
        "from src.trainer.interruption import deferred, stops_on_signals\n"
        "@stops_on_signals\n"
        "def work():\n"
        "    with deferred():\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "        time.sleep(60)\n"
        "work()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert "a second signal ends at once" in process.stderr.readline()
        assert process.poll() is None
        started = time.monotonic()
        process.send_signal(number)
        assert process.wait(30) == -number
        assert time.monotonic() - started < 10


def test_workers_leave_signals_to_the_run(tiny_lm, tmp_path):
    """Ctrl-C reaches the whole process group, and a scheduler may signal every process."""
    cut = make_trainer(tiny_lm, tmp_path, dataloader_num_workers=2)

    class SignalWorkers(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                listing = subprocess.run(
                    ["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True
                )
                children = [int(line) for line in listing.stdout.split()]
                signalled = 0
                for child in children:
                    if Path(f"/proc/{child}/cmdline").exists():
                        os.kill(child, signal.SIGTERM)
                        os.kill(child, signal.SIGINT)
                        signalled += 1
                assert signalled >= 2
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGTERM)

    cut.add_callback(SignalWorkers())
    with pytest.raises(SystemExit) as stop:
        stops_on_signals(cut.train)()
    assert stop.value.code == 143
    assert checkpoints_of(tmp_path)[0].name == "checkpoint-3"
    assert fault_of(tmp_path / "checkpoint-3") is None
