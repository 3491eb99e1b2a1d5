"""What other tools read and write: weights with timm's names, and detections for QuPath."""
