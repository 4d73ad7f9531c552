"""Stores for the tests of this folder."""

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
    """The address s3://... of an empty bucket, which this process and those it starts can reach."""
    for name, value in environment_of(store_url).items():
        monkeypatch.setenv(name, value)
    # fsspec keeps what it opened for an environment that was.
    s3fs.S3FileSystem.clear_instance_cache()
    return make_bucket(store_url)


@pytest.fixture
def spoiled(store_url: str, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyStore]:
    """The way to the store leads through a proxy that spoils requests."""
    with faulty_store(store_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
