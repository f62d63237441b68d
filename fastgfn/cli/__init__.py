"""`fastgfn train|sample|bench|lab|info`. Bad input is one line on stderr, code 2; all else is a defect."""

import sys

from fastgfn import checks


def main() -> None:
    """Entry point of the `fastgfn` command."""
    try:
        try:
            from fastgfn.cli.commands import app
        except ImportError as error:
            package = (error.name or "").split(".")[0]
            if package not in ("typer", "rich"):
                raise
            checks.missing_package("fastgfn", package, "run `pip install 'fastgfn[cli]'`")
        app()
    except checks.USER_ERRORS as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
