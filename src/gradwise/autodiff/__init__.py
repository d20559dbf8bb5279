"""Derivatives: products, contexts, hooks, per-sample gradients and path samples. Stateless."""
