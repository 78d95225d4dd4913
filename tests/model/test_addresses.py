"""What a numeric address means, however it is written."""

from __future__ import annotations

import pytest

from overlay.model import addresses


@pytest.mark.parametrize(
    ("text", "is_loopback", "is_wildcard"),
    [
        ("127.0.0.1", True, False),
        ("127.8.0.1", True, False),
        ("::1", True, False),
        ("[::1]", True, False),
        ("::ffff:127.0.0.1", True, False),
        ("localhost", True, False),
        ("0.0.0.0", False, True),
        ("::", False, True),
        ("[::]", False, True),
        ("::ffff:0.0.0.0", False, True),
        ("192.168.1.1", False, False),
        ("fe80::1%eth0", False, False),
        ("[fe80::1%2]", False, False),
        ("pc.local", False, False),
        ("localhost.example.com", False, False),
        ("", False, False),
    ],
)
def test_loopback_and_wildcard(text: str, is_loopback: bool, is_wildcard: bool) -> None:
    assert addresses.is_loopback(text) is is_loopback
    assert addresses.is_wildcard(text) is is_wildcard


@pytest.mark.parametrize(
    ("text", "plain"),
    [("::ffff:10.0.0.7", "10.0.0.7"), ("[2001:DB8::0:1]", "2001:db8::1"), ("fe80::1%2", "fe80::1")],
)
def test_the_canonical_form(text: str, plain: str) -> None:
    assert addresses.plain(text) == plain


def test_a_name_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match=r"'pc\.local' is not a numeric address"):
        addresses.plain("pc.local")
