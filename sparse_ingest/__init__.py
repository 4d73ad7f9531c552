"""Encode text with learned-sparse models, bulk-load the vectors into OpenSearch, verify and search them.

The public names are listed in __init__.pyi. Each is imported when it is first used, so `import sparse_ingest` imports
neither torch nor opensearchpy. Nothing prints: pass `progress=True` for a tqdm bar, and set up `logging` for warnings.
"""

from __future__ import annotations

import logging
import warnings

import lazy_loader

_attribute, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
# Old name to new: kept for one release.
_RENAMED = {"weigh": "query_weights", "weigh_many": "many_query_weights"}

logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        warnings.warn(f"sparse_ingest.{name} is now {_RENAMED[name]}.", DeprecationWarning, stacklevel=2)
    return _attribute(_RENAMED.get(name, name))
