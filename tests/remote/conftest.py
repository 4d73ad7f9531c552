"""Object stores for the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import s3fs
from support.stores import FaultyStore, environment_of, faulty_store, make_bucket, moto_store


@pytest.fixture(scope="session")
def store_url() -> Iterator[str]:
    with moto_store() as url:
        yield url


@pytest.fixture
def bucket(store_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the s3:// address of an empty bucket, reachable from this process and its children."""
    for name, value in environment_of(store_url).items():
        monkeypatch.setenv(name, value)
    # fsspec caches file systems, also those of an earlier environment.
    s3fs.S3FileSystem.clear_instance_cache()
    return make_bucket(store_url)


@pytest.fixture
def faulty(store_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """Route requests to the store through a proxy that injects faults."""
    with faulty_store(store_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
