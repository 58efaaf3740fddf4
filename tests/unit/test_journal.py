"""The journal of measurements: known answers, damaged files, other questions."""

import json
import logging

import pytest

from tsp.journal import Journal


class Alone:
    """The part of an engine that the journal uses, on one rank."""

    is_first = True

    def on_first(self, make):
        return make()


def opened(path, job="a job"):
    return Journal.open(path, Alone(), lambda: job)


def refuse():
    raise AssertionError("measured again")


@pytest.fixture
def path(tmp_path):
    """A journal of three measurements."""
    journal = opened(tmp_path / "state/journal.jsonl")
    for number in range(3):
        assert journal.once({"gone": [number]}, lambda number=number: [number / 3, float("nan")])[0] == number / 3
    return tmp_path / "state/journal.jsonl"


def test_what_was_measured_is_not_measured_again(path):
    journal = opened(path)
    for number in range(3):
        value, nan = journal.once({"gone": [number]}, refuse)
        assert value == number / 3, "to the last bit"
        assert nan != nan
    assert journal.once({"gone": [3]}, lambda: [7.0]) == [7.0]
    assert len(path.read_text().splitlines()) == 4


def test_the_same_question_twice_has_two_answers(tmp_path):
    """The weights may have changed in between; the order tells them apart."""
    first = opened(tmp_path / "journal.jsonl")
    first.once({"gone": []}, lambda: [1.0])
    first.once({"gone": []}, lambda: [2.0])
    again = opened(tmp_path / "journal.jsonl")
    assert [again.once({"gone": []}, refuse), again.once({"gone": []}, refuse)] == [[1.0], [2.0]]


def test_what_is_asked_in_the_middle_of_a_measurement_is_a_part_of_it(tmp_path):
    def whole(journal):
        return journal.once({"moved": [1]}, lambda: [1 + journal.once({"gone": [1]}, lambda: [1.0])[0]])

    first = opened(tmp_path / "journal.jsonl")
    assert [whole(first), first.once({"gone": [1]}, lambda: [3.0])] == [[2.0], [3.0]]
    again = opened(tmp_path / "journal.jsonl")
    assert again.once({"moved": [1]}, refuse) == [2.0]
    assert again.once({"gone": [1]}, refuse) == [3.0]


def test_a_measurement_that_fails_leaves_the_next_one_its_line(tmp_path):
    journal = opened(tmp_path / "journal.jsonl")
    with pytest.raises(AssertionError):
        journal.once({"gone": [0]}, refuse)
    journal.once({"gone": [0]}, lambda: [1.0])
    assert opened(tmp_path / "journal.jsonl").once({"gone": [0]}, refuse) == [1.0]


def test_the_seconds_of_what_is_known_are_told(path):
    entries = [json.loads(line.partition(" ")[2]) for line in path.read_text().splitlines()]
    assert all(0 <= entry.pop("seconds") < 60 for entry in entries)
    entries[0]["seconds"] = 400.0  # An earlier version wrote none.
    journal = Journal("a job", entries)
    assert journal.known_s == 0
    for number in range(2):
        journal.once({"gone": [number]}, refuse)
    journal.once({"gone": [9]}, lambda: [1.0])
    assert journal.known_s == 400


@pytest.mark.parametrize("job", ["a job", "another job"])
def test_from_the_first_other_question_on_all_is_measured(path, job, caplog):
    journal = opened(path, job)
    known = 1 if job == "a job" else 0
    if known:
        journal.once({"gone": [0]}, refuse)
    with caplog.at_level(logging.WARNING):
        assert journal.once({"gone": [9]}, lambda: [9.0]) == [9.0]
    assert "another" in caplog.text
    assert journal.once({"gone": [2]}, lambda: [5.0]) == [5.0]
    assert len(path.read_text().splitlines()) == known + 2
    again = opened(path, job)
    if known:
        again.once({"gone": [0]}, refuse)
    assert [again.once({"gone": [9]}, refuse), again.once({"gone": [2]}, refuse)] == [[9.0], [5.0]]


def test_one_that_cannot_be_written_anew_is_gone_on_without(path, monkeypatch, caplog):
    journal = opened(path, "a job")
    journal.once({"gone": [0]}, refuse)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tsp.journal.os.replace", full)
    assert journal.once({"gone": [9]}, lambda: [9.0]) == [9.0]
    assert journal.once({"gone": [2]}, lambda: [5.0]) == [5.0]
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_torn_line_is_cut_off(path, cut, caplog):
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    with caplog.at_level(logging.WARNING):
        journal = opened(path)
    assert "damaged behind line 2" in caplog.text
    for number in range(2):
        journal.once({"gone": [number]}, refuse)
    assert journal.once({"gone": [2]}, lambda: [2 / 3, float("nan")])[0] == 2 / 3
    again = opened(path)
    assert [again.once({"gone": [number]}, refuse)[0] for number in range(3)] == [0, 1 / 3, 2 / 3]


def test_any_changed_byte_is_noticed(path):
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for place in range(len(lines[0]), len(lines[0]) + len(lines[1])):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        journal = opened(path)
        journal.once({"gone": [0]}, refuse)
        assert journal.once({"gone": [1]}, lambda: [5.0]) == [5.0], place
        path.write_bytes(whole)


def test_off_rank_0_nothing_is_written_and_all_is_known(path, tmp_path):
    class Second(Alone):
        is_first = False

    journal = Journal.open(path, Second(), lambda: "a job")
    before = path.read_bytes()
    journal.once({"gone": [0]}, refuse)
    journal.once({"gone": [9]}, lambda: [1.0])
    assert path.read_bytes() == before


def test_a_journal_of_nothing(tmp_path):
    assert Journal().once({"gone": []}, lambda: [1.0]) == [1.0]
    assert list(tmp_path.iterdir()) == []
