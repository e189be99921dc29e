"""The URL of a Redis server: what is read from it, and what is refused in words that do not show it."""

from __future__ import annotations

import pytest

from flask_pg_sse.engine.broker import to_broker
from flask_pg_sse.errors import ConfigurationError

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("redis://", "localhost:6379"),
        ("redis://db.example.com", "db.example.com:6379"),
        (f"redis://:{SECRET}@[::1]:7000/3", "::1:7000"),
        (f"rediss://user:{SECRET}@host:1?ssl_cert_reqs=none", "host:1"),
        (f" valkey://user:{SECRET}@host/0 ", "host:6379"),
        ("valkeys://host", "host:6379"),
        (f"unix://user:{SECRET}@/run/redis.sock?db=2", "/run/redis.sock"),
        ("redis://host?protocol=3&socket_timeout=2&max_connections=10&health_check_interval=3", "host:6379"),
    ],
)
def test_what_is_read(url: str, where: str) -> None:
    broker = to_broker(url, "REDIS_URL")
    assert str(broker) == where
    assert SECRET not in repr(broker) and SECRET not in str(broker)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("localhost:6379", "must begin with redis://"),
        (f"http://:{SECRET}@host", "must begin with redis://"),
        (f"redis://:{SECRET}/x@host", "in a password, write"),
        (f"redis://:{SECRET}@host:port", "in a password, write"),
        (f"redis://:{SECRET}@host/name", "not the number of a database"),
        (f"redis://:{SECRET}@host?protocol=4", "protocol"),
        (f"redis://:{SECRET}@host?what=1", "options that redis-py does not take, or not so: what"),
        (f"unix://host:{SECRET}", "in a password, write"),
        ("unix://run/redis.sock", "with three slashes"),
        (f"redis+sentinel://:{SECRET}@a:26379/mymaster", "names a Sentinel"),
        (f"redis://:{SECRET}@a?sentinel=mymaster", "names a Sentinel"),
        (f"redis-cluster://:{SECRET}@a:7000", "names a Cluster"),
        (f"redis://:{SECRET}@a:7000,b:7000/0", "names several servers"),
        (f"redis://:{SECRET}@a,b/0", "names several servers"),
        (f"redis://:{SECRET}@a?master_name=m", "names several servers"),
    ],
)
def test_what_is_refused(url: str, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words) as caught:
        to_broker(url, "REDIS_URL")
    assert str(caught.value).startswith("REDIS_URL ") and SECRET not in str(caught.value)
