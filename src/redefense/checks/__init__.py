"""Self-checks of an evaluation: of the model, its gradients and draws, attacks and results."""
