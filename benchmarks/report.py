"""Write what the rows in `results/` say: the measured parts of the documents, and one HTML page.

    python benchmarks/report.py

The page has the same tables, plots, and every row; a browser opens it without a network.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from guide_tables import guide_of
from page import page
from results import ROOT
from tables import RESULTS, Table, gradients_of, tables_of

BEGIN, END = "<!-- measured: written by benchmarks/report.py -->", "<!-- end of measured -->"
DOCUMENTS: dict[Path, Callable[[Path], list[Table]]] = {
    ROOT / "README.md": tables_of,
    ROOT / "docs" / "gradients.md": gradients_of,
    ROOT / "IMPLEMENTATION_GUIDE.md": guide_of,
}


def with_measured(document: str, tables: Sequence[Table]) -> str:
    """The document's text with its measured part made anew."""
    body = "\n\n".join(table.markdown() for table in tables)
    changed, count = re.subn(
        f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: f"{BEGIN}\n{body}\n{END}", document, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"document: expected one part between {BEGIN} and {END}, got {count}")
    return changed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="report.py", description="Tables and plots from the rows of benchmarks.")
    parser.add_argument("--page", type=Path, default=Path("report.html"), help="the HTML page (report.html)")
    parser.add_argument("--results", type=Path, help="a folder of other rows, from which only the page is written")
    args = parser.parse_args(argv)
    folder = args.results or RESULTS
    if not any(folder.glob("*.csv")):
        parser.error(f"--results: expected a folder with CSV files, got {folder}")
    if args.results is None:
        for path, tables in DOCUMENTS.items():
            path.write_text(with_measured(path.read_text(), tables(folder)))
    args.page.write_text(page(folder))
    print(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
