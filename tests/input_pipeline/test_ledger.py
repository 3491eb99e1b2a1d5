from time import sleep

import pytest

from input_pipeline.ledger import Ledger, Stopwatch


class Reader:
    def __init__(self):
        self.timings = {"read": 0.0}


def test_a_stage_does_not_count_what_inner_stages_and_readers_took():
    watch, reader = Stopwatch(), Reader()
    watch.readers.append(reader)
    with watch("outer"):
        sleep(0.02)
        reader.timings["read"] += 100.0
        with watch("inner"):
            sleep(0.02)
    assert watch.seconds["read"] == 100.0
    assert 0.015 < watch.seconds["inner"] < 1
    assert watch.seconds["outer"] == 0.0  # the reader claims more than passed: never below nothing

    with watch("outer"), watch("inner"):
        sleep(0.02)
    assert watch.seconds["outer"] < 0.01


def test_the_limit_is_a_stage_of_the_crew_that_was_busy_longest():
    """Four readers share 8 s, which is 2 s of the clock; the device was busy for 3 s."""
    ledger = Ledger(crews={"read": ("readers", 4), "decode": ("readers", 4), "compute": ("device", 1)})
    ledger.add({"read": 3.0, "decode": 5.0, "compute": 3.0}, tiles=100)
    assert ledger.limit() == ("compute", 3.0, 3.0)
    ledger.wall = 4.0
    assert "The limit is compute (27% of the work, device busy 75% of the time)." in ledger.table()
    ledger.add({"decode": 9.0}, tiles=100)
    assert ledger.limit() == ("decode", 14.0, 17 / 4)


def test_the_table_names_the_limit():
    ledger = Ledger()
    ledger.add({"read": 1.0, "decode": 3.0}, tiles=100)
    ledger.add({"decode": 4.0, "write": 2.0}, tiles=100)
    ledger.wall = 5.0
    table = ledger.table()
    assert "The limit is decode (70% of the work)" in table
    assert "2 slides, 200 tiles in 5.0 s: 40 tiles/s, 24.0 slides/min" in table
    lines = [line.split() for line in table.splitlines()]
    assert lines[1][:4] == ["decode", "7.0", "70%", "29"]


def test_an_empty_ledger_says_so():
    assert "nothing was done" in Ledger().table()


def test_time_is_counted_when_the_stage_fails():
    watch = Stopwatch()
    with pytest.raises(RuntimeError), watch("stage"):
        raise RuntimeError
    assert "stage" in watch.seconds
