"""`openlora devnet`: a chain of this machine's own (anvil), with the contracts on it and keys for every role.

anvil keeps everything in memory and would lose it to a SIGKILL, so its state is dumped after each change, whole files
only. A chain that was lost all the same is deployed anew, which is allowed here alone.
"""

from __future__ import annotations

import ctypes
import gzip
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eth_account.signers.local import LocalAccount

from ..errors import ChainMismatch, OpenLoRAError, Unavailable
from ..processes.lock_file import lock_holder, locked
from .contracts import Contracts, contracts_of
from .deploy import DeploymentPlan, deploy
from .deployment import DEVNET_CHAIN_ID, Deployment, connect, is_loopback
from .parameters import Parameters
from .rpc import reaching
from .signer import DEVNET_MNEMONIC, devnet_account, write_key
from .tools import find_tool
from .transactions import rpc_url, send

if TYPE_CHECKING:
    from web3 import Web3

HOST = "127.0.0.1"
ROLES = (
    "admin",
    "publisher",
    "attestor-1",
    "attestor-2",
    "attestor-3",
    "guardian",
    "operator",
    "owner-1",
    "owner-2",
    "owner-3",
)
"""Accounts of anvil's mnemonic in this order. `operator` runs a node: owner, submitter and payee of its log."""

DEPLOYMENT_FILE = "deployment.json"
STATE_FILE = "chain.json"
LOCK_FILE = "devnet.pid"
READY_FILE = "ready"
TOKENS = 10**24  # to the operator
NOTICE_SECONDS = 5
DELAY_SECONDS = 2
THRESHOLD = 2
MAX_AGE_SECONDS = 3600
START_SECONDS = 20.0
STOP_SECONDS = 5.0
LOOK_SECONDS = 0.1
DUMP_PART = 0.1  # of the time, at most: a long chain is dumped less often
PR_SET_PDEATHSIG = 1

Progress = Callable[[str], None]


@dataclass
class DevnetOptions:
    """`block_seconds`: a block at least so often, so that time passes on the chain; 0 = only with transactions."""

    state_dir: Path
    port: int = 8545
    block_seconds: int = 10

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def deployment_file(self) -> Path:
        return self.state_dir / DEPLOYMENT_FILE

    def key_file(self, role: str) -> Path:
        return self.state_dir / "keys" / f"{role}.key"


def run_devnet(options: DevnetOptions, on_ready: Callable[[Deployment], None], progress: Progress) -> None:
    """Until SIGTERM or SIGINT.

    Raises:
        Unavailable: anvil is not installed, the port or the state directory is taken, or anvil ended.
        ChainMismatch: the deployment file there is about another chain than a devnet.
    """
    stopping = False

    def ask_to_stop(number: int, frame: object) -> None:
        nonlocal stopping
        stopping = True

    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, ask_to_stop)
    root = options.state_dir
    root.mkdir(parents=True, exist_ok=True)
    only_one = locked(root / LOCK_FILE, lambda pid: f"a devnet (pid {pid}) runs on {root} already")
    with only_one, _ready_file(root) as ready, _anvil(options) as process:
        web3 = _answering(process, options)
        deployment = ensure_deployed(web3, options, progress)
        keeper = _StateKeeper(web3, options.state_dir / STATE_FILE)
        keeper.keep()
        ready.write_text(f"{os.getpid()}\n")
        on_ready(deployment)
        try:
            while not stopping:
                if process.poll() is not None:
                    raise Unavailable(f"anvil ended with status {process.returncode}{_last_words(options)}")
                keeper.look()
                time.sleep(LOOK_SECONDS)
        finally:
            ready.unlink(missing_ok=True)
            if process.poll() is None:
                keeper.keep()


def ensure_deployed(web3: Web3, options: DevnetOptions, progress: Progress = lambda _: None) -> Deployment:
    """The deployment that is on this chain already, or else a new one.

    Raises:
        ChainMismatch: the file names another chain than a devnet of this machine: nothing is written over it.
    """
    file = options.deployment_file
    if file.exists():
        known = Deployment.load(file)
        with reaching(options.url):
            is_devnet = web3.eth.chain_id == DEVNET_CHAIN_ID and is_loopback(rpc_url(web3))
        if not (known.is_local_devnet and is_devnet):
            raise ChainMismatch(f"{file} is about chain {known.chain_id} at another place: no devnet replaces it")
        moved = known.model_copy(update={"rpc_url": options.url})
        try:
            moved.check(web3)
        except ChainMismatch as error:
            progress(f"the chain's state was lost ({error.message}); deploying anew")
        else:
            if moved != known:
                moved.save(file)
            return moved
    return _deploy_all(web3, options, progress)


def stop_devnet(state_dir: Path) -> int:
    """End the devnet of a state directory and wait until it is gone; its process id.

    Raises:
        Unavailable: none runs there, or it does not end.
    """
    pid = running_pid(state_dir)
    if pid is None:
        raise Unavailable(f"no devnet runs on {state_dir}")
    os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + 2 * STOP_SECONDS
    while running_pid(state_dir) == pid:
        if time.monotonic() > until:
            raise Unavailable(f"the devnet (pid {pid}) does not end")
        time.sleep(LOOK_SECONDS)
    return pid


def running_pid(state_dir: Path) -> int | None:
    """The devnet that holds this directory, if one does."""
    return lock_holder(state_dir / LOCK_FILE)


def devnet_lacks(state_dir: Path, pid: int) -> str:
    """What the devnet of that process waits for; "" = it is ready."""
    ready = running_pid(state_dir) == pid and (state_dir / READY_FILE).exists()
    return "" if ready else "chain and contracts"


def _deploy_all(web3: Web3, options: DevnetOptions, progress: Progress) -> Deployment:
    accounts = {role: devnet_account(index) for index, role in enumerate(ROLES)}
    for role, account in accounts.items():
        write_key(options.key_file(role), account)
    admin = accounts["admin"]
    plan = DeploymentPlan(
        notice_seconds=NOTICE_SECONDS,
        delay_seconds=DELAY_SECONDS,
        epoch_cap=TOKENS,
        threshold=THRESHOLD,
        publishers=[accounts["publisher"].address],
        attestors=[accounts[role].address for role in ROLES if role.startswith("attestor")],
        guardians=[accounts["guardian"].address],
        confirmations=0,  # one node, no re-orgs but those that somebody asks anvil for
    )
    deployment = deploy(web3, admin, plan, progress)
    _fill(web3, admin, accounts["operator"], contracts_of(web3, deployment), progress)
    deployment.save(options.deployment_file)
    return deployment


def _fill(web3: Web3, admin: LocalAccount, operator: LocalAccount, on: Contracts, progress: Progress) -> None:
    progress("minting tokens, publishing parameters")
    send(web3, admin, on.token.mint(operator.address, TOKENS))
    parameters = Parameters(
        schema=1,
        platform=admin.address,
        platform_ppm=100_000,
        node_ppm=300_000,
        adapter_ppm=300_000,
        data_ppm=200_000,
        base_ppm=100_000,
        max_age=MAX_AGE_SECONDS,
    )
    send(web3, admin, on.registry.publish_parameters(parameters.document))


class _StateKeeper:
    """Dumps the chain into a file when it has moved."""

    def __init__(self, web3: Web3, file: Path) -> None:
        self._web3 = web3
        self._file = file
        self._kept: bytes | None = None  # hash of the newest block that is in the file
        self._next = 0.0

    def look(self) -> None:
        if time.monotonic() < self._next:
            return
        try:
            if bytes(self._web3.eth.get_block("latest")["hash"]) != self._kept:
                self.keep()
        except (OSError, OpenLoRAError):
            pass  # a busy or ended anvil: the next look, or the one at the process, tells

    def keep(self) -> None:
        began = time.monotonic()
        with reaching(rpc_url(self._web3)):
            newest = bytes(self._web3.eth.get_block("latest")["hash"])
            answer = self._web3.provider.make_request("anvil_dumpState", [])
        if "result" not in answer:
            raise Unavailable(f"anvil gives no state: {answer.get('error')}")
        state = json.loads(gzip.decompress(bytes.fromhex(answer["result"][2:])))
        state["blocks"] = self._canonical(state["blocks"])
        draft = self._file.with_suffix(".new")
        with draft.open("w") as file:
            json.dump(state, file)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._file)
        self._kept = newest
        now = time.monotonic()
        self._next = now + (now - began) / DUMP_PART

    def _canonical(self, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Without those that others took the place of: anvil adds a genesis at each start, and keeps what a re-org
        threw out; of two blocks of one number it would load either."""
        counts = Counter(block["header"]["number"] for block in blocks)
        kept: list[dict[str, Any]] = []
        for block in blocks:
            header = block["header"]
            if counts[header["number"]] > 1:
                with reaching(rpc_url(self._web3)):
                    real = self._web3.eth.get_block(int(header["number"], 16))
                wanted = (real["parentHash"].to_0x_hex(), real["stateRoot"].to_0x_hex(), real["timestamp"])
                if (header["parentHash"], header["stateRoot"], int(header["timestamp"], 16)) != wanted:
                    continue
            kept.append(block)
        return kept


@contextmanager
def _ready_file(state_dir: Path) -> Iterator[Path]:
    """To be written when everything is there; gone before and after."""
    file = state_dir / READY_FILE
    file.unlink(missing_ok=True)
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def _anvil(options: DevnetOptions) -> Iterator[subprocess.Popen[bytes]]:
    """anvil on this state directory; gone afterwards, and with this process however that ends."""
    anvil = str(find_tool("anvil"))
    _wait_for_port(options.port)
    command = [anvil, "--host", HOST, "--port", str(options.port), "--chain-id", str(DEVNET_CHAIN_ID), "--silent"]
    command += ["--slots-in-an-epoch", "1", "--mnemonic", DEVNET_MNEMONIC, "--accounts", str(len(ROLES))]
    if options.block_seconds:
        command += ["--mixed-mining", "--block-time", str(options.block_seconds)]
    state = options.state_dir / STATE_FILE
    if state.exists():
        command += ["--load-state", str(state)]
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def leave_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    with (options.state_dir / "anvil.log").open("wb") as words:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=words,
            stderr=subprocess.STDOUT,
            preexec_fn=leave_with_parent,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answering(process: subprocess.Popen[bytes], options: DevnetOptions) -> Web3:
    web3 = connect(options.url)
    until = time.monotonic() + START_SECONDS
    while True:
        if process.poll() is not None:
            raise Unavailable(f"anvil ended with status {process.returncode}{_last_words(options)}")
        try:
            with reaching(options.url):
                web3.eth.get_block(0)
        except Unavailable:
            if time.monotonic() > until:
                raise
            time.sleep(LOOK_SECONDS / 5)
            continue
        return web3


def _wait_for_port(port: int) -> None:
    """That of a devnet that was killed is free in a moment. Another program that answered there would be taken for
    anvil."""
    until = time.monotonic() + STOP_SECONDS
    while True:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
                return
            except OSError:
                if time.monotonic() > until:
                    raise Unavailable(f"port {port} on {HOST} is taken by another program") from None
        time.sleep(LOOK_SECONDS)


def _last_words(options: DevnetOptions) -> str:
    words = (options.state_dir / "anvil.log").read_text(errors="replace").strip().splitlines()
    return f": {words[-1]}" if words else ""
