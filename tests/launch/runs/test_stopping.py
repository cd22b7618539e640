"""Requests to stop: all processes agree on the block after which they do, and no save is cut off."""

import os
import signal
import threading
import time

import pytest

from launch.runs import processes, stopping
from launch.runs.trainer import agree_to_stop


@pytest.mark.parametrize(("others", "stops"), [(0, False), (signal.SIGINT, True)])
def test_a_signal_while_the_processes_tell_each_other_waits_for_the_next_block(monkeypatch, others, stops):
    request = stopping.StopRequest(lambda: "")

    def of_all(value: int) -> list[int]:
        request.number = signal.SIGTERM  # after this process has said that it has none
        return [value, others]

    monkeypatch.setattr(processes, "of_all", of_all)
    assert agree_to_stop(request) is stops
    monkeypatch.setattr(processes, "of_all", lambda value: [value, 0])
    assert agree_to_stop(request)
    assert request.number == signal.SIGTERM


@pytest.mark.parametrize("interruptible", [False, True])
def test_only_interruptible_work_is_cut_off(monkeypatch, interruptible):
    left = threading.Event()
    monkeypatch.setattr(stopping, "GRACE", 0.05)
    monkeypatch.setattr(stopping.os, "_exit", lambda code: left.set())
    request = stopping.StopRequest(lambda: "")
    with request.listening():
        if interruptible:
            with request.interruptible():
                os.kill(os.getpid(), signal.SIGTERM)
                assert left.wait(10)
        else:
            with request.interruptible():
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.3)
    assert left.is_set() is interruptible
    with pytest.raises(stopping.Stopped):
        request.stop_if_requested()
