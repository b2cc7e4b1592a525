"""What a run takes before it starts: parameters, memory, FLOPs, time."""
