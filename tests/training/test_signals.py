"""Being asked to stop."""

from __future__ import annotations

import signal

import pytest

from andromeda.training.signals import stop_request


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_kept_for_the_end_of_the_step(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with stop_request() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop() and stop.received is number
    assert capfd.readouterr() == ("", "stopping after this step; once more to stop at once\n")
    assert signal.getsignal(number) is before


def test_the_second_ctrl_c_stops_at_once() -> None:
    with stop_request() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert stop.received is signal.SIGINT
