"""Natural video: real clips, the teacher trained on them and the script that trained it."""
