"""Small trained models that ship with the package, each with its card and training script."""
