import io

import pytest
from rich.console import Console

from fleet_worker.ops.snapshot import LaneStatus, Snapshot
from fleet_worker.ops.status import INSTANCES_FIT, NO_LANES, NO_REGISTRY_NODE, UNSERVED, tables
from fleet_worker.protocol.status import InstanceStatus
from fleet_worker.registry.offered import Offered
from fleet_worker.terminal import FITS_A_TABLE, UNLIMITED, output

RED = "\x1b[1;31m"
CHAT, EMBED = "llm.fleet.chat.mlx-community-qwen3-14b-4bit", "llm.fleet.embed.m"
DIRECT = "llm.fleet.node.local@mini-7"
WHY = "the MLX server does not accept connections [Errno 111]"


NOW = 1000.0


def instance(name="local", host="mini-7", **fields):
    known = {
        "status": "available",
        "lanes": (CHAT,),
        "slots": 8,
        "running": 3,
        "tokens_per_second": 31.25,
        "prompt_tokens": 3_000,
        "cached_tokens": 2_610,
        "last_token_age": 0.44,
        "server": "mlx_lm",
        "version": "0.1.0",
        "heard_at": NOW,
    }
    return InstanceStatus(host=host, name=name, node=f"{name}@{host}", **{**known, **fields})


def model(name, of, *, ready=True):
    return Offered(name, ("chat",), (), {}, ready, of)


def snapshot(instances, models, lanes):
    return Snapshot(instances, models, lanes, taken_at=NOW)


def lane(name=CHAT, depth=0, oldest_age=None, nodes=1):
    return LaneStatus(name, depth, oldest_age, nodes, unserved=bool(depth) and nodes == 0)


def printed(seen, width=UNLIMITED, *, colours=False):
    """What a console of that many columns shows."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=colours, color_system="standard" if colours else None)
    console.print(tables(seen))
    return file.getvalue()


def words(text):
    """The text without whitespace, so that folded lines do not matter."""
    return "".join(text.split())


BROKEN = instance("embed", status="unavailable", reason=WHY, lanes=(), running=0)
FLEET = snapshot(
    instances=[instance(), BROKEN],
    models=[model("mlx-community/Qwen3-14B-4bit", instance()), model("m", BROKEN, ready=False)],
    lanes=[lane(EMBED, 3, 75.2, nodes=0), lane(CHAT, 12, 3.21, nodes=2)],
)


def test_every_row_is_one_line_without_a_width():
    lines = [line.split() for line in printed(FLEET).splitlines()]
    assert [
        "local@mini-7",
        "available",
        "mlx-community/Qwen3-14B-4bit",
        "3",
        "5",
        "31.2",
        "87%",
        "0.4s",
        "mlx_lm",
        "0.1.0",
    ] in lines
    assert [EMBED, "3", "75s", "0", *UNSERVED.split()] in lines
    assert [CHAT, "12", "3.2s", "2"] in lines
    assert f"embed@mini-7 is unavailable: {WHY}".split() in lines


def test_a_file_has_no_width(capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    output().print(tables(FLEET))
    assert [EMBED, "3", "75s", "0", *UNSERVED.split()] in [
        line.split() for line in capsys.readouterr().out.splitlines()
    ]


def test_the_top_lines_are_a_summary():
    first, second, third, *_ = printed(FLEET).splitlines()
    assert first == "1 of 2 instances on 1 host ready, 3 of 16 slots used"
    assert second == "15 requests waiting in 2 lanes"
    assert third == f"{UNSERVED}: 1 lane with waiting requests"


@pytest.mark.parametrize("width", [30, 40, 60, 71, 72, 79, 80, 100, 160])
def test_no_terminal_is_too_narrow_for_it(width):
    """Nothing is cut off: in a table a long name goes on below itself, and without one there are paragraphs. A table
    that is too wide has no version and then no server."""
    text = printed(FLEET, width)
    assert max(map(len, text.splitlines())) <= width
    assert words(f"embed@mini-7 is unavailable: {WHY}") in words(text)
    instances, lanes = width >= INSTANCES_FIT, width >= FITS_A_TABLE
    assert "mlx-community/Qwen3-14B-4bit" in (column(text, "models", "used") if instances else words(text))
    assert CHAT in (column(text, "lane", "waiting") if lanes else words(text))
    for said in ("unavailable", "31.2", "87%", "0.4s", "12", "3.2s", "75s"):
        assert said in text.split()
    has_all = width < INSTANCES_FIT or width > 100
    assert ("mlx_lm" in text.split(), "0.1.0" in text.split()) == (has_all or width == 100, has_all)
    assert text.count(UNSERVED) == 2


def column(text, header, following):
    """The words of a column, up to the one that follows, of the table whose header has these two."""
    lines = iter(text.splitlines())
    top = next(line for line in lines if line.startswith(("node ", "lane ")) and header in line)
    return words("".join(line[top.index(header) : top.index(following)] for line in lines))


def test_only_unserved_lanes_are_red():
    red = [line for line in printed(FLEET, 120, colours=True).splitlines() if RED in line]
    assert len(red) == 2
    assert all(UNSERVED in line for line in red)


def test_without_a_terminal_there_are_no_colours():
    assert "\x1b" not in printed(FLEET)


def test_a_lane_that_is_served_or_empty_is_not_marked():
    assert UNSERVED not in printed(snapshot([instance()], [], [lane(CHAT, 5, 1.0), lane(EMBED, 0, nodes=0)]))


def test_the_lane_of_one_node_is_shown_if_something_waits_in_it():
    idle, busy = (snapshot([instance()], [], [lane(DIRECT, depth)]) for depth in (0, 1))
    assert DIRECT not in printed(idle)
    assert DIRECT in printed(busy)


@pytest.mark.parametrize(
    ("prompt_tokens", "cached_tokens", "said"),
    [(None, None, "-"), (0, 0, "-"), (9, None, "-"), (9, 0, "0%"), (1_000, 996, "100%"), (3, 9, "100%")],
)
def test_how_much_of_all_prompts_came_from_the_cache(prompt_tokens, cached_tokens, said):
    text = printed(snapshot([instance(prompt_tokens=prompt_tokens, cached_tokens=cached_tokens)], [], []))
    (row,) = [line.split() for line in text.splitlines() if line.startswith("local@mini-7 ")]
    assert row[3:8] == ["3", "5", "31.2", said, "0.4s"]


def test_unknown_figures_are_shown_as_unknown():
    text = printed(snapshot([instance(last_token_age=None)], [], [lane(CHAT, None, None, nodes=None)]))
    assert [CHAT, "?", "-", "?"] in [line.split() for line in text.splitlines()]
    assert "0.0s" not in text


def test_without_a_registry_node_it_is_said_how_to_start_one():
    text = printed(snapshot([], [], [lane(CHAT, 5, 1.0, nodes=None)]))
    assert NO_REGISTRY_NODE in text
    assert "celery -A fleet_worker worker -n registry@%h" in text
    assert [CHAT, "5", "1.0s", "?"] in [line.split() for line in text.splitlines()]
    assert UNSERVED not in text


def test_without_any_lane_it_is_said_why():
    assert NO_LANES in printed(snapshot([instance()], [], []))


def test_a_model_that_a_working_server_lacks_is_marked():
    one = instance()
    text = printed(snapshot([one], [model("there", one), model("gone", one, ready=False)], []))
    assert "there, gone (not there)" in text


def test_text_of_other_hosts_moves_no_cursor_and_is_no_markup():
    odd = instance(node := "\x1b[2Jlocal", reason="[red]\r\nrm -rf[/red]", status="degraded")
    text = printed(snapshot([odd], [model("[bold]m", odd)], [lane("llm.fleet.\x9b2J", 1)]), 120)
    assert node not in text
    assert "[red]??rm -rf[/red]" in text
    assert "[bold]m" in text
    assert text.isascii()
    assert text.replace("\n", "").isprintable()


@pytest.mark.parametrize(
    ("seconds", "said"),
    {0: "0.0s", 9.94: "9.9s", 10: "10s", 119: "119s", 120: "2min", 3600: "60min", 7200: "2h", 1e6: "12d"}.items(),
)
def test_ages_are_short(seconds, said):
    text = printed(snapshot([], [], [lane(CHAT, 1, seconds)]))
    assert [CHAT, "1", said, "1"] in [line.split() for line in text.splitlines()]
