"""What a trained model is worth: its loss on a whole split, comparisons, standard tasks."""
