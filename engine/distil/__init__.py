"""Learning from a teacher: one file a way. `logits` soft answers, `layers` what happens inside, `synthetic` what it
says, `run` four students side by side, `restricted` a student of SmolLM2 with part of its vocabulary."""
