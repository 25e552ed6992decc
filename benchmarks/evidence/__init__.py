"""The published claims about the methods, tested on real text: trainings, measurements and tables."""
