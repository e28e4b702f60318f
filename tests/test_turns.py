"""Turns of threads: their order, and what ends one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mla_convert.run.turns import Call, Closed, Turns


def started(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def wait_until(ready: Callable[[], Any]) -> None:
    end = time.monotonic() + 10
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_turns_go_in_order_of_arrival_and_a_thread_may_nest_them() -> None:
    turns, order = Turns(), []

    def work(index: int) -> None:
        with turns.turn(), turns.turn():
            order.append(index)

    threads = []
    with turns.turn():
        for index in range(4):
            threads.append(started(lambda index=index: work(index)))  # type: ignore[misc]
            wait_until(lambda: len(turns._line) == len(threads))
        assert order == []
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3]


def test_an_exception_ends_only_the_wait_of_its_own_thread() -> None:
    """Also between two items, where the thread had given up its turn."""
    turns, here = Turns(), threading.get_ident()
    wait_for = turns.changed.wait_for
    given, back = threading.Event(), threading.Event()

    def interrupted(ready: Callable[[], bool]) -> bool:
        if threading.get_ident() == here and not ready():
            raise KeyboardInterrupt
        return wait_for(ready)

    def other() -> None:
        given.wait(10)
        with turns.turn():
            taken.set()
            back.wait(10)

    def items() -> Iterator[int]:
        given.set()
        assert taken.wait(10)
        yield 1

    turns.changed.wait_for = interrupted  # type: ignore[method-assign, assignment]
    taken = threading.Event()
    thread = started(other)
    with pytest.raises(KeyboardInterrupt), turns.turn():
        next(turns.between_turns(items()))
    assert [place.thread for place in turns._held] == [thread.ident] and not turns._line
    with pytest.raises(KeyboardInterrupt), turns.turn():
        pass
    assert [place.thread for place in turns._held] == [thread.ident] and not turns._line
    back.set()
    thread.join(10)
    with turns.turn():
        assert len(turns._held) == 1


def test_a_closed_call_waits_no_longer() -> None:
    turns = Turns()
    call, ended = Call(turns), []

    def work() -> None:
        try:
            with turns.turn(call):
                ended.append("turn")
        except Closed:
            ended.append("closed")

    with turns.turn():
        thread = started(work)
        wait_until(lambda: turns._line)
        call.closed.set()
        thread.join(10)
        assert ended == ["closed"]


def test_a_callback_lends_its_turn_to_its_own_calls_only() -> None:
    """It is over when they have given it back; afterwards they wait in line like others."""
    turns, order = Turns(), []
    owner, stranger = Call(turns), Call(turns)
    reached, goes_on = threading.Event(), threading.Event()

    def work(call: Call, name: str) -> None:
        with turns.turn(call):
            order.append(name)
            if name == "own":
                reached.set()
                goes_on.wait(10)

    with turns.turn(owner):
        threads = [started(lambda: work(stranger, "stranger"))]
        wait_until(lambda: turns._line)
        with owner.callback():
            own = Call(turns, owner)
            threads.append(started(lambda: work(own, "own")))
            assert reached.wait(10)
            threading.Timer(0.2, goes_on.set).start()
        assert goes_on.is_set() and order == ["own"]
        threads.append(started(lambda: work(own, "later")))
        wait_until(lambda: len(turns._line) == 2)
        assert order == ["own"]
    for thread in threads:
        thread.join(10)
    assert order == ["own", "stranger", "later"]


def test_work_for_idle_turns_is_not_waited_for() -> None:
    turns, done = Turns(), []
    with turns.turn():
        thread = started(lambda: turns.when_idle(lambda: done.append(1)))
        thread.join(10)
        turns.when_idle(lambda: done.append(2))
    assert done == []
    turns.when_idle(lambda: done.append(3))
    assert done == [3] and not turns._held
