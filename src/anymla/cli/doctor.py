"""doctor."""

from __future__ import annotations

import typer

from anymla.cli.options import Json, app, out, print_json


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, fast dtypes, free disk, optional packages and engines. Fetches nothing."""
    from anymla.doctor import examine, pip_line

    found = examine()
    if as_json:
        print_json(found.to_dict())
    else:
        from anymla.report.doctor import doctor_table

        out.print(doctor_table(found, {extra: pip_line(extra) for extra in found.extras}))
        if any(found.extras.values()):
            out.print("In a clone of the project, '.[tune]' takes the place of 'anymla[tune]'.")
        out.print("Next: anymla demo" if not found.missing else "Something that anymla needs is missing: see above.")
    if found.missing:
        raise typer.Exit(1)
