"""`python -m openlora_gateway`: serves the run that the launcher named in the environment."""

from __future__ import annotations

import sys

import uvicorn

from openlora.config import RunConfig
from openlora.errors import OpenLoRAError
from openlora.processes.parent_watch import exit_with

from .app import create_app

SHUTDOWN_SECONDS = 2


def main() -> int:
    try:
        run = RunConfig.load()
        exit_with(run.launcher_pid)
        uvicorn.run(
            create_app(run),
            host=run.settings.host,
            port=run.settings.gateway_port,
            access_log=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        )
    except OpenLoRAError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
