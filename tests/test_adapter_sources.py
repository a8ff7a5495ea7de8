"""Adapters from HTTP sources that misbehave: an error or success after retry, never a wrong adapter, no leftovers."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from ipaddress import ip_address
from zlib import crc32

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from scripted_source import Fault, ScriptedSource, etag
from tiny_models import make_adapter
from typer.testing import CliRunner

from openlora.adapters.catalog_reader import CatalogReader
from openlora.adapters.commands import adapters_app
from openlora.adapters.fetch import FetchArea
from openlora.adapters.ingest import ingest
from openlora.adapters.ingest_jobs import check_result, fetch_evicted, job_of
from openlora.adapters.ingest_worker import (
    Copied,
    Downloaded,
    IngestJob,
    IngestRequest,
    IngestResult,
    Started,
    known_records,
)
from openlora.adapters.manifest import adapter_manifest
from openlora.adapters.sources import SourceLimits, parse_uri
from openlora.errors import AdapterInvalid, AdapterNotFound, InvalidArgument, Unavailable

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ADDRESS = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"  # from EIP-55
CARD = {"schema": 1, "owner": ADDRESS, "licence": "MIT", "prices": {"version": 1, "input": 1, "output": 2}}
QUICK = SourceLimits(attempts=3, first_wait_seconds=0.005, longest_wait_seconds=0.02)
HASTY = replace(QUICK, stall_seconds=1.0)


@pytest.fixture(scope="module")
def pristine(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine")
    for number, name in enumerate(("cook", "poet", "bard")):
        make_adapter(base.path, folder / name, number, r=4, target_modules=["q_proj", "v_proj"])
    return folder


@pytest.fixture
def http(pristine):
    source = ScriptedSource()
    for folder in pristine.iterdir():
        serve(source, folder, folder.name)
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def other_http():
    source = ScriptedSource()
    try:
        yield source
    finally:
        source.close()


@pytest.fixture
def poet(pristine):
    return adapter_manifest(pristine / "poet").digest


def serve(source, folder, place):
    for name in (CONFIG, WEIGHTS):
        source.files[f"/{place}/{name}"] = (folder / name).read_bytes()


def weights(source, place="poet"):
    return source.files[f"/{place}/{WEIGHTS}"]


def add(state, base, source, place="poet", limits=QUICK, digest="", name=None):
    (result,) = ingest(state, base, [job_of(f"{source.url}/{place}", name or place, digest)], limits=limits)
    return result


def copies_of(folder, source, marks):
    """A place with the same adapter for each of `marks`."""
    places = {mark: f"copy{number}" for number, mark in enumerate(marks)}
    for place in places.values():
        serve(source, folder, place)
    return places


def add_all(state, base, source, places):
    """In one worker, because it is the worker's start that takes the time."""
    return ingest(state, base, [job_of(f"{source.url}/{place}", None) for place in places], limits=QUICK)


def in_cache(state):
    return sorted(entry.name for entry in (state / "adapters").glob("[!.]*"))


def left_over(state):
    """Everything in the cache that is no adapter."""
    areas = (".lock", ".leases", ".fetching")
    return [str(path) for path in (state / "adapters").rglob(".*/**/*")] + [
        entry.name for entry in (state / "adapters").glob(".*") if entry.name not in areas
    ]


def parts(state):
    return list((state / "adapters" / ".fetching").iterdir())


def arrived(state, result, digest):
    """The adapter is there, its bytes are right, and nothing else is."""
    assert (result.status, result.digest, result.reason) == ("ready", digest, "")
    assert in_cache(state) == [digest]
    assert adapter_manifest(state / "adapters" / digest).digest == digest
    assert left_over(state) == []


def failed(state, result, reason, status="failed"):
    assert (result.status, result.version) == (status, 0)
    assert reason in result.reason
    assert in_cache(state) == []
    assert not (state / "catalog.sqlite").exists() or known_records(state) == []


def failed_clean(state, result, reason, status="failed"):
    failed(state, result, reason, status)
    assert left_over(state) == []


def test_an_adapter_arrives_whole_and_says_where_it_came_from(state, base, http, poet):
    http.files["/poet/openlora.json"] = json.dumps(CARD).encode()
    seen = []
    (result,) = ingest(state, base, [job_of(http.url + "/poet/", None)], seen.append, QUICK)
    arrived(state, result, poet)
    (record,) = known_records(state)
    assert (record.name, record.source, record.card) == ("poet", f"{http.url}/poet", CARD)
    size = sum(len(content) for path, content in http.files.items() if path.startswith("/poet/"))
    assert Downloaded("poet", size, size) in seen
    assert [type(event) for event in seen[-3:]] == [Started, Copied, IngestResult]


def test_the_same_again_is_not_downloaded_and_another_name_gets_its_own_version(state, base, http, poet):
    add(state, base, http)
    again = add(state, base, http)
    bard = add(state, base, http, name="bard")
    assert (again.change, again.version) == ("unchanged", 1)
    assert (bard.change, bard.version, bard.digest) == ("added", 1, poet)
    assert len(http.asked("GET", WEIGHTS)) == 1
    http.files[f"/poet/{WEIGHTS}"] = weights(http, "bard")
    newer = add(state, base, http)
    assert (newer.change, newer.version) == ("added", 2)
    assert len(http.asked("GET", WEIGHTS)) == 2


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_cut_at_every_tenth_is_continued(state, base, http, poet, pristine, reset):
    places = copies_of(pristine / "poet", http, range(1, 10))
    cuts = {place: len(weights(http)) * tenths // 10 for tenths, place in places.items()}
    for place, at in cuts.items():
        http.fail(f"/{place}/{WEIGHTS}", Fault(cut_at=at, reset=reset))
    for result in add_all(state, base, http, cuts):
        arrived(state, result, poet)
    for place, at in cuts.items():
        first, second = http.asked("GET", f"/{place}/{WEIGHTS}")
        assert "range" not in first
        assert reset or second["range"] == f"bytes={at}-"  # a reset may take back what was sent
    if not reset:  # every byte once
        assert http.sent == sum(len(content) for path, content in http.files.items() if path.split("/")[1] in cuts)


def test_nine_cuts_in_one_download_are_more_than_its_attempts_but_each_brings_it_further(state, base, http, poet):
    size = len(weights(http))
    http.fail(f"/poet/{WEIGHTS}", *(Fault(cut_at=size * tenths // 10) for tenths in range(1, 10)))
    arrived(state, add(state, base, http), poet)
    assert len(http.asked("GET", WEIGHTS)) == 10


def test_without_range_support_a_cut_download_starts_again(state, base, http, poet):
    half = len(weights(http)) // 2
    http.fail(f"/poet/{WEIGHTS}", Fault(cut_at=half), Fault(ranges=False))
    arrived(state, add(state, base, http), poet)
    assert [headers.get("range") for headers in http.asked("GET", WEIGHTS)] == [None, f"bytes={half}-"]


@pytest.mark.parametrize("tag", ["", 'W/"weak"'])
def test_without_a_strong_tag_nothing_is_continued(state, base, http, poet, tag):
    untagged = Fault(headers={"ETag": tag})
    http.fail(f"/poet/{CONFIG}", untagged, methods=("HEAD", "GET"), for_ever=True)
    http.fail(f"/poet/{WEIGHTS}", untagged, methods=("HEAD",), for_ever=True)
    http.fail(f"/poet/{WEIGHTS}", replace(untagged, cut_at=5000), untagged, for_ever=True)
    arrived(state, add(state, base, http), poet)
    assert [headers.get("range") for headers in http.asked("GET", WEIGHTS)] == [None, None]
    assert add(state, base, http).change == "unchanged"
    assert len(http.asked("GET", WEIGHTS)) == 3


def test_a_download_that_is_cut_for_ever_is_kept_and_continued_by_the_next_command(state, base, http, poet):
    half = len(weights(http)) // 2
    http.fail(f"/poet/{WEIGHTS}", Fault(cut_at=half), for_ever=True)
    failed(state, add(state, base, http), f"{http.url}/poet/{WEIGHTS}: ")
    assert len(http.asked("GET", WEIGHTS)) == 1 + QUICK.attempts
    (part,) = parts(state)
    assert (part / WEIGHTS).read_bytes() == weights(http)[:half]
    assert oct(part.stat().st_mode)[-3:] == "700"
    http.faults.clear()
    arrived(state, add(state, base, http), poet)
    assert http.asked("GET", WEIGHTS)[-1]["range"] == f"bytes={half}-"


def test_a_part_of_other_bytes_is_not_continued(state, base, http, pristine):
    http.fail(f"/poet/{WEIGHTS}", Fault(cut_at=len(weights(http)) // 2), for_ever=True)
    add(state, base, http)
    assert len(parts(state)) == 1
    http.faults.clear()
    serve(http, pristine / "bard", "poet")
    arrived(state, add(state, base, http), adapter_manifest(pristine / "bard").digest)


@pytest.mark.parametrize("honours", [True, False], ids=["new-file", "new-range"])
def test_a_file_replaced_between_two_parts_is_never_mixed(state, base, http, pristine, honours):
    """Where the server sends a range of the new file although the old one was asked for, its tag tells."""
    http.fail(
        f"/poet/{WEIGHTS}",
        Fault(cut_at=len(weights(http)) // 2),
        Fault(before=lambda: serve(http, pristine / "bard", "poet"))
        if honours
        else Fault(status=206, headers={"ETag": '"new"', "Content-Range": "bytes 5-9/10"}),
    )
    result = add(state, base, http)
    wanted = pristine / ("bard" if honours else "poet")
    arrived(state, result, adapter_manifest(wanted).digest)


def test_a_file_replaced_after_it_was_read_is_noticed(state, base, http):
    """The configuration changes while the weights come: both are read again."""
    config = json.loads(http.files[f"/poet/{CONFIG}"])
    changed = json.dumps({**config, "lora_alpha": 99}).encode()
    http.fail(f"/poet/{WEIGHTS}", Fault(before=lambda: http.files.update({f"/poet/{CONFIG}": changed})))
    result = add(state, base, http)
    arrived(state, result, result.digest)
    assert (state / "adapters" / result.digest / CONFIG).read_bytes() == changed


MARKS = {
    "weak-tag": lambda content: {"ETag": f"W/{etag(content)}"},
    "last-modified": lambda content: {"Last-Modified": format_datetime(datetime.fromtimestamp(crc32(content), UTC))},
}


@pytest.mark.parametrize("mark", MARKS)
def test_old_and_new_files_are_not_mixed_though_only_a_hint_tells_them_apart(state, base, http, pristine, mark):
    """Both files are replaced by others of the same size, after the configuration was read."""
    http.marks = MARKS[mark]
    config, other = http.files[f"/poet/{CONFIG}"], (pristine / "bard" / WEIGHTS).read_bytes()
    changed = config.replace(b'"lora_alpha": 8', b'"lora_alpha": 9')
    assert changed != config and len(other) == len(weights(http))
    new = {f"/poet/{CONFIG}": changed, f"/poet/{WEIGHTS}": other}
    http.fail(f"/poet/{WEIGHTS}", Fault(before=lambda: http.files.update(new)))
    result = add(state, base, http)
    arrived(state, result, result.digest)
    assert (state / "adapters" / result.digest / CONFIG).read_bytes() == changed
    assert (state / "adapters" / result.digest / WEIGHTS).read_bytes() == other
    assert [headers.get("range") for headers in http.asked("GET", WEIGHTS)] == [None, None]


def test_a_source_that_changes_for_ever_is_given_up(state, base, http):
    numbers = iter(range(10**6))
    http.fail(f"/poet/{WEIGHTS}", Fault(before=lambda: touched(http, next(numbers))), for_ever=True)
    failed_clean(state, add(state, base, http), "changed while it was downloaded, 3 times")


def touched(source, number):
    source.files[f"/poet/{CONFIG}"] += b" " * (number % 7 + 1)


def test_server_errors_are_retried(state, base, http, poet, pristine):
    places = copies_of(pristine / "poet", http, [500, 502, 503, 429, 408])
    for status, place in places.items():
        for name in (WEIGHTS, CONFIG):
            http.fail(f"/{place}/{name}", Fault(status=status), Fault(status=status), methods=("HEAD", "GET"))
    for result in add_all(state, base, http, places.values()):
        arrived(state, result, poet)


def test_server_errors_for_ever_end_in_an_error(state, base, http, pristine):
    places = copies_of(pristine / "poet", http, [(how, name) for how in ("HEAD", "GET") for name in (WEIGHTS, CONFIG)])
    for (method, name), place in places.items():
        unwell = Fault(status=503, headers={"Retry-After": "0"})
        http.fail(f"/{place}/{name}", unwell, methods=(method,), for_ever=True)
    for result, ((method, name), place) in zip(
        add_all(state, base, http, places.values()), places.items(), strict=True
    ):
        failed(state, result, f"{http.url}/{place}/{name}: 503 Service Unavailable, 3 times")
        assert len(http.asked(method, f"/{place}/{name}")) == QUICK.attempts
    http.faults.clear()
    assert {result.status for result in add_all(state, base, http, places.values())} == {"ready"}
    assert left_over(state) == []


def test_what_no_retry_would_change_is_not_retried(state, base, http, pristine):
    expected = {
        404: (f"{WEIGHTS} is missing at ", "quarantined"),
        410: (f"{WEIGHTS} is missing at ", "quarantined"),
        401: ("access denied (401 Unauthorized)", "failed"),
        403: ("access denied (403 Forbidden)", "failed"),
        418: ("418", "quarantined"),
        304: ("304", "quarantined"),
    }
    places = copies_of(pristine / "poet", http, expected)
    for status, place in places.items():
        http.fail(f"/{place}/{WEIGHTS}", Fault(status=status), methods=("HEAD", "GET"), for_ever=True)
    for result, (status, place) in zip(add_all(state, base, http, places.values()), places.items(), strict=True):
        failed_clean(state, result, *expected[status])
        assert len(http.asked("HEAD", f"/{place}/{WEIGHTS}")) == 1
        # URLs that are signed for GET answer HEAD with 403
        assert len(http.asked("GET", f"/{place}/{WEIGHTS}")) == (1 if status == 403 else 0)


def test_servers_that_know_no_head_are_asked_by_get(state, base, http, poet, pristine):
    places = copies_of(pristine / "poet", http, [403, 405, 501])
    for status, place in places.items():
        for name in (WEIGHTS, CONFIG):
            http.fail(f"/{place}/{name}", Fault(status=status), methods=("HEAD",), for_ever=True)
    for result in add_all(state, base, http, places.values()):
        arrived(state, result, poet)


def test_a_stalled_server_is_left_and_the_rest_is_asked_for_again(state, base, http, poet):
    half = len(weights(http)) // 2
    http.fail(f"/poet/{WEIGHTS}", Fault(stall_at=half))
    arrived(state, add(state, base, http, limits=HASTY), poet)
    assert http.asked("GET", WEIGHTS)[1]["range"] == f"bytes={half}-"


def test_a_server_that_stalls_for_ever_is_given_up(state, base, http):
    http.fail(f"/poet/{WEIGHTS}", Fault(stall_at=0), for_ever=True)
    failed(state, add(state, base, http, limits=HASTY), "no answer for too long, 3 times")


DRIPS = {
    "header": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;",
}


@pytest.mark.parametrize("place", DRIPS)
def test_a_server_that_drips_is_given_up(state, base, http, place):
    """Something comes all the time, and never enough of it."""
    untagged = Fault(headers={"ETag": ""})
    http.fail(f"/poet/{CONFIG}", untagged, methods=("HEAD",), for_ever=True)
    http.fail(f"/poet/{CONFIG}", Fault(drip=DRIPS[place]), for_ever=True)
    limits = replace(HASTY, connect_seconds=1.0)
    failed_clean(state, add(state, base, http, limits=limits), ", 3 times")
    assert len(http.asked("GET", CONFIG)) == HASTY.attempts


def test_nobody_there_is_an_error(state, base, other_http):
    url = other_http.url
    other_http.close()
    (result,) = ingest(state, base, [job_of(url + "/poet", None)], limits=QUICK)
    failed_clean(state, result, "Connect call failed ('127.0.0.1'")


def test_a_length_beyond_any_adapter_is_refused_before_anything_is_downloaded(state, base, http):
    http.fail(f"/poet/{WEIGHTS}", Fault(claim=1 << 40), methods=("HEAD", "GET"), for_ever=True)
    failed_clean(state, add(state, base, http), f"{WEIGHTS} is {1 << 40} bytes or more, at most", "quarantined")
    assert http.asked("GET", "") == []


def test_a_length_that_is_too_long_ends_in_an_error(state, base, http):
    http.fail(f"/poet/{WEIGHTS}", Fault(claim=len(weights(http)) + 100), methods=("HEAD", "GET"), for_ever=True)
    failed_clean(state, add(state, base, http), f"{http.url}/poet/{WEIGHTS}")


def test_a_length_that_is_too_short_never_makes_an_adapter(state, base, http):
    http.fail(f"/poet/{WEIGHTS}", Fault(claim=len(weights(http)) - 100), methods=("HEAD", "GET"), for_ever=True)
    result = add(state, base, http)
    assert result.status == "quarantined"
    assert WEIGHTS in result.reason
    assert (in_cache(state), left_over(state)) == ([], [])


def test_head_and_get_that_disagree_end_in_an_error(state, base, http):
    http.fail(f"/poet/{WEIGHTS}", Fault(claim=len(weights(http)) - 100), methods=("HEAD",), for_ever=True)
    failed_clean(state, add(state, base, http), f"has {len(weights(http))} bytes, it had")


def test_an_endless_answer_is_cut_off_at_the_largest_possible_adapter(state, base, http):
    http.fail(f"/poet/{WEIGHTS}", Fault(endless=True), methods=("HEAD", "GET"), for_ever=True)
    failed_clean(state, add(state, base, http), f"{WEIGHTS} is ", "quarantined")
    assert len(http.asked("GET", WEIGHTS)) == 1
    assert http.sent < 32 << 20


def test_a_web_page_is_no_file(state, base, http):
    page = Fault(body=b"<html>log in</html>", headers={"Content-Type": "text/html; charset=utf-8"})
    http.fail(f"/poet/{CONFIG}", page, methods=("HEAD", "GET"), for_ever=True)
    failed_clean(state, add(state, base, http), f"{CONFIG} is a web page (text/html), not a file", "quarantined")


def test_a_compressed_answer_is_refused(state, base, http):
    http.fail(f"/poet/{CONFIG}", Fault(headers={"Content-Encoding": "gzip"}), methods=("HEAD", "GET"), for_ever=True)
    failed_clean(state, add(state, base, http), "is sent as gzip, plain bytes were asked for", "quarantined")


def test_redirects_to_other_schemes_are_not_followed(state, base, http, pristine):
    targets = ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "s3://b/k"]
    places = copies_of(pristine / "poet", http, targets)
    for target, place in places.items():
        moved = Fault(status=302, headers={"Location": target})
        http.fail(f"/{place}/{CONFIG}", moved, methods=("HEAD", "GET"), for_ever=True)
    for result, target in zip(add_all(state, base, http, places.values()), targets, strict=True):
        reason = f"redirected to {target.partition(':')[0]}://, which isn't followed"
        failed_clean(state, result, reason, "quarantined")


def test_redirect_loops_end(state, base, http):
    moved = Fault(status=307, headers={"Location": f"/poet/{CONFIG}"})
    http.fail(f"/poet/{CONFIG}", moved, methods=("HEAD", "GET"), for_ever=True)
    failed_clean(state, add(state, base, http), "more than 5 redirects", "quarantined")
    assert len(http.asked("HEAD", CONFIG)) == 6


def test_redirects_are_followed_and_credentials_stay_behind(state, base, http, other_http, pristine, poet):
    serve(other_http, pristine / "poet", "elsewhere")
    http.login = "user:pa55word"
    for name in (CONFIG, WEIGHTS):
        moved = Fault(status=302, headers={"Location": f"{other_http.url}/elsewhere/{name}"})
        http.fail(f"/poet/{name}", moved, methods=("HEAD", "GET"), for_ever=True)
    url = http.url.replace("//", "//user:pa55word@")
    (result,) = ingest(state, base, [job_of(url + "/poet", None)], limits=QUICK)
    arrived(state, result, poet)
    assert all("authorization" in headers for _, _, headers in http.requests)
    assert other_http.requests and not any("authorization" in headers for _, _, headers in other_http.requests)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Of 127.0.0.1, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(made.public_bytes(pem) + secret)
    return path


@pytest.fixture
def https(certificate, pristine):
    source = ScriptedSource(certificate)
    serve(source, pristine / "poet", "poet")
    try:
        yield source
    finally:
        source.close()


def test_https_needs_a_certificate_that_is_trusted(state, base, https, poet, certificate, monkeypatch):
    failed_clean(state, add(state, base, https), "certificate verify failed")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    arrived(state, add(state, base, https), poet)


def test_a_redirect_from_https_to_http_is_not_followed(state, base, https, http, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    moved = Fault(status=302, headers={"Location": f"{http.url}/poet/{CONFIG}"})
    https.fail(f"/poet/{CONFIG}", moved, methods=("HEAD", "GET"), for_ever=True)
    failed_clean(state, add(state, base, https), "redirected from https to http", "quarantined")
    assert http.requests == []


def test_credentials_open_the_source_and_are_written_nowhere(state, base, http, poet, tmp_path):
    http.login = "user:pa55word"
    url = http.url.replace("//", "//user:pa55word@") + "/poet?token=s3cr3t"
    good = CliRunner().invoke(adapters_app, ["add", url, "--model", base.path, "--state-dir", str(state), "--json"])
    assert good.exit_code == 0, good.stderr
    arrived(state, msgspec.json.decode(good.stdout, type=IngestResult), poet)
    assert all(path.endswith("?token=s3cr3t") for _, path, _ in http.requests)
    http.login = "user:other"
    bad = CliRunner().invoke(adapters_app, ["add", url, "--name", "other", "--state-dir", str(state)])
    assert bad.exit_code == 7
    assert bad.stderr == (f"[UNAVAILABLE] adapter other: {http.url}/poet/{CONFIG}: access denied (401 Unauthorized)\n")
    written = b"".join(path.read_bytes() for path in state.rglob("*") if path.is_file())
    told = (good.stdout + good.stderr + bad.stdout + bad.stderr).encode()
    for secret in (b"pa55word", b"s3cr3t", b"user:"):
        assert secret not in written + told
    assert http.url.encode() in written


def test_what_came_by_a_login_in_its_uri_is_never_evicted_until_it_came_without(state, base, http, poet):
    signed = http.url + "/poet?token=s3cr3t"
    for source, kept in ((signed, {poet}), (signed, {poet}), (f"{http.url}/poet", set())):
        (result,) = ingest(state, base, [job_of(source, None)], limits=QUICK)
        assert (result.status, result.version) == ("ready", 1)
        with CatalogReader(state / "catalog.sqlite") as reader:
            assert reader.irreplaceable() == kept


def test_logins_come_from_netrc(state, base, http, poet, tmp_path, monkeypatch):
    http.login = "user:pa55word"
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password pa55word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    arrived(state, add(state, base, http), poet)


def test_wrong_bytes_are_quarantined_like_those_of_a_local_directory(state, base, http):
    broken = bytearray(weights(http))
    broken[10] ^= 0xFF
    http.files[f"/poet/{WEIGHTS}"] = bytes(broken)
    result = add(state, base, http)
    assert (result.status, result.version) == ("quarantined", 1)
    assert "its header is not JSON" in result.reason
    assert (in_cache(state), left_over(state)) == ([], [])


def test_bytes_of_another_digest_are_refused_and_leave_the_good_version_alone(state, base, http, poet):
    arrived(state, add(state, base, http, digest=poet), poet)
    changed = bytearray(weights(http))
    changed[-1] ^= 1  # still a valid adapter
    http.files[f"/poet/{WEIGHTS}"] = bytes(changed)
    result = add(state, base, http, digest=poet)
    assert (result.status, result.version) == ("quarantined", 0)
    assert result.reason == f"its digest is {result.digest}, {poet} was asked for"
    assert [(record.version, record.status) for record in known_records(state)] == [(1, "ready")]
    assert (in_cache(state), left_over(state)) == ([poet], [])


def test_a_full_disk_ends_in_an_error_and_leaves_nothing(state, base, http):
    """The worker's file size limit stands for the full disk: the same OSError, made by the kernel."""
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from openlora.adapters import fetch, ingest_worker\n"
        "original = fetch._Download._read\n"
        "def read(*arguments):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
        "    try: original(*arguments)\n"
        "    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "fetch._Download._read = read\n"
        "ingest_worker.main()\n"
    )
    request = IngestRequest(str(state), base, (IngestJob("poet", f"{http.url}/poet"),), QUICK)
    done = subprocess.run(
        [sys.executable, "-c", script], input=msgspec.json.encode(request), capture_output=True, check=True
    )
    result = msgspec.json.decode(done.stdout.splitlines()[-1], type=IngestResult | Downloaded | Started | Copied)
    failed_clean(state, result, os.strerror(errno.EFBIG))


def test_two_commands_for_one_source_download_it_once(state, base, http, poet):
    reached, go = threading.Event(), threading.Event()
    http.fail(f"/poet/{WEIGHTS}", Fault(before=lambda: (reached.set(), go.wait())))
    results = {}

    def bring(name):
        results[name] = add(state, base, http, name=name)

    first = threading.Thread(target=bring, args=("first",))
    second = threading.Thread(target=bring, args=("second",))
    first.start()
    assert reached.wait(60)
    second.start()
    go.set()
    first.join()
    second.join()
    assert {name: result.status for name, result in results.items()} == {"first": "ready", "second": "ready"}
    assert len(http.asked("GET", WEIGHTS)) == 1
    arrived(state, results["second"], poet)


def test_one_command_downloads_several_beside_each_other_within_bounds(state, base, http, pristine):
    """Of four, exactly two at a time: each waits for a second one before it is answered."""
    pair = threading.Barrier(2)
    at_once, most, lock = [0], [0], threading.Lock()

    def meet():
        with lock:
            at_once[0] += 1
            most[0] = max(most[0], at_once[0])
        pair.wait(60)
        with lock:
            at_once[0] -= 1

    places = list(copies_of(pristine / "poet", http, range(4)).values())
    for place in places:
        http.fail(f"/{place}/{WEIGHTS}", Fault(before=meet))
    jobs = [job_of(f"{http.url}/{place}", None) for place in places]
    results = ingest(state, base, jobs, limits=replace(QUICK, parallel=2))
    assert [(result.name, result.status) for result in results] == [(place, "ready") for place in places]
    assert most == [2]
    assert left_over(state) == []


def test_the_same_source_twice_in_one_command_is_downloaded_once(state, base, http, poet):
    jobs = [job_of(f"{http.url}/poet", name) for name in ("one", "two", "three")]
    results = ingest(state, base, jobs, limits=QUICK)
    assert [result.status for result in results] == ["ready"] * 3
    assert len(http.asked("GET", WEIGHTS)) == 1
    arrived(state, results[0], poet)


def test_a_download_holds_up_no_local_adapter(state, base, http, pristine):
    reached, go = threading.Event(), threading.Event()
    http.fail(f"/poet/{WEIGHTS}", Fault(before=lambda: (reached.set(), go.wait())))
    remote = []
    thread = threading.Thread(target=lambda: remote.append(add(state, base, http)))
    thread.start()
    assert reached.wait(60)
    (local,) = ingest(state, base, [IngestJob("cook", str(pristine / "cook"))])
    assert local.status == "ready"
    assert remote == []
    go.set()
    thread.join()
    assert remote[0].status == "ready"


def test_parts_have_a_bound_in_number_and_age(state, base, http, pristine):
    limits = replace(QUICK, max_parts=2)
    for number in range(4):
        place = f"poet{number}"
        serve(http, pristine / "poet", place)
        http.faults["GET", f"/{place}/{WEIGHTS}"] = [Fault(cut_at=5000)] * 4
        assert add(state, base, http, place, limits).status == "failed"
    assert len(parts(state)) == 2
    for part in parts(state):
        os.utime(part, (0, 0))
    area = FetchArea(state / "adapters", limits)
    held = area.alone(parse_uri(f"{http.url}/poet3"))
    os.utime(held.directory, (0, 0))
    area.sweep()
    assert parts(state) == [held.directory]  # somebody works on it
    held.release(keep=True)
    area.sweep()
    assert parts(state) == [held.directory]  # used just now
    os.utime(held.directory, (0, 0))
    area.sweep()
    assert parts(state) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ftp://host/poet", "ftp:// is no source"),
        ("file:///etc/poet", "file:// is no source"),
        ("javascript://host/x", "javascript:// is no source"),
        ("https://host", "https://HOST/PATH is wanted"),
        ("https:///poet", "https://HOST/PATH"),
        ("hf://org", "hf://NAME/PATH is wanted"),
        ("https://host/a/../poet", "a path with . or .. is no source"),
        ("https://host/%2e%2e/poet", "a path with . or .. is no source"),
        ("https://host/poet#main", "#fragment"),
        ("https://host:port/poet", "its host or port can't be read"),
        ("https://host/po et", "without spaces"),
        ("https://host/" + "a" * 3000, "at most 2048 characters"),
        ("hf://user:s3cr3t@org/poet", "takes no credentials"),
        ("hf://org/poet?token=s3cr3t", "takes no credentials"),
    ],
)
def test_what_is_no_source_is_refused_at_once_and_repeats_no_secret(text, said):
    with pytest.raises(InvalidArgument) as refused:
        job_of(text, "poet")
    assert said in str(refused.value)
    assert "s3cr3t" not in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("https://host/adapters/poet/", "poet"),
        ("hf://org/poet", "poet"),
        ("hf://org/poet@v1.0", "poet"),
        ("hf://org/poet@refs%2Fpr%2F1", "poet"),
        ("hf://org/poet@refs/pr/1", "poet"),
        ("hf://org/many@main/adapters/poet", "poet"),
    ],
)
def test_an_adapter_is_called_like_the_end_of_its_path(uri, name):
    assert job_of(uri, None).name == name
    assert job_of(uri, None).source == uri.rstrip("/")


def test_a_missing_driver_is_an_error_that_names_the_extra(state, monkeypatch):
    monkeypatch.setattr("openlora.adapters.sources.importlib.util.find_spec", lambda name: None)
    for uri, package, extra in (("s3://b/k", "s3fs", "s3"), ("gs://b/k", "gcsfs", "gcs")):
        done = CliRunner().invoke(adapters_app, ["add", uri, "--state-dir", str(state)])
        assert done.exit_code == 2
        needs = f"needs the package {package}: pip install 'openlora-triton[{extra}]'"
        assert needs in done.stderr


def test_a_digest_is_64_hex_digits(poet):
    assert job_of("/some/poet", None, poet.upper()).digest == poet
    for digest in ("1234", "g" * 64, poet + "0"):
        with pytest.raises(InvalidArgument, match="64 hex digits are wanted"):
            job_of("/some/poet", None, digest)


def test_a_local_adapter_is_checked_against_its_digest_too(state, base, pristine, poet):
    (good,) = ingest(state, base, [job_of(str(pristine / "poet"), None, poet)])
    (bad,) = ingest(state, base, [job_of(str(pristine / "bard"), "poet", poet)])
    assert (good.status, bad.status, bad.version) == ("ready", "quarantined", 0)
    assert len(known_records(state)) == 1


def test_evicted_files_come_back_and_their_terms_stay(state, base, http, poet):
    add(state, base, http)
    shutil.rmtree(state / "adapters" / poet)
    http.files["/poet/openlora.json"] = json.dumps(CARD).encode()
    before = known_records(state)
    (result,) = fetch_evicted(state, base, ["poet"])
    arrived(state, result, poet)
    assert result.version == 1
    assert known_records(state) == before
    assert fetch_evicted(state, base, []) == []
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        fetch_evicted(state, base, ["nobody"])


def test_evicted_files_whose_source_holds_others_now_do_not_come_back(state, base, http, poet, pristine):
    add(state, base, http)
    shutil.rmtree(state / "adapters" / poet)
    serve(http, pristine / "bard", "poet")
    before = known_records(state)
    (result,) = fetch_evicted(state, base, [])
    with pytest.raises(AdapterInvalid, match=f"{poet} was asked for"):
        check_result(result)
    assert (known_records(state), in_cache(state), left_over(state)) == (before, [], [])


def test_what_failed_is_unavailable():
    with pytest.raises(Unavailable, match="adapter poet: why"):
        check_result(IngestResult("poet", "failed", reason="why"))
