"""The course: exercises, lessons, the process that a submission runs in, and the mistakes that prove the lessons."""
