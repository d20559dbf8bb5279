"""The README's table of claims, made from the published results. Run with --write to renew it."""

from pathlib import Path
import sys

from gradwise import catalog

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- claims:begin -->", "<!-- claims:end -->"


def table() -> str:
    """One row per paper with published figures: verdict, verdict per setting, seeds."""
    rows = ["| paper | claim, as tested | verdict | by setting | seeds |", "| --- | --- | --- | --- | --- |"]
    for record in catalog.records():
        published = catalog.published(record.key)
        if published is None:
            continue
        verdict = published["verdict"]
        settings = "; ".join(f"{name}: {said}" for name, said in verdict["by_setting"].items())
        link = f"[`{record.id}`](docs/{record.family}/{record.id}.md)"
        cells = (link, published["statement"], f"**{verdict['overall']}**", settings, str(len(published["seeds"])))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def renewed(text: str) -> str:
    """The README's ``text`` with the present table."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table()}\n{END}{tail}"


if __name__ == "__main__" and "--write" in sys.argv:
    README.write_text(renewed(README.read_text()))
