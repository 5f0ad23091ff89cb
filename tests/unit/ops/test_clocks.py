import pytest

from fleet_worker.ops.clocks import described, wrong_clocks


@pytest.mark.parametrize(
    ("ahead", "wrong"),
    [
        ({}, {}),
        ({"a": -0.3}, {}),
        ({"a": 90.0}, {"a": 90.0}),
        ({"a": 0.1, "b": -3600.0}, {"b": -3600.0}),
        ({"a": 90.0, "b": 90.4}, {"": -90.0}),
        ({"a": 90.0, "b": -90.0}, {"a": 90.0, "b": -90.0}),
        ({"a": 3600.0, "b": 3600.2, "c": 3690.0}, {"": -3600.0, "c": 90.0}),
    ],
)
def test_a_clock_is_wrong_if_most_others_show_another_time(ahead, wrong):
    assert wrong_clocks(ahead) == pytest.approx(wrong, abs=0.5)


def test_whose_clock_it_is_is_told():
    assert list(described({"": -90.0, "mini-7": 3600.2})) == [
        "the clock of this host is 90 s behind the others",
        "the clock of mini-7 is 3600 s ahead of the others",
    ]
