from pathlib import Path

from tenuto_trainer.settings import table

PAGE = Path(__file__).parents[3] / "docs" / "training.md"


def test_table_of_settings_is_that_of_the_dataclass():
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `") and "`--" in line]
    expected = table().splitlines()[2:]
    assert shown == expected, "paste the output of `python -m tenuto_trainer.settings` into docs/training.md"
