"""The student's output head: switched to sampled classes, its gradients and its optimizer."""
