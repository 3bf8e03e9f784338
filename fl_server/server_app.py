"""The coordinator as a Flower ServerApp: in a simulation with what the caller holds, deployed from its home."""

from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_clients.contract import SignedContract
from fl_server import deployed_job, job_folder
from fl_server.coordinator import Coordinator, Outcome, Watch
from privacy.identity import SigningIdentity


def server_app(
    signed: SignedContract,
    identity: SigningIdentity,
    keep: Callable[[Callable[[], Outcome]], None],
    watch: Watch,
    timeout_s: float,
) -> ServerApp:
    """A ServerApp that drives one job and hands its run to `keep`."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        del context
        keep(Coordinator(grid=grid, signed=signed, identity=identity, watch=watch, timeout_s=timeout_s).run)

    return app


app = ServerApp()


@app.main()
def _main(grid: Grid, context: Context) -> None:
    """`xinyi-server job start` starts this; run config: `job` (its number), `use` (number of the run)."""
    home = job_folder.server_home(None)
    deployed_job.drive(grid, home, str(context.run_config["job"]), int(str(context.run_config["use"])))
