"""Loans: typed functions, called with JSON and answering in JSON (mode any).

Arguments are validated and converted by their annotations: an amount is a Decimal, never a rounded
float, and a date is a date. Results are written as JSON: a dataclass, or a generator's items.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from decimal import ROUND_HALF_UP, Decimal
from typing import Annotated

from pydantic import Field

from overlay import BadRequest

Months = Annotated[int, Field(ge=1, le=600)]
CENT = Decimal("0.01")


@dataclass
class Loan:
    """percent: interest per year."""

    amount: Decimal
    percent: Decimal
    months: Months = 12


@dataclass
class Payment:
    due: date
    paid: Decimal
    interest: Decimal
    left: Decimal


@dataclass
class Offer:
    monthly: Decimal
    interest: Decimal
    last: date
    made_by: str


def offer(loan: Loan, first: date, context) -> Offer:
    """The cost of a loan: its monthly payment, total interest and last due date.

    first: when the first payment is due; the others follow on the same day of each month.
    """
    made = list(payments(loan, first))
    interest = sum((payment.interest for payment in made), Decimal())
    return Offer(_monthly_payment(loan), interest, made[-1].due, context.process_id)


def payments(loan: Loan, first: date) -> Iterator[Payment]:
    """Each payment of a loan, until it is repaid."""
    if loan.amount <= 0 or loan.percent < 0:
        raise BadRequest(f"a loan of {loan.amount} at {loan.percent} % is not possible")
    monthly, left = _monthly_payment(loan), loan.amount
    for month in range(loan.months):
        interest = _rounded(left * loan.percent / 1200)
        is_last = month == loan.months - 1
        paid = left + interest if is_last else min(monthly, left + interest)
        left -= paid - interest
        yield Payment(_months_after(first, month), paid, interest, left)


def _monthly_payment(loan: Loan) -> Decimal:
    rate = loan.percent / 1200
    if not rate:
        return _rounded(loan.amount / loan.months)
    return _rounded(loan.amount * rate / (1 - (1 + rate) ** -loan.months))


def _rounded(amount: Decimal) -> Decimal:
    return amount.quantize(CENT, ROUND_HALF_UP)


def _months_after(first: date, months: int) -> date:
    """The same day of that month, or its last day if it is shorter."""
    year, month = divmod(first.month - 1 + months, 12)
    for day in range(first.day, 0, -1):
        try:
            return date(first.year + year, month + 1, day)
        except ValueError:
            continue
    raise AssertionError("every month has a first day")
