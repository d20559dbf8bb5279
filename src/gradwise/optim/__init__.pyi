from .innaprop import INNAprop as INNAprop

__all__ = [
    "INNAprop",
]
