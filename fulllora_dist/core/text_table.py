"""Text tables for the output of commands."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """Format rows as aligned columns, two spaces apart, without trailing spaces.

    Args:
        rows: cells of each row, the header first; all of the same length.
        align: "l" or "r" for each column; the last letter applies to all further columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), align[-1])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=False)
        ).rstrip()
        for row in rows
    )
