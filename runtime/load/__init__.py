"""The real-time contract: what work costs, how many streams fit, and how a stream degrades."""
