"""The search page, and the policy that allows nothing but its own style and script."""

from __future__ import annotations

import re
from base64 import b64encode
from hashlib import sha256


def page_policy(page: bytes) -> str:
    """Return the Content-Security-Policy of a page with inline style and script."""

    def hashes(tag: bytes) -> str:
        found = re.findall(rb"<" + tag + rb">(.*?)</" + tag + rb">", page, re.DOTALL)
        return " ".join(f"'sha256-{b64encode(sha256(content).digest()).decode()}'" for content in found) or "'none'"

    return (
        f"default-src 'none'; script-src {hashes(b'script')}; style-src {hashes(b'style')}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
