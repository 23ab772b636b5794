"""What a reward makes of gold answers, wrong answers and adversarial ones."""
