"""The hours of a week: how their texts are read, and when they are."""

import os
import re
import time
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleet_worker.availability_settings import AvailabilitySettings
from fleet_worker.hours import DAY, DAYS, UNDERSTOOD, WEEK, Hours

MONDAY = datetime(2026, 11, 30)


def at(day, clock):
    """The time on this day of one week, as in `at("mon", "19:00")`."""
    hour, minute = map(int, clock.split(":"))
    number = next(number for number, name in enumerate(DAYS) if name.startswith(day))
    return MONDAY + timedelta(days=number, hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("text", "within", "outside"),
    [
        (
            "mon-fri 19:00-08:00",
            ["mon 19:00", "tue 07:59", "sat 07:59", "fri 23:59"],
            ["mon 07:00", "tue 08:00", "sat 19:00"],
        ),
        ("sat,sun 00:00-24:00", ["sat 00:00", "sun 23:59"], ["fri 23:59", "mon 00:00"]),
        ("sat, sun", ["sat 00:00", "sun 23:59"], ["fri 23:59", "mon 00:00"]),
        ("sat, sun 10:00-18:00", ["sat 10:00", "sun 17:59"], ["sat 09:59", "sun 18:00", "mon 12:00"]),
        (
            "mon-fri 19:00-08:00, sat, sun",
            ["sat 12:00", "sun 23:59", "fri 20:00"],
            ["mon 00:00", "mon 07:59", "fri 18:59"],
        ),
        ("mon 8:00-9:00, 20:00-21:00", ["mon 08:30", "mon 20:30"], ["mon 12:00", "tue 08:30"]),
        ("22:00-06:00", ["mon 05:59", "thu 22:00"], ["sun 06:00", "sun 21:59"]),
        (
            "Friday - Monday 9:05 - 9:06",
            ["fri 09:05", "sat 09:05", "sun 09:05", "mon 09:05"],
            ["thu 09:05", "mon 09:06"],
        ),
        ("sun 23:00-24:00", ["sun 23:59"], ["mon 00:00"]),
        ("sun 20:00-04:00", ["mon 03:59"], ["mon 04:00", "sun 03:00"]),
        ("mon\u2013tue 19:00\u201320:00", ["mon 19:30"], ["mon 20:00"]),
    ],
)
def test_texts_mean_what_they_say(text, within, outside):
    hours = Hours.parse([text])
    assert [moment for moment in within if not hours.contain(at(*moment.split()))] == []
    assert [moment for moment in outside if hours.contain(at(*moment.split()))] == []


def test_a_list_of_texts_means_all_of_them():
    assert Hours.parse(["mon 10:00-12:00", "mon 11:00-13:00", "sat"]) == Hours.parse(["mon 10:00-13:00, sat"])
    assert Hours.parse(["sat", "mon 10:00-12:00"]) != Hours.parse(["sat, mon 10:00-12:00"]), "days share what follows"


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        ",",
        "mon,",
        "mo 8:00-9:00",
        "mon 8-9",
        "mon 25:00-26:00",
        "mon 08:60-09:00",
        "mon 24:00-08:00",
        "mon 8:00-8:00",
        "mon 10:00",
        "mon 10:00-12:00 13:00-14:00",
        "mon-tue-wed",
        "mon 10:00-12:00 tue",
        "10:00",
        "-",
        "24:01-01:00",
        "mon 0:0-1:00",
    ],
)
def test_a_wrong_text_is_refused_with_what_is_understood(text):
    with pytest.raises(ValueError, match=re.escape(UNDERSTOOD)):
        Hours.parse([text])


@pytest.mark.parametrize("value", [5, [], [3], {}, "", True, ["mon", ""]])
def test_hours_of_another_kind_are_refused_with_what_is_understood(value):
    with pytest.raises(ValidationError) as refused:
        AvailabilitySettings(hours=value)
    (fault,) = refused.value.errors()
    assert UNDERSTOOD in fault["msg"]


def test_the_section_is_in_use_as_soon_as_it_sets_anything():
    assert not AvailabilitySettings().in_use
    assert AvailabilitySettings().open_hours is None
    assert AvailabilitySettings(keep_awake=True).in_use
    assert AvailabilitySettings(hours=["sat"]).open_hours == Hours(((5 * DAY, 6 * DAY),))


MINUTES = st.integers(0, WEEK - 1)


@st.composite
def texts(draw):
    """Texts with one day and one range each, and the minutes of the week that they mean, one by one."""
    chosen = draw(
        st.lists(st.tuples(st.integers(0, 6), st.integers(0, DAY - 1), st.integers(1, DAY)), min_size=1, max_size=4)
    )
    chosen = [(day, first, end) for day, first, end in chosen if first != end] or [(0, 1, 2)]
    written = [
        f"{DAYS[day][:3]} {first // 60}:{first % 60:02}-{end // 60:02}:{end % 60:02}" for day, first, end in chosen
    ]
    minutes = {
        (day * DAY + minute) % WEEK
        for day, first, end in chosen
        for minute in range(first, end if end > first else end + DAY)
    }
    return written, minutes


@given(texts(), MINUTES)
def test_hours_contain_the_minutes_of_their_ranges_and_no_others(given_texts, minute):
    written, minutes = given_texts
    assert Hours.parse(written).contain(MONDAY + timedelta(minutes=minute)) == (minute in minutes)
    assert Hours.parse([", ".join(written)]) == Hours.parse(written)


@given(texts(), MINUTES)
def test_the_next_change_is_the_first_minute_that_differs(given_texts, minute):
    hours = Hours.parse(given_texts[0])
    now = MONDAY + timedelta(minutes=minute)
    minutes = hours.minutes_to_change(now)
    is_open = hours.contain(now)
    if minutes is None:
        assert all(hours.contain(MONDAY + timedelta(minutes=each)) == is_open for each in range(WEEK))
        return
    assert hours.contain(now + timedelta(minutes=minutes)) != is_open
    assert all(hours.contain(now + timedelta(minutes=each)) == is_open for each in range(minutes))


def test_a_whole_week_never_changes():
    assert Hours.parse(["mon-sun"]).minutes_to_change(MONDAY) is None
    assert Hours.parse(["00:00-24:00"]).contain(MONDAY)


def test_hours_follow_the_clock_on_the_wall_through_daylight_saving(monkeypatch):
    """In Berlin 02:30 does not exist on 29 March 2026, and is twice on 25 October."""
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        hours = Hours.parse(["sun 02:30-04:00"])

        def open_minutes(day):
            start = time.mktime((2026, *day, 0, 0, 0, 0, 0, -1))
            return sum(hours.contain(datetime.fromtimestamp(start + 60 * minute)) for minute in range(26 * 60))

        assert open_minutes((3, 29)) == 60, "from 03:00, which follows 01:59"
        assert open_minutes((10, 25)) == 120, "02:30 to 02:59 twice"
        assert open_minutes((5, 3)) == 90
    finally:
        os.environ.pop("TZ")
        time.tzset()
