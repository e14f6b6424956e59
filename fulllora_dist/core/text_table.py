"""Tables of text, as every command prints them."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], align: str = "l") -> str:
    """Aligned columns, two spaces apart, without trailing spaces.

    Args:
        rows: cells of each row, the header's first; all of one length.
        align: "l" or "r" for each column; its last letter holds for all further ones.
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
