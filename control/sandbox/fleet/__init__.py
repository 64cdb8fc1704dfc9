"""The customers' side of the sandbox: clusters whose nodes are instances of the sandbox's AWS, with pods and load."""
