"""Recorded steps beside other threads: who has to be alone, and how far a thread may run ahead of the device."""

import threading

import pytest
import torch

from prunus.capture import _AHEAD, CapturedStep, alone, alone_at_first


def passes(key):
    """Whether a thread that meets `key` twice passes a second time while another thread is alone."""
    found, met, held = [], threading.Event(), threading.Event()

    def work():
        with alone_at_first(key):
            pass
        met.set()
        held.wait(10)
        with alone_at_first(key):
            found.append("again")

    thread = threading.Thread(target=work)
    thread.start()
    assert met.wait(10)
    with alone():
        held.set()
        thread.join(10)
        return found == ["again"]


def waits(key):
    """Whether a new thread with this key waits for a thread that is alone."""
    found = []

    def work():
        with alone_at_first(key):
            found.append("met")

    thread = threading.Thread(target=work)
    with alone():
        thread.start()
        thread.join(0.05)
        waited = found == []
    thread.join(10)
    assert found == ["met"]
    return waited


def test_a_thread_is_alone_at_first_and_only_then():
    assert passes(("a", 1))
    assert waits(("a", 1))  # another thread has met nothing yet


def test_what_failed_has_not_been_met():
    with pytest.raises(ZeroDivisionError), alone_at_first("failed"):
        _ = 1 / 0
    results = []

    def hold(ready, done):
        with alone():
            ready.set()
            done.wait(10)

    ready, done = threading.Event(), threading.Event()
    other = threading.Thread(target=hold, args=(ready, done))
    other.start()
    assert ready.wait(10)
    threading.Timer(0.05, done.set).start()
    with alone_at_first("failed"):
        results.append(done.is_set())
    other.join(10)
    assert results == [True]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_do_not_queue_up_without_end():
    weight = torch.zeros(4, device="cuda")

    def step(parts):
        weight.add_(parts[0])
        return weight.sum()

    captured = CapturedStep(step, torch.device("cuda"))
    losses = [captured([torch.full((4,), float(place), device="cuda")]) for place in range(40)]
    assert len(captured.queued) <= _AHEAD
    assert torch.stack(losses).tolist() == [4.0 * sum(range(place + 1)) for place in range(40)]
