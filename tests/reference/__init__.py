"""What framesink is tested against: a tiny checkpoint and a dense streaming implementation."""
