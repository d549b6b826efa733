"""Curves of a training run in TensorBoard, Weights & Biases and MLflow; what is there already is not logged again."""
