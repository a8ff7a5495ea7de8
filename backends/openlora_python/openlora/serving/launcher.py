"""`openlora serve`: the parent of tritonserver, the engine, the fetcher and the gateway. Watches, restarts, says if all
is well.

A stub that dies leaves its clients hanging and Triton does not notice, so the launcher does: it ends tritonserver at
once, which closes every hanging connection, and starts a new one with new keys.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import msgspec
import zmq

from ..adapters.catalog import Catalog
from ..adapters.catalog_rows import BaseFacts
from ..adapters.ingest import sync_directory
from ..adapters.ingest_worker import IngestResult
from ..adapters.printable import printable
from ..attribution.chain_check import anchored_head
from ..attribution.custody import settle_custody
from ..attribution.witness_client import WitnessAddress, WitnessClient
from ..config import RUN_DIR_VARIABLE, RunConfig, Settings
from ..engine.wire import EngineConfig, Report
from ..errors import OpenLoRAError, Unavailable
from ..network.deployment import Deployment
from ..processes.kept_process import Command, KeptProcess
from ..processes.parent_watch import remove_shared_memory
from .base_model import read_base_model
from .engine_options import engine_options
from .fetch_wire import FetcherConfig
from .health import HealthServer
from .seal import write_run_key
from .state_dir import StateDir
from .stubs import Stubs
from .tritonserver import build_backend_directory, find_tritonserver, server_command, server_environment

TICK_SECONDS = 0.1
STOP_SECONDS = 8.0  # tritonserver ends requests after 5, and may then hang on its way out
START_SECONDS = 120.0  # for tritonserver to load its models
PORT_SECONDS = 20.0  # how long ports of a server that was just killed may stay taken

log = logging.getLogger("openlora")


class Launcher:
    """One run of the server. `run()` returns when it was told to stop, or raises when it gave up."""

    def __init__(self, settings: Settings, on_ready: Callable[[RunConfig], None]) -> None:
        self._on_ready = on_ready
        self._state = StateDir(settings.state_dir.resolve())
        self._lock = self._state.lock()
        self._state.prepare()
        self._install = find_tritonserver()
        if settings.network.deployment is not None:
            Deployment.load(settings.network.deployment)  # says so here if it can't be one
        _settle_custody(self._state.root, settings)
        self._run = self._make_run(settings)
        self._run.save()
        self._base = BaseFacts(str(self._run.base.path), self._run.base.digest, settings.engine.max_rank)
        self._backends = self._run.run_dir / "backends"
        build_backend_directory(self._install, self._backends)
        self._server_starts, self._server_started_at = 0, 0.0
        policy = settings.restart
        logs = self._run.log_dir
        self._engine = KeptProcess("engine", self._engine_command, logs / "engine.log", policy)
        self._fetcher = KeptProcess("fetcher", self._fetcher_command, logs / "fetcher.log", policy)
        self._server = KeptProcess("tritonserver", self._server_command, logs / "tritonserver.log", policy)
        self._gateway = KeptProcess("gateway", self._gateway_command, logs / "gateway.log", policy)
        self._kept = [self._engine, self._fetcher, self._server, self._gateway]
        self._chain: KeptProcess | None = None
        if settings.network.deployment is not None:
            # Serving never waits for a chain: this one is started again for ever.
            self._chain = KeptProcess("network", self._network_command, logs / "network.log", policy, gives_up=False)
            self._kept.append(self._chain)
        self._stubs = Stubs()
        self._engine_ready = self._fetcher_ready = False
        self._engine_steps, self._engine_moved_at = -1, time.monotonic()
        self._models_ready = self._gateway_ready = self._announced = False
        self._adapters_fault = "being read"
        self._stopping = False

    # --- one life ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT.

        Raises:
            Unavailable: a process died too often, or a port is taken.
        """
        self._wait_for_ports()
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._ask_to_stop)
        reports = zmq.Context.instance().socket(zmq.PULL)
        reports.bind(self._run.socket("status"))
        health = HealthServer(self._run.settings.host, self._run.settings.health_port, self.faults)
        try:
            self._start_reading_adapters()
            for process in self._kept:
                process.start()
            while not self._stopping:
                self._turn(reports)
        finally:
            self._shut_down()
            health.close()
            reports.close(linger=0)

    def faults(self) -> dict[str, str]:
        """What keeps this node from being ready, part by part."""
        found = {"launcher": "stopping"} if self._stopping else {}
        if self._adapters_fault:
            found["adapters"] = self._adapters_fault
        if not self._engine_ready:
            found["engine"] = "starting"
        if not self._fetcher_ready:
            found["fetcher"] = "starting"
        if not self._models_ready:
            found["tritonserver"] = "starting"
        if not self._gateway_ready:
            found["gateway"] = "starting"
        found.update(self._stubs.faults())
        return found

    def _turn(self, reports: zmq.Socket) -> None:
        """Wait a moment for news, then act on all of it."""
        poller = zmq.Poller()
        poller.register(reports, zmq.POLLIN)
        watched = [process for process in self._kept if process.running]
        for process in watched:
            poller.register(process.pidfd, zmq.POLLIN)
        if self._server.running:
            self._stubs.look(self._server.pid)
        for pidfd in self._stubs.pidfds:
            poller.register(pidfd, zmq.POLLIN)
        ready = dict(poller.poll(TICK_SECONDS * 1000))
        while reports.poll(0):
            self._hear(msgspec.msgpack.decode(reports.recv(), type=Report))
        for process in watched:
            if process.pidfd in ready:
                self._buried(process)
        if died := self._stubs.died(ready):
            self._end_server(f"the {died} died")
        self._check_hangs()
        self._start_what_is_due()
        self._look_for_readiness()

    def _ask_to_stop(self, number: int, frame: object) -> None:
        self._stopping = True

    # --- news --------------------------------------------------------------------------------------------------------

    def _hear(self, report: Report) -> None:
        now = time.monotonic()
        if report.name == "engine":
            if report.pid != self._engine.pid:
                return  # the last words of one that is gone
            self._engine_ready = report.ready
            if report.stats and (report.stats.steps != self._engine_steps or not _has_work(report)):
                self._engine_steps, self._engine_moved_at = report.stats.steps, now
            return
        if report.name == "fetcher":
            self._fetcher_ready = report.pid == self._fetcher.pid
            return
        self._stubs.hear(report, self._server.pid)

    def _buried(self, process: KeptProcess) -> None:
        """A child of ours ended, or was killed."""
        status = process.reap()
        spent = process is self._engine and status == 0  # it answered all that it took, and asks to be replaced
        log.log(logging.INFO if spent else logging.ERROR, "%s ended with status %d", process.name, status)
        if process is self._engine:
            self._engine_ready = False
        elif process is self._fetcher:
            self._fetcher_ready = False
        elif process is self._server:
            self._models_ready = False
            self._stubs.drop()
        elif process is self._gateway:
            self._gateway_ready = False
        if spent:
            process.replace()
        else:
            process.plan_restart()

    def _end_server(self, why: str) -> None:
        """Whoever hangs on it is told by its end, and a new one starts."""
        log.error("%s: restarting tritonserver", why)
        self._server.kill()
        self._buried(self._server)

    def _check_hangs(self) -> None:
        now, limit = time.monotonic(), self._run.settings.engine.hang_seconds
        if self._engine.running and self._engine_ready and now - self._engine_moved_at > limit:
            log.error("the engine took no step for %.0f s with work queued: restarting it", limit)
            self._engine_ready = False
            self._engine_moved_at = now
            self._engine.kill()
        if not self._server.running:
            return
        if silent := self._stubs.silent(limit):
            self._end_server(f"the {silent} said nothing for {limit:.0f} s")
        elif not self._stubs.complete and now - self._server_started_at > START_SECONDS:
            self._end_server(f"the models did not start in {START_SECONDS:.0f} s")

    def _start_what_is_due(self) -> None:
        for process in self._kept:
            if process.due is not None and process.due <= time.monotonic():
                process.start()
                if process is self._engine:
                    self._engine_moved_at = time.monotonic()

    def _look_for_readiness(self) -> None:
        settings = self._run.settings
        if not self._models_ready and self._stubs.complete:
            self._models_ready = _answers(f"http://{settings.host}:{settings.http_port}/v2/models/openlora/ready")
        if not self._gateway_ready and self._gateway.running:
            self._gateway_ready = _answers(f"http://{settings.host}:{settings.gateway_port}/health")
        if not self._announced and not self.faults():
            self._announced = True
            self._on_ready(self._run)

    # --- commands ----------------------------------------------------------------------------------------------------

    def _make_run(self, settings: Settings) -> RunConfig:
        root = self._state.root
        return RunConfig(
            settings=settings,
            base=read_base_model(settings.model.resolve(), root / "digests.json", settings.engine.max_model_len),
            state_dir=root,
            socket_dir=self._state.make_socket_dir(),
            shm_prefix=f"openlora_{sha256(str(root).encode()).hexdigest()[:12]}_",
            launcher_pid=os.getpid(),
        )

    def _engine_command(self) -> Command:
        engine, run = self._run.settings.engine, self._run
        config = EngineConfig(
            kind=engine.kind,
            model_dir=str(run.base.path),
            base_digest=run.base.digest,
            socket=run.socket("engine"),
            status_socket=run.socket("status"),
            launcher_pid=run.launcher_pid,
            threads=engine.threads,
            options=engine_options(run),
        )
        file = run.run_dir / "engine.json"
        file.write_bytes(msgspec.json.encode(config))
        # Its threads spin at the end of a phase for the others of a step, not for one that the system put off: the
        # core is tritonserver's and its stubs' then. With 64 streams 30000 cost 4 % of the rate, 200000 8 %.
        environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
        if engine.python is not None:  # another interpreter finds our package here and its libraries at home
            environment["PYTHONPATH"] = str(self._backends / "openlora_python")
        python = str(engine.python or sys.executable)
        return Command([python, "-m", "openlora.engine.host", str(file)], environment)

    def _fetcher_command(self) -> Command:
        run = self._run
        config = FetcherConfig(
            state_dir=str(run.state_dir),
            base=self._base,
            limits=run.settings.sources,
            socket=run.socket("fetcher"),
            status_socket=run.socket("status"),
            launcher_pid=run.launcher_pid,
        )
        file = run.run_dir / "fetcher.json"
        file.write_bytes(msgspec.json.encode(config))
        return Command([sys.executable, "-m", "openlora.serving.fetcher", str(file)], dict(os.environ))

    def _server_command(self) -> Command:
        remove_shared_memory(self._run.shm_prefix)
        write_run_key(self._run.run_key_path)  # tickets and chunks of before are worth nothing now
        self._server_starts += 1
        self._server_started_at = time.monotonic()
        prefix = f"{self._run.shm_prefix}{self._server_starts}_"
        return Command(
            server_command(self._install, self._run, self._backends, prefix),
            server_environment(self._install, self._run),
        )

    def _network_command(self) -> Command:
        environment = {**os.environ, RUN_DIR_VARIABLE: str(self._run.run_dir)}
        return Command([sys.executable, "-m", "openlora.network.follow"], environment)

    def _gateway_command(self) -> Command:
        environment = {**os.environ, RUN_DIR_VARIABLE: str(self._run.run_dir)}
        return Command([sys.executable, "-m", "openlora_gateway"], environment)

    # --- beginning and end -------------------------------------------------------------------------------------------

    def _start_reading_adapters(self) -> None:
        """Tell the catalog which base model this is, then bring the adapters in beside everything else."""
        settings, run = self._run.settings, self._run
        base = self._base
        with Catalog(run.catalog_path) as catalog:
            catalog.set_base(base)

        read_so_far = itertools.count(1)

        def tell(event: object) -> None:
            if isinstance(event, IngestResult):
                self._adapters_fault = f"being read, {next(read_so_far)} done"

        def read() -> None:
            try:
                for result in sync_directory(settings.adapters, run.state_dir, base, tell, settings.sources):
                    if result.status in ("quarantined", "failed"):
                        log.warning("adapter %s is %s: %s", printable(result.name), result.status, result.reason)
            except OpenLoRAError as error:
                log.error("adapters: %s", error)
                self._adapters_fault = str(error)
            else:
                self._adapters_fault = ""

        threading.Thread(target=read, name="adapters", daemon=True).start()

    def _wait_for_ports(self) -> None:
        settings = self._run.settings
        until = time.monotonic() + PORT_SECONDS
        for port in (
            settings.http_port,
            settings.grpc_port,
            settings.metrics_port,
            settings.health_port,
            settings.gateway_port,
        ):
            while not _is_free(settings.host, port):
                if time.monotonic() > until:
                    raise Unavailable(f"port {port} on {settings.host} is taken by another program")
                time.sleep(TICK_SECONDS)

    def _shut_down(self) -> None:
        # The engine first: a tritonserver that is told to stop refuses the next chunk of every answer and waits for
        # its end; without an engine generation ends all of them at once, in the journal and towards their clients.
        for process in (self._engine, self._fetcher, self._gateway, self._server, self._chain):
            if process is None:
                continue
            try:
                process.stop(STOP_SECONDS)
            except OSError as error:
                log.error("stopping %s: %s", process.name, error)
        self._stubs.drop()
        remove_shared_memory(self._run.shm_prefix)
        shutil.rmtree(self._run.socket_dir, ignore_errors=True)
        shutil.rmtree(self._run.run_dir, ignore_errors=True)


def _has_work(report: Report) -> bool:
    return bool(report.stats and (report.stats.running or report.stats.waiting))


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _settle_custody(state_dir: Path, settings: Settings) -> None:
    """A receipt log that was copied or restored must not sign what contradicts what it signed before."""
    clients = [WitnessClient(WitnessAddress.parse(one)) for one in settings.attribution.witnesses]
    observers = [client.newest for client in clients]
    if settings.network.deployment is not None:
        observers.append(anchored_head(state_dir))
    try:
        settle_custody(state_dir, observers)
    finally:
        for client in clients:
            client.close()
