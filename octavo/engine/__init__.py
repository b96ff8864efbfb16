"""From requests to text: sampling parameters, scheduling, sampling, and the public faces."""
