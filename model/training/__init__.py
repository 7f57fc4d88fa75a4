"""What happens in a run: the step, SAT's loop around it, memory, features of images, metrics."""
