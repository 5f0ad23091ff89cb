"""What commands print: tables on a terminal of any width, one line per row anywhere else. And what they read."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from fleet_worker.errors import InvalidRequest

FITS_A_TABLE = 72
"""Columns of a terminal; in a narrower one each row of a table becomes a paragraph."""
UNLIMITED = 10_000
"""Columns of a file or a pipe: nothing is folded there, so that every row is one line."""


def output() -> Console:
    """Return a console for standard output that prints text as it is: no markup, no emoji."""
    console = Console(highlight=False, emoji=False, markup=False)
    if not console.is_terminal:
        console.width = UNLIMITED
    return console


def printable(text: str) -> str:
    """Return the text on one line, without control characters: other hosts wrote it, and it must not move a cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)


def cell(text: str, style: str = "") -> Text:
    return Text(printable(text), style)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class Listing:
    """Rows of cells: a table, or a paragraph for each row where a table does not fit. No cell is cut off."""

    def __init__(
        self,
        *headers: str,
        numbers: tuple[str, ...] = (),
        whole: tuple[str, ...] = (),
        spare: tuple[str, ...] = (),
        fits: int = FITS_A_TABLE,
    ) -> None:
        """`numbers` names the columns to align to the right, `whole` those that are never folded. A terminal of at
        least `fits` columns gets a table; without the `spare` columns, one after the other, if it is too wide."""
        self._fits = fits
        self._spare = spare
        self._headers = headers
        self._numbers = numbers
        self._whole = whole
        self._rows: list[tuple[Text, ...]] = []

    def add(self, *cells: Text) -> None:
        self._rows.append(cells)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        if options.max_width >= self._fits:
            yield self._widest_table(console, options)
        else:
            for row in self._rows:
                yield from self._paragraph(row)

    def _widest_table(self, console: Console, options: ConsoleOptions) -> Table:
        """Return the table with all columns that fit; if even the spare ones make no difference, what is long is
        folded."""
        table = self._table(self._headers)
        for number in range(1, len(self._spare) + 1):
            if console.measure(table, options=options.update(max_width=UNLIMITED)).maximum <= options.max_width:
                break
            table = self._table([each for each in self._headers if each not in self._spare[:number]])
        return table

    def _table(self, headers: Sequence[str]) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for header in headers:
            justify: JustifyMethod = "right" if header in self._numbers else "left"
            name = header.replace(" ", "\n") if header in self._numbers else header
            table.add_column(name, justify=justify, no_wrap=header in self._whole, overflow="fold")
        for row in self._rows:
            table.add_row(*(each for header, each in zip(self._headers, row, strict=True) if header in headers))
        return table

    def _paragraph(self, row: tuple[Text, ...]) -> Iterator[RenderableType]:
        title, *cells = row
        yield title
        below = Table.grid(padding=(0, 2, 0, 0))
        below.add_column(no_wrap=True)
        below.add_column(overflow="fold")
        for header, each in zip(self._headers[1:], cells, strict=True):
            if each.plain:
                below.add_row(f"  {header}", each)
        yield below


def standard_input() -> str:
    """Return all of it. Raises `InvalidRequest` if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise InvalidRequest("standard input is not UTF-8 text") from None


def lines(text: str) -> list[str]:
    """Split at line ends only: `str.splitlines` also splits at U+2028 and others, which belong to a text."""
    return [line.rstrip("\r") for line in text.removesuffix("\n").split("\n")]
