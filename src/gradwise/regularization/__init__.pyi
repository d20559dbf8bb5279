from .gam import (
    GAM as GAM,
    first_order_flatness as first_order_flatness,
    zeroth_order_flatness as zeroth_order_flatness,
)
from .gradient_regularization import (
    GradientRegularization as GradientRegularization,
    flooding as flooding,
    gradient_norm as gradient_norm,
    gradient_penalty as gradient_penalty,
)

__all__ = [
    "GAM",
    "GradientRegularization",
    "first_order_flatness",
    "flooding",
    "gradient_norm",
    "gradient_penalty",
    "zeroth_order_flatness",
]
