"""MkDocs hooks: pages show the published figures and the catalogue as they are, never a copy of them."""

from typing import Any

from gradwise import catalog, reporting


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Append the measured figures to a paper's page and fill the catalogue table."""
    _, _, name = page.file.src_uri.removesuffix(".md").partition("/")
    if any(name == record.id for record in catalog.records()):
        return f"{markdown}\n\n{reporting.paper_page(name, measured_only=True)}"
    if page.file.src_uri == "catalogue.md":
        return markdown.replace("<!-- catalogue -->", _catalogue())
    return markdown


def _catalogue() -> str:
    rows = ["| id | family | title | status |", "| --- | --- | --- | --- |"]
    for record in catalog.records():
        link = f"[{record.id}]({record.family}/{record.id}.md)" if record.status == "working" else record.id
        rows.append(f"| {link} | {record.family} | {record.title} | {record.status} |")
    return "\n".join(rows)
