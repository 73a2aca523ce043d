import signal
import threading

import pytest

from danlu.train.signals import Stop


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_remembered(number: signal.Signals, code: int) -> None:
    with Stop() as stop:
        assert stop.exit_code == 0
        signal.raise_signal(number)
        assert stop.exit_code == code
        signal.raise_signal(signal.SIGTERM)
        assert stop.exit_code == code


def test_a_second_interrupt_is_obeyed_at_once() -> None:
    with Stop():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_one_of_several_processes_waits_for_the_others() -> None:
    with Stop(patient=True) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == 143


def test_the_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with Stop():
        assert signal.getsignal(signal.SIGINT) != before[0]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_outside_the_main_thread_no_handler_is_set() -> None:
    codes = []

    def work() -> None:
        with Stop() as stop:
            codes.append(stop.exit_code)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert codes == [0]
