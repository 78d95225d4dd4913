"""Whether an overlay is open or closed, from what its processes say of themselves."""

from __future__ import annotations

import pytest

from overlay.monitor.protection import protection
from overlay.transport.codec import pb2

YEAR_2027 = 1_800_000_000.0


def answer(process_id: str, mode: str, **fields: object) -> pb2.MetricsResponse:
    return pb2.MetricsResponse(process_id=process_id, security=pb2.Security(mode=mode, **fields))


@pytest.mark.parametrize(
    ("modes", "mode", "text"),
    [
        (["open", "open"], "open", "OPEN: anyone who can reach it can run its handlers; do closes"),
        (["tls", "open"], "open", "OPEN (B): anyone who can reach it can run its handlers; do clo"),
        (["local", "local"], "local", ""),
        (["", ""], "", ""),  # an older release
        ([], "", ""),
    ],
)
def test_one_open_process_makes_the_overlay_open(modes, mode, text):
    found = protection([answer(i, m) for i, m in zip("AB", modes, strict=False)], "do")

    assert found.mode == mode
    assert found.text.startswith(text)
    assert bool(found.text) == bool(text)
    assert found.lines == ([found.text] if text else [])


def test_a_closed_overlay_names_the_day_on_which_the_first_certificate_expires():
    found = protection(
        [answer("A", "tls", expires_s=YEAR_2027 + 9e6), answer("B", "tls", expires_s=YEAR_2027)]
    )

    assert (found.mode, found.text) == ("tls", "closed: mutual TLS, certificates until 2027-01-15")


def test_each_problem_is_a_warning_with_the_ids_that_have_it():
    found = protection(
        [
            answer("A", "tls", expires_s=YEAR_2027, problem="ca.pem cannot be read"),
            answer("B", "tls", expires_s=YEAR_2027),
            answer("C", "tls", expires_s=YEAR_2027, problem="ca.pem cannot be read"),
        ],
        own_problem="yours expires in 9 days",
    )

    assert found.lines[1:] == [
        "warning: yours expires in 9 days",
        "warning: A, C: ca.pem cannot be read",
    ]


@pytest.mark.parametrize("expires_s", [1e300, -1e300, float("inf"), float("nan")])
def test_a_date_that_is_none_is_no_traceback(expires_s):
    found = protection([answer("A", "tls", expires_s=expires_s)])

    assert found.text == "closed: mutual TLS, certificates until an unknown day"
