"""Adapters from an S3-compatible server on loopback, through the driver that users have."""

import shutil
import socket
import subprocess
import sys
import urllib.request
from dataclasses import replace

import pytest
import s3fs
from scripted_source import Fault, ScriptedSource
from tiny_models import make_adapter
from typer.testing import CliRunner

from openlora.adapters.commands import adapters_app
from openlora.adapters.fetch import DESCRIPTION_FILE, FetchArea, state_of
from openlora.adapters.ingest import ingest
from openlora.adapters.ingest_jobs import job_of
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.object_source import ObjectSource
from openlora.adapters.sources import SourceLimits, parse_uri

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
QUICK = SourceLimits(attempts=3, first_wait_seconds=0.005, longest_wait_seconds=0.02)
LOGIN = {"AWS_ACCESS_KEY_ID": "AKIATESTTESTTEST", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-test"}


@pytest.fixture(scope="module")
def poet(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "poet"
    make_adapter(base.path, folder, 1, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture(scope="module")
def store_url():
    """A moto server of its own; it tells its port, and ends with us."""
    script = (
        "import sys; from moto.server import ThreadedMotoServer\n"
        "server = ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False); server.start()\n"
        "print(server.get_host_and_port()[1], flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        server.stdin.close()


@pytest.fixture
def bucket(store_url, poet, monkeypatch):
    """`s3://adapters/poet`, and an environment in which the driver finds its server."""
    moto(store_url, "reset")
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", store_url)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    files = s3fs.S3FileSystem(skip_instance_cache=True)
    files.mkdir("adapters")
    for name in (CONFIG, WEIGHTS):
        files.pipe_file(f"adapters/poet/{name}", (poet / name).read_bytes())
    return files


def moto(url, command, data=b""):
    request = urllib.request.Request(f"{url}/moto-api/{command}", data, {"Content-Type": "text/plain"}, method="POST")
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 200


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


def in_cache(state):
    return sorted(entry.name for entry in (state / "adapters").glob("*"))


def add(state, base, uri="s3://adapters/poet", **more):
    (result,) = ingest(state, base, [job_of(uri, None, **more)], limits=QUICK)
    return result


def test_an_adapter_arrives_from_a_bucket(state, base, poet, bucket):
    digest = adapter_manifest(poet).digest
    done = CliRunner().invoke(
        adapters_app,
        ["add", "s3://adapters/poet", "--digest", digest, "--model", base.path, "--state-dir", str(state)],
    )
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"poet version 1: added ({digest[:16]}…)\n"
    assert adapter_manifest(state / "adapters" / digest).digest == digest
    again = add(state, base)
    assert (again.change, again.version) == ("unchanged", 1)
    written = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    assert b"s3://adapters/poet" in written
    for secret in LOGIN.values():
        assert secret.encode() not in written


def test_an_interrupted_download_is_continued_with_the_same_bytes_only(state, base, poet, bucket):
    """The part is what a killed worker leaves; its note is what the store said of the files."""
    first = add(state, base)
    uri = parse_uri("s3://adapters/poet")
    source = ObjectSource(uri, QUICK)
    described = {name: source.describe(name) for name in (CONFIG, WEIGHTS)}
    assert source.describe("openlora.json") is None
    shutil.rmtree(state / "adapters" / first.digest)
    part = FetchArea(state / "adapters", QUICK).alone(uri)
    (part.directory / DESCRIPTION_FILE).write_text(state_of(described))
    (part.directory / WEIGHTS).write_bytes(bytes(5000))  # other bytes than the store's: whoever goes on shows it
    part.release(keep=True)
    result = add(state, base, digest=first.digest)
    assert (result.status, result.version) == ("quarantined", 0)
    assert "was asked for" in result.reason
    assert add(state, base, digest=first.digest).status == "ready"
    assert in_cache(state) == [".fetching", ".lock", first.digest]


def test_what_is_not_in_the_bucket_is_missing(state, base, bucket):
    for uri in ("s3://adapters/nobody", "s3://nowhere/poet"):
        result = add(state, base, uri)
        assert (result.status, result.version) == ("quarantined", 0)
        assert result.reason == f"{CONFIG} is missing at {uri}"
    assert list((state / "adapters" / ".fetching").iterdir()) == []


def test_a_login_without_rights_is_told_so_once(state, base, store_url, bucket):
    moto(store_url, "reset-auth", b"0")  # from here on the server checks who asks
    try:
        result = add(state, base)
    finally:
        moto(store_url, "reset-auth", b"1000000")
    assert (result.status, result.version) == ("failed", 0)
    assert "s3://adapters/poet/adapter_config.json: access denied" in result.reason
    for secret in LOGIN.values():
        assert secret not in result.reason
    assert list((state / "adapters" / ".fetching").iterdir()) == []


def test_a_store_that_is_not_there_is_an_error(state, base, bucket, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    result = add(state, base)
    assert (result.status, result.version) == ("failed", 0)
    assert "3 times" in result.reason


def test_a_store_that_drips_is_given_up(state, base, poet, bucket, monkeypatch):
    """Bytes come all the time, and never enough of them; the store is one only as far as the driver asks here."""
    http = ScriptedSource()
    try:
        for name in (CONFIG, WEIGHTS):
            http.files[f"/adapters/poet/{name}"] = (poet / name).read_bytes()
        size = len(http.files[f"/adapters/poet/{WEIGHTS}"])
        dripping = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {size}\r\n\r\n".encode()
        http.fail(f"/adapters/poet/{WEIGHTS}", Fault(drip=dripping), for_ever=True)
        monkeypatch.setenv("AWS_ENDPOINT_URL", http.url)
        limits = replace(QUICK, stall_seconds=1.0, connect_seconds=1.0)
        (result,) = ingest(state, base, [job_of("s3://adapters/poet", None)], limits=limits)
        assert result.status == "failed"
        assert result.reason == f"s3://adapters/poet/{WEIGHTS}: no answer for too long, 3 times"
        http.faults.clear()
        result = add(state, base)
        assert (result.status, result.digest) == ("ready", adapter_manifest(poet).digest)
    finally:
        http.close()
