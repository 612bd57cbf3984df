"""Trackers: TensorBoard, Weights & Biases, MLflow, trackio, files; fed from the record of a run by processes of their own."""
