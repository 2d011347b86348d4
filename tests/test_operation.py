"""What operators see and set: access log, request ids, metrics, API keys, TLS, CORS, and what clients must not see."""

import json
import os
import re
import shutil
import ssl
import subprocess
import time

import httpx
import pytest
from server_process import serving

from gptq_belle.errors import HardwareError, InputError, UsageError
from gptq_belle.serving.access_log import AccessLog
from gptq_belle.serving.api_errors import from_exception
from gptq_belle.serving.request_guard import Access
from gptq_belle.serving.server_config import ListenConfig, read_keys

BODY = {"messages": [{"role": "user", "content": "你好，秘密"}], "max_tokens": 5, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_bloom, tmp_path_factory):
    folder = tmp_path_factory.mktemp("operation")
    (folder / "keys").write_text("# two keys\nfirst\n\n  second  \n")
    options = ("--api-key", "main", "--api-key-file", str(folder / "keys"), "--metrics-key", "scraper",
               "--log-format", "json", "--cors-origin", "https://chat.example")
    with serving(tiny_bloom, folder / "log", *options) as running:
        yield running


def get(server, path, key="main", **headers):
    return httpx.get(server.url + path, headers={"Authorization": f"Bearer {key}"} | headers)


def logged(server, name):
    """The log line of a request; it is written after the response."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [json.loads(line) for line in server.log.splitlines() if name in line and line.endswith("}")]
        if found:
            [line] = found
            return line
        time.sleep(0.02)
    raise AssertionError(server.log)


@pytest.mark.parametrize("stream", [False, True])
def test_request_is_one_line_of_the_log_without_its_text(server, stream):
    name = f"call-{stream}"
    response = httpx.post(server.url + "/v1/chat/completions?x=1", json=BODY | {"stream": stream}, timeout=60,
                          headers={"Authorization": "Bearer main", "X-Request-Id": name})
    assert response.headers["x-request-id"] == name
    line = logged(server, name)
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert line["completion_tokens"] == 5
    assert line["prompt_tokens"] > 5
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert "秘密" not in server.log
    assert "\\u79d8" not in server.log


@pytest.mark.parametrize("given", ["x" * 129, "two words", "", "é"])
def test_invalid_request_id_is_replaced(server, given):
    response = httpx.get(server.url + "/health", headers={"x-request-id": given.encode("latin-1")})
    assert re.fullmatch("[0-9a-f]{32}", response.headers["x-request-id"])


def test_refused_and_unknown_requests_are_logged_with_their_status(server):
    for path, key, status in (("/v1/models", "wrong", 401), ("/no\nsuch", "main", 404)):
        name = get(server, path.replace("\n", "%0A"), key).headers["x-request-id"]
        line = logged(server, name)
        assert (line["path"], line["status"]) == (path, status)


@pytest.mark.parametrize(("path", "key", "status"), [
    ("/v1/models", "main", 200), ("/v1/models", "first", 200), ("/v1/models", "second", 200),
    ("/v1/models", "# two keys", 401), ("/v1/models", "scraper", 401), ("/v1/models", "other", 401),
    ("/metrics", "scraper", 200), ("/metrics", "main", 401)])
def test_each_key_opens_its_paths(server, path, key, status):
    assert get(server, path, key).status_code == status


@pytest.mark.parametrize(("header", "status"), [
    ("bearer main", 200), ("BEARER main", 200), ("Bearer  main", 200), ("Basic main", 401), ("main", 401),
    ("Bearermain", 401)])
def test_scheme_of_the_authorization_may_have_any_case(server, header, status):
    assert httpx.get(server.url + "/v1/models", headers={"Authorization": header}).status_code == status


def test_pages_of_the_given_origin_may_use_the_server(server):
    asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}
    allowed = httpx.options(server.url + "/v1/chat/completions", headers=asked)
    assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (200, "https://chat.example")
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    assert get(server, "/v1/models", Origin=asked["Origin"]).headers["access-control-allow-origin"] == asked["Origin"]
    assert "access-control-allow-origin" not in get(server, "/v1/models", Origin="https://evil.example").headers


def test_head_of_health_has_no_body(server):
    response = httpx.head(server.url + "/health")
    assert (response.status_code, response.content) == (200, b"")


def test_metrics_count_times_and_cached_tokens(server):
    long = {"messages": [{"role": "user", "content": "春" * 60}], "max_tokens": 4, "ignore_eos": True}
    for _ in range(2):
        httpx.post(server.url + "/v1/chat/completions", json=long, headers={"Authorization": "Bearer main"}, timeout=60)
    text = get(server, "/metrics", "scraper").text
    values = {name: float(value) for name, value in re.findall(r"^(gptq_belle_\w+) (\S+)$", text, re.M)}
    assert values["gptq_belle_inter_token_latency_seconds_count"] >= 6
    for name in ("time_to_first_token", "request_queue_time", "e2e_request_latency"):
        assert values[f"gptq_belle_{name}_seconds_count"] >= 2
    assert 64 <= values["gptq_belle_prefix_cache_hits_total"] < values["gptq_belle_prefix_cache_queries_total"]


def test_tls(tiny_bloom, tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-out", certificate, "-keyout", key], check=True,
                   capture_output=True)
    Access(), ListenConfig(certificate=certificate, private_key=key).check()
    for wrong in ({"certificate": certificate}, {"private_key": key}):
        with pytest.raises(UsageError):
            ListenConfig(**wrong).check()
    with pytest.raises(InputError):
        ListenConfig(certificate=key, private_key=certificate).check()
    with serving(tiny_bloom, tmp_path / "log", "--ssl-certfile", str(certificate), "--ssl-keyfile", str(key),
                 ready=False) as server:
        assert server.url.startswith("https://")
        context = ssl.create_default_context(cafile=certificate)
        assert httpx.get(server.url + "/health", verify=context).status_code in (200, 503)


def test_file_of_keys_is_read_or_refused(tmp_path):
    path = tmp_path / "keys"
    for content in (None, b"# nothing\n", b"\xff\xfe\xff"):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(InputError):
            read_keys(path)


@pytest.mark.parametrize(("error", "status"), [
    (InputError("/srv/models/belle/model-1.safetensors: NaN in model.layers.3", "Fetch it again."), 500),
    (HardwareError("CUDA out of memory on GPU 0 (NVIDIA A100)", "Use fewer slots."), 503),
    (UsageError("<function f at 0x7f3a5c>: no template in /srv/models/belle", "Give one."), 400),
    (RuntimeError("/srv/models: 0x7f3a5c"), 500), (MemoryError("GPU 0"), 503)])
def test_errors_for_clients_have_no_paths_addresses_or_devices(error, status):
    found = from_exception(error)
    assert found.status == status
    assert not re.search(r"/srv|0x|GPU|NVIDIA", found.message), found.message
    assert "layers.3" in found.message or "layers" not in str(error)


def test_failed_requests_keep_their_status_in_the_log(caplog):
    import asyncio

    async def failing(scope, receive, send):
        raise ValueError("x")

    caplog.set_level("INFO", "gptq_belle.access")
    with pytest.raises(ValueError, match="x"):
        asyncio.run(AccessLog(failing)({"type": "http", "method": "GET", "path": "/", "headers": []}, None, None))
    assert caplog.records[-1].fields["status"] == 500
    assert os.linesep not in caplog.records[-1].getMessage()
