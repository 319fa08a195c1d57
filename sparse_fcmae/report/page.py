"""The page itself: one HTML file with its style, its script and what it shows, which needs nothing else."""

import base64
import time
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from sparse_fcmae.report.record import Record, RunReader, as_json
from sparse_fcmae.runtime.files import write_atomic

PAGE = "report.html"
MARK = "<!-- sparse-fcmae report -->"  # in the second line of such a page


def record_of(readers: list[RunReader], live: bool = False) -> Record:
    """All that a page shows. live: whether it is renewed while it is looked at."""
    records = [reader.read() for reader in readers]
    for record, name in zip(records, names_of([reader.folder for reader in readers]), strict=True):
        record["name"] = name
    return {"live": live, "made": time.strftime("%Y-%m-%d %H:%M:%S"), "runs": records}


def names_of(folders: list[Path]) -> list[str]:
    """What runs are called: by the last part of their paths, or the whole where that is not enough."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(map(str, folders))


def write_page(record: Record, out: Path) -> None:
    """Writes the page, atomically."""
    write_atomic(out, lambda path: path.write_bytes(page_of(record)))


def page_of(record: Record) -> bytes:
    """The whole page, with its style, its script and what it shows, in UTF-8."""
    parts = {name: files(__package__).joinpath(f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    page = Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))
    title = escape(", ".join(run["name"] for run in record["runs"]))
    text = page.substitute(parts, mark=MARK, title=title, data=as_json(record))
    return text.encode("utf-8", errors="backslashreplace")  # as a name may have bytes that are no text


def in_page(data: bytes, media_type: str) -> str:
    """The address of a picture that is part of the page."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
