"""What `calibrate` promises, checked."""
