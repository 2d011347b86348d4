"""The same server several times behind one address, through Ray Serve: on this machine, or on a cluster of Ray's."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gptq_belle.errors import HardwareError
from gptq_belle.serving.server import SHUTDOWN_TIMEOUT
from gptq_belle.serving.server_config import ListenConfig, ServiceConfig, address

try:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
except ImportError as error:
    raise HardwareError(f"--ray needs a package that is not installed: {error.name}",
                        "Install it: pip install 'gptq-belle[ray]'") from error
NAME = "gptq-belle"
HEALTH = 1.0  # seconds between two looks at a replica: a dead one is replaced that soon


def serve_replicas(config: ServiceConfig, listen: ListenConfig, replicas: int,
                   on_ready: Callable[[Any], None] | None = None,
                   notice: Callable[[str], None] = lambda text: None) -> None:
    """Serve a model directory by several processes until SIGINT or SIGTERM; answers that run then are finished.

    Ray sends each request to a replica that has room. Where a replica dies, the requests that it held are lost (status
    500, or a stream that breaks off), all others go to the rest, and a new one is started. With RAY_ADDRESS in the
    environment the replicas run on that cluster, whose machines must hold the directory under the same path; without
    it, on this machine, its cores divided between them, or a GPU each.

    Args:
        config: the model, and what each replica takes at a time.
        listen: where to listen, and who may ask; port 0 takes a free one.
        replicas: how many.
        on_ready: takes {"url", "model", "slots", "replicas"} once they are ready.
        notice: called with a sentence once the server listens, and once the model is ready.
    Raises:
        UsageError: beyond loopback without a key.
        InputError: as `ServiceConfig.check`.
        HardwareError: the address cannot be listened on, there is no place for so many replicas, or they do not start.
    """
    listen.check()
    config.check()
    port = _free_port(listen)
    stopped, interrupted = threading.Event(), threading.Event()
    _join()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        application = _application(config, listen, replicas, _share(config, replicas))
        serve.start(http_options=HTTPOptions(host=listen.host, port=port))
        _start(application, replicas)
        _on_signals(stopped, interrupted)
        url = address(listen.host, port)
        if on_ready is not None:
            on_ready({"url": url, "model": config.name, "slots": replicas * config.limits.slots, "replicas": replicas})
        notice(f"Listening on {url}; {replicas} replicas of {config.name} are ready.")
        stopped.wait()
        serve.delete(NAME)
    finally:
        serve.shutdown()
        ray.shutdown()
    if interrupted.is_set():
        raise KeyboardInterrupt


def _join() -> None:
    """Start Ray on this machine, or join the cluster of RAY_ADDRESS; never one that merely happens to run here."""
    where = os.environ.get("RAY_ADDRESS", "local")
    host, _, port = where.rpartition(":")
    try:  # Ray itself would try for minutes
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise HardwareError(f"no cluster answers at RAY_ADDRESS={where}",
                            "Start it there with `ray start --head`, or unset RAY_ADDRESS.") from error
    dashboard: dict[str, Any] = {"include_dashboard": False} if where == "local" else {}
    ray.init(where, logging_level=logging.ERROR, log_to_driver=False, **dashboard)


def _start(application: serve.Application, replicas: int) -> None:
    try:
        serve.run(application, name=NAME, logging_config={"log_level": "ERROR"})
    except RuntimeError as error:
        raise HardwareError(f"Ray cannot start {replicas} replicas: {str(error).strip().splitlines()[-1]}",
                            "Serve the model without --ray to see what is wrong with one.") from error


def _application(config: ServiceConfig, listen: ListenConfig, replicas: int,
                 options: dict[str, Any]) -> serve.Application:
    def build() -> Any:
        from gptq_belle.serving.app import create_app

        return create_app(lambda state: config.service(state.metrics), config.limits, api_key=listen.api_key,
                          local_only=listen.local, at_once=True)

    deployment: Any = serve.deployment(
        serve.ingress(build)(), name="replica", num_replicas=replicas, ray_actor_options=options,
        max_ongoing_requests=config.limits.slots + config.limits.waiting, health_check_period_s=HEALTH,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT, max_constructor_retry_count=1)
    return deployment.bind()


def _share(config: ServiceConfig, replicas: int) -> dict[str, Any]:
    """What of the machines each replica gets; Ray sets the number of threads by it."""
    there = ray.cluster_resources()
    if config.device == "cuda" or (config.device == "auto" and there.get("GPU", 0) and torch.cuda.is_available()):
        if there.get("GPU", 0) < replicas:
            raise HardwareError(f"{replicas} replicas need a GPU each, and there are {int(there.get('GPU', 0))}",
                                "Ask for fewer --replicas, or for --device cpu.")
        return {"num_gpus": 1, "num_cpus": 1}
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if (each := cores_each(cores, replicas)) == 0:
        raise HardwareError(f"{replicas} replicas need a core each, and there are {sum(cores)}",
                            "Ask for fewer --replicas.")
    return {"num_cpus": each}


def cores_each(cores: Sequence[int], replicas: int) -> int:
    """The most that every replica can have of machines with so many cores; no replica spans two of them."""
    return next((each for each in range(max(cores), 0, -1) if sum(count // each for count in cores) >= replicas), 0)


def _free_port(listen: ListenConfig) -> int:
    """The port of an address, once seen to be free: Ray chooses none by itself, and says late that one is taken."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        with socket.create_server((listen.host.strip("[]"), listen.port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise listen.refused() from error


def _on_signals(stopped: threading.Event, interrupted: threading.Event) -> None:
    def stop(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            interrupted.set()
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
