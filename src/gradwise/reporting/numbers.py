"""Numbers as people read them: few digits, a true minus sign, no false precision."""

import math
from typing import Any

MINUS = "\u2212"
THIN = "\u202f"


def number(value: Any, digits: int = 3) -> str:
    """``value`` to ``digits`` significant digits; very large and small ones in powers of ten, missing ones as a dash.

    >>> number(0.91234), number(-12.5), number(123456.0), number(1.2e-7), number(None)
    ('0.912', '−12.5', '123\u202f456', '1.2 × 10⁻⁷', '–')
    """
    if value is None or isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return f"{MINUS if value < 0 else ''}∞"
    size = abs(value)
    if size and (size < 10 ** -(digits + 1) or size >= 1e7):
        mantissa, _, exponent = f"{size:.{digits - 1}e}".partition("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        text = f"{mantissa} × 10{_superscript(int(exponent))}"
    elif size >= 10**digits or float(value).is_integer():
        text = f"{size:,.0f}".replace(",", THIN) if size >= 1e4 else f"{size:.0f}"
    else:
        decimals = digits - 1 - math.floor(math.log10(float(f"{size:.{digits - 1}e}")))
        text = f"{size:.{max(decimals, 0)}f}"
    return MINUS + text if value < 0 and float(f"{size:.12g}") else text


def short(value: float, digits: int = 3) -> str:
    """As :func:`number` without trailing zeros, for labels inside pictures.

    >>> short(0.2), short(100.0), short(1e-5)
    ('0.2', '100', '10⁻⁵')
    """
    text = number(value, digits)
    mantissa, times, power = text.partition(" × ")
    if "." in mantissa:
        mantissa = mantissa.rstrip("0").rstrip(".")
    return power if times and mantissa == "1" else mantissa + times + power


def signed(value: Any, digits: int = 3) -> str:
    """As :func:`number`, with a plus sign in front of positive values."""
    text = number(value, digits)
    return f"+{text}" if isinstance(value, int | float) and value > 0 else text


def estimate(value: Any, low: Any, high: Any, *, sign: bool = False) -> tuple[str, str]:
    """A value and its interval to the same number of decimals: as many as the interval's width gives meaning to.

    >>> estimate(0.0078991, 0.0016312, 0.0141677, sign=True)
    ('+0.0079', '0.0016 to 0.0142')
    """
    write = signed if sign else number
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in (value, low, high)) or high <= low:
        return write(value), interval(low, high)
    decimals = 1 - math.floor(math.log10((high - low) / 2))
    if not 0 <= decimals <= 6:
        return write(value), interval(low, high)

    def fixed(v: float) -> str:
        text = f"{abs(v):.{decimals}f}"
        return MINUS + text if v < 0 and float(text) else text

    plus = "+" if sign and value > 0 else ""
    return plus + fixed(value), f"{fixed(low)} to {fixed(high)}"


def percent(share: float) -> str:
    """A share in per cent, kept on one line.

    >>> percent(0.95)
    '95\u202f%'
    """
    return f"{number(100 * share)}{THIN}%"


def interval(low: Any, high: Any, digits: int = 3) -> str:
    """``low to high``; a dash when either end is missing."""
    return "–" if low is None or high is None else f"{number(low, digits)} to {number(high, digits)}"


def seconds(value: Any) -> str:
    """A duration in the unit a person would choose.

    >>> seconds(0.004), seconds(7.25), seconds(95), seconds(7384)
    ('4 ms', '7.2 s', '1 min 35 s', '2 h 3 min')
    """
    if value is None or not isinstance(value, int | float) or not math.isfinite(value):
        return number(value)
    if value < 1:
        return f"{value * 1000:.0f} ms" if value >= 0.001 else "under 1 ms"
    if value < 60:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def memory(value: Any) -> str:
    """Bytes in binary units.

    >>> memory(1536), memory(3 * 2**20)
    ('1.5 KiB', '3.0 MiB')
    """
    if value is None or not isinstance(value, int | float) or not math.isfinite(value):
        return number(value)
    size = float(value)
    for unit in ("bytes", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _superscript(value: int) -> str:
    return str(value).translate(str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻"))
