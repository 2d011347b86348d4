"""Replicas by Ray Serve: if one is killed, only its requests are lost, and it is replaced."""

import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil
import pytest
from server_process import serving

pytestmark = pytest.mark.slow
pytest.importorskip("ray.serve", reason="pip install 'gptq-belle[ray]'")
CLIENTS, SECONDS, KILL_AFTER = 8, 20, 6
BODY = {"messages": [{"role": "user", "content": "你好"}], "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny_llama, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(tiny_llama, log, "--ray", "--replicas", "2", "--max-batch", "4") as running:
        yield running


def replicas(server):
    """The processes of a server's replicas."""
    return [process for process in psutil.Process(server.process.pid).children(recursive=True)
            if "ServeReplica:gptq-belle" in " ".join(process.cmdline())]


def run_serve(path, *options):
    """Run `gptq-belle serve` with options that make it exit."""
    return subprocess.run([sys.executable, "-m", "gptq_belle.cli", "serve", str(path), "--device", "cpu", *options],
                          capture_output=True, text=True, timeout=120)


def ask(client):
    began = time.monotonic()
    try:
        response = client.post("/v1/chat/completions", json=BODY)
    except httpx.HTTPError as error:
        return began, type(error).__name__
    return began, response.json()["choices"][0]["message"]["content"] if response.is_success else response.status_code


def test_killed_replica_loses_only_its_requests(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        expected = ask(client)[1]
    assert isinstance(expected, str)
    before, killed = {process.pid for process in replicas(server)}, []
    assert len(before) == 2
    end = time.monotonic() + SECONDS

    def load():
        seen = []
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while time.monotonic() < end:
                seen.append(ask(client))
        return seen

    def kill():
        victim = replicas(server)[0]
        killed.append(victim.pid)
        victim.kill()
        killed.append(time.monotonic())

    timer = threading.Timer(KILL_AFTER, kill)
    timer.start()
    with ThreadPoolExecutor(CLIENTS) as pool:
        seen = [one for each in [pool.submit(load) for _ in range(CLIENTS)] for one in each.result()]
    timer.join()
    pid, moment = killed
    lost = [(began - moment, answer) for began, answer in seen if answer != expected]
    assert len(lost) <= CLIENTS, Counter(answer for _, answer in lost)
    assert all(began < 0 for began, _ in lost), lost
    assert sum(began > moment for began, _ in seen) > CLIENTS
    deadline = time.monotonic() + 60
    while len(replicas(server)) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    after = {process.pid for process in replicas(server)}
    assert len(after) == 2
    assert pid not in after


def test_streams_and_errors_are_forwarded(server):
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=BODY | {"stream": True}, timeout=60) as stream:
        lines = [line for line in stream.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    refused = httpx.post(f"{server.url}/v1/chat/completions", json=BODY | {"temperature": -1})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "temperature"


@pytest.mark.parametrize(("options", "named"), [
    (["--replicas", "1000"], "1000"), (["--port", "TAKEN"], "127.0.0.1:TAKEN")])
def test_server_that_cannot_start_exits_3(tiny_llama, options, named):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = run_serve(tiny_llama, "--ray", *[option.replace("TAKEN", port) for option in options])
    assert done.returncode == 3
    assert named.replace("TAKEN", port) in done.stderr


@pytest.mark.parametrize(("cores", "replicas", "each"), [([2], 2, 1), ([8, 4], 2, 4), ([8, 4], 3, 4), ([16, 2], 1, 16),
                                                         ([16, 2], 4, 4), ([2], 3, 0)])
def test_replica_gets_cores_of_one_machine_only(cores, replicas, each):
    from gptq_belle.serving.ray_replicas import cores_per_replica

    assert cores_per_replica(cores, replicas) == each


def test_unreachable_cluster_is_named(tiny_llama, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        monkeypatch.setenv("RAY_ADDRESS", address := f"127.0.0.1:{closed.getsockname()[1]}")
    done = run_serve(tiny_llama, "--ray")
    assert done.returncode == 3
    assert f"RAY_ADDRESS={address}" in done.stderr


def test_directory_without_a_model_is_refused_before_ray_starts(tmp_path):
    done = run_serve(tmp_path, "--ray")
    assert done.returncode == 4
    assert "config.json" in done.stderr
    assert "Ray" not in done.stderr


def test_sigterm_finishes_running_requests(server):
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", timeout=60,
                      json=BODY | {"max_tokens": 200, "stream": True}) as stream:
        lines = stream.iter_lines()
        next(lines)
        server.process.terminate()
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert server.process.wait(60) == 0
