"""One palette for pictures and pages: restrained, told apart by colour-blind readers, in light and dark.

Pictures are drawn with stand-in colours that no figure would use otherwise, which then become CSS variables. So one
SVG follows the page's light or dark scheme, and still has sensible colours where it stands alone.
"""

# role: (stand-in, on light, on dark). Contrast against the page's background is at least 4.5 : 1 for text roles and
# 3 : 1 for series; neighbouring series differ in lightness as well as in hue.
ROLES: dict[str, tuple[str, str, str]] = {
    "ink": ("#010101", "#1c2127", "#e6e9ec"),
    "muted": ("#020202", "#566069", "#a3adb7"),
    "grid": ("#030303", "#dfe3e7", "#333b43"),
    "paper": ("#040404", "#ffffff", "#1a1f24"),
    "mark": ("#050505", "#8a3b12", "#f2a66f"),
    "s1": ("#110101", "#1d5f9e", "#74b3ec"),
    "s2": ("#110202", "#c05a00", "#f19a4b"),
    "s3": ("#110303", "#0f7a67", "#57c9b4"),
    "s4": ("#110404", "#84569c", "#c8a2de"),
    "s5": ("#110505", "#7d6b00", "#d7c455"),
    "s6": ("#110606", "#5a6570", "#aab4be"),
}
SERIES = ("s1", "s2", "s3", "s4", "s5", "s6")

# Severities and verdicts are never told by colour alone: each has its own mark and its word.
STATES: dict[str, tuple[str, str, str]] = {
    "good": ("✓", "#0b6b5a", "#57c9b4"),
    "watch": ("!", "#8a5a00", "#e8b64c"),
    "bad": ("✗", "#a83232", "#f08a80"),
    "open": ("?", "#566069", "#a3adb7"),
    "none": ("–", "#566069", "#a3adb7"),
}
STATE_OF: dict[str, str] = {
    "ok": "good",
    "watch": "watch",
    "act": "bad",
    "skipped": "none",
    "failed": "bad",
    "holds": "good",
    "partly": "watch",
    "fails": "bad",
    "not settled": "open",
    "not settled at this size": "open",
    "not credible": "bad",
    "reported": "none",
    "passed": "good",
    "effect shows": "bad",
    "met": "good",
    "not met": "bad",
    "working": "good",
    "method": "open",
    "planned": "none",
}


def stand_in(role: str) -> str:
    """The colour a picture is drawn with, to be replaced by the role's CSS variable."""
    return ROLES[role][0]


def series_role(index: int) -> str:
    """The role of the ``index``-th series of a picture."""
    return SERIES[index % len(SERIES)]


def css_variable(role: str) -> str:
    """``var(--gw-...)`` with the light colour as fallback; ink follows the text colour around the picture."""
    return "currentColor" if role == "ink" else f"var(--gw-{role}, {ROLES[role][1]})"


def css_declarations(scheme: int) -> str:
    """The variables of the light (1) or dark (2) scheme as CSS declarations."""
    roles = [f"--gw-{role}: {colours[scheme]};" for role, colours in ROLES.items()]
    states = [f"--gw-{state}: {colours[scheme]};" for state, colours in STATES.items()]
    return " ".join(roles + states)
