"""Before the first step: is the gradient right with what is installed, and does the largest micro-batch fit?"""
