"""Signals that wait for the end of a step, and those that do not."""

import os
import signal

import pytest

from tsp.interrupts import SIGNALS, Terminated, deferred, listen


@pytest.fixture(autouse=True)
def listening():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    listen()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_acts_at_once_where_nothing_puts_it_off(number):
    with pytest.raises(KeyboardInterrupt, match=number.name) as raised:
        send(number)
    assert isinstance(raised.value, Terminated) == (number != signal.SIGINT)


@pytest.mark.parametrize("number", SIGNALS)
def test_within_a_step_it_waits_and_the_first_one_counts(number):
    with deferred() as pending:
        send(number)
        send(signal.SIGTERM)
        assert pending.number == number


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt, match="SIGINT"), deferred() as pending:
        send(signal.SIGINT)
        assert pending.number == signal.SIGINT
        send(signal.SIGINT)
        pytest.fail("it went on")


def test_after_a_step_they_act_at_once_again():
    with deferred():
        send(signal.SIGUSR1)
    with pytest.raises(Terminated, match="SIGUSR1"):
        send(signal.SIGUSR1)
