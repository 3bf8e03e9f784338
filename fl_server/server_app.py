"""The coordinator as a Flower ServerApp: the contract and the identity come from files that the run config names."""

from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_clients.contract import SignedContract
from fl_server.coordinator import Coordinator, Outcome, Watch
from fl_server.run_store import write_outcome
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
    """`flwr run` with run config `contract` (JSON file), `identity` (key file) and `out` (directory of the result)."""
    signed = SignedContract.model_validate_json(Path(str(context.run_config["contract"])).read_text(encoding="utf-8"))
    identity = SigningIdentity.load(Path(str(context.run_config["identity"])))
    outcome = Coordinator(grid=grid, signed=signed, identity=identity).run()
    write_outcome(Path(str(context.run_config["out"])), signed, outcome)
