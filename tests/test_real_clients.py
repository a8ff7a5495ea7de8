"""The clients that users have: curl and perf_analyzer. (tritonclient and openai have files of their own.)"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from get_perf_analyzer import get_perf_analyzer
from live_server import LiveServer

TOOLS = Path(__file__).resolve().parents[1] / "var" / "tools"
CONCURRENCY = 8
REQUESTS = 48


def curl(url: str, body: dict[str, object]) -> str:
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--no-buffer", "--max-time", "60", url]
    return subprocess.run(
        [*command, "--data", json.dumps(body)], check=True, capture_output=True, text=True, timeout=90
    ).stdout


def test_curl_generate_and_stream_agree(server: LiveServer, demo_adapters: list[str]) -> None:
    url = f"{server.http_url}/v2/models/openlora"
    for adapter in (None, *demo_adapters):
        body = {"text_input": "Tell me about the dog.", "max_tokens": 40, "temperature": 0.0}
        body |= {} if adapter is None else {"adapters": adapter}
        whole = json.loads(curl(f"{url}/generate", body))
        lines = curl(f"{url}/generate_stream", {**body, "stream": True}).splitlines()
        events = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert len(events) > 5
        assert "".join(event["text_output"] for event in events) == whole["text_output"] != ""
        ids = [event["token_ids"] for event in events]
        assert [one for part in ids for one in (part if isinstance(part, list) else [part])] == whole["token_ids"]
        assert [event["finish_reason"] for event in events] == [""] * (len(events) - 1) + [whole["finish_reason"]]
        assert sum(event["num_output_tokens"] for event in events) == whole["num_output_tokens"]
        assert all("receipt" not in event for event in events[:-1])
        assert json.loads(events[-1]["receipt"])["request_id"] == "0x" + events[0]["request_id"]
        used = json.loads(whole["receipt"])["blobs"]["adapters"]["adapters"]
        assert len(used) == (0 if adapter is None else 1)


def test_perf_analyzer_with_a_row_per_adapter(server: LiveServer, demo_adapters: list[str], tmp_path: Path) -> None:
    ensemble = json.dumps([{"name": demo_adapters[0], "weight": 0.5}, {"name": demo_adapters[1], "weight": 0.7}])
    rows = [
        {"text_input": ["Tell me about the fox."], "adapters": [spec], "stream": [True], "max_tokens": [24]}
        | {"sampling_parameters": ['{"temperature": 0, "ignore_eos": true}']}
        for spec in [*demo_adapters, ensemble]
    ]
    data, export = tmp_path / "rows.json", tmp_path / "profile.json"
    data.write_text(json.dumps({"data": rows}))
    before = len(server.receipts())
    try:
        binary = get_perf_analyzer(TOOLS)
    except subprocess.CalledProcessError as error:
        pytest.fail(f"perf_analyzer can't be fetched: {error}")
    command = [str(binary), "-m", "openlora", "-u", server.grpc_url, "-i", "grpc", "--async", "--streaming"]
    command += ["--input-data", str(data), "--concurrency-range", str(CONCURRENCY), "--request-count", str(REQUESTS)]
    command += ["--profile-export-file", str(export)]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(TOOLS / "lib")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr

    profile = json.loads(export.read_text())
    requests = [request for experiment in profile["experiments"] for request in experiment["requests"]]
    assert len(requests) == REQUESTS
    receipts = server.receipts()[before:]
    served = [receipt for receipt in receipts if receipt["status"] == 1]
    assert len(served) >= REQUESTS
    assert all(receipt["out_tokens"] == 24 for receipt in served), "a token was lost"
    mixes = {json.dumps(receipt["blobs"]["adapters"]["adapters"]) for receipt in served}
    assert len(mixes) == len(rows), "every row was asked for"
