"""`--gpus`: the devices that it needs, and the one line that it prints of several errors."""

import pytest
import torch

from sslrun.errors import UserError
from sslrun.launch import torchrun


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("auto", "no GPU; add --device cpu to train in 2 processes"),
        ("cpu:0", "--device cpu:0 is one device"),
    ],
)
def test_too_few_devices_are_one_line(device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=message):
        torchrun.check_device_count(device, 2)
    torchrun.check_device_count("cpu", 2)


def test_the_first_of_several_errors_is_left_for_the_parent(tmp_path, monkeypatch):
    assert not torchrun.leave_error("printed by the process itself")
    monkeypatch.setenv(torchrun.ERROR_FILE, str(tmp_path / "error"))
    assert torchrun.leave_error("first")
    assert torchrun.leave_error("second")
    assert (tmp_path / "error").read_text() == "first"
