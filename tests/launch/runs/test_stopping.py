"""Requests to stop: all processes agree on the block after which they do, and work that hangs is cut off."""

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


@pytest.mark.parametrize("finished", [False, True])
def test_work_that_does_not_end_is_cut_off_and_what_follows_it_is_not(monkeypatch, finished):
    left = threading.Event()
    monkeypatch.setattr(stopping, "GRACE", 0.2)
    monkeypatch.setattr(stopping.os, "_exit", lambda code: left.set())
    request = stopping.StopRequest(lambda: "")
    with request.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        while request.number is None:
            time.sleep(0.001)
        if finished:
            request.finish_work()  # at once: the timer must be known by now
            time.sleep(0.5)
        else:
            assert left.wait(10)
    assert left.is_set() is not finished
    with pytest.raises(stopping.Stopped):
        request.stop_if_requested()
