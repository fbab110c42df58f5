"""Recorded steps beside other threads: how far a thread may run ahead of the device."""

import pytest
import torch

from prunus.train.capture import _AHEAD, CapturedStep


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
