"""`tsp server` and `tsp ui`: the tracking server of a team, and the store of this folder in a browser."""

import sys
from pathlib import Path

import click

from tsp.exits import exit_codes
from tsp.options import Command


@click.command(cls=Command)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(1, 65535), default=5000, show_default=True, help="To listen on.")
@click.option(
    "--store",
    metavar="URI",
    help="sqlite:///FILE.db or postgresql://USER@HOST/DATABASE; with a password only in MLFLOW_BACKEND_STORE_URI "
    "[mlruns/server/mlflow.db].",
)
@click.option("--artifacts", metavar="DIR", help="Keeps all files of runs and models [mlruns/server/artifacts].")
@click.option("--allowed-hosts", metavar="a,b", help="Names by which clients call it [what this machine is called].")
@click.option("--auth/--no-auth", default=None, help="Ask users who they are [unless only this machine reaches it].")
@click.option(
    "--admin-password-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Password of the first user, admin [made up in mlruns/server/admin-password].",
)
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def server(
    host: str,
    port: int,
    store: str | None,
    artifacts: str | None,
    allowed_hosts: str | None,
    auth: bool | None,
    admin_password_file: Path | None,
    debug: bool,
) -> None:
    """Run a tracking server for a team: jobs, files and the model registry, over HTTP."""
    with exit_codes(debug=debug):
        from tsp.tracking.server import serve

        code = serve(
            Path.cwd(),
            host=host,
            port=port,
            store=store,
            artifacts=artifacts,
            allowed_hosts=allowed_hosts.split(",") if allowed_hosts else (),
            auth=auth,
            admin_password_file=admin_password_file,
        )
        sys.exit(code)


@click.command(cls=Command)
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=5000,
    show_default=True,
    help="Of the web UI, on this machine only.",
)
@click.option("--writable", is_flag=True, help="Let notes, tags and the rest be changed; else the store is only read.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def ui(port: int, writable: bool, debug: bool) -> None:
    """Look at the store in this folder with MLflow's web UI."""
    with exit_codes(debug=debug):
        from tsp.tracking.ui import serve_ui

        sys.exit(serve_ui(Path.cwd(), port, writable=writable))
