"""How a method enters a training loop: closures, the evaluation engine, samplers, one fit loop."""
