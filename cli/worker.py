"""`whetstone worker`: train the trials of a server's studies, one after another."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from cli import remote, settings
from hpo.errors import Fault, Invalid


def worker(
    url: remote.Url = None,
    token: remote.Token = None,
    device: Annotated[
        str,
        typer.Option(
            help="auto (a CUDA device of its own, or the CPU), cuda (never the CPU), cuda:N, cpu.", show_default=True
        ),
    ] = "auto",
    name: Annotated[
        str | None,
        typer.Option(help="Name among the workers; must be its own. Default: host, process and a few digits."),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="CPU threads of a trial. Default: one a core; share them between CPU workers."
        ),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Train one trial (waiting for it if need be), then exit.")
    ] = False,
) -> None:
    """Train trials of the server's running studies, until Ctrl-C or SIGTERM hands the current one back.

    Data, checkpoints and caches are where WHETSTONE_DATA, WHETSTONE_ARTIFACTS and WHETSTONE_HOME say. Exit codes: 0
    stopped as asked, 1 refused or unfit (one line says why), 3 the GPU gave up, 4 a trial was stuck; start it again
    after 3 and 4.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages, read by torch when it is loaded
    from workers.run import run

    chosen = settings.load()
    where, secret = settings.address(chosen, url, token, role="worker")
    try:
        code = run(
            where,
            secret,
            name=name,
            device=device,
            data_root=chosen.data_root,
            home=chosen.home_dir,
            artifacts=chosen.artifacts_root,
            threads=threads,
            once=once,
        )
    except ModuleNotFoundError as error:
        fault = f"{error.name} is not installed: a worker needs `pip install 'whetstone[worker]'`"
        raise Invalid([Fault("", fault)], "this installation") from None
    raise typer.Exit(code)
