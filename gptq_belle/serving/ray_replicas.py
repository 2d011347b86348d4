"""Several replicas of the server at one address by Ray Serve, on this machine or on a Ray cluster."""

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gptq_belle.common.text import count
from gptq_belle.errors import HardwareError, UsageError
from gptq_belle.serving.server import FAILURE_DELAY, SHUTDOWN_TIMEOUT
from gptq_belle.serving.server_config import ListenConfig, ServiceConfig, address
from gptq_belle.serving.service import AppState, Service

try:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions
except ImportError as error:
    raise HardwareError(f"--ray needs a package that is not installed: {error.name}",
                        "Install it: pip install 'gptq-belle[ray]'") from error
NAME = "gptq-belle"
HEALTH_CHECK_PERIOD = 1.0  # seconds until a dead replica is replaced


def serve_replicas(config: ServiceConfig, listen: ListenConfig, replicas: int,
                   on_ready: Callable[[Any], None] | None = None,
                   notice: Callable[[str], None] = lambda text: None) -> None:
    """Serve a model directory by several processes until SIGINT or SIGTERM; running requests are finished.

    Ray sends each request to a replica with free capacity. If a replica dies, its requests are lost (status 500, or an
    interrupted stream), and a new replica is started. If the environment variable RAY_ADDRESS is set, the replicas run
    on that cluster, whose machines need the model directory at the same path. Otherwise they run on this machine and
    share its cores, or use one GPU each.

    Args:
        config: the model and the limits of each replica.
        listen: address and access; port 0 selects a free port.
        replicas: number of replicas.
        on_ready: called with {"url", "model", "slots", "replicas"} when all replicas are ready.
        notice: called with a message when all replicas are ready.
    Raises:
        UsageError: the address is not loopback, and there is no API key.
        InputError: see `ServiceConfig.check`.
        HardwareError: the address is not available, there are too few cores or GPUs, or a replica does not start.
    """
    listen.check()
    if listen.certificate is not None:
        raise UsageError("--ray does not support TLS", "Put a proxy with TLS before it, or serve without --ray.")
    config.check()
    port = _free_port(listen)
    stopped, interrupted = threading.Event(), threading.Event()
    _connect_to_ray()
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        application = _application(config, listen, replicas, _resources_per_replica(config, replicas))
        serve.start(http_options=HTTPOptions(host=listen.host, port=port))
        _start(application, replicas)
        _stop_on_signals(stopped, interrupted)
        url = address(listen.host, port)
        if on_ready is not None:
            on_ready({"url": url, "model": config.names[0], "slots": replicas * config.limits.slots,
                      "replicas": replicas})
        notice(f"Listening on {url} with {count(replicas, 'replica')} of {config.names[0]}.")
        stopped.wait()
        serve.delete(NAME)
    finally:
        serve.shutdown()
        ray.shutdown()
    if interrupted.is_set():
        raise KeyboardInterrupt


def _connect_to_ray() -> None:
    """Connect to the cluster of RAY_ADDRESS, else start Ray; never join another cluster that runs on this machine."""
    where = os.environ.get("RAY_ADDRESS", "local")
    host, _, port = where.rpartition(":")
    try:  # Ray itself retries for minutes
        if port.isdigit():
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        raise HardwareError(f"no Ray cluster responds at RAY_ADDRESS={where}",
                            "Start it there with `ray start --head`, or unset RAY_ADDRESS.") from error
    dashboard: dict[str, Any] = {"include_dashboard": False} if where == "local" else {}
    ray.init(where, logging_level=logging.ERROR, log_to_driver=False, **dashboard)


def _start(application: serve.Application, replicas: int) -> None:
    try:
        serve.run(application, name=NAME, logging_config={"log_level": "ERROR"})
    except RuntimeError as error:
        raise HardwareError(f"Ray cannot start {replicas} replicas: {str(error).strip().splitlines()[-1]}",
                            "Serve the model without --ray to see the error of a single server.") from error


def _application(config: ServiceConfig, listen: ListenConfig, replicas: int,
                 options: dict[str, Any]) -> serve.Application:
    def build() -> Any:
        from gptq_belle.serving.app import create_app

        return create_app(load, config.limits, listen.access, load_first=True)

    def load(state: AppState) -> Service:
        service = config.service(state.metrics)
        service.scheduler.on_failure = _end_replica
        return service

    deployment: Any = serve.deployment(
        serve.ingress(build)(), name="replica", num_replicas=replicas, ray_actor_options=options,
        max_ongoing_requests=config.limits.slots + config.limits.waiting, health_check_period_s=HEALTH_CHECK_PERIOD,
        graceful_shutdown_timeout_s=SHUTDOWN_TIMEOUT, max_constructor_retry_count=1)
    return deployment.bind()


def _end_replica(error: BaseException) -> None:
    """End this process once its clients have read their errors: Ray starts a new replica."""
    time.sleep(FAILURE_DELAY)
    os._exit(1)


def _resources_per_replica(config: ServiceConfig, replicas: int) -> dict[str, Any]:
    """Resources of each replica; Ray sets the number of threads from them."""
    available = ray.cluster_resources()
    if config.device == "cuda" or (config.device == "auto" and available.get("GPU", 0) and torch.cuda.is_available()):
        if available.get("GPU", 0) < replicas:
            raise HardwareError(f"{replicas} replicas need one GPU each, but there are {int(available.get('GPU', 0))}",
                                "Use fewer --replicas, or --device cpu.")
        return {"num_gpus": 1, "num_cpus": 1}
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if (each := cores_per_replica(cores, replicas)) == 0:
        raise HardwareError(f"{replicas} replicas need one core each, but there are {sum(cores)}",
                            "Use fewer --replicas.")
    return {"num_cpus": each}


def cores_per_replica(cores: Sequence[int], replicas: int) -> int:
    """Largest number of cores that every replica can have, given the cores of each machine; 0 if there are too few."""
    return next((each for each in range(max(cores), 0, -1) if sum(count // each for count in cores) >= replicas), 0)


def _free_port(listen: ListenConfig) -> int:
    """Check that the port is free, and select one for port 0: Ray does neither before the replicas start."""
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    try:
        with socket.create_server((listen.host.strip("[]"), listen.port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise listen.unavailable(error) from error


def _stop_on_signals(stopped: threading.Event, interrupted: threading.Event) -> None:
    def stop(number: int, _: Any) -> None:
        if number == signal.SIGINT:
            interrupted.set()
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
