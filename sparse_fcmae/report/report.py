"""The command `report`: the page of a run, or of several beside each other."""

from pathlib import Path
from typing import Any

from sparse_fcmae.report.config import ReportConfig
from sparse_fcmae.report.page import MARK, PAGE, in_page, record_of, write_page
from sparse_fcmae.report.record import RunReader
from sparse_fcmae.report.watch import watch
from sparse_fcmae.runtime.errors import UserError
from sparse_fcmae.runtime.files import check_writable
from sparse_fcmae.runtime.options import check, check_given, check_paths, keywords_of, paths_of


@keywords_of(ReportConfig)
def report(options: dict[str, Any]) -> str:
    """Writes a page that needs nothing else, and returns where it is; with `watch` serves it until Ctrl-C.

    Raises UserError for what the user can put right.
    """
    check_paths(ReportConfig, options)
    check_given(options, {"runs": "the folder of a run"})
    config = ReportConfig(**options)
    check(config)
    folders = list(map(Path, paths_of(config.runs)))
    if len(set(folders)) < len(folders):
        raise UserError("`runs` names a folder twice: name each once")
    readers = [RunReader(folder, in_page) for folder in folders]
    out = Path(config.out) if config.out else folders[0] / PAGE
    check_page(out)
    if config.watch:
        watch(readers, config.port)
        for reader in readers:
            reader.keep_by(in_page)
    write_page(record_of(readers), out)
    return f"report: {out}"


def check_page(out: Path) -> None:
    """Raises UserError where a page can't be written, or would replace what is none."""
    if out.exists() and not out.is_dir():
        with out.open(encoding="utf-8", errors="replace") as file:
            if MARK not in (file.readline(), file.readline().strip()):
                raise UserError(f"`out` {out} is a file, and no page of a run: choose another")
    check_writable(out)
