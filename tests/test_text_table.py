"""Columns of text."""

from fulllora_dist.core.text_table import text_table


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("attack", "n", "%"), ("clean", "1000", "9.5"), ("pgd20x5", "", "")]
    assert text_table(rows).splitlines() == ["attack   n     %", "clean    1000  9.5", "pgd20x5"]
    assert text_table(rows, "lr").splitlines() == ["attack      n    %", "clean    1000  9.5", "pgd20x5"]
