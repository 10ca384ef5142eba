from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from lmc.cache.sections import RedisConfig
from lmc.cache.tiers.redis import RedisTier
from lmc.cache.tiers.redis_address import parse_address
from lmc.cache.tiers.redis_connect import open_client
from lmc.errors import ConfigError, TierError
from tests import services
from tests.contracts.tier import NUM_KEYS, SCOPE, OpenTier, TierContract, key, load, payload
from tests.services import RedisServer

pytestmark = pytest.mark.service


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with services.redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def server(shared_server: RedisServer) -> RedisServer:
    with shared_server.client() as client:
        client.flushall()
    return shared_server


def redis_config(**settings: object) -> RedisConfig:
    """Settings with a time-out that a busy machine does not run into."""
    return RedisConfig.model_validate({"timeout": 20.0} | settings)


class TestStandalone(TierContract):
    @pytest.fixture
    def open_tier(self, server: RedisServer) -> OpenTier:
        return lambda scope: RedisTier(redis_config(url=server.url), scope)


class TestUnixSocket(TierContract):
    @pytest.fixture(scope="class")
    def socket_path(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
        folder = tmp_path_factory.mktemp("redis")
        with services.redis_server(folder, "--unixsocket", str(folder / "r.sock")):
            yield folder / "r.sock"

    @pytest.fixture
    def open_tier(self, socket_path: Path) -> OpenTier:
        config = redis_config(url=f"unix://{socket_path}")
        _empty(RedisTier(config, SCOPE))
        return lambda scope: RedisTier(config, scope)


class TestCluster(TierContract):
    model_examples = 5

    @pytest.fixture(scope="class")
    def nodes(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
        with services.redis_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
            yield nodes

    @pytest.fixture
    def open_tier(self, nodes: list[RedisServer]) -> OpenTier:
        for node in nodes:
            with node.client() as client:
                client.flushall()
        return lambda scope: RedisTier(redis_config(url=nodes[0].url, mode="cluster"), scope)

    def test_chunks_are_spread_over_the_masters(self, open_tier: OpenTier, nodes: list[RedisServer]) -> None:
        tier = open_tier(SCOPE)
        for number in range(60):
            tier.put(key(number), payload(number))
        for node in nodes:
            with node.client() as client:
                assert client.dbsize() > 5

    def test_a_moved_slot_is_followed(self, open_tier: OpenTier, nodes: list[RedisServer]) -> None:
        """The client's map of the cluster is out of date: it asks the old master, which redirects."""
        tier = open_tier(SCOPE)
        assert isinstance(tier, RedisTier)
        tier.put(key(1), payload(1))
        with nodes[0].client() as first:
            slot = first.execute_command("CLUSTER", "KEYSLOT", tier._name(key(1)))
            old = next(node for node in nodes if slot in _slots_of(node))
            new = next(node for node in nodes if node is not old)
        with old.client() as source, new.client() as target:
            target_id, source_id = (_node_id(one) for one in (target, source))
            target.execute_command("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
            source.execute_command("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
            source.execute_command("MIGRATE", services.LOCAL, new.port, tier._name(key(1)), 0, 5000)
            assert load(tier, 1) == payload(1), "while the slot moves (ASK)"
            tier.put(key(1), payload(2))
            assert load(tier, 1) == payload(2)
            for client in (source, target):
                client.execute_command("CLUSTER", "SETSLOT", slot, "NODE", target_id)
        assert load(tier, 1) == payload(2), "after the slot has moved (MOVED)"
        tier.put(key(1), payload(3))
        assert load(tier, 1) == payload(3)
        assert tier.contains([key(1)]) == [True]


def _slots_of(node: RedisServer) -> set[int]:
    with node.client() as client:
        found = client.execute_command("CLUSTER", "SLOTS")
    return {slot for first, last, master, *_ in found if master[1] == node.port for slot in range(first, last + 1)}


def _node_id(client: object) -> str:
    return client.execute_command("CLUSTER", "MYID").decode()  # type: ignore[attr-defined]


def _empty(tier: RedisTier) -> None:
    """Delete what an earlier test of the class has left."""
    for number in range(NUM_KEYS):
        tier.delete(key(number))


class TestSentinel(TierContract):
    model_examples = 5

    @pytest.fixture(scope="class")
    def watched(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[services.SentinelSet]:
        with services.redis_sentinel(tmp_path_factory.mktemp("sentinel")) as watched:
            yield watched

    @pytest.fixture
    def open_tier(self, watched: services.SentinelSet) -> OpenTier:
        config = redis_config(url=watched.url, mode="sentinel", sentinel_service=watched.service)
        _empty(RedisTier(config, SCOPE))
        return lambda scope: RedisTier(config, scope)


def test_chunks_are_found_after_a_failover(tmp_path: Path) -> None:
    with services.redis_sentinel(tmp_path) as watched:
        config = redis_config(url=watched.url, mode="sentinel", sentinel_service=watched.service)
        tier = RedisTier(config, SCOPE)
        for number in range(4):
            tier.put(key(number), payload(number))
        with watched.replica.client() as replica:
            services.wait_until(lambda: replica.dbsize() == 4, "replication of the chunks")
        watched.fail_over()
        services.wait_until(lambda: _loads(tier, 1), "a load from the new master")
        assert [load(tier, number) for number in range(4)] == [payload(number) for number in range(4)]
        tier.put(key(5), payload(5))
        assert load(tier, 5) == payload(5)


def _loads(tier: RedisTier, number: int) -> bool:
    try:
        return load(tier, number) == payload(number)
    except TierError:
        return False


class TestTls(TierContract):
    model_examples = 5

    @pytest.fixture(scope="class")
    def certificate(self, tmp_path_factory: pytest.TempPathFactory) -> services.Certificate:
        return services.make_certificate(tmp_path_factory.mktemp("certificate"))

    @pytest.fixture(scope="class")
    def port(self, tmp_path_factory: pytest.TempPathFactory, certificate: services.Certificate) -> Iterator[int]:
        with services.tls_redis(tmp_path_factory.mktemp("redis"), certificate) as port:
            yield port

    @pytest.fixture
    def open_tier(self, port: int, certificate: services.Certificate) -> OpenTier:
        config = redis_config(url=f"rediss://{services.LOCAL}:{port}", ca_file=certificate.certificate)
        _empty(RedisTier(config, SCOPE))
        return lambda scope: RedisTier(config, scope)

    def test_an_unknown_authority_is_refused(self, port: int) -> None:
        tier = RedisTier(redis_config(url=f"rediss://{services.LOCAL}:{port}"), SCOPE)
        with pytest.raises(TierError, match="certificate verify failed"):
            tier.put(key(1), payload(1))

    def test_a_proxy_that_ends_tls_serves_too(self, server: RedisServer, certificate: services.Certificate) -> None:
        with services.proxy(server.port, certificate) as front:
            config = redis_config(url=f"rediss://{services.LOCAL}:{front.port}", ca_file=certificate.certificate)
            tier = RedisTier(config, SCOPE)
            tier.put(key(1), payload(1))
            assert load(tier, 1) == payload(1)
            tier.close()


class TestAclUser(TierContract):
    """The whole contract with no more rights than docs/operations.md names."""

    model_examples = 5
    rights = ("+get", "+set", "+exists", "+unlink", "+select", "+client", "+ping")

    @pytest.fixture(scope="class")
    def port(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
        with services.redis_server(tmp_path_factory.mktemp("redis")) as server, server.client() as admin:
            admin.execute_command("ACL", "SETUSER", "chunks", "on", ">secret", "~lmc:*", "-@all", *self.rights)
            admin.execute_command("ACL", "SETUSER", "default", "off")
            yield server.port

    @pytest.fixture
    def open_tier(self, port: int) -> OpenTier:
        config = redis_config(url=f"redis://{services.LOCAL}:{port}", username="chunks", password="secret")
        _empty(RedisTier(config, SCOPE))
        return lambda scope: RedisTier(config, scope)

    @pytest.mark.parametrize(
        ("access", "said"),
        [
            ({"username": "chunks", "password": "wrong"}, r"AUTH|WRONGPASS|invalid username-password"),
            ({}, r"(?i)authentication required"),
        ],
    )
    def test_others_are_refused(self, port: int, access: dict[str, str], said: str) -> None:
        tier = RedisTier(redis_config(url=f"redis://{services.LOCAL}:{port}", **access), SCOPE)
        with pytest.raises(TierError, match=said):
            tier.contains([key(1)])
        with pytest.raises(TierError, match=said):
            load(tier, 1)


class TestAccess:
    def test_password_in_the_address(self, tmp_path: Path) -> None:
        with services.redis_server(tmp_path, "--requirepass", "s3cr@t") as server:
            tier = RedisTier(redis_config(url=f"redis://:s3cr%40t@{services.LOCAL}:{server.port}/3"), SCOPE)
            tier.put(key(1), payload(1))
            assert load(tier, 1) == payload(1)


class TestFork:
    def test_a_forked_child_uses_connections_of_its_own(self, server: RedisServer) -> None:
        tier = RedisTier(redis_config(url=server.url), SCOPE)
        for number in (1, 2):
            tier.put(key(number), payload(number))
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            right = False
            try:
                assert load(tier, 1) == payload(1)  # while the parent's connection lies idle
                assert all(line._connection.pid == os.getpid() for idle in tier._idle.values() for line in idle)
                os.write(writer, b"x")
                right = all(load(tier, 1) == payload(1) for _ in range(200))
            finally:
                os._exit(0 if right else 1)
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        assert all(load(tier, 2) == payload(2) for _ in range(200))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class TestTimeToLive:
    def test_a_chunk_expires(self, server: RedisServer) -> None:
        tier = RedisTier(redis_config(url=server.url, ttl=60), SCOPE)
        tier.put(key(1), payload(1))
        assert load(tier, 1) == payload(1)
        with server.client() as client:
            assert 0 < client.pttl(tier._name(key(1))) <= 60_000
        tier = RedisTier(redis_config(url=server.url, ttl=0.2), SCOPE)
        tier.put(key(1), payload(1))
        services.wait_until(lambda: load(tier, 1) is None, "the end of the chunk's time")


class TestAddress:
    @pytest.mark.parametrize(
        ("url", "mode"),
        [
            ("localhost:6379", "standalone"),
            ("http://localhost", "standalone"),
            ("redis://", "standalone"),
            ("redis://host:port", "standalone"),
            ("redis://host/name", "standalone"),
            ("redis://host?socket_timeout=9", "standalone"),
            ("redis://one,two", "standalone"),
            ("unix:///run/redis.sock", "cluster"),
        ],
    )
    def test_a_wrong_address_is_refused_at_once(self, url: str, mode: str) -> None:
        with pytest.raises(ConfigError, match=r"redis\.url"):
            RedisTier(RedisConfig.model_validate({"url": url, "mode": mode}), SCOPE)

    def test_an_error_does_not_show_the_password(self) -> None:
        with pytest.raises(ConfigError) as caught:
            RedisTier(redis_config(url="redis://user:hidden@host/name"), SCOPE)
        assert "hidden" not in str(caught.value)
        tier = RedisTier(redis_config(url=f"redis://user:hidden@{services.LOCAL}:{services.free_port()}"), SCOPE)
        with pytest.raises(TierError) as failed:
            load(tier, 1)
        assert "hidden" not in str(failed.value)

    @pytest.mark.parametrize(
        "url",
        [
            "redis://user:hush",  # the host was forgotten
            "redis://:hush/0",
            "redis:user:hush@host",
            "//user:hush@host",
            "redis://user:hush@host:99999",
            "redis://user:hush@host#x",
            "redis://user:hush@one,two",
            "redis://user:hush@host?password=hush",
            "redis://user:hush@host/hush",
            "redis://u@hush:hush",
            "unix://user:hush@path",
            "unix://user:hush@/",
            "http://user:hush@host",
            "hush",
        ],
    )
    def test_nothing_of_a_wrong_address_is_shown(self, url: str) -> None:
        for mode in ("standalone", "cluster", "sentinel"):
            if mode == "standalone" or "one,two" not in url:
                with pytest.raises(ConfigError, match=r"redis\.url") as caught:
                    parse_address(url, mode)
                assert "hush" not in str(caught.value)

    @given(
        st.text(st.characters(exclude_characters="%", exclude_categories=("Cs",)), min_size=1),
        st.sampled_from(["redis://u:{}@h:1/2", "rediss://u:{}@[::1]/2", "unix://u:{}@/run/x?db=2"]),
    )
    @example("a/b?c#d@e:f", "redis://u:{}@h:1/2")
    def test_a_password_may_hold_anything(self, password: str, form: str) -> None:
        for written in (password, quote(password, safe="")):
            address = parse_address(form.format(written), "standalone")
            assert (address.username, address.password, address.db) == ("u", password, 2)
            assert password not in repr(address) or len(password) < 12

    def test_a_socket_has_databases_too(self) -> None:
        assert parse_address("unix:///run/redis.sock?db=3", "standalone").db == 3
        assert parse_address("unix:///run/redis.sock", "standalone").socket_path == "/run/redis.sock"
        assert parse_address("unix://:p@/run/redis.sock?db=3", "standalone").password == "p"
        assert parse_address("redis://h?db=4", "standalone").db == 4

    def test_a_certificate_must_be_made_for_the_hosts_name(self, tmp_path: Path) -> None:
        made = services.make_certificate(tmp_path)  # for 127.0.0.1
        with services.tls_redis(tmp_path, made) as port:
            right, wrong = (
                RedisTier(redis_config(url=f"rediss://{host}:{port}", ca_file=made.certificate), SCOPE)
                for host in (services.LOCAL, "localhost")
            )
            right.put(key(1), payload(1))
            with pytest.raises(TierError, match=r"(?i)hostname mismatch"):
                wrong.put(key(1), payload(1))
            right.close()

    def test_what_is_checked_does_not_depend_on_redis_pys_version(self) -> None:
        for mode in ("standalone", "sentinel"):
            config = redis_config(url="rediss://one", mode=mode)
            client = open_client(config, parse_address("rediss://one", mode))
            options = client.connection_pool.connection_kwargs
            assert (options["ssl_check_hostname"], options["ssl_cert_reqs"]) == (True, "required")

    def test_sentinels_that_want_a_password_of_their_own(self, tmp_path: Path) -> None:
        for name in ("server", "sentinel"):
            (tmp_path / name).mkdir()
        with ExitStack() as stack:
            server = stack.enter_context(services.redis_server(tmp_path / "server"))
            settings = tmp_path / "sentinel" / "sentinel.conf"
            settings.write_text(f"requirepass theirs\nsentinel monitor chunks {services.LOCAL} {server.port} 1\n")
            sentinel = stack.enter_context(services.redis_server(tmp_path / "sentinel", sentinel=settings))
            values = {"url": sentinel.url, "mode": "sentinel", "sentinel_service": "chunks"}
            without = RedisTier(redis_config(**values), SCOPE)
            with pytest.raises(TierError):
                without.put(key(1), payload(1))
            tier = RedisTier(redis_config(**values, sentinel_password="theirs"), SCOPE)
            tier.put(key(1), payload(1))
            assert load(tier, 1) == payload(1)
            tier.close()

    @pytest.mark.parametrize(
        ("url", "mode", "hosts"),
        [
            ("redis://one", "standalone", (("one", 6379),)),
            ("redis://[::1]:7000/2", "standalone", (("::1", 7000),)),
            ("rediss://u:p%40@one:1,two:2", "cluster", (("one", 1), ("two", 2))),
            ("redis://one,two:3", "sentinel", (("one", 26379), ("two", 3))),
        ],
    )
    def test_hosts_and_ports(self, url: str, mode: str, hosts: tuple[tuple[str, int], ...]) -> None:
        assert parse_address(url, mode).hosts == hosts

    def test_an_unreachable_server_costs_an_error_per_call(self) -> None:
        tier = RedisTier(redis_config(url=f"redis://{services.LOCAL}:{services.free_port()}"), SCOPE)
        for _ in range(2):
            with pytest.raises(TierError, match=f"{services.LOCAL}.*refused"):
                tier.put(key(1), payload(1))

    def test_an_unreachable_cluster_costs_an_error_per_call(self) -> None:
        config = redis_config(url=f"redis://{services.LOCAL}:{services.free_port()}", mode="cluster")
        tier = RedisTier(config, SCOPE)
        for _ in range(2):
            with pytest.raises(TierError, match=services.LOCAL):
                load(tier, 1)
